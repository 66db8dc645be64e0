"""A comparison as data and as text: parts, each equal, different or unknown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from sparkproof.results import Strict

SHOWN = 12  # rows a part in the text; the JSON has all


class Item(Strict):
    """One thing that differs."""

    name: str
    detail: str = ""
    bytes: int = Field(default=0, description="Size of it now (of what went, before).")
    ours: bool = Field(default=False, description="It carries this project's label.")


class Part(Strict):
    """One comparable part of the machine."""

    area: str = Field(description="python, files, caches, containers, dpkg, profiles, variables, processes, gpu")
    place: str = Field(description="Environment, folder or engine.")
    unknown: str = Field(default="", description="Why nothing can be said; empty: it was read both times.")
    added: list[Item] = Field(default_factory=list)
    removed: list[Item] = Field(default_factory=list)
    changed: list[Item] = Field(default_factory=list)

    @property
    def state(self) -> Literal["equal", "differs", "unknown"]:
        """One word for it."""
        if self.unknown:
            return "unknown"
        return "differs" if self.added or self.removed or self.changed else "equal"


class Diff(Strict):
    """All parts, equal ones too."""

    schema_: Literal["sparkproof-diff/1"] = Field(default="sparkproof-diff/1", alias="schema")
    before: str = Field(description="When the first snapshot was taken.")
    after: str
    parts: list[Part] = Field(default_factory=list)

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @property
    def is_empty(self) -> bool:
        """Everything that was asked for was read both times and is equal; a diff without parts shows nothing and is
        not empty.
        """
        return bool(self.parts) and all(p.state == "equal" for p in self.parts)

    @property
    def added_bytes(self) -> int:
        """Bytes of all that came."""
        return sum(i.bytes for p in self.parts for i in p.added)

    def of(self, area: str) -> list[Part]:
        """The parts of one area."""
        return [p for p in self.parts if p.area == area]

    def text(self) -> str:
        """For a person: one paragraph a part that differs or is unknown, and a last line that sums up."""
        lines: list[str] = []
        for part in self.parts:
            lines += _part_lines(part)
        counts = Counter(p.state for p in self.parts)
        if self.is_empty:
            lines.append(f"Nothing differs: {counts['equal']} parts were read twice and are equal.")
        else:
            lines.append(
                f"{counts['differs']} parts differ ({size(self.added_bytes)} came), {counts['unknown']} are unknown, "
                f"{counts['equal']} are equal."
            )
        return "\n".join(lines)


def size(number: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def _part_lines(part: Part) -> Iterator[str]:
    if part.state == "equal":
        return
    yield f"{part.area} {part.place}"
    if part.unknown:
        yield f"  unknown: {part.unknown}"
    for sign, items in (("+", part.added), ("-", part.removed), ("~", part.changed)):
        if not items:
            continue
        for i in sorted(items, key=lambda i: (-i.bytes, i.name))[:SHOWN]:
            detail = f"  {i.detail}" if i.detail else ""
            yield f"  {sign} {i.name}{detail}{'  ' + size(i.bytes) if i.bytes else ''}"
        if len(items) > SHOWN:
            total = size(sum(i.bytes for i in items))
            yield f"  {sign} ... and {len(items) - SHOWN} more; in all {len(items)}, {total}"
