"""What a runner gets, and how it starts work in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparkproof.facts.model import Facts
from sparkproof.results import CaseResult
from sparkproof.runners.process import Outcome, run_process
from sparkproof.scenario import Case


@dataclass
class Context:
    """The surroundings of one case."""

    run_dir: Path
    facts: Facts
    cache_dir: Path
    memory_floor_gib: float
    progress: Callable[[str], None] = lambda text: None
    cases: dict[str, Case] = field(default_factory=dict)
    strict: bool = False

    def case_dir(self, case: Case) -> Path:
        """Folder of this case's own files, made on first use: `<run>/cases/<slug>`."""
        path = self.run_dir / "cases" / case.slug
        path.mkdir(parents=True, exist_ok=True)
        return path

    def spawn(
        self,
        entry: str,
        payload: dict[str, Any],
        *,
        case: Case,
        phase: str,
        timeout_s: float,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> Outcome:
        """Run `module:function` with `payload` in a fresh process under the timeout and the memory watchdog.

        The function takes the payload and returns a dict that JSON can carry. Output goes to
        `<case_dir>/<phase>.log`; `Outcome` says how it ended. See `sparkproof.runners.child`. `python` is another
        environment's, which must find this package.
        """
        return run_process(
            [python, "-m", "sparkproof.runners.child", entry],
            payload,
            work_dir=self.case_dir(case),
            phase=phase,
            timeout_s=timeout_s,
            floor_gib=self.memory_floor_gib,
            env={**os.environ, **(env or {})},
            progress=self.progress,
        )


class Runner(Protocol):
    """One a kind; found by `sparkproof.runners.registry`."""

    def __call__(self, case: Case, context: Context) -> CaseResult:
        """Run the case to its end and say what was seen; raise only for faults of the harness itself."""
        ...
