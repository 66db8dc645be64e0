"""Read a Python environment from outside: its metadata folders, no interpreter of it is started.

So a broken environment, one of another Python, and one without pip are read alike, in a second for the 100
distributions and 60,000 files of a fine-tuning stack.
"""

# ruff: noqa: PTH100, PTH112, PTH118, PTH208
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import csv
import hashlib
import os
import posixpath
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import PathDistribution
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from sparkproof.rollback import manifest, tree
from sparkproof.rollback.model import Distribution, Environment

_VARIES = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json")  # between two installs of one wheel


def default_roots(env: Mapping[str, str], home: str) -> list[str]:
    """The active environment (VIRTUAL_ENV or CONDA_PREFIX, else the one sparkproof runs in), what `pip install --user` fills,
    and /usr/local, which `sudo pip install` does.

    An environment of sparkproof's own is none of them: it goes as a whole, and its content proves nothing.
    """
    active = env.get("VIRTUAL_ENV") or env.get("CONDA_PREFIX") or (sys.prefix if sys.prefix != sys.base_prefix else "")
    ours = {e.path for e in manifest.ours() if e.kind == "venv"}
    roots = [os.path.abspath(active)] if active and os.path.realpath(active) not in ours else []
    return list(dict.fromkeys([*roots, os.path.join(home, ".local"), "/usr/local"]))


def read(root: str | Path, deadline: float = float("inf")) -> Environment:
    """What is installed under a prefix. Never raises: what can't be read is in `not_read`."""
    root = os.path.abspath(root)
    found = Environment(root=root, real=os.path.realpath(root))
    try:
        found.present = os.path.isdir(root)
        config = Path(root, "pyvenv.cfg")
        found.virtual = config.is_file()
        if found.virtual:
            found.identity = identity(root)
        found.sites = _sites(found.real)
        for site in found.sites:
            found.distributions += _distributions(found.real, site)
    except OSError as e:
        found.not_read = f"{e.filename or root}: {e.strerror}"
        return found
    owned = owned_paths(found.distributions)
    for top in [""] if found.virtual else found.sites:
        listing = tree.scan(os.path.join(found.real, top), deadline, partial(_accounted, top, owned))
        found.unowned.update((posixpath.join(top, p) if top else p, s) for p, s in listing.stamps.items())
        found.not_read = found.not_read or listing.why
    return found


def identity(root: str) -> str:
    """Digest of pyvenv.cfg, '' where there is none. Errors: OSError."""
    try:
        return hashlib.sha256(Path(root, "pyvenv.cfg").read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return ""


def owned_paths(distributions: Iterable[Distribution]) -> set[str]:
    """All files that the given distributions say are theirs."""
    return {p for d in distributions for p in d.paths or ()}


def compiled_from(path: str) -> str:
    """Source file of `x/__pycache__/y.cpython-312.pyc`: `x/y.py`; '' for anything else."""
    folder, name = posixpath.split(path)
    if posixpath.basename(folder) != "__pycache__" or not name.endswith(".pyc"):
        return ""
    return posixpath.join(posixpath.dirname(folder), name.split(".")[0] + ".py")


def _accounted(top: str, owned: set[str], path: str) -> bool:
    path = posixpath.join(top, path)
    return tree.to_text(path) in owned or compiled_from(path) in owned


def _sites(root: str) -> list[str]:
    """site-packages and dist-packages under `lib*/python3*/`, each real folder once (lib64 may be a link to lib)."""
    seen: dict[str, str] = {}
    for pattern in ("lib/python3*/site-packages", "lib/python3*/dist-packages", "lib64/python3*/site-packages"):
        for path in sorted(Path(root).glob(pattern)):
            real = os.path.realpath(path)
            if path.is_dir() and os.path.commonpath([real, root]) == root:
                seen.setdefault(real, os.path.relpath(real, root))
    return list(seen.values())


def _distributions(root: str, site: str) -> list[Distribution]:
    python = posixpath.basename(posixpath.dirname(site)).removeprefix("python")
    found: list[Distribution] = []
    for folder in sorted(os.listdir(os.path.join(root, site))):
        path = Path(root, site, folder)
        if not folder.endswith((".dist-info", ".egg-info")) or not path.is_dir() or path.is_symlink():
            continue
        # without any of these it is a remnant of an uninstallation, not a distribution
        if any((path / f).is_file() for f in ("METADATA", "PKG-INFO", "RECORD")):
            found.append(_distribution(path, root, site, python))
    return found


def _distribution(path: Path, root: str, site: str, python: str) -> Distribution:
    """One metadata folder. A half removed one, without METADATA, is still named after its folder."""
    metadata = PathDistribution(path)
    stem_name, _, stem_version = path.name.rsplit(".", 1)[0].partition("-")
    try:
        name, version = str(metadata.metadata["Name"] or stem_name), str(metadata.metadata["Version"] or stem_version)
        requires = _requires(metadata.requires or [], python)
    except Exception:  # importlib.metadata raises many things for damaged metadata
        name, version, requires = stem_name, stem_version, []
    record = _text(path / "RECORD")
    installer = _text(path / "INSTALLER").strip()
    d = Distribution(
        name=str(canonicalize_name(name)),
        version=version,
        folder=posixpath.join(site, path.name),
        installer=installer,
        requested=(path / "REQUESTED").exists() if installer in ("pip", "uv") else None,
        requires=requires,
        direct_url=_text(path / "direct_url.json").strip(),
        scripts=sorted(e.name for e in metadata.entry_points if e.group in ("console_scripts", "gui_scripts")),
    )
    if record:
        _read_record(d, record, root, site)
    return d


def _read_record(d: Distribution, record: str, root: str, site: str) -> None:
    digest, d.paths = hashlib.sha256(), []
    for row in csv.reader(record.splitlines()):
        if not row or not row[0]:
            continue
        relative = os.path.relpath(row[0], root) if row[0].startswith("/") else posixpath.join(site, row[0])
        relative = posixpath.normpath(relative)
        if relative.startswith("../") or relative in ("..", "."):
            d.outside.append(tree.to_text(row[0]))
            continue
        d.paths.append(tree.to_text(relative))
        if len(row) > 2 and row[2].isdigit():
            d.bytes += int(row[2])
        if not row[0].endswith(".pyc") and posixpath.basename(row[0]) not in _VARIES:
            digest.update(f"{relative}\0{row[1] if len(row) > 1 else ''}\n".encode(errors="surrogateescape"))
    d.digest = digest.hexdigest()[:16]


def _requires(lines: list[str], python: str) -> list[str]:
    names = set()
    for line in lines:
        try:
            r = Requirement(line)
            environment = {"extra": ""} | (
                {"python_version": python, "python_full_version": python + ".0"} if "." in python else {}
            )
            if r.marker is None or r.marker.evaluate(environment):
                names.add(str(canonicalize_name(r.name)))
        except InvalidRequirement:
            continue
    return sorted(names)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""
