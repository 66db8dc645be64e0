"""Every family against transformers' own: losses, every LoRA gradient, packing, padding, twenty steps, generation."""

import pytest
import torch
from families import FAMILIES, build, routed_alike, routers, step, tokens, twins, worst
from sparktune.models import patch_model, unpatch_model
from sparktune.models.projection import fallbacks, reset_fallbacks
from sparktune.ops import dispatch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
every = pytest.mark.parametrize("family", FAMILIES)
# One of each kind of layer with the fast tests; the others take minutes together.
KINDS = {"llama", "qwen3", "gemma2", "gpt_oss"}
each_kind = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in KINDS else pytest.mark.slow) for f in FAMILIES]
)


@every
def test_loss_and_gradients_are_those_of_transformers(family):
    theirs, ours = twins(family)
    batch = {"input_ids": tokens(), "labels": tokens()}
    reset_fallbacks()
    dispatch.reset()
    loss, grads = step(theirs, **batch)
    assert not dispatch.watermarks()
    found, own = step(ours, **batch)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    distance, name = worst(own, grads)
    assert distance < 1e-5, name
    assert all(g.abs().max() > 0 for g in grads.values())
    assert not fallbacks()
    assert dispatch.watermarks()["linear_cross_entropy"]


@each_kind
def test_in_bf16_it_is_no_further_from_the_truth_than_twice_transformers(family):
    truth, _ = twins(family)
    theirs, ours = twins(family, torch.bfloat16)
    truth.load_state_dict({k: v.float() for k, v in theirs.state_dict().items()})
    ids = routed_alike(truth, theirs, ours)
    batch = {"input_ids": ids, "labels": ids}
    (exact, exact_grads), (loss, grads), (found, own) = (step(m, **batch) for m in (truth, theirs, ours))
    errors = [(loss - exact, found - exact)]
    with torch.no_grad():  # a loss is one number, near the truth or not by luck; six are not
        for row in ids[:, None]:
            exact, loss, found = (m(input_ids=row, labels=row, use_cache=False).loss for m in (truth, theirs, ours))
            errors.append((loss - exact, found - exact))
    their_error, our_error = torch.tensor(errors).square().mean(0).sqrt()
    assert our_error <= 2 * their_error + 1e-3
    for name, grad in exact_grads.items():
        norm = grad.norm()
        assert (own[name] - grad).norm() / norm <= 2 * (grads[name] - grad).norm() / norm + 8e-3, name


@each_kind
def test_packed_documents_are_those_documents_alone(family):
    theirs, ours = twins(family)
    lengths = (7, 1, 11, 5)
    ids = tokens(1, sum(lengths))
    labels = ids.clone()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    losses = {}
    alone = {}
    count = sum(n - 1 for n in lengths)
    for start, length in zip(starts, lengths, strict=True):
        if length == 1:
            continue  # one token has nothing to predict
        part = ids[:, start : start + length]
        loss, grads = step(theirs, input_ids=part, labels=part, num_items_in_batch=count)
        losses[start] = loss
        alone = {n: alone.get(n, 0) + g for n, g in grads.items()}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cumulative = torch.tensor([0, *(s + n for s, n in zip(starts, lengths, strict=True))], dtype=torch.int32)
    ways = {
        "positions": {"position_ids": positions},
        "lengths": {"packed_seq_lengths": torch.tensor(lengths)},
        "cumulative": {"position_ids": positions, "cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative,
                       "max_length_q": 11, "max_length_k": 11},
    }  # fmt: skip
    for way, extra in ways.items():
        loss, grads = step(ours, input_ids=ids, labels=labels, **extra)
        assert loss == pytest.approx(sum(losses.values()).item(), rel=1e-5), way
        distance, name = worst(grads, alone)
        assert distance < 2e-5, (way, name)


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, side):
    theirs, ours = twins(family)
    long, short = tokens(1, 13), tokens(1, 6, seed=4)
    pad = torch.zeros(1, 7, dtype=torch.long)
    row = torch.cat((pad, short) if side == "left" else (short, pad), 1)
    ids = torch.cat((long, row))
    mask = (ids != 0).long()
    labels = ids.masked_fill(ids == 0, -100)
    if side == "left":
        labels[1, 7] = -100  # else padding would predict it
    loss, grads = step(ours, input_ids=ids, labels=labels, attention_mask=mask)
    expected, wanted = step(theirs, input_ids=ids, labels=labels, attention_mask=mask)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    distance, name = worst(grads, wanted)
    assert distance < 2e-5, name
    ids[ids == 0] = 77  # whatever padding holds; in a product of experts it shifts the rows, and so the last bits
    again, _ = step(ours, input_ids=ids, labels=labels, attention_mask=mask)
    assert again == pytest.approx(loss.item(), rel=1e-6 if routers(ours) else 0, abs=0)


@each_kind
def test_twenty_steps_follow_transformers(family):
    curves = []
    for model in twins(family):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for i in range(20):
            ids = tokens(2, 16, seed=i % 4)
            loss, _ = step(model, input_ids=ids, labels=ids)
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    theirs, ours = curves
    assert ours[:10] == pytest.approx(theirs[:10], rel=2e-4)
    # Where tokens choose experts, a difference of the last bit may flip one choice, and the optimiser carries it on.
    routed = hasattr(build(family).config, "num_experts_per_tok")
    assert ours == pytest.approx(theirs, rel=5e-3 if routed else 2e-4)
    assert theirs[-1] < 0.8 * theirs[0]


@each_kind
def test_generation_and_logits_are_those_of_transformers(family):
    model = build(family)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    with torch.no_grad():
        plain, text = model(ids, use_cache=False, output_hidden_states=True), model.generate(ids, **options)
        report = patch_model(model)
        after, again = model(ids, use_cache=False).logits, model.generate(ids, **options)
        evaluated = model(ids, labels=ids, use_cache=False, output_hidden_states=True)
    before = plain.logits
    assert torch.allclose(before, after, atol=1e-5 * before.abs().max())
    assert torch.equal(text, again)
    assert torch.allclose(evaluated.logits, before, atol=1e-5 * before.abs().max())
    assert len(evaluated.hidden_states) == len(plain.hidden_states) > 2
    for own, other in zip(evaluated.hidden_states, plain.hidden_states, strict=True):
        assert torch.allclose(own, other, atol=1e-5 * other.abs().max())
    assert not report.left
    assert unpatch_model(model) > 0
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, before)
