"""Intervals, and the sentence they become."""

import pytest
from sparkproof.judge import stats


def test_a_median_lies_in_its_interval_and_is_reproducible():
    samples = [1.0, 1.1, 0.9, 1.05, 5.0, 1.02, 0.98]
    i = stats.median(samples)
    assert i.low <= i.value <= i.high and i.value == 1.02
    assert i == stats.median(samples)


def test_an_outlier_moves_neither_median_nor_ratio():
    steady = [1.0 + k / 1000 for k in range(25)]
    assert abs(stats.ratio([*steady, 100.0], steady).value - 1) < 0.01


def test_clear_and_unclear_differences():
    a = [1.0 + (k % 5) / 100 for k in range(25)]
    b = [1.5 + (k % 5) / 100 for k in range(25)]
    assert stats.verdict(stats.ratio(b, a), "plain PyTorch").startswith("1.49 x faster than plain PyTorch")
    assert "slower" in stats.verdict(stats.ratio(a, b), "plain PyTorch")
    assert stats.verdict(stats.ratio(a, list(a)), "plain PyTorch").startswith("no difference from plain PyTorch")


def test_no_samples_is_an_error():
    with pytest.raises((ValueError, IndexError)):
        stats.median([])
