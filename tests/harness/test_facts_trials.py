"""The trials: what each finds where nothing is wrong, that a planted fault is found, and what a dead child leaves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sparkproof.checks.registry import evaluate
from sparkproof.facts import companions, compile_child, gpu_child, packages_child, trials
from sparkproof.facts.child import WORST
from sparkproof.facts.host import Host, Ran
from sparkproof.facts.toolchain import Triton
from test_checks_logic import change

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


class Scripted(Host):
    """A host whose children say what they are told to."""

    def __init__(self, *lines: dict[str, Any], error: str = "") -> None:
        super().__init__()
        self.ran = Ran(None if error else 0, "\n".join(json.dumps(x) for x in lines) + "\ntorn {", "", error)
        self.asked: list[tuple[str, Sequence[str], Mapping[str, str] | None]] = []

    def run_python(
        self, module: str, timeout_s: float, env: Mapping[str, str] | None = None, args: Sequence[str] = ()
    ) -> Ran:
        self.asked.append((module, args, env))
        return self.ran


# --- compilation, for real


def real_host(**environ: str) -> Host:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    return Host(environ={**kept, **environ})


def test_cold_warm_and_anew_agree_and_the_live_variable_is_proven() -> None:
    found = trials.read_compilation(real_host())
    assert found.error is None and found.target == "sm_121a"
    assert found.cold_binary == found.warm_binary == found.again_binary and len(found.cold_binary or "") == 64
    assert found.live_variables == ["TRITON_PTXAS_BLACKWELL_PATH"], "Triton 3.6 and later"
    assert found.cold_s and found.warm_s


def test_an_assembler_that_fails_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "ptxas"
    broken.write_text(compile_child.FAILING, encoding="utf-8")
    broken.chmod(0o755)
    found = trials.read_compilation(real_host(TRITON_PTXAS_BLACKWELL_PATH=str(broken)))
    assert found.error and found.error.startswith("the cold compilation: ") and found.cold_binary is None


def test_fp4_needs_the_target_with_the_letter() -> None:
    from triton.backends.nvidia import compiler

    live = Triton(version="3.8.0", live_ptxas=compiler.get_ptxas(121).path)
    assert trials.read_fp4(Host(), live, "sm_121a") is True
    assert trials.read_fp4(Host(), live, "sm_121") is False
    assert trials.read_fp4(Host(), live, None) is None
    assert trials.read_fp4(Host(), Triton(live_ptxas="/no/such/ptxas"), "sm_121a") is None


def test_the_pipeline_asks_for_what_the_failure_is_known_by() -> None:
    """98304 bytes fit into a GB10's block and 131072 do not: the published numbers, from the compiler itself."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparkproof.facts.pipeline_kernel import product
types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
signature = types | dict.fromkeys(("BLOCK", "BLOCK_K", "STAGES"), "constexpr")
for stages in (4, 5):
    constants = {"BLOCK": 128, "BLOCK_K": 64, "STAGES": stages}
    source = ASTSource(fn=product, signature=signature, constexprs=constants,
                       attrs={(i,): [["tt.divisibility", 16]] for i in range(4)})
    options = {"num_warps": 8, "num_stages": stages}
    print(triton.compile(source, target=GPUTarget("cuda", 121, 32), options=options).metadata.shared)
"""
    ran = Host(environ=real_host().environ).run([sys.executable, "-c", code], 60, {"PYTHONPATH": ":".join(sys.path)})
    assert ran.out.split() == ["98304", "131072"], ran.error


# --- packages


def test_four_bit_on_the_cpu_gives_back_what_went_in() -> None:
    found = packages_child.four_bit(torch, "cpu")
    assert found["parameter"] == "Params4bit" and found["has_statistics"] is True and "error" not in found
    assert 0.05 < found["relative_error"] < 0.12 and found["product_error"] < 0.01


def test_four_bit_that_gives_back_something_else(monkeypatch: Patch) -> None:
    import bitsandbytes.functional as f

    real = f.dequantize_4bit
    monkeypatch.setattr(f, "dequantize_4bit", lambda *a, **k: real(*a, **k) * 0)
    assert packages_child.four_bit(torch, "cpu")["relative_error"] == 1.0


def test_four_bit_without_a_library_is_an_error_in_one_line(monkeypatch: Patch) -> None:
    import bitsandbytes.functional as f

    def broken(*a: Any, **k: Any) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(f, "quantize_4bit", broken)
    assert packages_child.four_bit(torch, "cpu")["error"] == "RuntimeError: no kernel image is available"


def install(monkeypatch: Patch, name: str, version: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    versions = {name.replace("_", "-"): version, name: version}
    real = packages_child.importlib.metadata.version
    monkeypatch.setattr(packages_child.importlib.metadata, "version", lambda n: versions.get(n) or real(n))


@pytest.mark.parametrize(
    ("kept", "error"),
    [([0, 2], None), ([0, 1, 2], "ArithmeticError: nms kept [0, 1, 2] of three boxes instead of [0, 2]")],
)
def test_torchvision_by_its_boxes(kept: list[int], error: str | None, monkeypatch: Patch, capsys: Capture) -> None:
    ops = types.SimpleNamespace(nms=lambda boxes, scores, bound: torch.tensor(kept))
    install(monkeypatch, "torchvision", "0.27.0", ops=ops)
    packages_child.extensions(torch, "cpu")
    said = trials.merge(capsys.readouterr().out)
    assert said["extensions"] == [{"name": "torchvision", "version": "0.27.0", "error": error}]


def causal(x: Any, w: Any) -> Any:
    return torch.nn.functional.conv1d(x, w.unsqueeze(1), padding=3, groups=8)[..., :32]


@pytest.mark.parametrize(("function", "right"), [(causal, True), (lambda x, w: causal(x, w.flip(-1)), False)])
def test_causal_convolution_by_its_values(function: Any, right: bool, monkeypatch: Patch) -> None:
    install(monkeypatch, "causal_conv1d", "1.6.0", causal_conv1d_fn=function)
    if right:
        packages_child.causal_conv1d(torch, "cpu")
        return
    with pytest.raises(ArithmeticError, match="off by"):
        packages_child.causal_conv1d(torch, "cpu")


def test_flash_attention_by_its_values(monkeypatch: Patch) -> None:
    def right(q: Any, k: Any, v: Any, causal: bool) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    install(monkeypatch, "flash_attn", "2.8.3", flash_attn_func=right)
    packages_child.flash_attn(torch, "cpu")
    install(monkeypatch, "flash_attn", "2.8.3", flash_attn_func=lambda q, k, v, causal: right(q, k, v, False))
    with pytest.raises(ArithmeticError, match="off by"):
        packages_child.flash_attn(torch, "cpu")


def test_selective_scan_by_its_values(monkeypatch: Patch) -> None:
    name = "mamba_ssm.ops.selective_scan_interface"
    for parent in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    module: Any = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    module.selective_scan_fn = lambda u, delta, a, b, c: u.cumsum(-1)
    packages_child.mamba_ssm(torch, "cpu")
    module.selective_scan_fn = lambda u, delta, a, b, c: u
    with pytest.raises(ArithmeticError, match="off by"):
        packages_child.mamba_ssm(torch, "cpu")


def test_what_needs_a_gpu_is_passed_over_without_one(monkeypatch: Patch, capsys: Capture) -> None:
    install(monkeypatch, "xformers", "0.0.33")
    packages_child.extensions(torch, "cpu")
    assert "xformers" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "where"),
    [("it called flash-attn", "extensions"), ("it quantised to 4 bits and back", "four_bit")],
)
def test_a_crash_names_the_package_it_came_in(stage: str, where: str) -> None:
    found = trials.read_packages_tried(Scripted({"stage": stage}, error="exit code -11"))
    part = getattr(found, where)
    assert "exit code -11" in part[0].error and stage in part[0].error


def test_a_crash_before_any_package_is_the_probes_own() -> None:
    with pytest.raises(RuntimeError, match="it imported torch"):
        trials.read_packages_tried(Scripted({"stage": "it imported torch"}, error="no answer within 30 s"))


# --- the GPU's children, on the CPU


@pytest.fixture
def on_cpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def sdpa(q: Any, k: Any, v: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_right_backend_is_right_both_ways(on_cpu: None) -> None:
    rows = gpu_child.Case(torch, 64, torch.float32).rows(sdpa)
    assert [r["direction"] for r in rows] == ["forward", "backward"] and all(r["error"] < 1e-5 for r in rows)
    assert all(r["error"] < 0.01 for r in gpu_child.Case(torch, 64, torch.bfloat16).rows(sdpa))


def test_a_backend_without_its_mask_is_wrong(on_cpu: None) -> None:
    def unmasked(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert all(r["error"] > 0.1 for r in gpu_child.Case(torch, 64, torch.float32).rows(unmasked))


def test_a_wrong_gradient_and_zeros_are_wrong(on_cpu: None) -> None:
    def detached(q: Any, k: Any, v: Any) -> Any:
        return sdpa(q, k.detach() + 0 * k, v)

    forward, backward = gpu_child.Case(torch, 64, torch.float32).rows(detached)
    assert forward["error"] < 1e-5 and backward["error"] > 0.5
    zeros = gpu_child.Case(torch, 64, torch.float32).rows(lambda q, k, v: sdpa(q, k, v) * 0)
    assert zeros[0]["error"] == 1.0


def test_refusals_and_nans(on_cpu: None) -> None:
    def refuse(q: Any, k: Any, v: Any) -> Any:
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    rows = gpu_child.Case(torch, 64, torch.float32).rows(refuse)
    assert [r["refused"] for r in rows] == ["RuntimeError: No available kernel. Aborting execution."] * 2
    nan = gpu_child.Case(torch, 64, torch.float32).rows(lambda q, k, v: sdpa(q, k, v) * math.nan)
    assert nan[0]["error"] == WORST and json.loads(json.dumps(nan)) == nan


def test_the_whole_matrix_of_backends(on_cpu: None, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(gpu_child, "HEAD_SIZES", (64,))
    gpu_child.attention(torch)
    rows = trials.merge(capsys.readouterr().out)["attention"]
    assert len(rows) == 3 * 4 * 2
    math_rows = [r for r in rows if r["backend"] == "math"]
    assert all(r["error"] < 0.02 for r in math_rows)
    assert {r["backend"] for r in rows} == {"flash", "efficient", "cudnn", "math"}


def test_a_convolution(on_cpu: None, monkeypatch: Patch) -> None:
    assert gpu_child.convolution(torch) == {"convolution": True, "convolution_error": None}
    real = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, w: real(x, w) * (1 if x.dtype.itemsize == 8 else 0))
    assert gpu_child.convolution(torch)["convolution_error"] == "off by 1"


OUT_OF_RESOURCES = "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes"


class OutOfResources(Exception):
    pass


class Pipeline:
    """As much of pipeline_kernel as the trial asks, for a device whose real limit is `limit`."""

    BLOCK, BUFFER_BYTES = 128, 32768

    def __init__(self, limit: int = 101376, harm: bool = False, wrong: bool = False) -> None:
        self.limit, self.harm, self.wrong, self.harmed = limit, harm, wrong, False

    def shared_bytes(self, a: Any, b: Any, stages: int) -> int:
        return max(1, stages - 1) * self.BUFFER_BYTES

    def launch(self, a: Any, b: Any, stages: int) -> Any:
        if self.harmed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.shared_bytes(a, b, stages) > self.limit:
            self.harmed = self.harm
            raise OutOfResources(OUT_OF_RESOURCES)
        return (a.float() @ b.float()) * (0 if self.wrong else 1)


def shared(monkeypatch: Patch, pipeline: Pipeline, promised: int = 101376) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "sparkproof.facts.pipeline_kernel", pipeline)  # type: ignore[arg-type]
    monkeypatch.setattr("sparkproof.facts.pipeline_kernel", pipeline, raising=False)
    properties = types.SimpleNamespace(shared_memory_per_block_optin=promised)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return gpu_child.shared_memory(torch)


def test_shared_memory_of_a_gb10(on_cpu: None, monkeypatch: Patch) -> None:
    found = shared(monkeypatch, Pipeline())
    assert (found["fits_bytes"], found["fits_ran"], found["over_bytes"]) == (98304, True, 131072)
    assert found["over_raised"].startswith("OutOfResources: out of resource") and found["alive_after"] is True


def test_shared_memory_follows_the_device(on_cpu: None, monkeypatch: Patch) -> None:
    found = shared(monkeypatch, Pipeline(232448), promised=232448)
    assert (found["fits_bytes"], found["over_bytes"]) == (229376, 262144)


def test_shared_memory_that_is_not_given_not_refused_or_harms(on_cpu: None, monkeypatch: Patch) -> None:
    less = shared(monkeypatch, Pipeline(65536))
    assert less["fits_ran"] is False and "OutOfResources" in less["error"]
    assert shared(monkeypatch, Pipeline(wrong=True))["fits_ran"] is False
    assert "over_raised" not in shared(monkeypatch, Pipeline(10**9))
    harmed = shared(monkeypatch, Pipeline(harm=True))
    assert harmed["alive_after"] is False and "illegal memory access" in harmed["error"]


def test_flex_runs_compiled_with_heads_of_256(on_cpu: None, monkeypatch: Patch) -> None:
    module: Any = types.ModuleType("flex")
    module.create_block_mask = lambda *a, **k: "mask"
    module.flex_attention = lambda q, k, v, block_mask: sdpa(q, k, v)
    monkeypatch.setattr(gpu_child.importlib, "import_module", lambda name: module)
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    rows = gpu_child.flex(torch)
    assert compiled and [(r["backend"], r["head_size"], r["direction"]) for r in rows] == [
        ("flex", 256, "forward"),
        ("flex", 256, "backward"),
    ]
    assert all(r["error"] < 0.02 for r in rows)


# --- children that die


def test_a_crash_in_one_backend_keeps_the_others() -> None:
    row = {"backend": "flash", "dtype": "bf16", "head_size": 64, "direction": "forward", "error": 0.003}
    shared_memory = {"limit": 101376, "fits_bytes": 98304, "fits_ran": True}
    stage = "it tried efficient attention in fp32 with heads of 64"
    host = Scripted(
        {"convolution": True, "shared_memory": shared_memory, "attention": [row], "stage": stage}, error="died"
    )
    found = trials.read_kernels(host)
    assert found.convolution is True and found.shared_memory is not None and found.shared_memory.fits_ran
    assert found.attention is not None and len(found.attention) == 2
    lost = found.attention[1]
    assert (lost.backend, lost.dtype, lost.head_size) == ("efficient", "fp32", 64) and "died" in (lost.refused or "")


@pytest.mark.parametrize(("stage", "convolution"), [("it ran a convolution", False), ("it imported torch", None)])
def test_a_crash_before_the_kernels(stage: str, convolution: bool | None) -> None:
    found = trials.read_kernels(Scripted({"stage": stage}, error="died"))
    assert found.convolution is convolution and found.attention is None
    assert found.shared_memory is not None and "died" in (found.shared_memory.error or "")


def test_flex_gets_caches_of_its_own_and_a_hang_is_a_refusal() -> None:
    host = Scripted({"stage": "it compiled flex_attention with heads of 256"}, error="no answer within 35 s")
    found = trials.read_flex(host)
    assert [r.direction for r in found] == ["forward", "backward"] and "no answer" in (found[0].refused or "")
    env = host.asked[0][2]
    assert env is not None and {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} <= set(env)
    assert not Path(env["TRITON_CACHE_DIR"]).parent.exists(), "the folder ends with the trial"


def test_no_child_changes_a_cache_of_the_user(tmp_path: Path) -> None:
    """The compile child writes only below the folder that it is given."""
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    folder.mkdir()
    env = {**real_host().environ, "HOME": str(home), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-m", "sparkproof.facts.compile_child", "cold", str(folder)]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
    assert not list(home.iterdir()) and (folder / "cache").is_dir()


def test_a_gpu_that_torch_cannot_use_is_not_touched_again() -> None:
    host = Scripted({"four_bit": [{"device": "cpu"}]}, {"done": True})
    trials.read_packages_tried(host, visible=False)
    env = host.asked[0][2]
    assert env is not None and env["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "read",
    [
        trials.read_packages_tried,
        trials.read_canaries,
        trials.read_kernels,
        trials.read_flex,
        companions.import_unsloth,
    ],
)
def test_every_trial_has_caches_of_its_own(read: Any) -> None:
    host = Scripted({"attention": [], "done": True})
    read(host)
    env = host.asked[0][2]
    assert env is not None
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        assert not Path(env[name]).parent.exists(), "it ended with the trial"


def test_children_leave_no_byte_code_and_no_entry_in_the_drivers_cache(monkeypatch: Patch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Host, "run", lambda self, argv, timeout_s, env=None: seen.append(env) or Ran(0))
    Host().run_python("x", 1)
    assert seen[0]["PYTHONDONTWRITEBYTECODE"] == seen[0]["CUDA_CACHE_DISABLE"] == "1"


def test_canaries_that_hang_say_where() -> None:
    said = {"canaries": {"copy_gb_s": 187.0}, "stage": "it loaded the GPU"}
    found = trials.read_canaries(Scripted(said, error="no answer within 25 s"))
    assert found.copy_gb_s == 187.0
    assert found.error == "the trial stopped while it loaded the GPU: no answer within 25 s"


# --- whole children on the CPU, read by the parent: what one says the other must take


class Said(Scripted):
    """A host whose child said this text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ran = Ran(0, text)


def test_the_kernels_child_from_end_to_end(on_cpu: None, monkeypatch: Patch, capsys: Capture) -> None:
    shared(monkeypatch, Pipeline())
    monkeypatch.setattr(gpu_child, "HEAD_SIZES", (64,))
    gpu_child.main("kernels")
    found = trials.read_kernels(Said(capsys.readouterr().out))
    assert found.convolution is True and found.shared_memory is not None and found.shared_memory.alive_after
    assert found.attention is not None and len(found.attention) == 24
    assert {r.backend for r in found.attention if r.error is not None} >= {"math"}
    facts = change("gb10_healthy")
    facts.tried = found
    assert evaluate("gpu.shared_memory_limit", facts).state == "ok"
    assert all("off by" not in f.evidence for f in evaluate("attention.backends", facts).findings)


def test_the_kernels_child_without_the_property_says_so(on_cpu: None, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace())
    monkeypatch.setattr(gpu_child, "HEAD_SIZES", ())
    gpu_child.main("kernels")
    found = trials.read_kernels(Said(capsys.readouterr().out))
    assert found.shared_memory is not None and "does not tell" in (found.shared_memory.error or "")


def test_the_flex_child_from_end_to_end(on_cpu: None, monkeypatch: Patch, capsys: Capture) -> None:
    module: Any = types.ModuleType("flex")
    module.create_block_mask = lambda *a, **k: "mask"
    module.flex_attention = lambda q, k, v, block_mask: sdpa(q, k, v)
    monkeypatch.setattr(gpu_child.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    gpu_child.main("flex")
    assert [r.error is not None for r in trials.read_flex(Said(capsys.readouterr().out))] == [True, True]

    def too_large(q: Any, k: Any, v: Any, block_mask: Any) -> Any:
        raise OutOfResources("No valid triton configs.\nout of resource: Required: 114688 Hardware limit: 101376")

    module.flex_attention = too_large
    gpu_child.main("flex")
    refused = trials.read_flex(Said(capsys.readouterr().out))
    assert all("Required: 114688 Hardware limit: 101376" in (r.refused or "") for r in refused)
    del module.create_block_mask
    gpu_child.main("flex")
    assert "AttributeError" in (trials.read_flex(Said(capsys.readouterr().out))[0].refused or "")


def test_the_real_flex_attention_takes_this_mask_and_is_right(on_cpu: None) -> None:
    """The mask and the call fit the real flex_attention, uncompiled and on the CPU."""
    module = gpu_child.importlib.import_module("torch.nn.attention.flex_attention")
    size = gpu_child.LENGTH
    mask = module.create_block_mask(lambda b, h, q, k: q >= k, None, None, size, size, device="cpu")
    case = gpu_child.Case(torch, 64, torch.float32)
    case.inputs = [t.requires_grad_(False) for t in case.inputs]
    with torch.no_grad():
        y = module.flex_attention(*case.inputs, block_mask=mask)
    assert gpu_child.relative(y, case.want) < 1e-5


def test_the_packages_child_from_end_to_end(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setitem(vars(torch), "compile", torch.compile)  # put back after the child's own change
    ops = types.SimpleNamespace(nms=lambda boxes, scores, bound: torch.tensor([0, 2]))
    install(monkeypatch, "torchvision", "0.27.0", ops=ops)
    packages_child.main()
    found = trials.read_packages_tried(Said(capsys.readouterr().out))
    assert found.extensions[0].error is None and found.four_bit[0].parameter == "Params4bit"
