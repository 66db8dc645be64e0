"""A step that is replayed is the step as ever, until something changes.

Where there is no GPU, what is recorded is run again instead of replayed: all but the recording itself is tried.
"""

import copy

import pytest
import torch
from families import build, step, tokens, with_lora, worst
from sparktune.models import graphs, patch_model
from sparktune.models.checkpointing import set_memory_budget
from sparktune.models.graphs import use_cuda_graphs
from sparktune.models.projection import fallbacks, reset_fallbacks
from sparktune.models.valid_rows import ValidRows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(scope="module")
def untouched():
    found = with_lora(build("llama")).to(DEVICE)
    patch_model(found)
    return found.train()


@pytest.fixture
def pair(untouched, monkeypatch):
    """(a model that runs as ever, the same with graphs, the latter's `StepGraphs`)."""
    reset_fallbacks()
    plain, graphed = copy.deepcopy(untouched), copy.deepcopy(untouched)
    for m in (plain, graphed):
        m.gradient_checkpointing_enable({"use_reentrant": False})
    return plain, graphed, switched_on(graphed, monkeypatch)


def switched_on(model, monkeypatch):
    if CUDA:
        use_cuda_graphs(model)
    else:
        monkeypatch.setattr(graphs, "record", run_again)
        object.__setattr__(causal(model), graphs.GRAPHS, graphs.StepGraphs())
    return causal(model).__dict__[graphs.GRAPHS]


def run_again(work, pool, stream):
    def again():
        with torch.enable_grad():
            work()

    again()
    return again


def causal(model):
    return model.get_base_model()


def batch(seed=0, length=12, prompt=2, rows=2):
    ids = tokens(rows, length, seed=seed).to(DEVICE)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def same(plain, graphed, data):
    """One step of both is the same to the bit."""
    loss, grads = step(plain, **data)
    found, own = step(graphed, **data)
    assert found.item() == loss.item()
    assert own.keys() == grads.keys()
    assert all(torch.equal(own[n], g) for n, g in grads.items())


def learn(*models):
    for m in models:
        torch.manual_seed(0)
        with torch.no_grad():
            for p in m.parameters():
                if p.requires_grad:
                    p += 0.01 * torch.randn(p.shape).to(p.device)


def test_replayed_steps_are_the_steps_as_ever_while_the_model_learns(pair):
    plain, graphed, of = pair
    for seed in range(6):
        same(plain, graphed, batch(seed))
        learn(plain, graphed)
    assert dict(of.steps) == {"as ever: the shape is new": 2, "recorded": 1, "replayed": 4}
    assert graphs.report(graphed) == {"graphs": 1, "steps": dict(of.steps)}
    assert not fallbacks()


def test_gradients_of_several_steps_add_up(pair):
    plain, graphed, of = pair
    for seed in range(5):
        for m in (plain, graphed):
            (m(**batch(seed), use_cache=False).loss * (seed + 1)).backward()
    assert of.steps["replayed"] == 3
    own = {n: p.grad for n, p in graphed.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert worst(own, wanted)[0] < 1e-6


def test_what_was_given_out_is_not_written_again(pair):
    _, graphed, of = pair
    kept = []
    for seed in range(5):
        loss, grads = step(graphed, **batch(seed))
        kept.append((loss, loss.item(), {n: (g, g.clone()) for n, g in grads.items()}))
    assert of.steps["replayed"] == 3
    for loss, value, grads in kept:
        assert loss.item() == value
        assert all(torch.equal(g, then) for g, then in grads.values())


def test_another_number_of_labels_or_another_shape_is_another_graph(pair):
    plain, graphed, _ = pair
    for data in [batch(s, prompt=2) for s in range(4)] + [batch(s, prompt=7) for s in range(4)]:
        same(plain, graphed, data)
    for s in range(4):
        same(plain, graphed, batch(s, length=9))
    assert graphs.report(graphed)["graphs"] >= 3
    assert not fallbacks()


def test_where_every_batch_has_another_number_of_labels_one_graph_serves_all(pair):
    plain, graphed, of = pair
    for prompt in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10):
        loss, grads = step(plain, **batch(prompt, prompt=prompt))
        found, own = step(graphed, **batch(prompt, prompt=prompt))
        assert found.item() == pytest.approx(loss.item(), rel=1e-6)  # another order of rows in the loss
        assert worst(own, grads)[0] < 2e-5
    assert graphs.report(graphed)["graphs"] == 1
    assert of.steps["replayed"] == 4


def test_a_number_of_labels_is_not_waited_for_once_it_has_come_twice(pair, monkeypatch):
    plain, graphed, of = pair
    order = []
    run, read = graphs.Recorded.run, ValidRows.read
    monkeypatch.setattr(graphs.Recorded, "run", lambda *a: order.append("replay") or run(*a))
    monkeypatch.setattr(ValidRows, "read", lambda *a: order.append("number") or read(*a))
    for seed in range(5):
        order.clear()
        same(plain, graphed, batch(seed))
    read_by_plain = 1
    assert order[read_by_plain:] == ["replay", "number"]
    assert of.steps["replayed"] == 3


def test_labels_are_counted_once_a_step_whichever_way_it_goes(pair, monkeypatch):
    _, graphed, of = pair
    reads = []
    read = ValidRows.read
    monkeypatch.setattr(ValidRows, "read", lambda *a: reads.append(1) or read(*a))
    for prompt in (2, 2, 2, 2, 5):  # as ever, as ever, recorded, replayed, replayed in vain and then as ever
        reads.clear()
        step(graphed, **batch(prompt=prompt))
        assert len(reads) == 1
    assert of.steps["replayed in vain: another number of labels, or setting"] == 1


def test_a_step_of_another_number_than_the_usual_one_is_replayed_anew_with_its_own(pair):
    plain, graphed, of = pair
    for prompt in (2, 2, 2, 2, 5, 5, 5, 5, 2, 2, 5, 2):
        same(plain, graphed, batch(prompt=prompt))
    assert of.steps["replayed in vain: another number of labels, or setting"] == 3
    assert of.steps["replayed"] == 8
    assert sum(n for how, n in of.steps.items() if "vain" not in how and how != "recorded") == 12


def test_packed_and_padded_rows_are_replayed_whatever_their_documents(pair):
    plain, graphed, of = pair
    ids = tokens(1, 24).to(DEVICE)
    for lengths in ([6] * 4, [5, 7, 6, 6], [8, 4, 8, 4], [6] * 4, [7, 5, 7, 5]):
        same(plain, graphed, {"input_ids": ids, "labels": ids, "packed_seq_lengths": lengths})
    assert of.steps["replayed"] == 3
    padded = torch.ones(2, 12, dtype=torch.int64, device=DEVICE)
    for hidden in (3, 1, 2, 3, 1):
        mask = padded.clone()
        mask[0, :hidden] = 0
        data = batch(prompt=4)
        same(plain, graphed, {**data, "attention_mask": mask})
    assert of.steps["replayed"] == 6
    assert not fallbacks()


def test_the_number_of_items_divides_the_sum(pair):
    plain, graphed, of = pair
    for items in (3, 5.0, torch.tensor(7, device=DEVICE), 4, torch.tensor(9.0, device=DEVICE)):
        same(plain, graphed, {**batch(), "num_items_in_batch": items})
    assert of.steps["replayed"] == 3


def scaled(model):
    q = causal(model).model.layers[0].self_attn.q_proj
    q.scaling["default"] *= 2


def moved(model):
    p = causal(model).model.layers[1].mlp.up_proj.lora_B["default"].weight
    p.data = p.data * 1.5


def frozen(model):
    causal(model).model.layers[0].mlp.up_proj.lora_A["default"].weight.requires_grad_(False)


def merged(model):
    causal(model).model.layers[0].self_attn.o_proj.merge()


def exchanged_head(model):
    causal(model).lm_head.weight.data = causal(model).lm_head.weight.data * 0.5


@pytest.mark.parametrize("change", [scaled, moved, frozen, exchanged_head])
def test_a_change_of_the_model_is_noticed(pair, change):
    plain, graphed, of = pair
    for s in range(4):
        same(plain, graphed, batch(s))
    for m in (plain, graphed):
        change(m)
    for s in range(4):
        same(plain, graphed, batch(s))
    assert of.steps["as ever: something of the model has changed"] == 1
    assert of.steps["recorded"] == 2


def test_a_merged_adapter_is_no_longer_replayed(pair):
    plain, graphed, of = pair
    for s in range(4):
        same(plain, graphed, batch(s))
    for m in (plain, graphed):
        merged(m)
    same(plain, graphed, batch())
    assert of.steps["as ever: something of the model has changed"] == 1


def test_a_hook_ends_recording_with_its_reason(pair):
    _, graphed, of = pair
    causal(graphed).model.layers[0].mlp.register_forward_hook(lambda *a: None)
    for s in range(4):
        step(graphed, **batch(s))
    assert of.steps["recorded"] == 0
    assert any("CUDA graph" in reason and "hooks" in reason for reason in fallbacks())


def test_a_second_forward_waits_for_no_backward(pair):
    plain, graphed, of = pair
    for s in range(3):
        same(plain, graphed, batch(s))
    losses = {}
    for name, m in (("plain", plain), ("graphed", graphed)):
        m.zero_grad()
        first = m(**batch(7), use_cache=False).loss
        second = m(**batch(8), use_cache=False).loss
        (first + second).backward()
        losses[name] = (first.item(), second.item(), [p.grad for p in m.parameters() if p.grad is not None])
    assert of.steps["as ever: the last forward's backward has not run"] == 1
    assert losses["plain"][:2] == losses["graphed"][:2]
    for a, b in zip(losses["plain"][2], losses["graphed"][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    graphed(**batch(9), use_cache=False)  # a loss that nobody wants
    same(plain, graphed, batch(9))
    assert of.steps["as ever: the last forward's backward has not run"] == 1


def test_backward_runs_once_and_has_no_second_derivative(pair):
    _, graphed, _ = pair
    for s in range(3):
        step(graphed, **batch(s))
    loss = graphed(**batch(), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def test_evaluation_and_generation_are_as_ever(pair):
    plain, graphed, of = pair
    for s in range(4):
        same(plain, graphed, batch(s))
    steps = dict(of.steps)
    for m in (plain, graphed):
        m.eval()
    with torch.no_grad():
        a, b = (m(**batch(), use_cache=False) for m in (plain, graphed))
    assert b.logits is not None and torch.equal(a.logits, b.logits)
    assert dict(of.steps) == steps
    for m in (plain, graphed):
        m.train()
    same(plain, graphed, batch(5))
    assert of.steps["replayed"] == steps["replayed"] + 1


def test_a_budget_is_a_part_of_the_key(pair):
    plain, graphed, of = pair
    for budget in (0, float("inf"), 0):
        for m in (plain, graphed):
            set_memory_budget(m, budget)
        for s in range(4):
            same(plain, graphed, batch(s))
    assert not fallbacks()
    assert of.steps["recorded"] >= 2


def test_other_keywords_run_as_ever(pair):
    _, graphed, of = pair
    for s in range(4):
        out = graphed(**batch(s), use_cache=False, output_hidden_states=True)
        assert out.hidden_states is not None
        out.loss.backward()
    assert not of.steps


def test_few_graphs_are_kept(pair, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    _, graphed, _of = pair
    for length in (8, 9, 10, 8, 9, 10):
        for s in range(3):
            step(graphed, **batch(s, length=length))
    assert graphs.report(graphed)["graphs"] == 2


def test_off_and_where_it_can_not_be():
    model = with_lora(build("llama"))
    with pytest.raises(ValueError, match="patch it first"):
        use_cuda_graphs(model)
    patch_model(model)
    if not CUDA:
        with pytest.raises(ValueError, match="one CUDA device; this one is on cpu"):
            use_cuda_graphs(model)
    use_cuda_graphs(model, on=False)
    assert graphs.report(model) == {"graphs": 0, "steps": {}}


def test_a_step_that_can_not_be_recorded_runs_as_ever(pair, monkeypatch):
    plain, graphed, of = pair

    def fails(work, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "record", fails)
    for s in range(4):
        same(plain, graphed, batch(s))
    assert of.steps["as ever: recording failed"] == 1
    assert any("not permitted when stream is capturing" in reason for reason in fallbacks())


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_under_autocast_and_with_weights_in_16_bits(pair):
    plain, graphed, of = pair
    for m in (plain, graphed):
        set_memory_budget(m, float("inf"))
        for n, p in m.named_parameters():
            if "lora" not in n:
                p.data = p.data.bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        for s in range(5):
            same(plain, graphed, batch(s))
            learn(plain, graphed)
    assert of.steps["replayed"] == 3


@pytest.mark.skipif(not CUDA, reason="streams need a GPU")
def test_another_stream_runs_as_ever(pair):
    plain, graphed, of = pair
    for s in range(4):
        same(plain, graphed, batch(s))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        same(plain, graphed, batch(5))
    torch.cuda.synchronize()
    assert of.steps["as ever: another stream"] == 1
