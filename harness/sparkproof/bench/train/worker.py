"""A process of `sparkproof bench train`: `python -m sparkproof.bench.train.worker TASK RESULT`, both files of JSON.

It writes the checkpoint, measures the floor, or runs one engine's steps. Torch is imported after an engine that must come first.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from sparkproof.bench.train.setting import Task
from sparkproof.runners import child


def run(payload: dict[str, Any]) -> dict[str, Any]:
    """Do one task; its result, or {"missing": why} for an engine that can't be had here."""
    task = Task.model_validate(payload)
    os.chdir(Path(task.checkpoint).parent)  # some write caches of compiled code where they stand
    folder, s = task.checkpoint, task.setting
    if task.stage == "engine":
        from sparkproof.bench.train import engines

        start = time.perf_counter()
        try:
            engines.first_import(task.engine)
            from sparkproof.bench.train import step

            return step.measure(task.engine, folder, s, start)
        except engines.NotInstalled as e:
            return {"missing": str(e)}
    from sparkproof.bench.train import step

    if task.stage == "prepare":
        from sparkproof.bench.train import checkpoint

        return checkpoint.write(s, Path(folder)) | step.where(s) | {"versions": step.versions()}
    from sparkproof.bench.train import calibrate

    return calibrate.floor(s)


def main() -> None:
    """Leave without the interpreter's farewells: what a library breaks in them is no finding."""
    code = child.main(["sparkproof.bench.train.worker:run", *sys.argv[1:3]])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
