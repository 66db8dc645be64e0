"""The script that draws KL over bytes: which budgets it tries, what it keeps, when llama.cpp's tools count as built."""

import json
import sys
from pathlib import Path

import pytest
from sparktune.quant.dynamic import Table
from sparktune.quant.dynamic.table import Option, Row

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import dynamic_curve
import llama_tools

PRESETS = {"Q4_0": 40, "Q6_K": 60, "Q8_0": 80}


def table():
    options = {kind: Option(size, 1 / size, 0.0, 0.0) for kind, size in (("q4_0", 20), ("q6_K", 30), ("q8_0", 40))}
    return Table("m", "gguf", 8, 1, 0, [Row(n, n, (2, 32), options) for n in ("a", "b")], [])


class Tools:
    """Of llama.cpp: what they were asked."""

    def __init__(self, at):
        self.at, self.made = at, []

    def quantise(self, preset, *more):
        kinds = (self.at / "types.txt").read_text().split("\n") if more else []
        self.size = sum({"q4_0": 20, "q6_K": 30, "q8_0": 40}[k.partition("=")[2]] for k in kinds) or PRESETS[preset]
        self.made.append((preset, bool(more)))
        return self.at / "out.gguf"

    def divergence(self):
        return 1 / self.size, 0.01, 0.9


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    tools = Tools(tmp_path)
    monkeypatch.setattr(dynamic_curve, "weights_in", lambda file: tools.size)

    def run(offered="three"):
        curve = dynamic_curve.Curve(tmp_path, tmp_path / "out", {"model": "m", "command": "c"}, offered)
        dynamic_curve.gguf(table(), tools, tuple(PRESETS), 8, curve)
        curve.publish()
        return json.loads((tmp_path / "out/curve.json").read_text())["points"]

    return tools, run


def test_ours_gets_every_presets_bytes_and_what_lies_half_way(drawn):
    _, run = drawn
    points = run()
    assert {(p["name"], p["bytes"]) for p in points if not p["dynamic"]} == set(PRESETS.items())
    assert {(p["name"], p["bytes"]) for p in points if p["dynamic"]} == {
        ("dynamic at Q4_0's bytes", 40), ("dynamic at Q6_K's bytes", 60), ("dynamic at Q8_0's bytes", 80),
        ("dynamic, half-way from Q4_0 to Q6_K", 50), ("dynamic, half-way from Q6_K to Q8_0", 70),
    }  # fmt: skip


def test_what_was_measured_is_not_measured_again(drawn):
    tools, run = drawn
    first = run()
    count = len(tools.made)
    assert run() == first and len(tools.made) == count == 8


def test_other_types_on_offer_measure_our_gguf_mixes_again_and_nothing_else(drawn, tmp_path):
    tools, run = drawn
    first = run()
    curve = dynamic_curve.Curve(tmp_path, tmp_path / "out", {}, "three")
    curve.add(dynamic_curve.Measured("nf4", "a mix", True, 50, 0.1, 8, None, None, None))
    count = len(tools.made)
    points = run("four")
    assert [more for _, more in tools.made[count:]] == [True] * 5
    assert [p for p in points if p["format"] == "gguf"] == first
    assert [p["name"] for p in points if p["format"] == "nf4"] == ["a mix"]
    assert len(run()) == len(first) + 1 and len(tools.made) == count + 5  # the first ones are kept beside


def test_a_file_of_other_bytes_than_the_tables_ends_the_run(drawn, monkeypatch):
    tools, run = drawn
    monkeypatch.setattr(dynamic_curve, "weights_in", lambda file: tools.size + 1)
    with pytest.raises(SystemExit, match="the table says"):
        run()


def test_tools_are_built_when_every_one_is_there_and_of_this_pin(tmp_path):
    assert not llama_tools.built(tmp_path)
    for name in llama_tools.TOOLS:
        (tmp_path / name).touch()
    assert not llama_tools.built(tmp_path)
    (tmp_path / "pin").write_text("of an older pin")
    assert not llama_tools.built(tmp_path)
    (tmp_path / "pin").write_text(llama_tools.pin())
    assert llama_tools.built(tmp_path)
