"""Where a run takes place, on the host or in a container, and why: handed on in one variable from whoever decided."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from sparkproof.facts.host import Host
from sparkproof.results import Strict

VARIABLE = "SPARKPROOF_RUNS_IN"
IN_IMAGE = "SPARKPROOF_IN_IMAGE"  # set by the image's entry point


class RunsIn(Strict):
    """Where, and of a container which image."""

    where: Literal["host", "container"] | None = Field(default=None, description="None: read before this was recorded.")
    why: str = Field(default="", description="Who or what decided it.")
    engine: str = Field(default="", description="'docker 28.2.2'.")
    image: str = Field(default="", description="Its tag.")
    digest: str = Field(
        default="", description="The registry's digest of the image, or its own identifier if it was built here."
    )
    lock: str = Field(default="", description="SHA-256 of the lock that it was built from.")
    revision: str = Field(default="", description="Commit that it was built from.")

    def sentence(self) -> str:
        """'in a container of docker 28.2.2, image sparkproof:local sha256:... (it was asked for)'."""
        if self.where is None:
            return ""
        why = f" ({self.why})" if self.why else ""
        if self.where == "host":
            return f"on the host{why}"
        image = " ".join(s for s in (self.image, self.digest or "of unknown digest") if s)
        return f"in a container{f' of {self.engine}' if self.engine else ''}, image {image}{why}"


def read_place(host: Host) -> RunsIn:
    """What VARIABLE says; without it, the image's own mark. Errors: ValueError for a variable that is no such document."""
    if text := host.environ.get(VARIABLE):
        try:
            return RunsIn.model_validate_json(text)
        except ValidationError:
            raise ValueError(f"{VARIABLE} is no document of this version") from None
    if host.environ.get(IN_IMAGE):
        return RunsIn(where="container", why="started by hand in the image", image="sparkproof")
    return RunsIn(where="host")
