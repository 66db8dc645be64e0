"""What differs outside Python and the caches: engines, Debian packages, start-up files, variables, processes, GPU."""

from __future__ import annotations

from collections.abc import Iterator

from sparkproof.rollback.model import Engine, GpuMemory, Snapshot
from sparkproof.rollback.parts import Item, Part

GPU_NOISE_BYTES = 256 * 2**20  # a desktop's windows come and go; a training process begins at about 400 MiB


def containers(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    """Images, containers, volumes and networks of each engine.

    What is ours and went is no difference: this project was here when the snapshot was taken, and is not now.
    """
    olds, news = ({e.name: e for e in s.engines} for s in (before, after))
    for name in sorted({*olds, *news}):
        a, b = olds.get(name) or Engine(name=name), news.get(name) or Engine(name=name)
        if a.not_read or b.not_read:
            yield Part(area="containers", place=name, unknown=f"not read: {a.not_read or b.not_read}")
            continue
        part = Part(area="containers", place=name)
        for kind in ("images", "containers", "volumes", "networks"):
            x, y = getattr(a, kind), getattr(b, kind)
            word = kind[:-1]
            part.added += [
                Item(name=f"{word} {y[k].label}", detail=k, bytes=y[k].bytes, ours=y[k].ours)
                for k in sorted(set(y) - set(x))
            ]
            part.removed += [
                Item(name=f"{word} {x[k].label}", detail=k, bytes=x[k].bytes)
                for k in sorted(set(x) - set(y))
                if not x[k].ours
            ]
        if (grown := b.build_cache_bytes - a.build_cache_bytes) > 0:
            why = "it grew; all builds on this machine share it, and it carries no labels"
            part.changed.append(Item(name="build cache", detail=why, bytes=grown))
        yield part


def dpkg(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    """Debian packages."""
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


def profiles(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    """Start-up files, each a part of its own. A file that only one of both has came or went."""
    a, b = before.profiles, after.profiles
    for path in dict.fromkeys([*a.files, *a.not_read, *b.files, *b.not_read]):
        part = Part(area="profiles", place=path)
        if path in a.not_read or path in b.not_read:
            part.unknown = f"not read: {a.not_read.get(path) or b.not_read.get(path)}"
        elif (old := a.files.get(path, "")) != (new := b.files.get(path, "")):
            target = part.added if not old else part.removed if not new else part.changed
            target.append(Item(name=path))
        yield part


def variables(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    """Variables of the shells that looked then and now. Of a search path, the entries."""
    x, y = before.variables.values, after.variables.values
    yield Part(
        area="variables",
        place="",
        added=[Item(name=n, detail=y[n]) for n in sorted(set(y) - set(x))],
        removed=[Item(name=n, detail=x[n]) for n in sorted(set(x) - set(y))],
        changed=[Item(name=n, detail=_path_change(x[n], y[n])) for n in sorted(set(x) & set(y)) if x[n] != y[n]],
    )


def _path_change(old: str, new: str) -> str:
    if old.startswith("digest "):
        return "another value"
    a, b = old.split(":"), new.split(":")
    came, went = [e for e in b if e not in a], [e for e in a if e not in b]
    said = [f"+{e}" for e in came] + [f"-{e}" for e in went]
    return ", ".join(said) or "another order"


def processes(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    """Processes that run now and did not then. One that ended since is no trace of anything."""
    a, b = before.processes, after.processes
    part = Part(area="processes", place="")
    if a.not_read or b.not_read:
        part.unknown = f"not read: {a.not_read or b.not_read}"
    else:
        came = {k: p for k, p in b.found.items() if k not in a.found}
        part.added = [Item(name=f"{k.split('@')[0]} {p.name}", detail=p.why) for k, p in came.items()]
    yield part


def gpu(before: Snapshot, after: Snapshot) -> Iterator[Part]:
    """Memory that GPUs hold: of processes that were not there, and more in use on a device than windows explain."""
    a, b = before.gpu, after.gpu
    part = Part(area="gpu", place="")
    if a.not_read or b.not_read:
        part.unknown = f"not read: {a.not_read or b.not_read}"
        yield part
        return
    part.added = [Item(name=f"process {k}", bytes=v) for k, v in b.processes.items() if k not in a.processes]
    part.changed = [
        Item(name=f"device {uuid}", detail="more memory in use", bytes=more)
        for uuid, used in b.devices.items()
        if (more := _more(a, uuid, used)) > GPU_NOISE_BYTES
    ]
    yield part


def _more(before: GpuMemory, uuid: str, used: int | None) -> int:
    then = before.devices.get(uuid)
    return used - then if used is not None and then is not None else 0
