"""What a way back consists of: steps that take something off or put it back, and what stays, with the reason."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparkproof.results import Strict
from sparkproof.rollback.model import Stamps

Group = Literal["ours", "reports", "packages", "caches"]
GROUPS: dict[Group, str] = {
    "ours": "what sparkproof made, by its labels and its list",
    "reports": "the reports of sparkproof's runs",
    "packages": "what came into your Python environments since the snapshot, and versions that changed",
    "caches": "what came into caches since the snapshot, where models of your own may lie",
}
ASKED: tuple[Group, ...] = ("reports", "packages", "caches")  # never without a word of their own


class Step(Strict):
    """One piece of work, small enough to be repeated after an interruption."""

    kind: Literal["restore", "distribution", "files", "cache", "own", "engine"]
    group: Group = Field(default="ours", description="Whose word it needs.")
    title: str
    place: str = Field(description="Folder, with links resolved, that all paths are relative to; or the engine.")
    paths: Stamps = Field(default_factory=dict, description="What to remove, in order, and what was seen there.")
    bytes: int = 0
    command: list[str] = Field(default_factory=list, description="restore: what puts the version back.")
    made: bool = Field(default=False, description="The folder itself is new: remove it too once it is empty.")
    above: str = Field(default="", description="made: empty folders between it and this one, which was there, go too.")
    sort: Literal["", "container", "network", "volume", "image"] = Field(default="", description="engine: of what.")
    key: str = Field(default="", description="engine: its identifier.")


class Left(Strict):
    """Something that stays, and why."""

    what: str
    why: str
    fix: str = ""
    bytes: int = 0
    failed: bool = Field(default=False, description="It should have gone and did not; else it stays by right.")


class Plan(Strict):
    """Everything that would be done, in order, what would be if it were asked for, and what would not."""

    steps: list[Step] = Field(default_factory=list)
    offered: list[Step] = Field(default_factory=list, description="Steps of groups that were not asked for.")
    left: list[Left] = Field(default_factory=list)
    kept: dict[str, str] = Field(default_factory=dict, description="Files that stay because a user changed them: why.")

    @property
    def bytes(self) -> int:
        """Bytes that the steps remove."""
        return sum(s.bytes for s in self.steps)
