"""The recorded facts: fresh, marked as what they are, and one of each machine that the checks must tell apart."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from sparkproof.facts.collect import load

FOLDER = Path(__file__).parents[1] / "facts"
sys.path.insert(0, str(FOLDER))  # make.py's own neighbours
_spec = importlib.util.spec_from_file_location("recorded_facts_make", FOLDER / "make.py")
assert _spec is not None and _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.mark.parametrize("name", make.NAMES)
def test_file_is_what_make_says(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == make.text(name), "run: python tests/facts/make.py"


def test_no_stray_files() -> None:
    assert {p.stem for p in FOLDER.glob("*.json")} == set(make.NAMES)


@pytest.mark.parametrize("name", make.NAMES)
def test_marked_as_constructed(name: str) -> None:
    origin = load(FOLDER / f"{name}.json").origin
    assert origin.startswith("constructed"), "facts that nobody read may not look as if somebody had"
    if name.startswith("gb10"):
        assert origin.startswith("constructed from published outputs: ")


@pytest.mark.parametrize(
    ("name", "target", "sentence"),
    [
        ("gb10_healthy", True, "NVIDIA GB10, 12.1, 48 SMs, 119.7 GiB unified"),
        ("n1x_healthy", True, "NVIDIA RTX Spark N1X, 12.1, 40 SMs, 45.4 GiB unified"),
        ("x86_rtx4090", False, "NVIDIA GeForce RTX 4090, 8.9, 128 SMs, 23.5 GiB"),
        ("x86_laptop", False, "no NVIDIA GPU, x86_64, 16 cores, 31.1 GiB"),
        ("gb10_no_gpus_flag", False, "an NVIDIA GPU that could not be read, aarch64, 20 cores, 119.7 GiB"),
        ("gb10_wedged", False, "NVIDIA GB10, 12.1"),
    ],
)
def test_target_by_properties(name: str, target: bool, sentence: str) -> None:
    facts = load(FOLDER / f"{name}.json")
    assert facts.is_target is target
    assert facts.device_sentence() == sentence


def test_target_needs_all_three_properties() -> None:
    spark = load(FOLDER / "gb10_healthy.json")
    gpu = spark.gpus[0]
    assert not spark.model_copy(update={"arch": "x86_64"}).is_target
    for change in ({"compute_capability": "12.0"}, {"integrated": False}, {"integrated": None}):
        assert not spark.model_copy(update={"gpus": [gpu.model_copy(update=change)]}).is_target
    renamed = spark.model_copy(update={"gpus": [gpu.model_copy(update={"name": "Graphics Device", "sm_count": 40})]})
    assert renamed.is_target, "names and sizes decide nothing"
