"""Comparing two runs: like runs give a list, unlike ones are refused with what differs, exit codes tell CI which."""

import json
from pathlib import Path

import jsonschema
import pytest
from report_sample import case, laptop, metric, record_of, spark
from sparkproof.cli import app
from sparkproof.report import compare as comparing
from sparkproof.report.compare import compare
from sparkproof.results import ReasonClass, Verdict
from sparkproof.scenario import Profile
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


def speed(centre, spread=0.01, n=21):
    return [centre * (1 + spread * (i % 5 - 2) / 2) for i in range(n)]


def train(tokens=900.0, load=4.0, verdict=Verdict.PASSED, revision="c0ffee", mode="gpu", samples=True, **more):
    measurements = [
        metric("tokens_per_s", tokens, "tokens/s", True, samples=speed(tokens) if samples else []),
        metric("load_s", load, "s", False),
        metric("peak_gpu_allocated_gib", 3.0, "GiB", False),
        metric("KL, mean", 0.1, "nats", None),
    ]
    return case(
        "train/llama/tiny[engine=hf]", "train", verdict, measurements=measurements, mode=mode,
        evidence={"base": {"revision": revision}, "data": {"digest": "d"}}, **more,
    )  # fmt: skip


def runs(tmp_path, a, b, **more):
    facts = more.pop("facts", None)
    return record_of(tmp_path / "a", a), record_of(tmp_path / "b", b, facts, **more)


def test_like_runs_without_a_difference(tmp_path):
    found = compare(*runs(tmp_path, [train()], [train(tokens=905)]))
    assert (found.exit_code, found.compared, found.regressions, found.improvements) == (0, 3, [], [])
    assert "0 worse, 0 better, of 3" in comparing.text(found)


def test_regressions_come_worst_first_and_improvements_after(tmp_path):
    found = compare(*runs(tmp_path, [train()], [train(tokens=600, load=12.0)]))
    assert found.exit_code == 1
    assert [c.measurement for c in found.regressions] == ["load_s", "tokens_per_s"]
    slower = found.regressions[1]
    assert slower.ratio == pytest.approx(2 / 3) and slower.worse == pytest.approx(1.5) and slower.high < 1
    better = compare(*runs(tmp_path / "2", [train(tokens=600, load=12.0)], [train()]))
    assert better.exit_code == 0 and [c.measurement for c in better.improvements] == ["load_s", "tokens_per_s"]


@pytest.mark.parametrize(("spread", "samples", "judged"), [(0.02, True, 1), (2.0, True, 0), (0.0, False, 1)])
def test_an_interval_that_spans_1_is_no_difference(tmp_path, spread, samples, judged):
    a, b = train(samples=False), train(tokens=700.0, samples=False)
    if samples:
        a.measurements[0].samples, b.measurements[0].samples = (
            [abs(x) + 1 for x in speed(v, spread)] for v in (900, 700)
        )
    assert len(compare(*runs(tmp_path, [a], [b])).regressions) == judged


def test_a_cpus_speed_is_told_and_not_judged(tmp_path):
    for mode in ("host", "reference"):
        c = compare(*runs(tmp_path / mode, [train(mode=mode)], [train(tokens=450, mode=mode)]))
        assert c.exit_code == 0 and not c.regressions and not c.improvements
        assert c.on_cpu[0].measurement == "tokens_per_s" and c.on_cpu[0].ratio == 0.5
        assert "not judged, a CPU's: 0.5 x" in comparing.text(c) and "0 worse" in comparing.text(c)


def test_the_tolerance_is_what_may_be_worse(tmp_path):
    pair = runs(tmp_path, [train()], [train(load=4.3)])
    assert [c.measurement for c in compare(*pair).regressions] == ["load_s"]
    assert compare(*pair, tolerance=0.1).regressions == []


def test_what_like_runs_differ_by_is_no_change(tmp_path):
    a, b = train(load=4.0), train(load=6.5)
    assert [c.measurement for c in compare(*runs(tmp_path, [a], [b])).regressions] == ["load_s"]
    b.measurements[1].noise = 3.0
    assert compare(*runs(tmp_path, [a], [b])).regressions == []
    b.measurements[1].value = 7.1
    assert [c.measurement for c in compare(*runs(tmp_path, [a], [b])).regressions] == ["load_s"]


def test_a_case_that_broke_or_must_be_measured_again(tmp_path):
    worse = compare(*runs(tmp_path, [train()], [train(verdict=Verdict.FAILED, reason="loss fall: 0.1")]))
    assert worse.exit_code == 1 and worse.broke[0].reason == "loss fall: 0.1"
    assert "BROKE     train/llama/tiny[engine=hf]: passed -> failed. loss fall: 0.1" in comparing.text(worse)
    again = compare(*runs(tmp_path / "2", [train()], [train(tokens=100, verdict=Verdict.RETEST)]))
    assert (again.exit_code, again.regressions, again.retest) == (3, [], ["train/llama/tiny[engine=hf]"])
    mended = compare(*runs(tmp_path / "3", [train(verdict=Verdict.FAILED)], [train()]))
    assert mended.exit_code == 0 and mended.mended[0].b is Verdict.PASSED


def test_a_case_that_is_skipped_now_is_no_pass(tmp_path):
    skipped = train(verdict=Verdict.SKIPPED, reason_class=ReasonClass.NETWORK, reason="no hub", mode="")
    assert compare(*runs(tmp_path, [train()], [skipped])).exit_code == 1


def test_two_runs_that_skipped_everything_are_not_equal(tmp_path):
    skipped = train(verdict=Verdict.SKIPPED, reason_class=ReasonClass.NETWORK, reason="no hub", mode="")
    found = compare(*runs(tmp_path, [skipped], [skipped]))
    assert found.exit_code == 2 and "none, all were skipped" in comparing.text(found)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"facts": laptop()}, "device"),
        ({"profile": Profile.FULL}, "profile"),
        ({"planned_only": ("train/more",)}, "cases that the other run did not plan"),
        ({"planned_only": ("train/more",)}, "completeness"),
        ({"case": {"revision": "decade"}}, "model revision of train/llama/tiny[engine=hf]"),
        ({"case": {"mode": "reference"}}, "what ran in train/llama/tiny[engine=hf]"),
    ],
)
def test_unlike_runs_are_refused_with_what_differs(tmp_path, change, what):
    b = train(**change.pop("case", {}))
    found = compare(*runs(tmp_path, [train()], [b], **change))
    assert found.exit_code == 2 and not found.alike and what in [u.what for u in found.unlike]
    assert (found.regressions, found.compared) == ([], 0)
    assert "can't be compared" in comparing.text(found) and what in comparing.text(found)


def test_another_scenario_under_the_same_name_is_another_configuration(tmp_path):
    a, b = runs(tmp_path, [train()], [train()])
    next(iter(b.entries.values())).digest = "e"
    assert [u.what for u in compare(a, b).unlike] == ["scenario of train/llama/tiny[engine=hf]"]


def test_two_cards_of_one_name_are_two_devices(tmp_path):
    one, other = spark(), spark()
    one.gpus[0].uuid, other.gpus[0].uuid = "GPU-1", "GPU-2"
    a, b = record_of(tmp_path / "a", [train()], one), record_of(tmp_path / "b", [train()], other)
    assert [u.what for u in compare(a, b).unlike] == ["device"]


def test_cards_of_two_names_are_two_devices_also_where_their_serials_were_taken_out(tmp_path):
    one, other = spark(), spark()
    one.gpus[0].uuid = other.gpus[0].uuid = "GPU-redacted"
    other.gpus[0].name = "NVIDIA H200"
    a, b = record_of(tmp_path / "a", [train()], one), record_of(tmp_path / "b", [train()], other)
    assert "device" in [u.what for u in compare(a, b).unlike]


def test_versions_may_differ_and_are_named(tmp_path):
    a, b = runs(tmp_path, [train()], [train()])
    b.header.versions["torch"] = "2.15.0"
    found = compare(a, b)
    assert found.exit_code == 0
    assert [(d.what, d.a, d.b) for d in found.differences] == [("torch", "2.14.1", "2.15.0")]


@pytest.mark.parametrize(("tokens", "facts", "code"), [(900, None, 0), (500, None, 1), (900, "laptop", 2)])
def test_the_verb(tmp_path, tokens, facts, code):
    runs(tmp_path, [train()], [train(tokens=tokens)], facts=laptop() if facts else None)
    where = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert CliRunner().invoke(app, ["compare", *where]).exit_code == code
    done = CliRunner().invoke(app, ["compare", *where, "--json"])
    assert done.exit_code == code
    document = json.loads(done.stdout)
    jsonschema.validate(document, json.loads((ROOT / "reports/schema/compare-1.json").read_text()))
    assert document["alike"] is (code != 2)
