"""A pinned model from the Hugging Face hub, with each way to fail told apart.

The hub's answers are not what they seem: without a token it says 401 for a repository that does not exist, just as
for a private one, and a commit hash skips the look-up, so that the first error may come from a file. What is raised
is therefore classified by the whole chain of causes. Messages never carry a token: they are written here, from the
model's name and the status alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from sparkproof.engines.pretrained import Pretrained, card_licence, chain, raise_disk_errors
from sparkproof.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]
UNWANTED = ["original/*", "onnx/*", "runs/*", "*.onnx_data"]


def from_hub(model: str, revision: str) -> Pretrained:
    """Download (or find in the hub's cache) `model` at the commit `revision`."""
    from huggingface_hub import snapshot_download

    if not revision:
        raise UserError(
            f"The hub model {model} has no pinned revision.", "Give the commit to use as `revision` (--revision)."
        )
    try:
        path = Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                endpoint=os.environ.get("HF_ENDPOINT") or None,
            )
        )
    except Exception as error:
        raise_disk_errors(error, f"downloading {model}")
        raise explain(error, model, revision) from error
    return Pretrained(path, model, path.name, card_licence(path), "hub")


def explain(error: BaseException, model: str, revision: str) -> UserError:
    """The sentence and the cure for whatever huggingface_hub raised."""
    from huggingface_hub import errors, get_token

    causes = chain(error)
    statuses = [
        code for c in causes if (code := getattr(getattr(c, "response", None), "status_code", None)) is not None
    ]
    has_token = get_token() is not None

    def saw(kind: type[BaseException]) -> bool:
        return any(isinstance(c, kind) for c in causes)

    if saw(errors.HFValidationError):
        return UserError(f"'{model}' is not a valid hub id.", "Write it as owner/name.")
    if saw(errors.GatedRepoError):
        cure = "Accept its terms on the model's page with the account of your token." if has_token else _TOKEN_FIX
        return UserError(f"The hub model {model} is gated and access was refused.", cure, skip_class="no-credentials")
    if saw(errors.RevisionNotFoundError):
        return UserError(f"The hub model {model} has no revision {revision}.", "Copy the commit from the model's page.")
    if saw(errors.RepositoryNotFoundError):
        cure = "Check the spelling; for a private model, check that the token's account may read it."
        if not has_token:
            cure = "Check the spelling; for a private model, set HF_TOKEN."
        return UserError(f"The model {model} does not exist on the hub, or is not visible to you.", cure)
    if 401 in statuses:
        return UserError(
            "The hub refused the token that is set (401).",
            "Make a new read token and set HF_TOKEN to it.",
            skip_class="no-credentials",
        )
    if 403 in statuses:
        return UserError(
            f"The token that is set may not read {model} (403).",
            "Give the token read access to the model.",
            skip_class="no-credentials",
        )
    if saw(errors.RemoteEntryNotFoundError) or 404 in statuses:
        return UserError(f"The model {model} does not exist on the hub at {revision}.", "Check the id and the commit.")
    if statuses:
        return UserError(f"The hub answered {model} with HTTP status {statuses[0]}.", "Try again later.")
    if saw(errors.OfflineModeIsEnabled) or (saw(errors.LocalEntryNotFoundError) and _offline()):
        return UserError(
            f"HF_HUB_OFFLINE is set and {model} is not in the cache.",
            f"HF_HUB_OFFLINE=0 hf download {model}",
            skip_class="no-network",
        )
    if saw(errors.LocalEntryNotFoundError) or any(_is_network(c) for c in causes):
        return UserError(
            f"No network: the hub can't be reached and {model} is not in the cache.",
            "Check the network or the proxy, or use the model embedded:smollm2-135m.",
            skip_class="no-network",
        )
    return UserError(f"The model {model} could not be downloaded ({type(error).__name__}).", "Try again with --debug.")


_TOKEN_FIX = "Accept its terms on the model's page, then set HF_TOKEN to a read token of that account."


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _is_network(error: BaseException) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in {
        "httpx",
        "httpcore",
    }
