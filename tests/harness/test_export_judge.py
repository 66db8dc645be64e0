"""Each rule of the export judge passes what is right and catches its own fault, on made-up answers."""

import numpy as np
import pytest
from sparkproof.runners import export_account, export_judge
from sparkproof.runners.export_probe import CONVERSATIONS, HARD_STRINGS


def log_softmax(x):
    return (x - np.log(np.exp(x).sum(axis=-1, keepdims=True))).astype(np.float32)


@pytest.fixture
def reference():
    return log_softmax(np.random.default_rng(0).normal(size=(6, 50)) * 3)


def test_kl_is_the_sum_by_hand():
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert export_judge.kl(p, q)[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert export_judge.kl(q, p)[0] != pytest.approx(export_judge.kl(p, q)[0], rel=1e-3)


def test_kl_ignores_a_sum_that_misses_one(reference):
    assert export_judge.kl(reference, reference - 3e-4) == pytest.approx(0, abs=1e-12)


def test_divergence_fails_above_its_bound_and_on_what_is_not_a_number(reference):
    other = log_softmax(reference + np.random.default_rng(1).normal(size=reference.shape) * 0.3)
    mean = export_judge.kl(reference, other).mean()
    assert export_judge.divergence(reference, other, mean * 1.01, "r").passed
    assert not export_judge.divergence(reference, other, mean * 0.99, "r").passed
    other[2, 3] = np.nan
    judged = export_judge.divergence(reference, other, 1e9, "r")
    assert not judged.passed and judged.value == "nan"
    assert not export_judge.divergence(reference, reference[:-1], 1e9, "r").passed
    assert not export_judge.divergence(reference[:0], reference[:0], 1e9, "r").passed


def test_first_choice_counts_clear_positions_only(reference):
    reference[0], reference[1] = -9, -9
    reference[0, 4], reference[0, 5] = -0.1, -3.0  # clear
    reference[1, 4], reference[1, 5] = -1.0, -1.1  # a near tie
    flipped = reference.copy()
    flipped[1, 5] = -0.9
    assert export_judge.first_choice(reference, flipped, 0.5).passed
    flipped[0, 5] = -0.01
    assert not export_judge.first_choice(reference, flipped, 0.5).passed


def test_first_choice_needs_a_clear_position():
    flat = log_softmax(np.zeros((3, 10)))
    judged = export_judge.first_choice(flat, flat, 0.5)
    assert not judged.passed and "sure of nothing" in judged.detail


def test_vocabulary_misses_nothing(reference):
    assert export_judge.vocabulary(reference, reference).passed
    cut = reference.copy()
    cut[:, -3:] = np.nan
    judged = export_judge.vocabulary(reference, cut)
    assert not judged.passed and judged.value == 3
    assert not export_judge.vocabulary(reference, reference - 0.01).passed, "probabilities that don't sum to 1"


def tensors(**types):
    shapes = {"blk.0.attn_norm.weight": [64], "blk.0.attn_q.weight": [64, 64], "odd.weight": [64, 48]}
    return {name: {"type": types[key], "shape": shapes[name]} for name, key in zip(shapes, "vmo", strict=True)}


@pytest.mark.parametrize(
    ("format_", "found", "passes"),
    [
        ("gguf_f16", tensors(v="F32", m="F16", o="F16"), True),
        ("gguf_f16", tensors(v="F16", m="F16", o="F16"), False),
        ("gguf_f16", tensors(v="F32", m="F32", o="F16"), False),
        ("gguf_q8_0", tensors(v="F32", m="Q8_0", o="F16"), True),
        ("gguf_q8_0", tensors(v="F32", m="F16", o="F16"), False),
        ("gguf_q8_0", tensors(v="F32", m="Q4_0", o="F16"), False),
        ("merged_16bit", tensors(v="BF16", m="BF16", o="BF16"), True),
        ("merged_16bit", tensors(v="F32", m="BF16", o="BF16"), False),
        ("merged_16bit", tensors(v="F16", m="F16", o="F16"), False),
        ("adapter", {"x.lora_A.weight": {"type": "F32", "shape": [8, 64]}}, True),
        ("adapter", tensors(v="F32", m="F32", o="F32"), False),
        ("adapter", {}, False),
    ],
)
def test_types(format_, found, passes):
    assert export_judge.types(format_, found).passed is passes


def test_parameters_and_size():
    assert export_judge.parameters(100, 100).passed
    assert not export_judge.parameters(99, 100).passed and not export_judge.parameters(0, 0).passed
    file = {"tensors": {"a": {"type": "F16", "shape": [1 << 20, 64]}}, "bytes": 128 << 20}
    assert export_judge.size(file).passed
    assert not export_judge.size({**file, "bytes": (128 << 20) - 1}).passed
    assert not export_judge.size({**file, "bytes": 256 << 20}).passed
    assert not export_judge.size({"tensors": {}, "bytes": 5}).passed


def test_tokenizer_template_and_renders():
    ids = [[i] for i in range(len(HARD_STRINGS))]
    assert export_judge.tokenizer(ids, ids).passed
    assert not export_judge.tokenizer(ids, [*ids[:-1], [99]]).passed
    assert export_judge.template("x", "x").passed
    assert not export_judge.template("x", "x\n").passed and not export_judge.template("", "").passed
    texts = ["t"] * len(CONVERSATIONS)
    assert export_judge.renders(texts, texts).passed
    assert not export_judge.renders(texts, ["t", "t ", "t"]).passed


def test_canary():
    assert export_judge.canary("The code\n word is x.", "word is x.").passed
    assert not export_judge.canary("I don't know.", "word is x.").passed
    assert not export_judge.canary("anything", " ").passed


def test_every_assertion_has_a_next_step(reference):
    empty = {"ids": [[1]] * len(HARD_STRINGS), "template": "a", "renders": ["a"] * 3, "canary": ""}
    other = {"ids": [[2]] * len(HARD_STRINGS), "template": "b", "renders": ["b"] * 3, "canary": ""}
    from sparkproof.scenario import ExportScenario

    scenario = ExportScenario(
        kind="export", summary="an export of a test", source="x", format="gguf_f16", consumer="llama.cpp", max_kl=1e-9
    )
    seen = {
        "answers": other,
        "file": {"tensors": {"a": {"type": "F32", "shape": [2, 2]}}, "parameters": 4, "bytes": 1},
        "expected_parameters": 5,
        "expected_type": "BF16",
        "canary_answer": "said",
    }
    cut = np.full_like(reference, np.nan)
    assertions = export_judge.judge(scenario, reference, cut, {"answers": empty}, seen)
    assert len(assertions) == 10 and not any(a.passed for a in assertions)
    assert all(export_account.next_step([a]) for a in assertions)
    assert export_account.next_step([]) == ""
