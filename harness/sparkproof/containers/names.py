"""What everything of ours in a container engine is called. The way back finds it by these labels, never by a name."""

from __future__ import annotations

PROJECT_LABEL = "io.sparkproof.project"
PROJECT = "sparkproof"
LOCK_LABEL = "io.sparkproof.lock"
REVISION_LABEL = "org.opencontainers.image.revision"
FILTER = f"{PROJECT_LABEL}={PROJECT}"

IMAGE = "sparkproof:local"
SERVE_IMAGE = "sparkproof:serve"


def labels(role: str) -> dict[str, str]:
    """Labels of a container, volume or network that we make; `role` says what for."""
    return {PROJECT_LABEL: PROJECT, "io.sparkproof.role": role}


def is_ours(found: dict[str, str] | None) -> bool:
    """Whether an object with these labels is ours."""
    return (found or {}).get(PROJECT_LABEL) == PROJECT
