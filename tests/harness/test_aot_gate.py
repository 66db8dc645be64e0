"""The ahead-of-time gate: it fails what does not fit, and passes what does, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sparkproof.errors import UserError
from sparkproof.judge import aot
from sparkproof.judge.targets import TARGETS

LIMITS = """
import json, sys
from dataclasses import asdict, replace
sys.path.insert(0, {here!r})
import aot_kernels as k
from sparkproof.judge import aot
from sparkproof.judge.aot import judge
from sparkproof.judge.targets import TARGETS
from sparktune.ops.spec import Launch
def launch(kernel, warps, stages=3, **flags):
    tensors = {{n: "*bf16" if n[0] in "ab" and kernel is k.tile else "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}}
    signature = tensors | {{"n": "i32"}} | dict.fromkeys(flags, "constexpr")
    return Launch("planted", kernel.fn.__name__, signature, flags, warps, stages)
def row(kernel, arch, *a, known=None, **f):
    return asdict(judge("planted", launch(kernel, *a, **f), kernel, TARGETS[arch], known))
def family(known):
    shapes = [dict(BLOCK=64, DEPTH=d, stages=2) for d in (32, 64)]
    return [row(k.tile, arch, 4, known=known, **s) for arch in ("sm_121", "sm_120") for s in shapes]
known, compiled = {{}}, []
compile_ = aot._compile
aot._compile = lambda launch, kernel, target: (compiled.append(target.name), compile_(launch, kernel, target))[1]
together = family(known)
full = list(compiled)
wrong = {{key: replace(made, arch="sm_121", ptx=made.ptx.replace("add", "sub")) for key, made in known.items() if len(key) > 2}}
print(json.dumps({{
    "fits": row(k.tile, "sm_121", 8, BLOCK=128, DEPTH=32, stages=2),
    "again": row(k.tile, "sm_121", 8, BLOCK=128, DEPTH=32, stages=2),
    "big": row(k.tile, "sm_121", 8, BLOCK=128, DEPTH=256, stages=1),
    "big_elsewhere": row(k.tile, "sm_90", 8, BLOCK=128, DEPTH=256, stages=1),
    "spills": row(k.crowded, "sm_121", 1, BLOCK=4096),
    "wrong": row(k.tile, "sm_121", 8, BLOCK=100, DEPTH=32),
    "together": together,
    "compiled": full,
    "apart": [row(k.tile, "sm_120", 4, BLOCK=64, DEPTH=d, stages=2) for d in (32, 64)],
    "other": row(k.tile, "sm_120", 4, known=wrong, BLOCK=64, DEPTH=32, stages=2),
}}))
"""


def child(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def planted():
    done = child(LIMITS.format(here=str(Path(__file__).parent)))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_tile_that_fits_passes_with_its_numbers(planted):
    row = planted["fits"]
    assert row["passed"] and not row["reason"]
    assert 0 < row["shared_bytes"] <= row["shared_limit"] == 101376
    assert 0 < row["registers"] <= 255 and row["spills"] == 0


def test_what_was_compiled_for_one_of_a_family_is_assembled_for_the_other_once_that_is_proven(planted):
    assert planted["compiled"] == ["sm_121", "sm_121", "sm_120"]
    plain = [r | {"seconds": 0} for r in planted["together"]]
    assert plain[2:] == [r | {"seconds": 0} for r in planted["apart"]]
    assert [r["arch"] for r in plain] == ["sm_121", "sm_121", "sm_120", "sm_120"] and all(r["passed"] for r in plain)


def test_where_one_of_a_family_gets_other_code_it_says_so(planted):
    assert not planted["other"]["passed"]
    assert "Triton makes other code for sm_120 than for sm_121" in planted["other"]["reason"]


def test_what_lies_in_the_cache_has_the_same_numbers(planted):
    assert planted["again"] | {"seconds": 0} == planted["fits"] | {"seconds": 0}


def test_case_22_too_much_shared_memory_fails_though_it_compiles(planted):
    row = planted["big"]
    assert not row["passed"] and row["shared_bytes"] > 101376
    assert "shared memory" in row["reason"]


def test_limits_are_the_targets_own(planted):
    row = planted["big_elsewhere"]
    assert row["shared_limit"] == 232448 and row["shared_bytes"] is not None
    assert "shared memory" not in row["reason"]


def test_a_kernel_that_spills_fails(planted):
    row = planted["spills"]
    assert not row["passed"] and row["spills"] > 0
    assert "spilled" in row["reason"]


def test_what_does_not_compile_fails_with_the_compilers_words(planted):
    row = planted["wrong"]
    assert not row["passed"] and row["registers"] is None
    assert row["reason"].startswith("does not compile: ") and len(row["reason"]) > 30


def test_every_limit_has_its_sentence():
    target = TARGETS["sm_121"]
    assert aot.excess(255, 0, 101376, 8, target) == ""
    assert "255 are allowed" in aot.excess(256, 0, 0, 1, target)
    assert "registers a block" in aot.excess(255, 0, 0, 16, target)
    assert "4 bytes spilled" in aot.excess(10, 4, 0, 1, target)
    assert aot.excess(300, 8, 200000, 16, target).count(";") == 3


def test_an_interpreting_process_refuses_to_compile():
    code = (
        "from sparkproof.judge.aot import compile_op\nfrom sparkproof.judge.targets import TARGETS\n"
        "from sparktune.ops import load_op\ncompile_op(load_op('swiglu'), TARGETS['sm_121'], {})"
    )
    done = child(code, TRITON_INTERPRET="1")
    assert done.returncode != 0 and "separate processes" in done.stderr


def test_all_configurations_of_ops_are_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # inherited, it must not reach the compiler
    archs, ops = ["sm_121", "sm_90"], ["swiglu", "grad_norm"]
    document = aot.compile_all(archs, ops, dtypes=["bf16"])
    assert document["schema"] == "sparkproof/compile-kernels/1" and document["passed"]
    from sparktune.ops import load_op

    wanted = [
        (op, arch, x.when)
        for op in ops
        for arch in archs
        for x in load_op(op).launches(TARGETS[arch].device)
        if x.dtype == "bf16"
    ]
    assert [(r["op"], r["arch"], r["configuration"]) for r in document["configurations"]] == wanted
    json.dumps(document)


def dealt(monkeypatch, archs, ops):
    """(the document, [ops and targets of each process]) of a run whose processes compile nothing."""
    jobs = []

    def answer(ops, archs, dtypes, **_):
        jobs.append((ops, archs))
        return [{"op": op, "passed": True} for op in ops]

    monkeypatch.setattr(aot, "_in_process", answer)
    return aot.compile_all(archs, ops), sorted(jobs)


def test_one_op_has_a_process_for_each_target(monkeypatch):
    assert dealt(monkeypatch, ["sm_121", "sm_90"], ["swiglu"])[1] == [(["swiglu"], "sm_121"), (["swiglu"], "sm_90")]


def test_ops_share_processes_and_come_back_in_their_order(monkeypatch):
    monkeypatch.setattr(aot, "TOGETHER", 2)
    document, jobs = dealt(monkeypatch, ["sm_121", "sm_90"], ["rope", "geglu", "swiglu"])
    assert jobs == [(["geglu"], "sm_121,sm_90"), (["rope", "swiglu"], "sm_121,sm_90")]
    assert [r["op"] for r in document["configurations"]] == ["rope", "geglu", "swiglu"]


def test_unknown_targets_and_ops_are_named():
    with pytest.raises(UserError, match="Unknown architecture 'sm_999'"):
        aot.compile_all(["sm_999"])
    with pytest.raises(UserError, match="no op called 'gelu'"):
        aot.compile_all(["sm_121"], ["gelu"])
