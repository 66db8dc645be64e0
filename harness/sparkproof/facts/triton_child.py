"""The far side of `triton_probe`: `python -m sparkproof.facts.triton_child` ends with one line of JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
CAPABILITY = 121


def live_path() -> str:
    """The ptxas that this Triton takes for compute capability 12.1."""
    from triton.backends.nvidia import compiler

    try:
        found = compiler.get_ptxas(CAPABILITY)
    except TypeError:  # before 3.6 there was one ptxas and the function took nothing
        found = compiler.get_ptxas()
    path = getattr(found, "path", None) or (found[0] if isinstance(found, tuple) else found)
    return str(path)


def live_variable() -> str | None:
    """The variable that redirects `live_path`, found by pointing each in turn at a decoy that answers like a ptxas."""
    kept = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in VARIABLES:
                decoy = Path(folder) / name
                decoy.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.0'\n", encoding="utf-8")
                decoy.chmod(0o755)
                os.environ[name] = str(decoy)
                try:
                    if live_path() == str(decoy):
                        return name
                finally:
                    del os.environ[name]
    finally:
        os.environ.update(kept)
    return None


def main() -> None:
    """Version, bundled assemblers, the live one and its variable."""
    document: dict[str, Any] = {"version": None, "bundled": [], "live": None, "variable": None, "error": None}
    try:
        import triton

        document["version"] = triton.__version__
        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        document["bundled"] = [str(p) for p in sorted(folder.glob("ptxas*"))]
        document["live"] = live_path()
        document["variable"] = live_variable()
    except Exception as e:
        document["error"] = f"{type(e).__name__}: {e}"
    print(json.dumps(document))


if __name__ == "__main__":
    main()
