"""References against the libraries they stand for, the reference route, wrong arguments, and the contract's own rules."""

import os
import subprocess
import sys

import pytest
import torch
from sparktune.ops import dequantize_4bit, dispatch, load_op, op_names, rms_norm, swiglu
from sparktune.ops.device import INTERPRETER, SPARK, DeviceProperties
from sparktune.ops.row_config import RowConfig
from sparktune.ops.spec import Mutant


def test_ops_are_found_by_scanning():
    assert {"dequantize_4bit", "rms_norm", "swiglu"} <= set(op_names())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_and_gemma_references_are_transformers(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, w = torch.randn(3, 5, 48).to(dtype), torch.randn(48).to(dtype)
    for cls, variant in ((LlamaRMSNorm, "llama"), (Gemma3RMSNorm, "gemma")):
        module = cls(48, eps=1e-6).to(dtype)
        with torch.no_grad():
            module.weight.copy_(w)
        assert torch.equal(rms_norm.reference(x, w, 1e-6, variant), module(x))


def test_the_table_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    ours = torch.tensor(dequantize_4bit.NF4)
    assert torch.equal(ours, functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(dequantize_4bit.FP4), functional.get_4bit_type("fp4", device="cpu"))
    assert list(dequantize_4bit.NF4) == sorted(dequantize_4bit.NF4) and dequantize_4bit.NF4[7] == 0


def test_without_gpu_or_interpreter_the_reference_runs_and_is_counted():
    code = (
        "import torch\nfrom sparktune.ops import dispatch\nfrom sparktune.ops.swiglu import swiglu, reference\n"
        "a = torch.randn(3, 8, requires_grad=True)\ny = swiglu(a, a)\nassert torch.equal(y, reference(a, a))\n"
        "g, = torch.autograd.grad(y.sum(), a, create_graph=True)\ng.sum().backward()\n"
        "assert dispatch.watermarks() == {'swiglu': {'triton': 0, 'interpreter': 0, 'reference': 1}}\n"
        "assert dispatch.launches() == {}\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: rms_norm.rms_norm(torch.ones(2, 4), torch.ones(3)), r"weight must be \[4\]"),
        (lambda: rms_norm.rms_norm(torch.ones(2, 4), torch.ones(4), variant="t5"), "llama, gemma"),
        (lambda: rms_norm.rms_norm(torch.ones(2, 4).double(), torch.ones(4)), "fp32, bf16 or fp16"),
        (lambda: rms_norm.rms_norm(torch.ones(2, 4), torch.ones(4, device="meta")), "on one device"),
        (lambda: swiglu.swiglu(torch.ones(2, 4), torch.ones(2, 5)), "one shape"),
        (lambda: swiglu.swiglu(torch.ones(2, 4), torch.ones(2, 4).bfloat16()), "both be"),
        (
            lambda: dequantize_4bit.dequantize_4bit(BYTES, ONE, 48, (4, 16), torch.float32),
            "blocksize must be one of 32",
        ),
        (
            lambda: dequantize_4bit.dequantize_4bit(BYTES, ONE, 64, (4, 17), torch.float32),
            "needs 34 bytes of codes and 2 scales",
        ),
        (lambda: dequantize_4bit.dequantize_4bit(BYTES, ONE, 64, (4, 16), torch.float64), "dtype must be"),
        (lambda: dequantize_4bit.dequantize_4bit(BYTES, ONE.half(), 64, (4, 16), torch.float32), "flat scales must be"),
        (
            lambda: dequantize_4bit.dequantize_4bit(BYTES, ONE.requires_grad_(), 64, (4, 16), torch.float32),
            "no gradient",
        ),
    ],
)
def test_wrong_arguments_get_a_sentence(call, match):
    with pytest.raises(ValueError, match=match):
        call()


BYTES, ONE = torch.zeros(32, dtype=torch.uint8), torch.ones(1)


@pytest.mark.parametrize("op", op_names())
def test_every_launch_names_its_kernels_arguments(op):
    spec = load_op(op)
    module = sys.modules[f"sparktune.ops.{op}"]
    launches = spec.launches(SPARK)
    assert launches
    for launch in launches:
        names = getattr(module, launch.kernel).arg_names
        assert set(names) == set(launch.signature), launch.when
        assert set(launch.constexprs) == {n for n, t in launch.signature.items() if t == "constexpr"}
    said = [(x.kernel, x.when, x.dtype, x.variant) for x in launches]
    assert len(said) == len(set(said))


@pytest.mark.parametrize("props", [SPARK, INTERPRETER, DeviceProperties(40, 101376, 1536, 2**24, 121)])
@pytest.mark.parametrize("n", [1, 63, 512, 1024, 1025, 1536, 2560, 2880, 3584, 5120, 5376, 7168, 8192, 8193, 262144])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_every_width_gets_a_configuration_that_the_gate_compiled(op, props, n):
    gate = set()
    for launch in load_op(op).launches(SPARK):
        x = launch.constexprs
        gate.add((launch.kernel.split("_")[0], x["BLOCK"], x["PIECES"], x["WHOLE"], launch.num_warps))
    for sums, kernel in ((False, "forward"), (False, "backward"), (True, "backward")):
        c = RowConfig.choose(4096, n, props, sums, cut=kernel == "backward" or op == "rms_norm")
        assert (kernel, c.block, c.pieces, c.whole, c.num_warps) in gate
        assert c.pieces * c.block == n if c.whole else not c.pieces or c.block >= n > 0
        assert not (sums and c.pieces > 1), "sums are kept for one piece"


@pytest.mark.parametrize("op", op_names())
def test_mutants_are_many_and_told_apart(op):
    mutants = load_op(op).mutants
    assert len(mutants) >= 8 and len({m.id for m in mutants}) == len(mutants)


def test_a_table_entry_that_is_not_whole_is_an_error():
    with pytest.raises(ValueError, match="broken"):
        Mutant.table("broken: no edit")


def test_routes_refuse_unknown_devices():
    with pytest.raises(ValueError, match="one device"):
        dispatch.route("x", torch.ones(1), torch.ones(1, device="meta"))
