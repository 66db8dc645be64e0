"""What may lie in host memory, and where that is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from families import build, step, tokens, with_lora
from sparktune.models import offload, patch_model
from sparktune.models.offload import embedding_to_host

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU with memory of its own")


def test_a_device_that_shares_the_hosts_memory_gains_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(is_integrated=True))
    with pytest.raises(ValueError, match=r"frees nothing: leave offload_embedding=False"):
        offload.refuse(torch.device("cuda"), "the embedding", "offload_embedding")
    with pytest.raises(ValueError, match="for a GPU only, not for cpu"):
        embedding_to_host(build("llama"))


def test_a_tied_head_would_read_the_table_in_every_step(monkeypatch):
    monkeypatch.setattr(offload, "refuse", lambda *a: None)
    with pytest.raises(ValueError, match="tied to the embedding"):
        embedding_to_host(build("llama3-rope"))


@needs_gpu
def test_a_step_is_the_same_to_the_bit_and_the_table_takes_no_device_memory():
    here = with_lora(build("llama")).to("cuda")
    patch_model(here)
    there = copy.deepcopy(here)
    before = torch.cuda.memory_allocated()
    base = there.get_base_model()
    size = base.get_input_embeddings().weight.nbytes
    embedding_to_host(base)
    assert torch.cuda.memory_allocated() <= before - size
    assert base.get_input_embeddings().weight.device.type == "cuda"
    assert next(there.parameters()).device.type == "cuda"
    ids = tokens(2, 24).to("cuda")
    loss, grads = step(here.train(), input_ids=ids, labels=ids)
    found, own = step(there.train(), input_ids=ids, labels=ids)
    assert found.item() == loss.item()
    assert all(torch.equal(own[n], g) for n, g in grads.items())
    kept = there.state_dict()["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(kept.cpu(), here.state_dict()["base_model.model.model.embed_tokens.weight"].cpu())
