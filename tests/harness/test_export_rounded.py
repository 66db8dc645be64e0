"""A quantised GGUF's own weights in transformers: put back where they belong, and the judge that parts format from consumer."""

import json

import numpy as np
import pytest
import torch
from sparkproof.results import Assertion
from sparkproof.runners import export_layout, export_rounded, export_rounded_judge
from sparkproof.runners.export_rounded_judge import Rounded
from sparkproof.scenario import ExportScenario
from sparktune.export import export_gguf

ANSWER = "It is amber falcon 7319."
LOST = "It is amber falcon 73 diff"


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """family -> (base, adapter that trains every linear layer, untrained but for B), made once."""
    made = {}

    def make(family):
        from peft import LoraConfig, get_peft_model
        from sparkproof.engines.tiny import tiny
        from transformers import AutoModelForCausalLM

        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = tiny(f"tiny:{family}@256", folder / "cache").path
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.normal_(std=0.02)
            model.save_pretrained(folder / "adapter")
            made[family] = base, folder / "adapter"
        return made[family]

    return make


# Between them: rows in another order; experts on a stack, and a projection cut in two, one part transposed.
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", pytest.param("gpt_oss", marks=pytest.mark.slow),
                                    pytest.param("gemma3", marks=pytest.mark.slow)])  # fmt: skip
def test_a_file_in_32_bits_comes_back_as_pefts_own_merge(taught, tmp_path, family):
    base, adapter = taught(family)
    export_gguf(base, tmp_path / "f.gguf", "f32", adapter)
    assert clean(export_rounded.write(tmp_path / "f.gguf", base, adapter, tmp_path / "out"))
    want, got = export_rounded.merged(base, adapter), tensors(tmp_path / "out")
    original = tensors(base)
    assert want.keys() == got.keys() == original.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    assert not np.allclose(
        want["model.layers.0.self_attn.o_proj.weight"], original["model.layers.0.self_attn.o_proj.weight"]
    )


def clean(written):
    """Every tensor of the file is the base's, and the types that it has are told."""
    return (
        not written["strays"]
        and not written["missing"]
        and set(written["kinds"].values()) <= {*export_rounded.ROUNDING}
    )


def tensors(folder):
    from safetensors.torch import load_file

    return {n: t.float().numpy() for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_a_quantised_file_comes_back_rounded_as_gguf_dequantises_it(taught, tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    base, adapter = taught("llama")
    file = tmp_path / "f.gguf"
    export_gguf(base, file, "q4_0", adapter)
    assert clean(export_rounded.write(file, base, adapter, tmp_path / "out"))
    (stored,) = [t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_down.weight"]
    assert stored.tensor_type.name == "Q4_0"
    got = tensors(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(got, dequantize(stored.data, stored.tensor_type))
    assert not np.allclose(got, export_rounded.merged(base, adapter)["model.layers.1.mlp.down_proj.weight"], atol=1e-3)


def test_a_wrong_tensor_of_the_file_is_named_and_the_right_one_stands_in_its_place(taught, tmp_path):
    from gguf import GGUFReader

    base, adapter = taught("llama")
    file = tmp_path / "f.gguf"
    export_gguf(base, file, "q8_0", adapter)
    found = {t.name: t.data for t in GGUFReader(file, "r+").tensors}
    found["blk.0.ffn_gate.weight"][:] = found["blk.0.ffn_up.weight"].copy()
    done = export_rounded.write(file, base, adapter, tmp_path / "out")
    assert len(done["strays"]) == 1 and done["strays"][0].startswith("blk.0.ffn_gate.weight is ")
    name = "model.layers.0.mlp.gate_proj.weight"
    np.testing.assert_array_equal(tensors(tmp_path / "out")[name], export_rounded.merged(base, adapter)[name])


def test_a_tensor_that_the_file_lacks_is_missing(taught, tmp_path, monkeypatch):
    base, adapter = taught("llama")
    file = tmp_path / "f.gguf"
    export_gguf(base, file, "q8_0", adapter)
    placed = export_layout.place(base)
    whole = placed["blk.1.ffn_down.weight"]
    (name, there, here), *_ = whole.sources
    placed["blk.1.ffn_down.weight"] = export_layout.Placed([("model.norm.weight", there[:0], here[:0])], 0.0)
    monkeypatch.setattr(export_rounded, "place", lambda base: placed)
    done = export_rounded.write(file, base, adapter, tmp_path / "out")
    assert done["missing"] == [name] and "blk.1.ffn_down.weight" in done["strays"][0]


def test_what_llama_cpp_computes_with_can_not_be_placed(taught, tmp_path, monkeypatch):
    import sparktune.export

    base, _ = taught("llama")
    right = sparktune.export.export_gguf

    def squared(folder, out, kind):
        from gguf import GGUFReader

        right(folder, out, kind)
        for t in GGUFReader(out, "r+").tensors:
            if t.name == "blk.0.ffn_up.weight":
                t.data[:] = t.data * 1.5

    monkeypatch.setattr(sparktune.export, "export_gguf", squared)
    with pytest.raises(export_layout.Unplaceable, match=r"blk\.0\.ffn_up"):
        export_layout.place(base)


def test_a_model_too_large_to_hold_twice_is_refused(taught, monkeypatch):
    base, adapter = taught("llama")
    monkeypatch.setattr(export_rounded, "LARGEST", 1000)
    with pytest.raises(export_layout.Unplaceable, match="held in memory"):
        export_rounded.merged(base, adapter)


def scenario(**changes):
    return ExportScenario(
        kind="export", summary="an export of a test", source="tiny:llama@256", format="gguf_q4_0", consumer="llama.cpp",
        max_kl=0.5, clear_margin=0.1, **changes,
    )  # fmt: skip


def log_softmax(x):
    return (x - np.log(np.exp(x).sum(axis=-1, keepdims=True))).astype(np.float32)


@pytest.fixture
def rows():
    """(the 16-bit model's, the file's in transformers, the consumer's): a format that loses much, a consumer that adds little."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(6, 50)) * 3
    lossy = logits + draw.normal(size=logits.shape) * 2
    return log_softmax(logits), log_softmax(lossy), log_softmax(lossy + draw.normal(size=logits.shape) * 0.02)


def own(rows, canary=LOST, stopped=False, strays=(), missing=()):
    return Rounded(rows, {"canary": canary, "stopped": stopped}, list(strays), list(missing))


def seen(canary=LOST, stopped=False):
    return {"answers": {"canary": canary, "stopped": stopped}, "canary_answer": ANSWER}


def passed(assertions):
    return [a.passed for a in assertions]


def test_a_consumer_near_the_files_own_weights_holds_whatever_the_format_lost(rows):
    _, lossy, consumed = rows
    assert passed(export_rounded_judge.judge(scenario(), own(lossy), consumed, seen())) == [True, True, True]


def test_a_consumer_away_from_the_files_own_weights_fails_the_tight_bound(rows):
    reference, lossy, _ = rows
    judged = export_rounded_judge.judge(scenario(), own(lossy), reference, seen())
    assert passed(judged) == [True, False, True] and judged[1].bound == "<= 0.02"
    assert passed(export_rounded_judge.judge(scenario(max_kl_file=9), own(lossy), reference, seen()))[1]


@pytest.mark.parametrize("part", [{"strays": ["blk.0 is 1.4 away"]}, {"missing": ["model.norm.weight"]}])
def test_a_file_with_other_weights_fails(rows, part):
    _, lossy, consumed = rows
    held = export_rounded_judge.judge(scenario(), own(lossy, **part), consumed, seen())[0]
    assert not held.passed and held.value == 1 and next(iter(part.values()))[0] in held.detail


@pytest.mark.parametrize(
    ("transformers", "consumer", "holds"),
    [(ANSWER, f"{ANSWER} And", True), (LOST, f"{LOST} more", True), (ANSWER, LOST, False), (LOST, ANSWER, False),
     (LOST, "It is amber hawk 12", True), ("", "", False)],
)  # fmt: skip
def test_both_say_the_answer_or_both_lose_it(transformers, consumer, holds):
    assert export_rounded_judge.same_answer(transformers, consumer, ANSWER).passed is holds


def whole_way(reference, exported, canary=LOST):
    from sparkproof.runners import export_judge

    s = scenario()
    return [
        export_judge.divergence(reference, exported, s.kl_bound(), s.reference),
        export_judge.first_choice(reference, exported, s.margin),
        export_judge.canary(canary, ANSWER),
        Assertion(name="chat template", passed=False, detail="They differ."),
    ]


QUESTIONS = {"canary_answer": ANSWER, "answers": {"stopped": True}}


def test_what_the_format_lost_is_said_so_in_one_sentence_with_every_kl(rows):
    reference, lossy, consumed = rows
    s, o = scenario(), own(lossy)
    judged, tight = whole_way(reference, consumed), export_rounded_judge.judge(s, o, consumed, seen())
    assert not any(passed(judged))
    found = export_rounded_judge.explained(judged, tight, s, reference, o, consumed, QUESTIONS)
    assert passed(found) == passed(judged)  # it is told, not forgiven
    steps = [float(export_rounded_judge.export_judge.kl(a, b).mean()) for a, b in
             export_rounded_judge.steps(reference, o, consumed)]  # fmt: skip
    for a in found[:3]:
        assert "gguf_q4_0 lost it, not the export: transformers over the file's own weights is" in a.detail
        assert all(f"{kl:.3g}" in a.detail for kl in steps)
    assert found[3] == judged[3]


@pytest.mark.parametrize("spoilt", ["stray", "consumer", "answer"])
def test_the_format_is_not_blamed_where_anything_else_is_wrong(rows, spoilt):
    reference, lossy, consumed = rows
    s, o = scenario(), own(lossy, strays=["x"] if spoilt == "stray" else [])
    if spoilt == "consumer":
        consumed = log_softmax(np.random.default_rng(5).normal(size=reference.shape) * 3)
    if spoilt == "answer":
        o = own(lossy, canary=ANSWER)  # the file's weights say it, so the format did not lose it
    tight = export_rounded_judge.judge(s, o, consumed, seen())
    found = export_rounded_judge.explained(whole_way(reference, consumed), tight, s, reference, o, consumed, QUESTIONS)
    assert not any("not the export" in a.detail for a in found)
    assert "The format alone does not explain it" in found[2].detail


@pytest.mark.parametrize(("canary", "words"), [(LOST, "not the export"), (ANSWER, "alone does not explain")])
def test_where_a_text_ends_is_the_formats_affair_once_it_lost_the_answer(rows, canary, words):
    from sparkproof.runners import export_judge

    reference, lossy, consumed = rows
    s, o = scenario(), own(lossy, canary=canary, stopped=True)
    tight = export_rounded_judge.judge(s, o, consumed, seen(canary))
    assert passed(tight) == [True, True, True]
    found = export_rounded_judge.explained(
        [export_judge.stops(True, False)], tight, s, reference, o, consumed, QUESTIONS
    )
    assert not found[0].passed and words in found[0].detail


def test_measurements_hold_both_steps(rows):
    reference, lossy, consumed = rows
    loses, adds = export_rounded_judge.measurements(scenario(), reference, own(lossy), consumed)
    assert loses.value > 0.5 > 0.01 > adds.value > 0 and len(adds.samples) == 6


def test_the_phase_asks_transformers_and_says_why_where_it_can_not(taught, tmp_path, monkeypatch):
    from sparkproof.runners import export_child

    base, adapter = taught("llama")
    questions, file = tmp_path / "q.json", tmp_path / "f.gguf"
    asked = {"base": str(base), "adapter": str(adapter), "reference": "base16+adapter", "prompts": ["Hi there"],
             "canary_prompt": "What?", "canary_answer": ANSWER, "questions": str(questions)}  # fmt: skip
    export_child.reference({**asked, "probabilities": str(tmp_path / "r.npy")})
    export_gguf(base, file, "q8_0", adapter)
    payload = {"file": str(file), "base": str(base), "adapter": str(adapter), "questions": str(questions),
               "probabilities": str(tmp_path / "o.npy")}  # fmt: skip
    done = export_child.rounded(payload)
    assert done["strays"] == done["missing"] == [] and json.dumps(done)
    kl = export_rounded_judge.export_judge.kl(np.load(tmp_path / "r.npy"), np.load(tmp_path / "o.npy"))
    assert 1e-6 < kl.mean() < 0.05
    monkeypatch.setattr(export_rounded, "LARGEST", 1000)
    assert "held in memory" in export_child.rounded(payload)["unplaceable"]
