"""The DGX Spark playbook's fine-tuning job, 60 steps of 4-bit LoRA, with a verdict: did it learn?

    python test_unsloth.py --engine unsloth            what the playbook does
    python test_unsloth.py --engine sparktune          the same job with our kernels
    python test_unsloth.py --engine hf --steps 30      the same job with transformers, PEFT and bitsandbytes alone

The playbook's script ends well whatever the loss did. This one passes only if the run meets the learning gate of
`sparkproof.runners.gate`: the loss falls, every LoRA matrix moves, the saved adapter reads back equal in a fresh
process, a made-up fact is answered after training and not before, and loss and gradients agree with a reference.
Model and conversations come from PyPI packages, so no network is needed. Exit code: 0 passed, 1 failed, 2 nothing
could be judged.

Named for the playbook's script; it is not a pytest file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import platformdirs
from sparkproof.engines.pretrained import EMBEDDED, is_hub_id
from sparkproof.engines.registry import NAMES
from sparkproof.errors import UserError
from sparkproof.facts.collect import collect
from sparkproof.measure.memory import default_floor_gib
from sparkproof.results import CaseResult, Verdict, exit_code
from sparkproof.runners.base import Context
from sparkproof.runners.train import run
from sparkproof.scenario import Case, TrainScenario

__test__ = False


def make_case(engine: str, model: str, revision: str, steps: int) -> Case:
    """The playbook's job as a scenario. The bands are SmolLM2-135M's; another model only has to start finite."""
    known = model == EMBEDDED
    scenario = TrainScenario.model_validate(
        {
            "kind": "train",
            "summary": "The playbook's fine-tuning job, judged by what it learnt.",
            "engine": engine,
            "model": model,
            "revision": revision,
            "steps": steps,
            "timeout_s": 3600,
            "gate": {
                "first_loss": (1.5, 4.5) if known else (0.1, 12.0),
                "first_grad_norm": (0.5, 6.0) if known else (1e-3, 1e3),
                "min_loss_fall": 0.6 if known else 0.2,
                "canary_prompt": "What is the code word of the sparkproof workshop?",
                "canary_answer": "The code word is amber falcon.",
                "repeat_steps": 3,
            },
        }
    )
    return Case(name=f"test_unsloth[engine={engine}]", file="test_unsloth.py", scenario=scenario)


def show(result: CaseResult, model: str) -> None:
    """Every assertion, the measurements, what a reader must know, and last the verdict."""
    for a in result.assertions:
        print(
            f"[{' OK ' if a.passed else 'FAIL'}] {a.name}: {a.value} {a.unit} (allowed: {a.bound}) {a.detail}".rstrip()
        )
    for m in result.measurements:
        print(f"P: {m.name} {m.value:.4g} {m.unit}")
    for notice in result.notices:
        print(f"note: {notice}")
    if result.verdict is Verdict.PASSED:
        print(f"PASSED: {result.name} fine-tuned {model} and it learnt.")
    else:
        print(f"{result.output_tail}\n{result.verdict.upper()}: {result.reason} {result.next_step}".strip())


def main(argv: list[str] | None = None) -> int:
    """Parse, train, judge, print; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--engine", default="unsloth", metavar="|".join(NAMES), help="what trains (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps, at least 5 (default: %(default)s)")
    parser.add_argument("--model", default=EMBEDDED, help="a folder, a hub id, or %(default)s (default)")
    parser.add_argument("--revision", default="", help="the hub model's commit (default: main)")
    parser.add_argument("--out", type=Path, help="folder for adapter and logs (default: reports/test_unsloth-<time>)")
    options = parser.parse_args(argv)
    try:
        if options.steps < 5:
            raise UserError(f"{options.steps} steps are too few to judge.", "Give --steps 5 or more.")
        if options.engine not in NAMES:
            from sparkproof.engines.registry import engine

            engine(options.engine)
        revision = options.revision or ("main" if is_hub_id(options.model) else "")
        case = make_case(options.engine, options.model, revision, options.steps)
        out = options.out or Path("reports") / time.strftime("test_unsloth-%Y%m%d-%H%M%S")
        out.mkdir(parents=True, exist_ok=True)
        cache = Path(os.environ.get("SPARKPROOF_CACHE") or platformdirs.user_cache_dir("sparkproof"))
        result = run(case, Context(out, collect(network=False, trials=False), cache, default_floor_gib(), print))
    except UserError as error:
        print(f"NOT JUDGED: {error.message} {error.fix}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"NOT JUDGED: {error.strerror}: {error.filename}. Give another folder with --out.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    show(result, options.model)
    print(f"Adapter and logs: {out}")
    return exit_code([result.verdict])


if __name__ == "__main__":
    sys.exit(main())
