"""Every way of not learning must be caught; a run that learnt must pass."""

import copy
import math

import pytest
from sparkproof.results import CaseResult, Verdict
from sparkproof.runners import gate
from sparkproof.runners.gate_evidence import Evidence
from sparkproof.runners.parity import rms
from sparkproof.scenario import TrainScenario

OPS = ("rms_norm", "lora_mlp")


def scenario(**changes):
    return TrainScenario.model_validate(
        {
            "kind": "train",
            "summary": "made-up numbers for the gate",
            "steps": 10,
            "gate": {
                "first_loss": [2, 5],
                "first_grad_norm": [0.1, 10],
                "min_loss_fall": 0.5,
                "canary_prompt": "q",
                "canary_answer": "amber falcon 7319",
                "repeat_steps": 3,
            },
            **changes,
        }
    )


def good(engine="hf", mode="host"):
    tensors = {f"layers.0.q_proj.lora_{ab}": f"digest {ab}" for ab in "AB"}
    loss = [4.0, 3.8, 3.5, 3.2, 3.0, 2.8, 2.6, 2.4, 2.2, 2.0]
    norm = [1.0 + i / 10 for i in range(10)]
    way = {"gpu": "triton", "reference": "reference"}.get(mode, "reference")
    counts = dict.fromkeys(("triton", "interpreter", "reference"), 0) | {way: 7}
    return Evidence(
        run={
            "loss": loss,
            "grad_norm": norm,
            "held_out_before": 4.0,
            "held_out_after": 3.0,
            "lora": {
                "targeted": 1,
                "without_lora": [],
                "tensors": 2,
                "frozen": [],
                "b_zero": [],
                "other_trainable": [],
            },
            "tensors_before": dict.fromkeys(tensors, "digest before"),
            "base_before": "x",
            "base_after": "x",
            "canary_before": "I do not know.",
            "canary_after": "The word is amber falcon 7319.",
            "tensors": tensors,
            "promises_repeat": True,
            "data": {"digest": "d", "misplaced": 0, "fewest_learnt": 3},
            "ran": {
                "mode": mode,
                "watermarks": {op: dict(counts) for op in OPS} if engine == "sparktune" else {},
                "patches": {"patched": dict.fromkeys((*OPS, "documents"), 2)} if engine == "sparktune" else {},
            },
        },
        again={
            "tensors": dict(tensors),
            "logits_equal": True,
            "logits_difference": 0.0,
            "repeat": {"loss": loss[:3], "grad_norm": norm[:3]},
            "data": {"digest": "d"},
            "gradients": {
                "fp32": {
                    "loss": 4.0,
                    "token_losses": [3.0, 5.0],
                    "fed": {way: {"loss": 1e-6, "relative": 1e-6} for way in ("packed", "accumulated")},
                    "merged": {"distance": 1e-6, "effect": 0.5},
                }
            },
        },
        parity={
            "reference": "hf",
            "bf16": None,
            "fp32": {
                "loss": 4.0,
                "reference_loss": 4.001,
                "token_rms": 1e-6,
                "relative": 1e-6,
                "worst": "layers.0.q_proj.lora_A",
                "worst_relative": 1e-6,
                "zero": [],
                "tensors": 2,
                "names_differ": [],
            },
        },
    )


def verdict(seen, **changes):
    return CaseResult.decide(gate.judge(scenario(**changes), seen))


def missed(seen, **changes):
    return [a.name for a in gate.judge(scenario(**changes), seen) if not a.passed]


@pytest.mark.parametrize(("engine", "mode"), [("hf", "host"), ("sparktune", "reference"), ("sparktune", "gpu")])
def test_a_run_that_learnt_passes(engine, mode):
    assert verdict(good(engine, mode), engine=engine) == (Verdict.PASSED, "")


def put(path, value):
    """A fault: the value at run.<...>, again.<...> or parity.<...> becomes another."""

    def fault(seen):
        part, *keys = path.split(".")
        target = getattr(seen, part)
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value(target[keys[-1]]) if callable(value) else value

    return fault


def at(index, value):
    return lambda old: [*old[:index], value, *old[index + 1 :]]


FAULTS = {
    "flat loss": (put("run.loss", [4.0] * 10), "loss fall"),
    "rising loss": (put("run.loss", lambda old: [4.0, *old[:0:-1]]), "loss fall"),
    "NaN that recovers": (put("run.loss", at(5, math.nan)), "not finite"),
    "infinite norm that recovers": (put("run.grad_norm", at(5, math.inf)), "not finite"),
    "NaN from the start": (put("run.loss", at(0, math.nan)), "first loss"),
    "NaN at the end": (put("run.loss", at(9, math.nan)), "loss fall"),
    "first loss too low": (put("run.loss", at(0, 0.1)), "first loss"),
    "first loss too high": (put("run.loss", at(0, 10.8)), "first loss"),
    "no gradient": (put("run.grad_norm", at(0, 0.0)), "first gradient norm"),
    "gradient too large": (put("run.grad_norm", at(0, 1e4)), "first gradient norm"),
    "steps missing": (put("run.loss", lambda old: old[:9]), "steps done"),
    "no steps": (put("run.loss", []), "steps done"),
    "learnt by heart only": (put("run.held_out_after", 4.5), "held out"),
    "held-out loss NaN": (put("run.held_out_after", math.nan), "held out"),
    "LoRA B still zero": (put("run.lora.b_zero", ["layers.0.q_proj.lora_B"]), "still zero"),
    "module without LoRA": (put("run.lora.without_lora", ["layers.1.q_proj"]), "without LoRA"),
    "nothing targeted": (put("run.lora.targeted", 0), "LoRA tensors"),
    "half the tensors": (put("run.lora.tensors", 1), "LoRA tensors"),
    "base trained too": (put("run.lora.other_trainable", ["lm_head"]), "other than LoRA"),
    "LoRA frozen": (put("run.lora.frozen", ["layers.0.q_proj.lora_B"]), "frozen"),
    "a tensor that never moved": (
        put("run.tensors_before", lambda old: old | {"layers.0.q_proj.lora_A": "digest A"}),
        "no step",
    ),
    "labels misplaced": (put("run.data.misplaced", 1), "token at their place"),
    "a step without labels": (put("run.data.fewest_learnt", 0), "fewest tokens"),
    "loss of other labels": (put("again.gradients.fp32.loss", 4.01), "own logits"),
    "no token has a loss": (put("again.gradients.fp32.token_losses", []), "own logits"),
    "packed rows see each other": (put("again.gradients.fp32.fed.packed.relative", 0.1), "packed"),
    "packed loss apart": (put("again.gradients.fp32.fed.packed.loss", 0.1), "packed"),
    "packed NaN": (put("again.gradients.fp32.fed.packed.relative", math.nan), "packed"),
    "accumulated with a wrong scale": (put("again.gradients.fp32.fed.accumulated.relative", 1.0), "accumulated"),
    "accumulated loss apart": (put("again.gradients.fp32.fed.accumulated.loss", 4.0), "accumulated"),
    "merged model differs": (put("again.gradients.fp32.merged.distance", 0.011), "merged"),
    "merged model is NaN": (put("again.gradients.fp32.merged.distance", math.nan), "merged"),
    "an adapter without effect": (put("again.gradients.fp32.merged", {"distance": 0.0, "effect": 0.0}), "merged"),
    "base changed": (put("run.base_after", "y"), "frozen base"),
    "canary known before": (put("run.canary_before", "It is amber falcon 7319"), "canary before"),
    "canary not learnt": (put("run.canary_after", "It is amber falcon 7318"), "canary after"),
    "canary empty": (put("run.canary_after", ""), "canary after"),
    "adapter differs": (put("again.tensors", lambda old: old | {"layers.0.q_proj.lora_A": "?"}), "read back different"),
    "adapter lacks a tensor": (put("again.tensors", {"layers.0.q_proj.lora_A": "digest A"}), "read back different"),
    "adapter has one too many": (put("again.tensors", lambda old: old | {"more": "?"}), "read back different"),
    "adapter empty": (put("run.tensors", {}), "read back different"),
    "logits differ": (put("again.logits_equal", False), "logits"),
    "repeat off by a bit": (put("again.repeat.loss", at(2, math.nextafter(3.5, 4))), "bit for bit"),
    "repeat's norm off by a bit": (put("again.repeat.grad_norm", at(0, math.nextafter(1.0, 2))), "bit for bit"),
    "repeat too short": (put("again.repeat.loss", lambda old: old[:2]), "bit for bit"),
    "no repeat": (put("again.repeat", None), "bit for bit"),
    "repeat of other data": (put("again.data.digest", "e"), "bit for bit"),
    "loss apart": (put("parity.fp32.loss", 4.5), "first loss, distance"),
    "loss apart, NaN": (put("parity.fp32.loss", math.nan), "first loss, distance"),
    "gradients apart": (put("parity.fp32.relative", 0.5), "gradients, distance"),
    "gradients NaN": (put("parity.fp32.relative", math.nan), "gradients, distance"),
    "gradients of other names": (put("parity.fp32.names_differ", ["layers.0.k_proj.lora_A"]), "gradients, distance"),
    "a gradient all zero": (put("parity.fp32.zero", ["layers.0.q_proj.lora_A"]), "gradients compared"),
    "gradients never compared": (lambda seen: seen.parity.update(fp32=None), "gradients compared"),
    "no gradients": (put("parity.fp32.tensors", 0), "gradients compared"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught_by_the_rule_that_names_it(name):
    fault, rule = FAULTS[name]
    seen = copy.deepcopy(good())
    fault(seen)
    assert any(rule in assertion for assertion in missed(seen)), missed(seen)
    assert verdict(seen)[0] is Verdict.FAILED


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        ("gpu", {"triton": 0, "interpreter": 0, "reference": 7}),
        ("gpu", {"triton": 7, "interpreter": 0, "reference": 1}),
        ("gpu", {}),
        ("reference", {"triton": 0, "interpreter": 0, "reference": 0}),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_a_fallback_is_never_silent(op, mode, counts):
    seen = good("sparktune", mode)
    seen.run["ran"]["watermarks"][op] = counts
    assert [name.split(":")[0] for name in missed(seen, engine="sparktune")] == [op]


def test_an_engine_that_patched_nothing_is_not_sparktune():
    seen = good("sparktune")
    seen.run["ran"].update(watermarks={}, patches={"patched": {"rms_norm": 0}})
    assert missed(seen, engine="sparktune") == ["sparktune: modules patched"]


def test_an_engine_that_promises_no_repeat_is_not_held_to_one():
    seen = good()
    seen.run["promises_repeat"] = False
    seen.again.update(repeat=None, logits_equal=False, logits_difference=1e-3)
    assert missed(seen) == []
    seen.again["logits_difference"] = 0.5
    assert missed(seen) == ["logits after reading back"]


def test_spaces_do_not_hide_the_canary():
    seen = good()
    seen.run["canary_after"] = "amber\n falcon  7319"
    assert missed(seen) == []


def test_loss_fall_is_of_fifths():
    assert gate.loss_fall([5.0, 3.0, *[9.0] * 6, 1.0, 1.0]) == pytest.approx(3.0)
    assert gate.loss_fall([2.0, 1.0]) == 1.0
    assert math.isnan(gate.loss_fall([]))


@pytest.mark.parametrize(
    ("relative", "own", "passes"),
    [
        (0.09, 0.08, True),
        (0.15, 0.08, True),
        (0.17, 0.08, False),
        (0.05, 0.001, False),
        (math.nan, 0.08, False),
        (0.01, math.nan, True),
        (0.1, math.nan, False),
    ],
)
def test_in_bf16_twice_the_references_own_error_is_allowed(relative, own, passes):
    seen = good()
    seen.parity["bf16"] = {
        **seen.parity["fp32"], "relative": relative, "reference_relative": own, "reference_token_rms": 0.1
    }  # fmt: skip
    expected = [] if passes else ["LoRA gradients, distance from hf, bf16"]
    assert missed(seen) == expected
    seen.parity["fp32"] = None
    assert missed(seen) == expected


@pytest.mark.parametrize(
    ("apart", "own", "passes"),
    [
        (0.19, 0.1, True),
        (0.21, 0.1, False),
        (0.02, 0.001, True),
        (0.03, 0.001, False),
        (math.nan, 0.1, False),
        (0.3, math.nan, False),
    ],
)
def test_in_bf16_losses_are_compared_token_by_token(apart, own, passes):
    seen = good()
    seen.parity["bf16"] = {
        **seen.parity["fp32"], "reference_relative": 0.08, "token_rms": apart, "reference_token_rms": own
    }  # fmt: skip
    assert missed(seen) == ([] if passes else ["first losses token by token, distance from hf, bf16"])


def test_token_losses_of_unequal_number_are_infinitely_apart():
    assert rms([1.0, 2.0], [1.0, 2.5]) == pytest.approx(math.sqrt(0.125))
    assert rms([1.0], [1.0, 2.0]) == math.inf
    assert rms([], []) == math.inf


def in_bf16_only(seen):
    """As for an engine without fp32."""
    seen.parity["bf16"] = {**seen.parity["fp32"], "reference_relative": 0.08, "reference_token_rms": 0.1}
    seen.parity["fp32"] = None
    seen.again["gradients"] = {"bf16": seen.again["gradients"].pop("fp32")}
    return seen


@pytest.mark.parametrize(
    ("path", "allowed", "refused"),
    [
        ("fed.packed.relative", 0.15, 0.17),
        ("fed.accumulated.relative", 0.15, 0.17),
        ("fed.accumulated.loss", 0.19, 0.21),
        ("merged.distance", 0.09, 0.11),
        ("loss", 4.019, 4.021),
    ],
)
def test_an_engine_without_fp32_is_held_to_what_bf16_costs_the_reference(path, allowed, refused):
    for value, passes in ((allowed, True), (refused, False)):
        seen = in_bf16_only(good())
        put(f"again.gradients.bf16.{path}", value)(seen)
        assert (missed(seen) == []) is passes, (path, value, missed(seen))


def test_an_engine_with_a_known_fault_is_not_held_to_packing_and_others_are():
    gate_fields = scenario().gate.model_dump() | {"no_packing": {"hf": "its masks know no documents."}}
    seen = good()
    put("again.gradients.fp32.fed.packed.relative", 0.5)(seen)
    assert missed(seen, gate=gate_fields) == []
    assert any("packed" in name for name in missed(seen, gate=gate_fields, engine="unsloth"))


@pytest.mark.parametrize(
    ("family", "patched", "ran"),
    [
        ("phi3", "lora_qkv", "lora_linear"),
        ("deepseek_v3", "lora_qkv", "lora_linear"),
        ("qwen3", "rope", "qk_norm_rope"),
        ("gpt_oss", "moe_mlp", "grouped_lora"),
    ],
)
def test_families_that_run_another_op_are_held_to_that_one(family, patched, ran):
    seen = good("sparktune", "gpu")
    counts = {"triton": 3, "interpreter": 0, "reference": 0}
    seen.run["ran"]["patches"] = {"family": family, "patched": {patched: 1}}
    seen.run["ran"]["watermarks"] = {ran: counts}
    assert missed(seen, engine="sparktune") == []
    seen.run["ran"]["watermarks"] = {"rms_norm": counts}
    assert missed(seen, engine="sparktune") != []
    seen.run["ran"]["watermarks"] = {ran: {**counts, "triton": 2, "reference": 1}}
    assert [name.split(":")[0] for name in missed(seen, engine="sparktune")] == [ran]


def test_a_plain_familys_product_is_not_replaced_by_single_ones():
    seen = good("sparktune", "gpu")
    counts = {"triton": 3, "interpreter": 0, "reference": 0}
    seen.run["ran"].update(patches={"family": "llama", "patched": {"lora_qkv": 1}}, watermarks={"lora_linear": counts})
    assert [name.split(":")[0] for name in missed(seen, engine="sparktune")] == ["lora_qkv"]


def test_calls_that_ran_module_by_module_fail_sparktune():
    seen = good("sparktune", "gpu")
    seen.run["ran"]["patches"]["fallbacks"] = {"attention: it has hooks": 3}
    assert missed(seen, engine="sparktune") == ["sparktune: reasons for which calls ran module by module"]
