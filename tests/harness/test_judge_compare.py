"""The error rule: what it lets pass, and what it must not."""

import math

import pytest
import torch
from sparkproof.judge.compare import degenerate, measure, outside, same_bits, unlike_nonfinite
from sparkproof.judge.families import FAMILIES, Family, generator, lay_out, make_inputs
from sparktune.ops import load_op


def tensors(dtype=torch.float32):
    oracle = torch.randn(8, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return oracle.to(dtype), oracle


def test_plain_pytorchs_own_result_passes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain, oracle = tensors(dtype)
        assert measure(plain, plain, oracle).ratio < 0.51


def test_three_times_plains_error_fails():
    plain, oracle = tensors(torch.bfloat16)
    worse = (oracle + 3 * (plain.double() - oracle)).to(torch.float32)
    assert measure(worse, plain, oracle, exempt_cap=True).ratio > 1


def test_one_wrong_element_in_many_fails():
    oracle = torch.randn(512, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = oracle.bfloat16()
    wrong = plain.clone()
    wrong[300, 17] += 0.5
    e = measure(wrong, plain, oracle)
    assert e.l2 <= e.l2_allowed and e.worst > e.worst_allowed and e.ratio > 1


def test_a_small_wrong_row_beside_large_ones_fails():
    plain, oracle = tensors()
    oracle[3] *= 1e-6
    plain = oracle.float()
    wrong = plain.clone()
    wrong[3] *= 1.01
    assert measure(wrong, plain, oracle).ratio > 1


def test_a_bad_reference_excuses_nothing():
    plain, oracle = tensors()
    plain = plain * 1.05
    assert measure(plain, plain, oracle).ratio > 1


def test_truncation_in_place_of_rounding_fails():
    plain, oracle = tensors(torch.bfloat16)
    cut = (oracle.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert measure(cut, plain, oracle).ratio > 1


def test_nan_and_inf_must_be_where_they_belong():
    plain, oracle = tensors(torch.float16)
    oracle[0, 0], oracle[1, 1], oracle[2, 2] = math.nan, math.inf, 1e6
    plain = oracle.half()
    assert unlike_nonfinite(plain, plain, oracle) == 0
    for place, value in (((0, 0), 0.0), ((1, 1), 65504.0), ((1, 1), -math.inf), ((5, 5), math.nan)):
        wrong = plain.clone()
        wrong[place] = value
        assert unlike_nonfinite(wrong, plain, oracle) == 1, place


def test_a_finite_result_where_plain_overflows_is_right_only_if_the_oracle_is_finite():
    plain, oracle = tensors(torch.float16)
    overflowed = plain.clone()
    overflowed[0, 0] = math.inf
    assert unlike_nonfinite(plain, overflowed, oracle) == 0


def test_oracles_that_prove_nothing_are_named():
    _, oracle = tensors()
    assert degenerate(oracle) == ""
    assert degenerate(torch.zeros(4, 4)) == "mostly zero"
    assert degenerate(torch.full((4, 4), 2.0)) == "all one value"
    assert degenerate(torch.full((4, 4), 2.0), constant_ok=True) == ""
    assert degenerate(torch.tensor([1.0, math.nan])) == "not finite"


def test_bits_and_bounds():
    a = torch.tensor([0.0, math.nan, 1.0])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([-0.0, math.nan, 1.0]))
    assert not same_bits(a, a.double())
    assert outside(a, a, a) == 0
    assert outside(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.5])) == 1
    assert outside(torch.tensor([math.nan]), torch.tensor([1.0]), torch.tensor([1.0])) == 1


def test_layouts_hold_the_values_and_are_what_they_say():
    t = torch.arange(12.0).reshape(3, 4)
    cpu = torch.device("cpu")
    for layout in ("contiguous", "sliced", "transposed"):
        view = lay_out(t, layout, cpu)
        assert torch.equal(view, t)
        assert view.is_contiguous() == (layout == "contiguous")
    assert lay_out(t, "row", cpu).stride() == (0, 1)
    assert lay_out(t, "scalar", cpu).stride() == (0, 0)
    far = lay_out(t.bfloat16(), "far", cpu)
    assert far.stride(0) == 2**30 and torch.equal(far, t.bfloat16())


def test_families_are_what_they_say_and_the_same_in_every_process():
    spec = load_op("rms_norm")
    p = spec.problem("typical", torch.float32, "llama")
    made = {f.name: make_inputs(spec, p, f, torch.device("cpu")) for f in FAMILIES}
    weights = [m["weight"] for m in made.values()]
    assert all(float(w.detach().std()) > 0.1 for w in weights)  # a weight of ones hides a wrong index
    assert made["NaN planted"]["x"].isnan().sum() == 1
    assert made["Inf planted"]["x"].isposinf().any() and made["Inf planted"]["x"].isneginf().any()
    assert made["scaled 1e3"]["x"].detach().std() > 100 and made["scaled 1e-3"]["x"].detach().std() < 0.01
    assert len(made["equal values"]["x"].unique()) == 1
    assert torch.rand(1, generator=generator("a", 1)).item() == torch.rand(1, generator=generator("a", 1)).item()
    assert torch.rand(1, generator=generator("a", 1)).item() != torch.rand(1, generator=generator("a", 2)).item()


@pytest.mark.parametrize("name", ["values", "inputs", "gradient"])
def test_each_kind_of_family_is_tried(name):
    assert len({getattr(f, name) for f in FAMILIES}) >= 3
    assert isinstance(FAMILIES[0], Family)
