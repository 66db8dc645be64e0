"""What each profile is: `scenarios/profiles/<name>.yaml`."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from sparkproof.errors import UserError
from sparkproof.results import Strict
from sparkproof.scenario import Profile


class ProfileSpec(Strict):
    """One level of the nesting smoke < quick < full < soak."""

    name: Profile
    summary: str = Field(description="What the profile is for, in one sentence.")
    time_box_minutes: float = Field(gt=0, description="How long it may take on the machine it is meant for.")


def profile_specs(root: Path) -> list[ProfileSpec]:
    """All profiles, innermost first. Errors: UserError when a file is missing or wrong."""
    return [load_profile(root, p) for p in Profile]


def load_profile(root: Path, profile: Profile) -> ProfileSpec:
    """One profile's file."""
    path = root / "profiles" / f"{profile.value}.yaml"
    if not path.exists():  # a folder of one's own scenarios needs none
        return ProfileSpec(name=profile, summary="(no profile file)", time_box_minutes=60)
    try:
        return ProfileSpec.model_validate({"name": profile, **(yaml.safe_load(path.read_text(encoding="utf-8")) or {})})
    except (ValidationError, yaml.YAMLError, TypeError) as e:
        raise UserError(f"{path} is wrong: {e}", "It needs `summary` and `time_box_minutes`.") from None
