"""Stand-ins for a fine-tuning stack: wheels with the true names, versions and dependencies, and next to nothing inside.

The dependency graph is recorded in `unsloth_graph.json`, with its source. So pip resolves, installs and uninstalls
just what it would for the real stack, offline and in seconds. What is not real: the files, and so their sizes.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pydantic import Field

from sparkproof.results import Strict

SCRIPTS = {"torch": ["torchrun"], "unsloth": ["unsloth"]}  # a command each, so that bin/ has something to lose
_DATE = (2026, 1, 1, 0, 0, 0)  # fixed, so that a wheel has the same bytes each time


class Node(Strict):
    """One distribution of the graph."""

    version: str
    wheel_bytes: int = Field(description="Size of the real wheel for aarch64.")
    requires: list[str] = Field(description="Names of what it needs on that platform.")


class Graph(Strict):
    """A resolved dependency graph."""

    source: str
    requested: list[str]
    distributions: dict[str, Node]


@cache
def graph() -> Graph:
    """The recorded graph of unsloth, torch and torchvision."""
    return Graph.model_validate_json(Path(__file__).with_name("unsloth_graph.json").read_text(encoding="utf-8"))


def wheel(
    folder: Path,
    name: str,
    version: str,
    requires: Iterable[str] = (),
    scripts: Iterable[str] = (),
    files: dict[str, str] | None = None,
) -> Path:
    """Write `name-version-py3-none-any.whl`: a package of one module unless `files` (path -> text) says otherwise."""
    module = name.replace("-", "_").replace(".", "_")
    info = f"{module}-{version}.dist-info"
    text = (
        f'"""A stand-in for {name} {version}: its name and its dependencies, not its content."""\n\nSTAND_IN = True\n'
    )
    main = "\n\ndef main() -> None:\n    print('a stand-in')\n"
    entries = dict(files) if files is not None else {f"{module}/__init__.py": text + main}
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: Stand-in for a rollback test."]
    entries[f"{info}/METADATA"] = "\n".join([*metadata, *(f"Requires-Dist: {r}" for r in requires)]) + "\n"
    entries[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: sparkproof\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    if commands := [f"{s} = {module}:main" for s in scripts]:
        entries[f"{info}/entry_points.txt"] = "\n".join(["[console_scripts]", *commands]) + "\n"
    rows = []
    for path, body in entries.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(body.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(body.encode())}")
    entries[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]) + "\n"
    target = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as z:
        for path, body in entries.items():
            z.writestr(zipfile.ZipInfo(path, _DATE), body)
    return target


def wheelhouse(folder: Path, only: Iterable[str] | None = None) -> list[Path]:
    """Write a wheel for every distribution of the graph, each dependency pinned to the recorded version."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = graph().distributions
    return [
        wheel(folder, n, d.version, [f"{r}=={nodes[r].version}" for r in d.requires], SCRIPTS.get(n, ()))
        for n, d in nodes.items()
        if only is None or n in only
    ]


def real_bytes(names: Iterable[str]) -> int:
    """What the real wheels of these distributions weigh; names that the graph does not have count nothing."""
    nodes = graph().distributions
    return sum(nodes[n].wheel_bytes for n in names if n in nodes)


def summary() -> str:
    """One sentence for a report."""
    g = graph()
    return (
        f"Stand-ins: {len(g.distributions)} nearly empty wheels with the recorded names, versions and dependencies of "
        f"{', '.join(f'{n} {g.distributions[n].version}' for n in g.requested)} (resolved by {g.source.split(':')[0]})."
    )
