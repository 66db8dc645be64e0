"""The real command line over fake runners: `python fake_harness.py validate ...`.

A kernel scenario's `op` says how its case ends. Everything else (catalog, session, pytest, record, views, exit codes) is real.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from sparkproof import controller, run
from sparkproof.facts.model import Cpu, Facts, Memory
from sparkproof.results import Assertion, CaseResult, Measurement, ReasonClass, Verdict
from sparkproof.runners import registry
from sparkproof.runners.base import Context
from sparkproof.scenario import Case

FACTS = Facts(
    origin="constructed for a test", arch="x86_64", cpu=Cpu(cores=1), memory=Memory(total_gib=24.0, available_gib=20.0)
)


def run_case(case: Case, context: Context) -> CaseResult:
    """End as the op's name asks."""
    op = case.scenario.op  # type: ignore[union-attr]
    base = {"name": case.name, "kind": case.kind, "mode": "interpreter"}
    log = os.environ.get("FAKE_LOG")
    if log:
        with Path(log).open("a") as f:
            f.write(f"{case.name}\n")
    good = Assertion(name="error ratio", passed=True, value=1.1, bound="<= 2")
    match op:
        case "fail":
            bad = Assertion(name="dx error ratio", passed=False, value=7.5, bound="<= 2", detail="family outlier")
            verdict, reason = CaseResult.decide([good, bad])
            return CaseResult(
                **base,
                verdict=verdict,
                reason=reason,
                assertions=[good, bad],
                next_step="Look at dx.",
                output_tail="the last line",
            )
        case "break":
            raise RuntimeError("a fault of the harness")
        case "retest":
            slow = Assertion(name="bandwidth", passed=False, about="speed", value=0.4, bound=">= 0.9")
            verdict, reason = CaseResult.decide([good, slow], speed_trusted=False)
            return CaseResult(**base, verdict=verdict, reason=reason, assertions=[good, slow])
        case "skip":
            return CaseResult(**base, verdict=Verdict.SKIPPED, reason_class=ReasonClass.NETWORK, reason="needs the hub")
        case "empty":
            return CaseResult(**base, verdict=Verdict.PASSED)
        case "die":
            os._exit(9)
        case "secret":
            tail = f"using token {os.environ['HF_TOKEN']}"
            return CaseResult(**base, verdict=Verdict.FAILED, reason=tail, assertions=[good], output_tail=tail)
        case "sleep":
            context.progress("sleeping")
            time.sleep(float(os.environ.get("FAKE_SLEEP", "30")))
        case "fill":
            block = context.run_dir / "ballast"
            try:
                with block.open("wb") as f:
                    while True:
                        f.write(b"x" * 65536)
                        f.flush()
            except OSError:
                pass
    speed = Measurement(
        name="tokens_per_s", value=123.4, unit="tokens/s", higher_is_better=True, samples=[120.0, 126.8]
    )
    return CaseResult(**base, verdict=Verdict.PASSED, assertions=[good], measurements=[speed])


def install() -> None:
    """Put the fakes in the place of the kernel runner and of the reading of this machine."""
    module = sys.modules["fake_runner"] = type(sys)("fake_runner")
    module.run = run_case  # type: ignore[attr-defined]
    registry._MODULES["kernel"] = "fake_runner"
    run.collect = controller.collect = lambda *a, **k: FACTS  # type: ignore[assignment]


def pytest_configure() -> None:
    """As a pytest plugin (`-p fake_harness`), also in xdist workers."""
    install()


if __name__ == "__main__":
    install()
    run.EXTRA_PLUGINS.append("fake_harness")  # for xdist's workers; its folder is on PYTHONPATH
    from sparkproof.cli import main

    main()
