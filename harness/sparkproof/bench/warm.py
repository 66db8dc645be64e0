"""Compiling ahead, in several processes, before anything is timed: compiled code waits in the caches on disk.

A whole table has over a hundred functions for torch.compile alone, which take several seconds each in turn. A worker builds its
rows' calls and runs each once. What it could not do is done again in the run itself, only later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sparkproof.bench.shapes import Row

MOST_WORKERS = 12
LARGE = (
    "cross_entropy",
    "linear_cross_entropy",
)  # one worker for these: two of their largest don't fit on a GPU at once
ENGINES = ("sparktune", "hf", "liger", "compiled")  # Unsloth's import alone takes longer than its kernels' compilation


@dataclass
class Warming:
    """The workers under way."""

    workers: list[subprocess.Popen[bytes]]
    deadline: float
    cut: int = field(default=0)

    def wait(self) -> list[str]:
        """Wait for them, not past the deadline; what a reader should know of it."""
        for w in self.workers:
            try:
                w.wait(timeout=max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.cut += 1
                w.kill()
                w.wait()
        return (
            [f"{self.cut} of {len(self.workers)} processes that compile ahead did not end in time."] if self.cut else []
        )


def shares(rows: Sequence[Row], workers: int) -> list[list[Row]]:
    """The rows of each worker, the large ones together."""
    large = [r for r in rows if r.kind.op in LARGE]
    small = [r for r in rows if r.kind.op not in LARGE]
    count = max(1, workers - bool(large))
    return [s for s in ([small[i::count] for i in range(count)] + [large]) if s]


@contextmanager
def started(rows: Sequence[Row], names: Sequence[str], seconds: float, progress) -> Iterator[Warming]:  # type: ignore[no-untyped-def]
    """Start the workers; whatever happens none outlives the block."""
    wanted = [n for n in ENGINES if n in names]
    workers = min(MOST_WORKERS, max(1, (os.cpu_count() or 2) - 2))
    found: list[subprocess.Popen[bytes]] = []
    if "compiled" in wanted and len(rows) > 2:
        progress("compiling ahead")
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for share in shares(rows, workers):
            task = json.dumps(
                {"rows": [[r.kind.model_dump(), r.model.model_dump(), r.tokens] for r in share], "engines": wanted}
            )
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(task.encode())
            process.stdin.close()
            found.append(process)
    try:
        yield Warming(found, time.monotonic() + seconds)
    finally:
        for p in found:
            if p.poll() is None:
                p.kill()
                p.wait()


def main() -> None:
    """A worker: rows on standard input."""
    import contextlib

    import torch

    from sparkproof.bench import cases, engines, guard
    from sparkproof.bench.shapes import Kind, Model
    from sparkproof.bench.timing import free_memory

    task = json.load(sys.stdin)
    device = torch.device("cuda", torch.cuda.current_device())
    for kind, model, tokens in task["rows"]:
        row = Row(Kind.model_validate(kind), Model.model_validate(model), tokens)
        with contextlib.suppress(Exception):
            case = cases.build(row, device)
            for name in task["engines"]:
                with contextlib.suppress(Exception):
                    build = engines.load(name).BUILDERS.get(row.kind.op)
                    if build is not None:
                        guard.run(case, build(case))
        case = None  # type: ignore[assignment]
        free_memory()


if __name__ == "__main__":
    main()
