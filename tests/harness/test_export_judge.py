"""Each rule of the export judge passes what is right and catches its own fault, on made-up answers."""

import numpy as np
import pytest
from sparkproof.runners import export_account, export_file_judge, export_judge
from sparkproof.runners.export_formats import allowed
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
    assert export_file_judge.types(format_, found).passed is passes


def test_parameters_and_size():
    assert export_file_judge.parameters(100, 100).passed
    assert not export_file_judge.parameters(99, 100).passed and not export_file_judge.parameters(0, 0).passed
    file = {"tensors": {"a": {"type": "F16", "shape": [1 << 20, 64]}}, "bytes": 128 << 20}
    assert export_file_judge.size(file).passed
    assert not export_file_judge.size({**file, "bytes": (128 << 20) - 1}).passed
    assert not export_file_judge.size({**file, "bytes": 256 << 20}).passed
    assert not export_file_judge.size({"tensors": {}, "bytes": 5}).passed


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


def test_chats_name_a_second_beginning_of_text():
    want = [[1, 5, 6], [1, 7], [1, 8]]
    assert export_judge.chats(want, want, 1).passed
    doubled = export_judge.chats(want, [[1, 1, 5, 6], [1, 7], [1, 8]], 1)
    assert not doubled.passed and "beginning of text, once too often" in doubled.detail
    other = export_judge.chats(want, [[1, 5, 9], [1, 7], [1, 8]], 1)
    assert not other.passed and "too often" not in other.detail
    assert not export_judge.chats(want[:2], want[:2], 1).passed


def test_stops_need_a_reference_that_stops():
    assert export_judge.stops(True, True).passed
    assert not export_judge.stops(True, False).passed
    judged = export_judge.stops(False, False)
    assert not judged.passed and "can't be judged" in judged.detail


@pytest.mark.parametrize(
    ("format_", "row", "kinds"),
    [
        ("gguf_q4_k_m", 256, {"Q4_K", "Q5_K", "Q6_K"}),
        ("gguf_q4_k_m", 576, {"Q5_0", "Q5_1", "Q8_0"}),
        ("gguf_q6_k", 576, {"Q8_0"}),
        ("gguf_q6_k", 48, {"F16"}),
        ("gguf_q4_0", 576, {"Q4_0", "Q8_0"}),
        ("gguf_bf16", 7, {"BF16"}),
    ],
)
def test_k_quants_fall_back_where_a_row_is_no_multiple_of_256(format_, row, kinds):
    assert allowed(format_, row) == kinds


def test_a_mix_that_is_hardly_the_format_is_no_such_format():
    def mix(few):
        kinds = {f"blk.{i}.ffn_up.weight": "Q4_K" if i < few else "Q6_K" for i in range(10)}
        return {name: {"type": kind, "shape": [256, 256]} for name, kind in kinds.items()}

    assert export_file_judge.types("gguf_q4_k_m", mix(5)).passed
    judged = export_file_judge.types("gguf_q4_k_m", mix(3))
    assert not judged.passed and "Q4_K holds 30%" in judged.detail


def weights(**changes):
    right = {
        "times": 1.001,
        "distance": 1e-3,
        "ratio": 0.4,
        "type": "BF16",
        "name": "q",
        "checked": 4,
        "off": 0,
        "nearest": "",
    }
    return {**right, **changes}


def test_weights_are_base_and_update_once():
    assert export_file_judge.times(weights()).passed and export_file_judge.distance(weights()).passed
    assert not export_file_judge.times(weights(times=2.0)).passed
    assert not export_file_judge.times(weights(times=float("nan"))).passed
    assert not export_file_judge.times(weights(checked=0)).passed
    judged = export_file_judge.distance(weights(ratio=1.2, off=3, nearest="the update added twice"))
    assert not judged.passed and "3 are off; they look like the update added twice" in judged.detail


def test_a_broken_file_is_judged_by_that_alone(reference):
    broken = {"tensors": {}, "parameters": 0, "bytes": 0, "broken": ["x ends early"]}
    seen = {"file": broken, "answers": None}
    (judged,) = export_judge.judge(scenario(), reference, reference[:0], {}, seen)
    assert not judged.passed and judged.name == "files that are not whole"


def scenario():
    from sparkproof.scenario import ExportScenario

    return ExportScenario(
        kind="export", summary="an export of a test", source="x", format="gguf_f16", consumer="llama.cpp", max_kl=1e-9
    )


def test_every_assertion_has_a_next_step(reference):
    empty = {"ids": [[1]] * len(HARD_STRINGS), "template": "a", "renders": ["a"] * 3, "canary": "", "chats": [[1]] * 3,
             "stopped": True, "made_up": [], "vocabulary": 50}  # fmt: skip
    other = {"ids": [[2]] * len(HARD_STRINGS), "template": "b", "renders": ["b"] * 3, "canary": "", "chats": [[2]] * 3,
             "stopped": False, "made_up": ["lm_head"], "vocabulary": 64}  # fmt: skip
    seen = {
        "answers": other,
        "file": {"tensors": {"a": {"type": "F32", "shape": [2, 2]}}, "parameters": 4, "bytes": 1, "broken": []},
        "expected_parameters": 5,
        "expected_type": "BF16",
        "canary_answer": "said",
        "weights": weights(times=0, ratio=9, off=1),
        "rope": {"apart": 0.5, "said": "nothing"},
    }
    cut = np.full_like(reference, np.nan)
    assertions = export_judge.judge(scenario(), reference, cut, {"answers": empty, "vocabulary": 50}, seen)
    assert len(assertions) == 18 and sum(a.passed for a in assertions) == 1  # nothing is missing from the file
    assert all(export_account.next_step([a]) for a in assertions if not a.passed)
    assert export_account.next_step([]) == ""
