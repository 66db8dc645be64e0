"""Many parameters as one: the same training, gradients that move and add up, names that stay."""

import pytest
import torch
from sparktune.optim.flat import FlatParameters
from torch import nn


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def train(flat, steps=4, micro=2):
    net = model()
    names = [n for n, _ in net.named_parameters()]
    net[0].bias.requires_grad_(False)
    whole = FlatParameters(net.parameters()) if flat else None
    trained = [whole.parameter] if whole else [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        for _ in range(micro):
            loss = net(torch.randn(4, 6, generator=generator)).pow(2).mean()
            (whole.watch(loss) if whole else loss).backward()
            losses.append(loss.item())
        if whole:
            assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert [n for n, _ in net.named_parameters()] == names
    return losses, [p.detach().clone() for p in net.parameters()]


def test_training_is_the_same_with_gradients_that_add_up():
    (apart, weights), (together, same) = train(False), train(True)
    assert together == apart
    assert apart[-1] < apart[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_values_are_shared_both_ways_and_parameters_begin_at_whole_blocks():
    net = model()
    flat = FlatParameters(net.parameters())
    with torch.no_grad():
        net[2].weight.fill_(7)
        assert int((flat.parameter == 7).sum()) == 15
        flat.parameter.zero_()
    assert not net[0].weight.any()
    assert all(p.data_ptr() % (256 * 4) == flat.parameter.data_ptr() % (256 * 4) for p in net.parameters())


def test_what_can_not_be_flat_is_named():
    net = model()
    net[2].weight.data = net[2].weight.data.double()
    with pytest.raises(ValueError, match=r"float32 on cpu, torch.float64 on cpu"):
        FlatParameters(net.parameters())
    with pytest.raises(ValueError, match="got none"):
        FlatParameters(p.requires_grad_(False) for p in net.parameters())
