"""The 16-bit base to merge into: a folder, or a model of the hub, from its cache or fetched at a revision."""

from __future__ import annotations

from pathlib import Path

from sparktune.export.files import ExportError

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "README.md", "LICENSE*", "NOTICE"]


def find_base(name: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The folder of the base `name`, complete. Errors: ExportError where it can't be had.

    A hub id is looked up in the cache first, so that an export needs no network where training had the model.
    """
    if Path(name).is_dir():
        if revision:
            raise ExportError(f"{name} is a folder, which has no revision.", "Leave the revision out.")
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(offline: bool) -> Path:
        return Path(
            snapshot_download(
                str(name), revision=revision, cache_dir=cache_dir, allow_patterns=FILES, local_files_only=offline
            )
        )

    try:
        found = fetch(offline=True)
        if any(found.glob("*.safetensors")):
            return found
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return fetch(offline=False)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at {revision}" if revision else ""
        raise ExportError(
            f"The 16-bit base {name}{at} is neither a folder nor to be had from the hub ({type(error).__name__}).",
            "Give the folder of the 16-bit model that was trained over.",
        ) from error
