"""The loss computes as many rows as have a label, and none of the others."""

import pytest
import torch
from families import step, tokens, twins, worst
from sparktune.models import causal
from sparktune.models.valid_rows import ValidRows


@pytest.fixture
def told(monkeypatch):
    """What the loss is told of the rows that count, call by call."""
    found = []

    def spy(*args, valid_rows=None, **kwargs):
        found.append(valid_rows)
        return real(*args, valid_rows=valid_rows, **kwargs)

    real = causal.linear_cross_entropy
    monkeypatch.setattr(causal, "linear_cross_entropy", spy)
    return found


def masked(prompt):
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return ids, labels


@pytest.mark.parametrize(("prompt", "count"), [(0, 22), (7, 10), (11, 2)])
def test_a_prompt_costs_no_rows_and_changes_nothing(told, prompt, count):
    theirs, ours = twins("llama")
    ids, labels = masked(prompt)
    loss, grads = step(theirs, input_ids=ids, labels=labels)
    found, own = step(ours, input_ids=ids, labels=labels)
    assert told == [count]
    assert found == pytest.approx(loss.item(), rel=1e-6)
    distance, name = worst(own, grads)
    assert distance < 2e-5, name


def test_labels_that_are_shifted_already_are_counted_as_they_are(told):
    _, ours = twins("llama")
    ids, labels = masked(4)
    expected, _ = step(ours, input_ids=ids, labels=labels)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    found, _ = step(ours, input_ids=ids, labels=labels, shift_labels=shifted)
    assert told == [16, 16]
    assert found == expected


def test_a_packed_documents_first_token_is_no_target(told):
    _, ours = twins("llama")
    ids = tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    step(ours, input_ids=ids, labels=ids, position_ids=positions)
    assert told == [9]


def test_no_label_at_all_is_a_loss_of_nothing(told):
    """transformers divides by zero and spoils the weights; here nothing is learnt from nothing."""
    _, ours = twins("llama")
    ids, labels = masked(12)
    loss, grads = step(ours, input_ids=ids, labels=labels)
    assert told == [0]
    assert loss == 0.0
    assert not any(g.any() for g in grads.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a host can know without waiting is of a device")
def test_on_a_device_the_count_is_of_the_labels_as_they_were():
    labels = torch.full((1 << 20,), 5, device="cuda")
    labels[: 1 << 10] = -100
    valid = ValidRows(labels)
    labels.fill_(-100)
    assert valid.read() == (1 << 20) - (1 << 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_nothing_is_asked_while_a_graph_records():
    labels = torch.zeros(8, dtype=torch.int64, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        valid = ValidRows(labels)
    assert valid.read() is None
