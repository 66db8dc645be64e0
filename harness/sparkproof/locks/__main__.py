"""`python -m sparkproof.locks compile|check`: make the image's locks, or prove what must be true of them.

`check` reads metadata, directories and library headers over the net by ranges, some tens of megabytes in all; `--deep` reads
every library of every wheel whole, gigabytes. Exit 1: something is not so; 2: it could not be judged.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.utils import canonicalize_name

from sparkproof.errors import UserError
from sparkproof.locks import judge
from sparkproof.locks.index import HttpIndex, Source
from sparkproof.locks.lockfile import Pin, on, read_lock
from sparkproof.locks.recipe import RECIPES, Recipe, compile_lock, requirements
from sparkproof.locks.wheel import Wheel, best

WORKERS = 16


def fresh(recipe: Recipe, folder: Path, pyproject: Path) -> judge.Seen:
    """Resolved again from the same inputs, starting from what is locked: the same file comes out."""
    lock = folder / recipe.file
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch, recipe.file)
        shutil.copy(lock, again)
        compile_lock(recipe, folder, pyproject, again)
        old, new = _pins(lock), _pins(again)
    changed = sorted(set(old) ^ set(new))
    if changed:
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        return judge.Seen("", [f"{recipe.file} is not what its inputs resolve to now: {shown}. Run `make lock-image`."])
    return judge.Seen(f"{recipe.file} is what its inputs resolve to ({len(old)} pins)", [])


def _pins(lock: Path) -> list[str]:
    """Each pin with its version and marker; hashes are held against the index's own, wheel by wheel."""
    return [f"{p.name}=={p.version}{f' ; {p.marker}' if p.marker else ''}" for p in read_lock(lock)]


def open_wheels(pins: dict[str, Pin], source: Source) -> tuple[dict[str, Wheel], list[str]]:
    """The arm64 wheel of each pin, and a sentence for each pin that has none with a hash in the lock."""

    def one(pin: Pin) -> Wheel | str:
        files = source.files(pin.name)
        found = best(pin, files)
        if found is None:
            here = any(f"-{pin.version}" in f.name for f in files)
            why = "no wheel for aarch64 with a hash in the lock" if here else "no file on the index"
            return f"{pin.name} {pin.version} has {why}."
        return Wheel(found, source.open(found))

    wheels, missing = {}, []
    with ThreadPoolExecutor(WORKERS) as pool:
        for pin, answer in zip(pins.values(), pool.map(one, pins.values()), strict=True):
            if isinstance(answer, str):
                missing.append(answer)
            else:
                wheels[pin.name] = answer
    return wheels, missing


def check(recipe: Recipe, folder: Path, source: Source, deep: bool) -> list[judge.Seen]:
    """Every rule that applies to one lock."""
    pins = on(read_lock(folder / recipe.file), judge.MACHINE)
    named = judge.NAMED if recipe.project else ()
    seen = [judge.exact(requirements(folder, recipe.inputs), pins, recipe.inputs[0], named)]
    if not recipe.wheels:
        return seen
    seen.append(judge.cuda_release(pins))
    if judge.RUNTIME in pins:
        seen.append(judge.one_compiler(pins))
    wheels, missing = open_wheels(pins, source)
    seen.append(judge.Seen(f"{len(wheels)} pins have an aarch64 wheel with its hash", missing))
    out = requirements(folder, (recipe.overrides,)) if recipe.overrides else []
    seen.append(judge.requirements(wheels, pins, frozenset(canonicalize_name(r.name) for r in out)))
    if "torch" in wheels:
        seen.append(judge.torch_cuda(wheels["torch"]))
    if "bitsandbytes" in wheels:
        seen.append(judge.bitsandbytes_code(wheels["bitsandbytes"]))
    with ThreadPoolExecutor(WORKERS) as pool:
        seen.append(judge.all_native(list(pool.map(lambda n: judge.native(n, wheels[n], deep), wheels))))
    return seen


def main(arguments: list[str] | None = None, source: Source | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sparkproof.locks", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("compile", "check"))
    parser.add_argument("--folder", type=Path, default=Path("docker"))
    parser.add_argument("--pyproject", type=Path, default=Path("pyproject.toml"))
    parser.add_argument("--deep", action="store_true", help="read every library of every wheel whole (gigabytes)")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(len(RECIPES)) as pool:
            if args.what == "compile":
                list(pool.map(lambda r: compile_lock(r, args.folder, args.pyproject, args.folder / r.file), RECIPES))
                print(f"{', '.join(r.file for r in RECIPES)} are made")
                return 0
            renewed = pool.map(lambda r: fresh(r, args.folder, args.pyproject), RECIPES)
            index = source or HttpIndex()
            seen = [s for r in RECIPES for s in check(r, args.folder, index, args.deep)] + list(renewed)
    except UserError as error:
        print(f"locks: {error}", file=sys.stderr)
        return 2
    problems = [p for s in seen for p in s.problems]
    for s in seen:
        print("\n".join(f"WRONG  {p}" for p in s.problems) or f"ok     {s.good}")
    print(f"{len(problems)} problems in {len(RECIPES)} locks, {time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
