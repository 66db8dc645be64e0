"""What broke other optimisers, by the numbers of the list of peers' cases."""

import pytest
import torch
from sparktune.ops.dynamic_map import dynamic_map
from sparktune.optim import AdamW8bit

pytestmark = pytest.mark.kernels(together=True)
LR, BETA2 = 1e-3, 0.999


def moved(p, optimizer):
    before = p.detach().clone()
    optimizer.step()
    return float((p - before).abs().max())


def test_case_20_v_is_zero_and_m_is_not(device):
    """Next to an outlier v is lost and m is not; a small gradient later must not be divided by eps alone."""
    p = torch.nn.Parameter(torch.zeros(4096, device=device))
    optimizer = AdamW8bit([p], LR, (0.9, BETA2), 1e-8, 0.0)
    g = torch.full((4096,), 1e-4, device=device)
    g[::256] = 1.0  # v of the others is 1e-8 of it, under half the smallest code's value
    p.grad = g
    first = moved(p, optimizer)
    m, v = optimizer.state[p]["state1"], optimizer.state[p]["state2"]
    assert (v[1] == 0) and (m[1] != 127), "the case has come up"
    assert first <= LR * 1.0001
    p.grad = torch.zeros_like(g)
    # By eps alone: 0.9 * 1e-5 / 1e-8, some hundred times lr.
    assert max(moved(p, optimizer) for _ in range(20)) <= LR / (1 - BETA2) ** 0.5


def test_case_20_sparse_gradients_for_a_long_time(device):
    """Whatever the gradients' scales in a block, no step is longer than Adam's own bound lr / sqrt(1 - beta2)."""
    r = torch.Generator().manual_seed(0)
    scales = 10.0 ** (torch.rand(1024, generator=r) * 8 - 8)
    p = torch.nn.Parameter(torch.zeros(1024, device=device))
    optimizer = AdamW8bit([p], LR, (0.9, BETA2), 1e-12, 0.0)
    longest = 0.0
    for _ in range(60):
        there = torch.rand(1024, generator=r) < 0.3
        p.grad = (torch.randn(1024, generator=r) * scales * there).to(device)
        longest = max(longest, moved(p, optimizer))
    assert longest <= LR / (1 - BETA2) ** 0.5


def test_case_20_states_stay_bitsandbytes_own(device):
    """The floor is in the update alone: what is stored for a lost v is v, so 0 stays 0."""
    p = torch.nn.Parameter(torch.zeros(4096, device=device))
    optimizer = AdamW8bit([p], LR, (0.9, BETA2), 1e-8, 0.0)
    g = torch.full((4096,), 1e-4, device=device)
    g[::256] = 1.0
    for _ in range(3):
        p.grad = g.clone()
        optimizer.step()
    state = optimizer.state[p]
    assert int(state["state2"][1]) == 0 and float(dynamic_map(False)[0]) == 0.0
    assert torch.allclose(state["absmax2"], torch.tensor(1 - BETA2**3, device=device).float(), rtol=1e-5)
