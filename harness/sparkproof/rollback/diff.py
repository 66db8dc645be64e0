"""What came, went and changed between two snapshots.

A part that was not read in one of both is "unknown", never "equal", and an unknown part is not empty: `is_empty`
means that everything was read twice and is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from sparkproof.results import Strict
from sparkproof.rollback import tree
from sparkproof.rollback.model import Cache, Distribution, Engine, Environment, Snapshot, Stamps

Changes = tuple[Stamps, Stamps, Stamps]  # added, removed, changed
SHOWN = 12  # rows a part in the text; the JSON has all


class Item(Strict):
    """One thing that differs."""

    name: str
    detail: str = ""
    bytes: int = Field(default=0, description="Size of it now (of what went, before).")


class Part(Strict):
    """One comparable part of the machine."""

    area: str = Field(description="python, files, caches, containers, dpkg, profiles")
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


def diff(before: Snapshot, after: Snapshot) -> Diff:
    """Compare. What only one of both looked at is unknown."""
    found = Diff(before=before.taken, after=after.taken)
    for area in [
        a for a in ("python", "caches", "containers", "dpkg", "profiles") if a in {*before.areas, *after.areas}
    ]:
        if area not in before.areas or area not in after.areas:
            found.parts.append(Part(area=area, place="", unknown="it was looked at in one of both snapshots only"))
            continue
        found.parts += {
            "python": _python,
            "caches": _caches,
            "containers": _engines,
            "dpkg": _dpkg,
            "profiles": _profiles,
        }[area](before, after)
    return found


def named(distributions: list[Distribution]) -> dict[str, Distribution]:
    """By name; a second one of a name (a broken installation) by name and version."""
    found: dict[str, Distribution] = {}
    for d in distributions:
        found[d.name if d.name not in found else f"{d.name}=={d.version}"] = d
    return found


def same(a: Distribution, b: Distribution) -> bool:
    """Same version and same files.

    Whether it was asked for by name is not compared: putting a version back asks for it.
    """
    return a.version == b.version and a.folder == b.folder and a.digest == b.digest


def orphans(after: Environment, came: set[str]) -> set[str]:
    """Of the distributions that came: not asked for, and needed by nothing that was asked for or is older."""
    known = named(after.distributions)
    needed = [n for n, d in known.items() if n not in came or d.requested is not False]
    seen = set(needed)
    while needed:
        for r in known[needed.pop()].requires:
            if r in known and r not in seen:
                seen.add(r)
                needed.append(r)
    return came - seen


def compare(before: Stamps, after: Stamps) -> Changes:
    """Added, removed and changed entries of two listings.

    A folder that merely became empty, or is no longer, did not come or go.
    """
    added = {p: s for p, s in after.items() if p not in before}
    removed = {p: s for p, s in before.items() if p not in after}
    changed = {p: s for p, s in after.items() if p in before and before[p] != s}
    if "d" in added.values():
        parents = _parents(before)
        added = {p: s for p, s in added.items() if s != "d" or p not in parents}
    if "d" in removed.values():
        parents = _parents(after)
        removed = {p: s for p, s in removed.items() if s != "d" or p not in parents}
    return added, removed, changed


def _parents(stamps: Stamps) -> set[str]:
    found: set[str] = set()
    for path in stamps:
        while "/" in path:
            path = path.rpartition("/")[0]
            if path in found:
                break
            found.add(path)
    return found


def _items(stamps: dict[str, str]) -> list[Item]:
    return [
        Item(name=p, bytes=tree.stamp_bytes(s), detail="link" if s.startswith("l:") else "") for p, s in stamps.items()
    ]


def strays(before: Environment, after: Environment) -> Changes:
    """Changes among the files that no distribution owns.

    One that a distribution owned then, or owns now, was there or is accounted for: it neither came nor went.
    """
    marked = [{**{p: "owned" for d in e.distributions for p in d.paths or ()}, **e.unowned} for e in (before, after)]
    added, removed, changed = compare(marked[0], marked[1])
    return (
        {p: s for p, s in added.items() if s != "owned"},
        {p: s for p, s in removed.items() if s != "owned"},
        {p: s for p, s in changed.items() if "owned" not in (s, marked[0][p])},
    )


def _files(area: str, place: str, changes: Changes) -> Part:
    added, removed, changed = map(_items, changes)
    return Part(area=area, place=place, added=added, removed=removed, changed=changed)


def _python(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    olds, news = ({e.root: e for e in s.environments} for s in (before, after))
    for root in dict.fromkeys([*olds, *news]):
        a, b = olds.get(root), news.get(root)
        why = "it was looked at in one of both snapshots only" if a is None or b is None else ""
        why = why or next((f"not read {w}: {e.not_read}" for w, e in (("then", a), ("now", b)) if e and e.not_read), "")
        if why or a is None or b is None:
            yield Part(area="python", place=root, unknown=why)
            continue
        yield _distributions(a, b)
        yield _files("files", root, strays(a, b))


def _distributions(before: Environment, after: Environment) -> Part:
    a, b = named(before.distributions), named(after.distributions)
    part = Part(area="python", place=after.root)
    orphaned = orphans(after, set(b) - set(a))
    for name in sorted({*a, *b}):
        old, new = a.get(name), b.get(name)
        if old is None and new is not None:
            how = "orphaned dependency" if name in orphaned else "asked for" if new.requested else "dependency"
            part.added.append(
                Item(name=f"{name} {new.version}", detail=f"{how}, {len(new.paths or [])} files", bytes=new.bytes)
            )
        elif new is None and old is not None:
            part.removed.append(Item(name=f"{name} {old.version}", bytes=old.bytes))
        elif old is not None and new is not None and not same(old, new):
            detail = f"was {old.version}" if old.version != new.version else "same version, other files"
            part.changed.append(Item(name=f"{name} {new.version}", detail=detail, bytes=new.bytes))
    return part


def why_unknown(before: Cache | None, after: Cache | None) -> str:
    """Why nothing can be concluded about a cache; '' if something can."""
    if before is None or after is None:
        return "the first snapshot did not look there" if before is None else "not looked at now"
    if before.not_read or after.not_read:
        return f"not read {'then' if before.not_read else 'now'}: {before.not_read or after.not_read}"
    return "" if before.real == after.real else f"it led to {before.real} then and leads to {after.real} now"


def _caches(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    olds, news = ({c.root: c for c in s.caches} for s in (before, after))
    for root in dict.fromkeys([*olds, *news]):
        a, b = olds.get(root), news.get(root)
        if a is None and b is not None and not b.present:
            continue  # a variable names a folder that does not exist
        if why := why_unknown(a, b):
            yield Part(area="caches", place=root, unknown=why)
        elif a is not None and b is not None:
            part = _files("caches", root, compare(a.listing, b.listing))
            if a.present != b.present and part.state == "equal":
                (part.added if b.present else part.removed).append(Item(name=".", detail="the folder itself, empty"))
            yield part


def _engines(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    olds, news = ({e.name: e for e in s.engines} for s in (before, after))
    for name in sorted({*olds, *news}):
        a, b = olds.get(name) or Engine(name=name), news.get(name) or Engine(name=name)
        if a.not_read or b.not_read:
            yield Part(area="containers", place=name, unknown=f"not read: {a.not_read or b.not_read}")
            continue
        part = Part(area="containers", place=name)
        for kind in ("images", "containers", "volumes"):
            x, y = getattr(a, kind), getattr(b, kind)
            word = kind[:-1]
            part.added += [Item(name=f"{word} {y[k][0]}", detail=k, bytes=y[k][1]) for k in sorted(set(y) - set(x))]
            part.removed += [Item(name=f"{word} {x[k][0]}", detail=k, bytes=x[k][1]) for k in sorted(set(x) - set(y))]
        yield part


def _dpkg(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    a, b = before.dpkg, after.dpkg
    if a.not_read or b.not_read:
        yield Part(area="dpkg", place="", unknown=f"not read: {a.not_read or b.not_read}")
        return
    x, y = a.packages, b.packages
    yield Part(
        area="dpkg",
        place="",
        added=[Item(name=n, detail=y[n]) for n in sorted(set(y) - set(x))],
        removed=[Item(name=n, detail=x[n]) for n in sorted(set(x) - set(y))],
        changed=[Item(name=n, detail=f"was {x[n]}, is {y[n]}") for n in sorted(set(x) & set(y)) if x[n] != y[n]],
    )


def _profiles(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    a, b = before.profiles, after.profiles
    for path in dict.fromkeys([*a.files, *a.not_read, *b.files, *b.not_read]):
        part = Part(area="profiles", place=path)
        if path in a.not_read or path in b.not_read or path not in a.files or path not in b.files:
            part.unknown = f"not read: {a.not_read.get(path) or b.not_read.get(path) or 'in one of both only'}"
        elif a.files[path] != b.files[path]:
            target = part.added if not a.files[path] else part.removed if not b.files[path] else part.changed
            target.append(Item(name=path))
        yield part
