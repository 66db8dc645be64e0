"""The arithmetic of the pool adds up, and says what a run may take."""

from __future__ import annotations

from pathlib import Path

import pytest
from sparkproof.facts.account import account, lines
from sparkproof.facts.collect import load
from sparkproof.facts.model import Facts, Memory
from test_checks_logic import change

FOLDER = Path(__file__).parents[1] / "facts"


def test_a_healthy_spark_in_numbers() -> None:
    found = account(load(FOLDER / "gb10_healthy.json"))
    assert found is not None and found.unified
    assert found.page_cache_gib == pytest.approx(7.1 - 0.2) and found.reclaimable_gib == pytest.approx(5.5)
    assert found.floor_gib == pytest.approx(119.7 / 8, abs=1e-3) and found.may_take_gib == pytest.approx(
        112.4 - 119.7 / 8, abs=1e-3
    )
    assert found.swap_used_gib == 0.0 and found.gpu_processes[0] == "Xorg 2871, 0.1 GiB"
    rows = dict(lines(found))
    assert rows["pool"] == "119.7 GiB, shared by CPU and GPU"
    assert rows["free"].startswith("119.7 - 2.6 processes - 0.2 shared - 0.9 kernel - 2.1 drivers - 6.9 page cache")
    assert rows["free"].endswith("= 106.9")
    assert rows["available"] == "106.9 free + 5.5 reclaimable = 112.4"
    assert rows["CUDA's free"].startswith("106.5, which is 5.9 less")
    assert rows["a run may take"] == "min(112.4 available - 15.0 floor, 0.85 x 119.7) = 97.4"
    assert rows["GPU's others"] == "Xorg 2871, 0.1 GiB; gnome-shell 3020, 0.0 GiB"


def test_no_more_than_most_of_the_pool() -> None:
    found = account(change("gb10_healthy", memory__available_gib=119.0))
    assert found is not None and found.may_take_gib == pytest.approx(0.85 * 119.7, abs=1e-3)


def test_nothing_is_left_below_the_floor() -> None:
    found = account(load(FOLDER / "gb10_neighbours.json"))
    assert found is not None and found.may_take_gib == 0.0
    assert "VLLM::EngineCore 4411, 101.5 GiB" in dict(lines(found))["GPU's others"]


def test_a_laptop_has_no_word_of_a_gpu() -> None:
    found = account(load(FOLDER / "x86_laptop.json"))
    assert found is not None
    rows = dict(lines(found))
    assert "CUDA's free" not in rows and "GPU's others" not in rows and rows["pool"] == "31.1 GiB"


def test_without_numbers_there_is_no_account() -> None:
    assert account(Facts(origin="nothing")) is None
    found = account(Facts(origin="little", memory=Memory(total_gib=8.0, available_gib=4.0)))
    assert found is not None
    assert [name for name, _ in lines(found)] == ["pool", "a run may take"]
