"""What came, went and changed between two snapshots.

A part that was not read in one of both is "unknown", never "equal", and an unknown part is not empty: `is_empty`
means that everything was read twice and is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sparkproof.rollback import diff_host, tree
from sparkproof.rollback.model import AREAS, Area, Cache, Distribution, Environment, Snapshot, Stamps
from sparkproof.rollback.parts import Diff, Item, Part

Changes = tuple[Stamps, Stamps, Stamps]  # added, removed, changed


def diff(before: Snapshot, after: Snapshot) -> Diff:
    """Compare. What only one of both looked at is unknown."""
    found = Diff(before=before.taken, after=after.taken)
    by_area: dict[Area, Callable[[Snapshot, Snapshot], Iterator[Part]]] = {
        "python": _python,
        "caches": _caches,
        "containers": diff_host.containers,
        "dpkg": diff_host.dpkg,
        "profiles": diff_host.profiles,
        "variables": diff_host.variables,
        "processes": diff_host.processes,
        "gpu": diff_host.gpu,
    }
    for area in [a for a in AREAS if a in {*before.areas, *after.areas}]:
        if area not in before.areas or area not in after.areas:
            found.parts.append(Part(area=area, place="", unknown="it was looked at in one of both snapshots only"))
        else:
            found.parts += by_area[area](before, after)
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
            added, removed, changed = compare(a.listing, b.listing)
            # what went from our own cache is no loss
            part = _files("caches", root, (added, {} if a.own else removed, {} if a.own else changed))
            if a.own:
                part.added = [i.model_copy(update={"ours": True}) for i in part.added]
            if a.present != b.present and part.state == "equal" and (b.present or not a.own):
                (part.added if b.present else part.removed).append(Item(name=".", detail="the folder itself, empty"))
            yield part
