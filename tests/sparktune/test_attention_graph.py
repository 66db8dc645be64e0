"""Attention inside a hand-written backward: what it keeps, and that it keeps nothing once it is let go of."""

import gc
import weakref

import pytest
import torch
from sparktune.models.attention_graph import Attended
from torch.multiprocessing.reductions import StorageWeakRef


def inputs():
    torch.manual_seed(3)
    return tuple(torch.randn(1, 8, heads, 16) for heads in (4, 2, 2))


def attended(q, k, v):
    return Attended(q, k, v, None, 0.25, None, None, None)


@pytest.mark.parametrize("forgets", ["nothing", "inputs", "output"])
def test_one_that_is_never_differentiated_dies_with_its_last_reference(forgets):
    attended(*inputs())  # first-time imports may leave frames behind
    gc.collect()
    gc.disable()
    try:
        it = attended(*inputs())
        alive = [weakref.ref(it), weakref.ref(it._output), weakref.ref(it._inputs)]
        if forgets == "inputs":
            it.forget_inputs()
        elif forgets == "output":
            it.forget_output()
        del it
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_forgotten_output_takes_no_memory_and_gives_the_same_gradients_when_it_is_back():
    q, k, v = inputs()
    dout = torch.randn_like(q)
    kept = attended(q, k, v).gradients(dout, q, k, v)
    other = attended(*(t.clone() for t in (q, k, v)))
    out = other.forget_output()
    elsewhere, memory = out.clone(), StorageWeakRef(out.untyped_storage())
    assert not memory.expired()
    del out
    assert memory.expired() and not other.output.numel()
    other.return_output(elsewhere)
    assert torch.equal(other.output, elsewhere)
    for found, wanted in zip(other.gradients(dout, q, k, v), kept, strict=True):
        assert torch.equal(found, wanted)


def test_forgotten_inputs_give_the_gradients_of_the_same_call():
    q, k, v = inputs()
    dout = torch.randn_like(q)
    kept = attended(q, k, v).gradients(dout, q, k, v)
    other = attended(*(t.clone() for t in (q, k, v)))
    other.forget_inputs()
    for found, wanted in zip(other.gradients(dout, q, k, v), kept, strict=True):
        assert torch.equal(found, wanted)
