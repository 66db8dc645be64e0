import math

import numpy as np
import pytest
from sparkproof.runners.gradients import compare


def tensors(**values):
    return {name: np.array(value, dtype=np.float32) for name, value in values.items()}


def test_distance_is_relative_over_all_and_names_the_worst():
    result = compare(tensors(a=[3.0, 4.0], b=[0.0, 1.1]), tensors(a=[3.0, 4.0], b=[0.0, 1.0]))
    assert result["relative"] == pytest.approx(0.1 / math.sqrt(26), rel=1e-4)
    assert (result["worst"], result["zero"], result["tensors"]) == ("b", [], 2)
    assert result["worst_relative"] == pytest.approx(0.1, rel=1e-4)


def test_sign_and_scale_are_seen():
    reference = tensors(a=[1.0, -2.0])
    assert compare(tensors(a=[-1.0, 2.0]), reference)["relative"] == pytest.approx(2.0)
    assert compare(tensors(a=[2.0, -4.0]), reference)["relative"] == pytest.approx(1.0)


def test_zero_gradients_are_named():
    assert compare(tensors(a=[0.0, 0.0]), tensors(a=[1.0, 0.0]))["zero"] == ["a"]


@pytest.mark.parametrize("ours", [tensors(b=[1.0]), tensors(a=[1.0, 2.0]), tensors(a=[1.0], b=[1.0]), {}])
def test_other_names_or_shapes_are_infinitely_far(ours):
    assert compare(ours, tensors(a=[1.0]))["relative"] == math.inf


def test_nan_is_never_near():
    result = compare(tensors(a=[math.nan], b=[1.0]), tensors(a=[1.0], b=[1.0]))
    assert not result["relative"] <= 1.0
    assert result["worst"] == "a"


def test_a_reference_of_zeros_proves_nothing():
    assert compare(tensors(a=[0.0]), tensors(a=[0.0]))["relative"] == math.inf
