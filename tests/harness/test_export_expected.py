"""A declared difference passes as itself alone, is told with its reason and source, and everything else fails as ever."""

import pytest
from sparkproof import catalog
from sparkproof.results import Assertion
from sparkproof.runners import export_expected, export_file_judge
from sparkproof.runners.export_rounded_judge import FORMAT_LOST, WHOLE_WAY
from sparkproof.scenario import ExportScenario
from test_catalog import ROOT

DECLARED = {
    "families": ["qwen2"], "assertion": "hard strings tokenised otherwise", "value": 1, "shows": "e\u0301",
    "reason": "The consumer does not put text into NFC.", "source": "https://example.org/1",
}  # fmt: skip


def scenario(model="tiny:qwen2@256", **changes):
    return ExportScenario(
        kind="export", summary="an export of a test", source=model, format="gguf_f16", consumer="llama.cpp", max_kl=1,
        expected=[{**DECLARED, **changes}],
    )  # fmt: skip


def seen(passed=False, value=1, detail="For example 'e\u0301'.", name=DECLARED["assertion"]):
    return [
        Assertion(name="mean KL", passed=False, value=1),
        Assertion(name=name, passed=passed, value=value, detail=detail),
    ]


def test_the_very_difference_passes_and_is_told():
    found, told = export_expected.apply(seen(), scenario())
    assert found[1].passed and "Declared: The consumer does not" in found[1].detail and not found[0].passed
    assert told == [
        "hard strings tokenised otherwise: 1, as declared: The consumer does not put text into NFC. (https://example.org/1)"
    ]


@pytest.mark.parametrize(
    ("other", "where"),
    [({"value": 2}, {}), ({"detail": "For example 'x'."}, {}), ({}, {"model": "tiny:qwen3@256"}), ({"name": "x"}, {})],
    ids=["more", "another string", "another family", "another assertion"],
)
def test_anything_else_fails_as_ever(other, where):
    assertions = seen(**other)
    assert export_expected.apply(assertions, scenario(**where)) == (assertions, [])


def test_a_declaration_may_name_its_formats_and_be_told_by_its_evidence_alone():
    alone = {"value": None, "source": ""}
    found, told = export_expected.apply(seen(value=7), scenario(**alone, formats=["gguf_f16"]))
    assert found[1].passed and told[0].endswith("The consumer does not put text into NFC.")
    assert not export_expected.apply(seen(detail="For example 'x'."), scenario(**alone))[0][1].passed
    for passed in (True, False):  # of another format it says nothing, not even that it can go
        assertions = seen(passed=passed)
        assert export_expected.apply(assertions, scenario(formats=["gguf_q8_0"])) == (assertions, [])


@pytest.mark.parametrize("changes", [{"value": None, "shows": ""}, {"source": "", "shows": ""}])
def test_a_declaration_that_nothing_proves_is_refused(changes):
    with pytest.raises(ValueError, match="a declared difference needs"):
        scenario(**changes)


def test_a_difference_that_is_gone_is_told():
    found, told = export_expected.apply(seen(passed=True, value=0, detail=""), scenario())
    assert found[1].passed and "is gone" in told[0]


def test_a_declaration_needs_a_reason_and_a_family():
    with pytest.raises(ValueError, match="reason"):
        scenario(reason="because")
    with pytest.raises(ValueError, match="families"):
        scenario(**{"families": []})


def test_what_the_projects_scenarios_declare_is_asserted_somewhere():
    declared = [d for c in catalog.load(ROOT / "scenarios").cases.values() for d in getattr(c.scenario, "expected", [])]
    lost = [d for d in declared if FORMAT_LOST in d.shows]
    declared = [d for d in declared if d not in lost]
    assert declared and {d.assertion for d in declared} == {"hard strings tokenised otherwise"}
    assert lost and all(d.assertion.startswith(WHOLE_WAY) and d.formats for d in lost)
    from sparkproof.runners.export_judge import tokenizer
    from sparkproof.runners.export_probe import HARD_STRINGS

    right = [[i] for i in range(len(HARD_STRINGS))]
    wrong = [[*ids, 0] if "e\u0301" in text else ids for ids, text in zip(right, HARD_STRINGS, strict=True)]
    a = tokenizer(right, wrong)
    for d in declared:
        assert (a.name, a.value) == (d.assertion, d.value) and d.shows in a.detail


def test_experts_biases_stay_in_32_bits():
    def kind(name, type_):
        return export_file_judge.types("gguf_f16", {name: {"type": type_, "shape": [4, 256]}}).passed

    assert kind("blk.0.ffn_up_exps.bias", "F32") and not kind("blk.0.ffn_up_exps.bias", "F16")
    assert kind("blk.0.ffn_up_exps.weight", "F16") and not kind("blk.0.ffn_up_exps.weight", "F32")
