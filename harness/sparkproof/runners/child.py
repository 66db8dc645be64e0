"""The far side of `Context.spawn`: `python -m sparkproof.runners.child module:function PAYLOAD RESULT`.

An exception raised inside `under_test(...)` is a finding about what is tested and fails the case; any other is a
fault of the harness and breaks it. The result file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_stage: list[str] = []
_began = time.monotonic()


@contextlib.contextmanager
def under_test(stage: str) -> Iterator[None]:
    """Mark code that belongs to the machine, image or engine under test: what it raises fails the case."""
    try:
        yield
    except Exception:
        if not _stage:
            _stage.append(stage)
        raise


def progress(text: str) -> None:
    """Tell the parent what is going on: shown live, never judged. The log has it with the seconds since the start."""
    print(f"[{time.monotonic() - _began:6.1f} s] {text}", flush=True)
    target = os.environ.get("SPARKPROOF_PROGRESS")
    if target:
        with contextlib.suppress(OSError), open(target, "a", encoding="utf-8") as f:
            f.write(text.replace("\n", " ") + "\n")


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` atomically."""
    tmp = path.with_suffix(path.suffix + ".part")
    with open(tmp, "w", encoding="utf-8") as f:
        json.dump(data, f)
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(path)


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent goes: a killed run must not leave a training behind."""
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get("SPARKPROOF_PARENT", str(os.getppid())) != str(os.getppid()):
            os._exit(9)  # it went before the kernel was asked


def main(argv: list[str] | None = None) -> int:
    """Run the entry point; exit 0 with a result, 3 with an error written to the result file."""
    die_with_parent()
    entry, payload_path, result_path = (argv or sys.argv[1:])[:3]
    module, _, name = entry.partition(":")
    try:
        payload = json.loads(Path(payload_path).read_text(encoding="utf-8"))
        function = getattr(importlib.import_module(module), name)
        document = {"result": function(payload)}
    except BaseException as error:
        traceback.print_exc()
        document = {
            "error": {
                "type": type(error).__name__,
                "message": str(error),
                "stage": _stage[0] if _stage else "",
                "traceback": traceback.format_exc()[-8000:],
            }
        }
    write_json(Path(result_path), document)
    sys.stdout.flush()
    return 0 if "result" in document else 3


if __name__ == "__main__":
    # As `__main__` this file is not the module that others import `under_test` from: run that one.
    from sparkproof.runners import child

    sys.exit(child.main())
