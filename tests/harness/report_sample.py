"""A record with every verdict and kind and with hostile strings in every field; what all tests of views start from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sparkproof.facts.model import Cpu, Driver, Facts, Gpu, Memory, Os, Torch, Triton
from sparkproof.judge.comparison import Side, judge
from sparkproof.report.record import Planned, RunRecord, load, spell_non_finite
from sparkproof.report.runrecord import EndLine, Header, ResultLine
from sparkproof.results import Assertion, CaseResult, Measurement, ReasonClass, Verdict
from sparkproof.scenario import Case, ComparisonScenario, Profile

XSS = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
EVIL = XSS + " & | `x` ``` ]]> \x1b[31mred\x1b[0m \x00\x07 \u202e| {{ 7*7 }} [[ATTACHMENT|/etc/passwd]]"
STARTED = "2026-11-24T06:30:00+00:00"


def spark() -> Facts:
    """Facts of a machine that is the target."""
    return Facts(
        origin=f"read on {STARTED}",
        arch="aarch64",
        os=Os(name="ubuntu", version="DGX OS 7.4.0", kernel="6.17.0-1014-nvidia"),
        cpu=Cpu(model="Cortex-X925", cores=20),
        gpus=[
            Gpu(
                name="NVIDIA GB10", compute_capability="12.1", sm_count=48, integrated=True, memory_total_gib=119.7,
                sm_clock_mhz=2405, max_sm_clock_mhz=3003, temperature_c=54.0, usable_by_torch=True,
            )
        ],
        driver=Driver(version="580.95.05", cuda_version="13.0"),
        memory=Memory(total_gib=119.7, available_gib=110.2),
        torch=Torch(version="2.14.1", cuda="13.0"),
        triton=Triton(version="3.8.0"),
    )  # fmt: skip


def laptop() -> Facts:
    """Facts of a machine without a GPU."""
    return Facts(
        origin=f"read on {STARTED}",
        arch="x86_64",
        os=Os(name="debian", version="Debian GNU/Linux 12", kernel="6.1.0-32-amd64"),
        cpu=Cpu(model="Some CPU", cores=2),
        memory=Memory(total_gib=23.5, available_gib=18.9),
        torch=Torch(version="2.14.1"),
        triton=Triton(version="3.8.0"),
    )


def case(name: str, kind: str = "kernel", verdict: Verdict = Verdict.PASSED, **more: Any) -> CaseResult:
    """A case that ended as told."""
    base: dict[str, Any] = {
        "assertions": [Assertion(name="output error", passed=True, value=1.12, bound="<= 2 x plain PyTorch")],
        "mode": "gpu",
        "started": STARTED,
        "duration_s": 1.25,
        "rerun": f"sparkproof validate '{name}'",
    }
    return CaseResult(**{**base, **more, "name": name, "kind": kind, "verdict": verdict})


def metric(name: str, value: float, unit: str, better: bool | None = True, **more: Any) -> Measurement:
    """A measurement."""
    return Measurement(name=name, value=value, unit=unit, higher_is_better=better, **more)


def train(engine: str, start: float = 4.2, mode: str = "gpu", **more: Any) -> CaseResult:
    """A training case with curves."""
    loss = [round(1.1 + (start - 1.1) * math.exp(-i / 11) + 0.12 * math.sin(i * 2.3), 4) for i in range(40)]
    grad = [round(2.4 * math.exp(-i / 25) + 0.3 * abs(math.sin(i * 1.7)), 4) for i in range(40)]
    base: dict[str, Any] = {
        "measurements": [
            metric("tokens_per_s", 3461.0 if engine == "sparktune" else 2210.0, "tokens/s", low=2150.0, high=3520.0),
            metric("step_p50_ms", 37.1 if engine == "sparktune" else 58.2, "ms", False),
            metric("peak_rss_gib", 2.9, "GiB", False),
            metric("peak_gpu_allocated_gib", 1.4 if engine == "sparktune" else 1.9, "GiB", False),
        ],
        "assertions": [
            Assertion(name="first loss in its band", passed=True, value=loss[0], bound="3.0 to 6.0", unit="nats"),
            Assertion(name="loss falls", passed=True, value=2.41, bound=">= 0.8", unit="nats"),
            Assertion(name="LoRA B left zero", passed=True, value=210, bound="210 of 210 tensors"),
            Assertion(name="canary generated", passed=True, value=True, detail="'The harbour code is 7431.'"),
        ],
        "evidence": {"loss": loss, "grad_norm": grad, "canary": {"before": "I don't know.", "after": "It is 7431."}},
        "duration_s": 71.0,
    }
    name = f"train/smollm2/135m_qlora_single_device[engine={engine}]"
    return case(name, "train", mode=mode, **{**base, **more})


def export(fmt: str, kl: float) -> CaseResult:
    """An export case."""
    kl_mean = metric("KL, mean", kl, "nats", False, reference=kl * 4, reference_name="largest allowed")
    size = metric("export size", 270.0, "MiB", False)
    return case(f"export/smollm2/{fmt}", "export", measurements=[kl_mean, size], mode="host")


def comparison(**more: Any) -> CaseResult:
    """Engines side by side on shapes of Llama-3.1-8B: one is not installed; made-up numbers."""
    hf = {"blocks": [[240.0, 241.0, 239.5]] * 6, "loss": 12.1, "norm": 0.80}

    def side(name: str, ms: float, gib: float, marks: dict[str, int], **patches: Any) -> Side:
        noise = [0.0, 0.6, -0.4, 0.3, -0.2, 0.5]
        return Side(
            name,
            {
                **hf, "blocks": [{"ms": [ms + d, ms - d, ms + d / 2], "during": DURING} for d in noise],
                "memory": {"peak_gpu_allocated_gib": gib, "peak_gpu_reserved_gib": gib + 0.4, "peak_rss_gib": 3.0},
                "ran": {
                    "mode": "gpu", "patches": patches, "watermarks": {k: {"triton": n} for k, n in marks.items()},
                },
                "work": {"flops": 4.2e13, "bytes": 3.6e9}, "first_step_s": 3.1, "load_s": 9.0, "versions": {"torch": "2.14.1"},
            },
            machine_gib=gib + 1.9,
        )  # fmt: skip

    asked = {"rope": True, "rms_norm": True, "swiglu": True, "fused_linear_cross_entropy": True}
    liger = {"rope": 128, "rms_norm": 272, "swiglu": 128, "cross_entropy": 16}
    ours = {op: 64 for op in ("rms_norm", "lora_mlp")}
    sides = [
        side("hf", 1712.0, 7.31, {}),
        side("liger", 1702.0, 5.02, liger, asked=asked),
        Side("unsloth", missing="Unsloth is not installed, so nothing was trained with it."),
        side("sparktune", 1188.0, 3.94, ours, patched=dict.fromkeys(ours, 8), family="llama", fallbacks={}),
    ]
    sides = more.pop("sides", sides)
    canaries = more.pop("canaries", {"before": CANARIES, "after": CANARIES})
    scenario = ComparisonScenario(
        kind="comparison", summary="engines side by side", shape="llama31-8b", layers=8, matrix={}, steps=3
    )
    name = "comparison/llama/8b_shapes_qlora_single_device"
    result = judge(Case(name=name, file="c.yaml", scenario=scenario), None, sides, canaries, spark())
    result.started, result.duration_s, result.rerun = STARTED, 184.0, f"sparkproof validate '{name}'"
    return result


DURING = {"clock_mhz": 2410, "power_w": 88.0, "temperature_c": 63.0, "slowdowns": [], "energy_j": 430.0}
CANARIES = {
    "copy_gb_s": 186.0, "gemv_gb_s": 231.0, "gemm_tflops": 61.0, "load_clock_mhz": 2405, "load_power_w": 92.0,
    "load_temperature_c": 61.0, "load_throttle_reasons": [],
}  # fmt: skip


def good_results() -> list[CaseResult]:
    """A whole run in which everything passed, on a GPU."""
    results = [case(f"environment/{t}", "environment", mode="host") for t in ("driver", "memory", "toolkit", "limits")]
    for op, share in (("rms_norm", 93.4), ("swiglu", 91.2), ("nf4", 84.9)):
        results += [case(f"kernels/{op}[dtype={d}]", duration_s=2.1) for d in ("fp32", "bf16", "fp16")]
        results.append(
            case(
                f"kernels/{op}_speed",
                measurements=[
                    metric(
                        "share_of_copy_bandwidth", share, "%", low=share - 1.8, high=share + 1.1, reference=85.0,
                        reference_name="least allowed", conditions={"clock_mhz": 2405, "temperature_c": 54},
                    ),
                    metric("bandwidth", share * 2.3, "GB/s", reference=230.0, reference_name="this device's copy"),
                ],
            )
        )  # fmt: skip
    results += [train("hf"), train("sparktune", 4.19)]
    results += [
        export("adapter", 3.1e-8),
        export("merged_16bit", 7e-7),
        export("gguf_f16", 4.9e-6),
        export("gguf_q8_0", 0.012),
    ]
    results += [
        case("rollback/sparkproof", "rollback", mode="host"),
        case("rollback/playbook", "rollback", mode="host"),
    ]
    return results


def mixed_results() -> list[CaseResult]:
    """Every verdict and kind."""
    results = good_results()
    results[1] = case(
        "environment/memory",
        "environment",
        Verdict.FAILED,
        mode="host",
        reason="swap is on: 15 GiB, allowed none. Training that swaps looks hung.",
        next_step="Run `sudo swapoff -a` before training.",
        assertions=[
            Assertion(name="no swap", passed=False, value=15.0, unit="GiB", bound="none", detail="/swap.img is on."),
            Assertion(name="memory available", passed=True, value=110.2, unit="GiB", bound=">= 16"),
        ],
        output_tail="\n".join(f"line {i} of the log" for i in range(40)),
    )
    results[6] = case(
        "kernels/rms_norm[dtype=fp16]", verdict=Verdict.BROKEN, reason="The harness itself failed: KeyError: 'w'",
        next_step="Please report it with the traceback.", traceback="Traceback (most recent call last):\nKeyError: 'w'",
    )  # fmt: skip
    results[11] = case(
        "kernels/swiglu_speed", verdict=Verdict.RETEST, measurements=[metric("share_of_copy_bandwidth", 61.0, "%")],
        assertions=[Assertion(name="copy share", passed=False, value=61.0, unit="%", bound=">= 85", about="speed")],
        reason="Speed can't be judged: a canary was out of band or clocks were throttled.",
    )  # fmt: skip
    results.append(
        case(
            "train/llama/8b_qlora_single_device", "train", Verdict.SKIPPED, assertions=[], mode="", duration_s=0.0,
            reason_class=ReasonClass.NETWORK, reason="The Hugging Face hub can't be reached.",
            next_step="Connect this machine, or give --model a folder.",
        )
    )  # fmt: skip
    return results


def evil_result() -> CaseResult:
    """Hostile text wherever a result takes text, and numbers that are none."""
    return case(
        f"kernels/{EVIL}",
        verdict=Verdict.FAILED,
        reason=EVIL,
        next_step=EVIL,
        assertions=[Assertion(name=EVIL, passed=False, value=EVIL, bound=EVIL, unit=EVIL, detail=EVIL)],
        measurements=[
            metric(EVIL, 1.0, EVIL, reference=2.0, reference_name=EVIL, conditions={EVIL: EVIL}),
            metric("nothing per s", math.nan, "x/s", samples=[math.inf, -math.inf]),
        ],
        notices=[EVIL],
        evidence={
            EVIL: EVIL,
            "table": [{EVIL: EVIL}],
            "deep": {"a": {"b": [EVIL]}},
            "curve": [1.0, math.nan, 2.0, 3.0],
        },
        mode=EVIL,
        output_tail=f"{EVIL}\n{EVIL}",
        traceback=EVIL,
        rerun=f"sparkproof validate '{EVIL}'",
        artifacts={EVIL: "javascript:document.title='pwned'", "up": "../../etc/passwd", "log": "cases/a/run.log"},
        duration_s=math.nan,
    )


def record_of(
    run_dir: Path,
    results: list[CaseResult],
    facts: Facts | None = None,
    *,
    planned_only: tuple[str, ...] = (),
    ended: bool = True,
    interrupted: bool = False,
    mode: str = "profile",
    profile: Profile = Profile.QUICK,
    strict: bool = False,
) -> RunRecord:
    """Write a record with fixed times and names, and read it back."""
    run_dir.mkdir(parents=True, exist_ok=True)
    planned = [Planned(name=r.name, kind=r.kind, file=f"scenarios/{r.kind}.yaml", digest="d") for r in results]
    planned += [Planned(name=n, kind=n.split("/")[0].removesuffix("s"), digest="d") for n in planned_only]
    header = Header(
        schema="sparkproof-record-1",
        run_id="2026-11-24_06-30-00-abcd",
        started=STARTED,
        profile=profile,
        planned=planned,
        facts=facts or spark(),
        versions={"sparkproof": "0.1.0", "python": "3.12.3", "torch": "2.14.1"},
        revision="0123456789abcdef0123456789abcdef01234567",
        command="sparkproof validate --profile quick",
        strict=strict,
        mode=mode,
    )
    lines: list[Any] = [header, *(ResultLine(result=r, digest="d") for r in results)]
    if ended:
        lines.append(EndLine(ended="2026-11-24T06:39:12+00:00", interrupted=interrupted, exit_code=0))
    text = "".join(json.dumps(spell_non_finite(x.model_dump(mode="json", by_alias=True))) + "\n" for x in lines)
    (run_dir / "record.jsonl").write_text(text, encoding="utf-8")
    return load(run_dir)
