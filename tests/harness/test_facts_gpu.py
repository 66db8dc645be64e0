"""The trials on a real GPU: they end in time, leave the GPU alive, and find a healthy device healthy."""

from __future__ import annotations

import time

import pytest
import torch
from sparkproof.checks.registry import run_checks
from sparkproof.facts import trials
from sparkproof.facts.collect import collect
from sparkproof.facts.host import Host
from sparkproof.facts.model import Facts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SECONDS = 60


@pytest.fixture(scope="module")
def read() -> tuple[Facts, float]:
    """Facts of this machine with all trials, and the seconds they took."""
    start = time.monotonic()
    return collect(network=False), time.monotonic() - start


def test_it_is_read_in_time_and_without_an_error(read: tuple[Facts, float]) -> None:
    facts, seconds = read
    assert facts.errors == {} and seconds < SECONDS
    assert all(g.usable_by_torch for g in facts.gpus)


def test_the_pipeline_that_fits_runs_and_the_next_is_refused(read: tuple[Facts, float]) -> None:
    found = read[0].tried.shared_memory
    assert found is not None and found.error is None, found
    assert found.fits_ran and found.alive_after and "OutOfResources" in (found.over_raised or "")
    assert found.fits_bytes is not None and found.over_bytes is not None
    assert found.fits_bytes <= found.limit < found.over_bytes


def test_attention_was_tried_in_all_its_cases(read: tuple[Facts, float]) -> None:
    rows = read[0].tried.attention or []
    assert len([r for r in rows if r.backend != "flex"]) == 4 * 3 * 3 * 2
    assert all((r.error is None) != (r.refused is None) for r in rows)
    assert all(r.error is not None for r in rows if r.backend == "math")
    assert [r.refused for r in rows if r.backend == "flex"] == [None, None]


def test_the_canaries_sang(read: tuple[Facts, float]) -> None:
    found = read[0].tried.canaries
    assert found is not None and found.error is None, found
    assert found.copy_gb_s and found.gemv_gb_s and found.gemm_tflops and found.load_clock_mhz
    again = trials.read_canaries(Host())
    assert again.copy_gb_s == pytest.approx(found.copy_gb_s, rel=0.2), "a canary that wanders judges nothing"


def test_what_the_trials_show_is_no_error(read: tuple[Facts, float]) -> None:
    topics = ("gpu", "attention", "bitsandbytes", "triton", "power")
    outcomes = [o for topic in topics for o in run_checks(read[0], topic)]
    assert not [f for o in outcomes for f in o.findings if f.severity == "error"]
    tried = ("gpu.shared_memory_limit", "attention.backends", "attention.flex", "power.clock", "power.canaries")
    assert {o.check: o.state for o in outcomes if o.check in tried and not o.judged} == {}
