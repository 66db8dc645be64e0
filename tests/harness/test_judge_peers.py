"""The peers' bounds: facts with their sources, forms that see what they say they see, and no count without a passing control."""

import dataclasses
import fnmatch
import json
import os
import subprocess
import sys

import pytest
import torch
from sparkproof.judge import peers
from sparkproof.judge.peers import PeerTest
from sparktune.ops import load_op, op_names
from sparktune.ops.spec import OpSpec, Problem

ALL = [t for op in op_names() for t in peers.tests(op)]
CPU = torch.device("cpu")


def test_every_test_is_of_an_op_that_exists():
    assert {t.op for t in peers._read()[1]} <= set(op_names())


@pytest.mark.parametrize("t", ALL, ids=lambda t: f"{t.peer}-{t.op}")
def test_facts_fit_their_op_and_name_their_source(t: PeerTest):
    spec = load_op(t.op)
    assert all(fnmatch.filter(spec.variants, pattern) for pattern in t.variants)
    assert t.source.startswith("https://")
    assert all(len(b) == (2 if t.form == "allclose" else 1) for b in t.bounds.values())
    inputs = spec.inputs(peers._problems(spec, t)[0])
    assert set(t.parameters) <= set(inputs)
    gradients = {f"gradient of {k}" for k, i in inputs.items() if i.grad}
    assert all(c in gradients for c in t.compares if c.startswith("gradient"))


@pytest.mark.parametrize("t", ALL, ids=lambda t: f"{t.peer}-{t.op}")
def test_plain_pytorch_passes_every_bound(t: PeerTest):
    """The reference judged by itself: what no bound may call wrong."""
    spec = load_op(t.op)
    same = dataclasses.replace(spec, call=lambda s, p: spec.reference(s, p, None))
    problems = [p for p in peers._problems(spec, t) if p.dtype == t.dtypes[0]]
    assert len(problems) >= len(t.sizes)
    assert [peers.noticed(t, spec, same, p, CPU) for p in problems] == [""] * len(problems)


def norm_test(**changes) -> tuple[PeerTest, OpSpec, Problem]:
    facts = dict(
        peer="liger", op="rms_norm", bounds={"fp32": [1e-4, 1e-6]}, published="", sizes=[{"rows": 4, "columns": 32}],
        source="https://example.org", variants=["llama"],
    )  # fmt: skip
    t = PeerTest.model_validate(facts | changes)
    spec = load_op("rms_norm")
    return t, spec, peers._problems(spec, t)[0]


def off(spec: OpSpec, by: float) -> OpSpec:
    return dataclasses.replace(spec, call=lambda t, p: spec.reference(t, p, None) + by * t["x"].detach().sign())


def test_allclose_sees_an_error_past_its_bound_and_none_within():
    t, spec, p = norm_test()
    assert peers.noticed(t, spec, off(spec, 1e-2), p, CPU).startswith("out is off by")
    assert peers.noticed(t, spec, off(spec, 1e-6), p, CPU) == ""


def scaled_gradient(spec: OpSpec, by: float) -> OpSpec:
    """Right results, and every gradient of x off by a constant."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy + by

    return dataclasses.replace(spec, call=lambda t, p: spec.reference({**t, "x": Off.apply(t["x"])}, p, None))


@pytest.mark.parametrize(("form", "by", "seen"), [
    ("signed", -1.0, True), ("signed", 1.0, False), ("distance", 1.0, True), ("distance", 1e-4, False),
])  # fmt: skip
def test_a_signed_difference_is_blind_to_one_side(form, by, seen):
    t, spec, p = norm_test(form=form, bounds={"fp32": [0.05]}, compares=["gradient of x"])
    assert bool(peers.noticed(t, spec, scaled_gradient(spec, by), p, CPU)) is seen


def test_weights_of_one_hide_a_wrong_weight_index():
    first = lambda t, p: {**t, "weight": t["weight"][:1].expand_as(t["weight"])}  # noqa: E731
    t, spec, p = norm_test(parameters={"weight": "ones"}, compares=["out"])
    wrong = dataclasses.replace(spec, call=lambda s, q: spec.reference(first(s, q), q, None))
    assert peers.noticed(t, spec, wrong, p, CPU) == ""
    t, spec, p = norm_test(compares=["out"])
    assert peers.noticed(t, spec, wrong, p, CPU)


def test_an_exception_is_noticed():
    t, spec, p = norm_test()
    broken = dataclasses.replace(spec, call=lambda s, q: 1 / 0)
    assert "ZeroDivisionError" in peers.noticed(t, spec, broken, p, CPU)


def test_a_bound_that_the_right_kernel_fails_counts_nothing():
    spec = load_op("rms_norm")
    bounds = peers.Bounds(spec)
    bounds.admit(off(spec, 10.0))
    assert not bounds.kept.get("liger") and len(bounds.left_out["liger"]) == 8
    assert "could be used" in bounds.why_not("liger")
    assert bounds.let_pass(off(spec, 0.0)) == ["unsloth"]  # whose test looks at a gradient alone


def test_no_test_is_said_in_a_sentence():
    assert peers.Bounds(load_op("swiglu")).why_not("unsloth").startswith("Unsloth 2026.10.9 publishes no test")


def test_the_document_counts_what_each_peer_lets_pass():
    code = """
import dataclasses, json
import sparkproof.judge.correctness as judge
from sparkproof.judge import selftest
judge.FAMILIES = judge.FAMILIES[:1]
judge._Trial.users = lambda self, *a: None
judge.promises.laws = lambda *a: None
from sparktune.ops import load_op
spec = load_op("swiglu")
few = {k: v for k, v in spec.sizes.items() if k == "typical"}
wanted = ("relu", "unrounded")
spec = dataclasses.replace(spec, sizes=few, mutants=tuple(m for m in spec.mutants if m.id in wanted))
selftest.load_op = lambda name: spec
print(json.dumps(selftest.one("swiglu")))
"""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["killed"] == row["total"] == 2
    assert row["let_pass"]["liger"] == {"count": 1, "mutants": ["unrounded"], "why": "", "left_out": []}
    assert row["let_pass"]["unsloth"]["count"] is None
    assert "publishes no test" in row["let_pass"]["unsloth"]["why"]
