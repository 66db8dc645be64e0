"""Take, save and load a snapshot.

Reading only: nothing on the machine is changed, and a missing tool is written down, not raised.
"""

# ruff: noqa: PTH100, PTH109
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from sparkproof import __version__
from sparkproof.errors import UserError
from sparkproof.rollback import caches, engines, environment, host, running
from sparkproof.rollback.model import AREAS, SCHEMA, Area, Snapshot

BUDGET_S = 8.0


def default_path() -> Path:
    """Where `sparkproof snapshot` writes, and `uninstall` and `verify-rollback` look, unless told otherwise."""
    return Path(platformdirs.user_state_dir("sparkproof")) / "snapshot.json"


def take(
    environments: Sequence[str | Path] | None = None,
    home: str | Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    areas: Iterable[Area] = AREAS,
    also_caches: Mapping[str, str] | None = None,
    budget_s: float = BUDGET_S,
) -> Snapshot:
    """Record what an installation can change.

    `environments`: prefixes (default: the active one and ~/.local). `env`: variables that move caches (default: this
    process's). `also_caches`: further folders (path -> name), for looking again where an earlier snapshot looked.
    `budget_s`: after that many seconds, what is still to be listed becomes "not read"; nothing is guessed.
    """
    start = time.monotonic()
    deadline = start + budget_s
    env = os.environ if env is None else env
    home = os.path.abspath(home or env.get("HOME") or Path.home())
    cwd = os.path.abspath(cwd or Path.cwd())
    chosen = [a for a in AREAS if a in set(areas)]
    roots = [os.path.abspath(e) for e in environments] if environments else environment.default_roots(env, home)
    found = Snapshot(
        taken=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sparkproof=__version__,
        machine=host.machine(),
        home=home,
        cwd=cwd,
        areas=chosen,
    )
    if "python" in chosen:
        found.environments = [environment.read(r, deadline) for r in dict.fromkeys(roots)]
    if "caches" in chosen:
        folders = {**caches.roots(env, home, cwd), **(also_caches or {})}
        found.caches = [caches.read(r, n, deadline) for r, n in folders.items()]
    if "containers" in chosen:
        found.engines = engines.read_all(env)
    if "dpkg" in chosen:
        found.dpkg = host.dpkg()
    if "profiles" in chosen:
        found.profiles = host.profiles(home)
    if "variables" in chosen:
        found.variables = host.variables(env)
    if "processes" in chosen:
        found.processes = running.processes(os.path.realpath(r) for r in roots)
    if "gpu" in chosen:
        found.gpu = running.gpu_memory()
    found.took_s = round(time.monotonic() - start, 3)
    return found


def nothing() -> Snapshot:
    """A snapshot that looked at nothing, so that nothing but what is ours can be told from what was there before."""
    return Snapshot(taken="never", machine=host.machine(), home=str(Path.home()), cwd="/", areas=[])


def again(before: Snapshot, env: Mapping[str, str] | None = None) -> Snapshot:
    """Look again at what `before` looked at, and at the places that the current variables name."""
    here = caches.roots(os.environ if env is None else env, before.home, os.getcwd())
    known = {c.root: c.name for c in before.caches}
    return take(
        [e.root for e in before.environments] or None,
        before.home,
        env=env,
        cwd=before.cwd,
        areas=before.areas,
        also_caches={**{r: n for r, n in here.items() if os.path.lexists(r)}, **known},
        budget_s=60.0,
    )


def save(snapshot: Snapshot, path: Path) -> None:
    """Write it whole or not at all. Errors: UserError."""
    text = json.dumps(snapshot.model_dump(mode="json", by_alias=True), indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(part, "w", encoding="utf-8") as f:
            f.write(text + "\n")
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        raise UserError(
            f"The snapshot can't be written to {path}: {e.strerror}.", "Give another place with --out."
        ) from None


def load(path: Path) -> Snapshot:
    """Read one. Errors: UserError that says what is wrong with the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no snapshot at {path}.", "Take one before you install: sparkproof snapshot"
        ) from None
    except (OSError, ValueError) as e:
        raise UserError(f"The snapshot {path} can't be read: {e}.", "Use an unharmed copy of it.") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        seen = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path} is no snapshot of this version: schema {seen!r}, expected {SCHEMA!r}.")
    try:
        return Snapshot.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise UserError(
            f"The snapshot {path} is damaged at {where}: {first['msg']}.", "Use an unharmed copy of it."
        ) from None
