"""The layer as one Function: transformers' loss and gradients, whatever it keeps and whichever layer it is."""

import copy
import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sparktune.models import checkpointing, layer_function, layer_mlp, offload, patch_model
from sparktune.models.checkpointing import (
    INPUT,
    NONE,
    NORMS,
    OVER,
    STORE,
    WEIGHTS,
    LayerShape,
    all_of,
    kinds_of,
    leaving,
    set_memory_budget,
    spare,
    spend,
)
from sparktune.models.graphs import report, use_cuda_graphs
from sparktune.models.layer_function import DecoderLayer, _forget
from sparktune.models.layer_parts import parts_of
from sparktune.models.projection import fallbacks, reset_fallbacks
from sparktune.ops import dispatch, qk_norm_rope
from sparktune.ops.weights import Weight

sys.path.insert(0, str(Path(__file__).parents[1] / "sparktune"))
import families

KINDS, ALL = kinds_of(1), all_of(1)
pytestmark = [pytest.mark.kernels(together=True), pytest.mark.filterwarnings("ignore")]
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
}  # fmt: skip


@pytest.fixture
def twins(device, monkeypatch):
    """family -> (transformers' model, ours) of two small layers, on the device, in fp32."""
    monkeypatch.setattr(families, "COMMON", families.COMMON | SMALL)

    def build(family, **options):
        theirs = families.with_lora(families.build(family), **options).to(device)
        ours = copy.deepcopy(theirs)
        patch_model(ours)
        reset_fallbacks()
        return theirs.train(), ours.train()

    return build


def batch(device, rows=1, length=7):
    ids = families.tokens(rows, length, vocab=40).to(device)
    return {"input_ids": ids, "labels": ids}


def keep(model, kinds):
    """Switch checkpointing on, and have every layer keep `kinds`; None: switch it off."""
    if kinds is None:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = model.get_base_model().model
    store = getattr(backbone, STORE, None)
    backbone._sparktune_kept_for = (0.0, 1, 7, store)
    for i, layer in enumerate(backbone.layers):
        layer.keep, layer.leaving = frozenset(kinds), NONE
        if store is not None and i < len(backbone.layers) - 1:
            layer.leaving = frozenset(kinds | {INPUT}) - {WEIGHTS, NORMS}


def agree(ours, theirs, data, exact=None):
    """Same loss and gradients as transformers; or the same bits as `exact`."""
    loss, grads = families.step(ours, **data)
    loss = loss.item()
    if exact is not None:
        assert loss == exact[0]
        assert all(torch.equal(g, exact[1][n]) for n, g in grads.items())
        return loss, grads
    expected, wanted = families.step(theirs, **data)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    distance, name = families.worst(grads, wanted)
    assert distance < 2e-5, name
    return loss, grads


SLOW = pytest.mark.slow  # families that differ in little from one beside them


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "phi4-mini", pytest.param("qwen2", marks=SLOW), pytest.param("smollm3", marks=SLOW)]
)
def test_it_is_transformers_layer_whatever_it_keeps(twins, device, family):
    theirs, ours = twins(family)
    dispatch.reset()
    first = agree(ours, theirs, batch(device))
    marks = dispatch.watermarks()
    assert {"rms_norm", "add_rms_norm", "lora_qkv", "lora_linear", "lora_mlp"} <= set(marks)
    assert not any(ways["reference"] for ways in marks.values())
    assert not fallbacks()
    for kinds in ({"attention"}, {"qkv", "gate_up0"}) if family == "qwen3" else (NONE,):
        keep(ours, kinds)
        agree(ours, theirs, batch(device), exact=first)


@pytest.fixture
def three_strips(monkeypatch):
    """Seven rows as three, three and one."""
    monkeypatch.setattr(checkpointing, "STRIP", 3)
    monkeypatch.setattr(checkpointing, "WHOLE", 3)


def test_a_layer_in_strips_is_the_same_layer_whichever_it_keeps(twins, device, three_strips):
    theirs, ours = twins("llama")
    assert layer_mlp.cut(7, checkpointing.strips_of(7)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    first = agree(ours, theirs, batch(device))
    for kinds in (NONE, {"gate_up0", "gate_up2", "residual"}, all_of(3) | {WEIGHTS, NORMS}):
        keep(ours, kinds)
        agree(ours, theirs, batch(device), exact=first)
    assert not fallbacks()


@pytest.mark.parametrize("frozen", ["layers.0.mlp.down", "nothing but norms"])
def test_strips_of_what_is_frozen_get_nothing(twins, device, three_strips, frozen):
    theirs, ours = twins("llama")
    for model in (theirs, ours):
        for name, p in model.named_parameters():
            if frozen == "nothing but norms":
                p.requires_grad_("norm" in name)
            elif frozen in name:
                p.requires_grad_(False)
    keep(ours, {"gate_up1"})
    agree(ours, theirs, batch(device))


def test_one_strip_of_gate_and_up_is_there_at_a_time(twins, device, three_strips, monkeypatch):
    _, ours = twins("llama")
    keep(ours, NONE)
    made, rows = [], []
    real = layer_mlp._feed

    def feed(call, strip, x1, p):
        gc.collect()
        assert not [t for t in made if t() is not None]
        real(call, strip, x1, p)
        made.append(weakref.ref(strip.eu.untyped_storage()))
        rows.append(len(strip.eu))

    monkeypatch.setattr(layer_mlp, "_feed", feed)
    families.step(ours, **batch(device))
    assert rows == [3, 3, 1] * 2 + [1, 3, 3] * 2  # two layers, forward and again


def test_packed_documents_stay_apart(twins, device):
    theirs, ours = twins("mistral")
    keep(ours, {"attention"})
    ids = families.tokens(1, 9, vocab=40).to(device)
    labels = ids.clone()
    labels[0, 4] = -100
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=device)
    agree(ours, theirs, {"input_ids": ids, "labels": labels, "position_ids": positions})


@pytest.mark.parametrize("frozen", ["lora_A", "layers.1", "layers.0.mlp", "self_attn", "nothing but norms"])
def test_what_is_frozen_gets_nothing_and_the_rest_its_own(twins, device, frozen):
    theirs, ours = twins("qwen3")
    for model in (theirs, ours):
        for name, p in model.named_parameters():
            if frozen == "nothing but norms":
                p.requires_grad_("norm" in name)
            elif frozen in name:
                p.requires_grad_(False)
    keep(ours, NONE)
    _, grads = agree(ours, theirs, batch(device, length=4))
    assert not any(frozen in name for name in grads)
    assert not fallbacks()


def test_a_gradient_with_something_beside_its_rows_is_not_written_beside(twins, device):
    """A layer's own gradient has room for the next one's low-rank product; rows of another tensor may look the same."""
    _, ours = twins("llama")
    x = torch.randn(1, 7, 32, device=device, requires_grad=True)
    backbone = ours.get_base_model().model
    tables = backbone.rotary_emb(x, torch.arange(7, device=device)[None])
    y = backbone.layers[0](x, position_embeddings=tables, documents=None)
    assert type(y.grad_fn.next_functions[0][0]).__name__ == f"{DecoderLayer.__name__}Backward"
    wide = torch.randn(7, 64 + 32, device=device)
    wanted = wide.clone()
    y.backward(wide[:, :32].view(1, 7, 32))
    assert torch.equal(wide, wanted)


def test_the_residual_streams_gradient_is_not_copied_for_the_next_layer(twins, device, monkeypatch):
    _, ours = twins("llama")
    found = []
    real = layer_function._row_of
    monkeypatch.setattr(layer_function, "_row_of", lambda dy, r: found.append(real(dy, r)) or found[-1])
    families.step(ours, **batch(device))
    assert [row is not None for row in found] == [False, True]  # after the loss, after a layer
    assert not layer_function._WITH_ROOM


def test_nothing_outlives_what_the_budget_lets_it_keep(twins, device):
    _, ours = twins("llama")
    alive = {}
    for kinds in (NONE, ALL):
        keep(ours, kinds)
        loss = ours(**batch(device), use_cache=False).loss
        node, states = loss.grad_fn, []
        stack = [node]
        while stack:
            node = stack.pop()
            stack += [f for f, _ in node.next_functions if f is not None]
            if type(node).__name__ == f"{DecoderLayer.__name__}Backward":
                states.append(node.state)
        assert len(states) == 2
        alive[kinds] = [
            [t is not None for t in (s.qkv, s.attended, s.x1, *(strip.eu for strip in s.strips))] for s in states
        ]
        inputs = weakref.ref(loss)
        del loss, node, stack, states
        gc.collect()
        assert inputs() is None
    assert alive == {NONE: [[False] * 4] * 2, ALL: [[True] * 4] * 2}


def test_heads_after_their_norms_are_made_again_of_what_is_kept(twins, device, monkeypatch):
    """q and k before their norms serve both; after them they are 10 of 22 KB a token of Qwen3-8B, and one pass to make."""
    theirs, ours = twins("qwen3")
    real = qk_norm_rope.forward_into
    for kinds, there in ((ALL, False), (ALL | {WEIGHTS, NORMS}, True)):
        keep(ours, kinds)
        made, seen = [], []
        with monkeypatch.context() as patch:
            patch.setattr(qk_norm_rope, "forward_into", lambda *a, made=made: made.append(1) or real(*a))
            patch.setattr(layer_function, "_forget", lambda c, s, seen=seen: _forget(c, s) or seen.append(s.q))
            agree(ours, theirs, batch(device))
        assert [q is not None for q in seen] == [there] * 2
        assert len(made) == (2 if there else 4)


class Shelf:
    """A store that hands out copies, and counts."""

    def __init__(self):
        self.began, self.out = 0, []

    def begin(self):
        self.began += 1

    def put(self, tensors):
        lots = {"rest": self.hold(tensors), "first": []}
        return SimpleNamespace(
            put_first=lambda more: lots.update(first=self.hold(more)),
            first=lambda: self.taken(lots["first"]),
            rest=lambda: self.taken(lots["rest"]),
        )

    def hold(self, tensors):
        found = [(offload.flat(t).clone(), offload.place(t)) for t in tensors]
        self.out.append(found)
        return found

    def taken(self, found):
        back = [offload.placed(*t) for t in found]
        found.clear()
        return back


@pytest.mark.parametrize(
    ("family", "sets"),
    [
        ("llama", [NONE, {"residual", "gate_up0"}]),
        pytest.param("qwen3", [{"attention"}, ALL], marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_may_wait_elsewhere(twins, device, family, sets):
    theirs, ours = twins(family)
    keep(ours, NONE)
    first = agree(ours, theirs, batch(device))
    backbone, shelf = ours.get_base_model().model, Shelf()
    object.__setattr__(backbone, STORE, shelf)
    for layer in backbone.layers:
        layer.store = shelf
    for count, kinds in enumerate(sets, 1):
        keep(ours, kinds)
        agree(ours, theirs, batch(device), exact=first)
        assert shelf.began == count and not any(shelf.out)
    keep(ours, None)
    agree(ours, theirs, batch(device), exact=first)  # without checkpointing all stay


@pytest.mark.slow
def test_some_strips_may_wait_elsewhere(twins, device, three_strips):
    theirs, ours = twins("llama")
    keep(ours, NONE)
    first = agree(ours, theirs, batch(device))
    shelf = Shelf()
    object.__setattr__(ours.get_base_model().model, STORE, shelf)
    for layer in ours.get_base_model().model.layers:
        layer.store = shelf
    keep(ours, {"gate_up0", "gate_up2", "qkv"})
    agree(ours, theirs, batch(device), exact=first)
    assert not any(shelf.out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU with memory of its own")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_kept_waits_in_host_memory(twins, device, family, recorded, monkeypatch):
    monkeypatch.setattr(families, "COMMON", families.COMMON | SMALL | {"num_hidden_layers": 5})
    theirs, ours = twins(family)
    for kinds in (NONE, ALL):
        set_memory_budget(ours, 0)
        keep(ours, kinds)
        first = agree(ours, theirs, batch(device))
        set_memory_budget(ours, 0, offload=True)
        keep(ours, kinds)
        use_cuda_graphs(ours, recorded)
        for _ in range(5):
            agree(ours, theirs, batch(device), exact=first)
        store = ours.get_base_model().model._sparktune_store
        assert not store._leaving and not store._arriving
        assert bool(store._recorded) is False
        if recorded:
            assert report(ours)["steps"] == {"as ever: the shape is new": 2, "recorded": 1, "replayed": 3}
        use_cuda_graphs(ours, False)
    assert not fallbacks()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU with memory of its own")
def test_two_forwards_before_their_backwards_have_host_memory_of_their_own(twins, device):
    theirs, ours = twins("llama")
    set_memory_budget(ours, 0, offload=True)
    keep(ours, ALL)
    datas = [batch(device), {k: v.flip(1) for k, v in batch(device).items()}]
    wanted = [agree(ours, theirs, data) for data in datas]
    losses = [ours(**data, use_cache=False).loss for data in datas]
    for loss, (_, grads) in zip(losses, wanted, strict=True):
        ours.zero_grad()
        loss.backward()
        assert all(torch.equal(p.grad, grads[n]) for n, p in ours.named_parameters() if p.grad is not None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_host_memory_is_refused_where_it_frees_nothing(twins, device):
    _, ours = twins("llama")
    with pytest.raises(ValueError, match="for a GPU only, not for cpu"):
        set_memory_budget(ours, 0, offload=True)


def test_a_second_backward_is_an_error_not_a_wrong_number(twins, device):
    _, ours = twins("llama")
    loss = ours(**batch(device, length=3), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def test_what_can_not_run_whole_runs_op_by_op_and_says_so(twins, device):
    theirs, ours = twins("llama", use_rslora=True)
    ours.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *a: None)
    agree(ours, theirs, batch(device, length=4))
    assert any("hooks" in reason for reason in fallbacks())


class TestBudget:
    LAYER = LayerShape(hidden=64, q=64, kv=32, heads=4, inner=128, head_norms=False, itemsize=2)

    def test_all_of_it_and_no_more(self):
        each = {k: self.LAYER.bytes_of(k) for k in KINDS}
        assert each == {"attention": 144, "residual": 128, "qkv": 256, "gate_up0": 512}
        for budget in (0, 1000, 5000, 144 * 10, 10**9):
            kept = spend(budget, 10, 16, [self.LAYER] * 3)
            weights = self.LAYER.weight_bytes * sum(WEIGHTS in layer for layer in kept)
            norms = 10 * self.LAYER.bytes_of(NORMS) * sum(NORMS in layer for layer in kept)
            spent = weights + sum(10 * each[k] for layer in kept for k in layer & ALL)
            assert spent + norms <= budget
            left = [k for layer in kept for k in KINDS if k not in layer]
            assert not left or budget - spent < min(10 * each[k] for k in left)

    def test_a_budget_is_spent_in_strips_the_last_of_every_layer_first(self):
        cut = replace(self.LAYER, strips=4)
        assert cut.bytes_of("gate_up0") * 4 == self.LAYER.bytes_of("gate_up0")
        assert cut.flops_of("gate_up0", 16) * 4 == self.LAYER.flops_of("gate_up0", 16)
        rest = {"attention", "residual", "qkv"}
        each = 10 * sum(cut.bytes_of(k) for k in rest)
        kept = spend(2 * each + 10 * 128 * 5, 10, 4096, [cut] * 2)
        assert kept == [rest | {"gate_up3", "gate_up2"}, rest | {"gate_up3", "gate_up2", "gate_up1"}]
        assert spend(2 * each + 10 * 128 * 8, 10, 4096, [cut] * 2) == [cut.all] * 2
        room = 10 * (144 + 2 * 128 + 127)
        assert spend(0, 10, 4096, [cut] * 2, room) == [NONE, {"attention", "gate_up3", "gate_up2"}]

    def test_strips_need_less_room_in_a_backward(self):
        large = LayerShape(4096, 4096, 1024, 32, 14336, False, 2)
        one, four = (spare(16384, replace(large, strips=n), 128256, 1024) for n in (1, 4))
        rows = 16384 * 2
        assert one - four == rows * (0.75 * 28672 - 14336 / 4 - 4096 / 4) - 14336 * 4096 * 2

    def test_long_rows_keep_attention_first_and_the_last_layers_before_the_first(self):
        assert spend(144 * 10, 10, 4096, [self.LAYER] * 3) == [NONE, NONE, {"attention"}]
        assert spend(144 * 20, 10, 4096, [self.LAYER] * 3) == [NONE, {"attention"}, {"attention"}]

    def test_the_last_layer_fills_its_spare_room_whatever_the_budget(self):
        """The largest kind first would leave 20 of 660 bytes a token, and spare less than the other three."""
        assert self.LAYER.flops_of("gate_up0", 1) > self.LAYER.flops_of("qkv", 1)
        room = 10 * (512 + 128 + 20)
        assert spend(0, 10, 16, [self.LAYER] * 3, room) == [NONE, NONE, {"gate_up0", "residual"}]
        assert spend(0, 10, 16, [self.LAYER] * 2, 10 * 640 - 1) == [NONE, {"gate_up0"}]
        assert spend(0, 10, 16, [self.LAYER] * 2, 10 * 500) == [NONE, {"residual", "qkv"}]
        assert spend(128 * 10, 10, 16, [self.LAYER] * 2, 10**9) == [{"residual"}, ALL]

    def test_there_is_no_spare_room_where_the_loss_needs_more(self):
        large = LayerShape(4096, 4096, 1024, 32, 14336, False, 2)
        assert spare(4096, large, 128256, 1024) == 283_115_520
        assert spare(256, large, 10**6, 1024) == 0.0

    def test_it_reaches_the_layers_and_follows_the_batch(self, twins, device):
        _, ours = twins("llama")
        keep(ours, NONE)
        layers = ours.get_base_model().model.layers
        set_memory_budget(ours, 7 * 32 * 4)
        for length, kinds in ((7, 1), (3, 2)):
            ours(**batch(device, length=length), use_cache=False)
            assert [len(layer.keep) for layer in layers] == [kinds, 4]  # the last: a loss of 40 words needs little room
        set_memory_budget(ours, float("inf"))
        ours(**batch(device, length=3), use_cache=False)
        assert all(layer.keep == ALL | {WEIGHTS, NORMS} for layer in layers)
        with pytest.raises(ValueError, match="0 bytes or more"):
            set_memory_budget(ours, -1)
        with pytest.raises(ValueError, match="patch it first"):
            set_memory_budget(torch.nn.Linear(2, 2), 1)


class TestLeaving:
    """What of a layer goes to host memory."""

    LARGE = LayerShape(4096, 4096, 1024, 32, 14336, False, 2)

    def test_as_much_as_is_copied_while_a_layer_runs_and_of_the_last_layer_nothing(self):
        flops = OVER * (2.0 * self.LARGE.weights + self.LARGE.flops_of("attention", 2048))
        for rate in (0.0, 3e-5, 5e-5, 9e-5, 3e-4):
            *found, last = leaving(2048, [self.LARGE] * 3, rate)
            assert last == NONE and found[0] == found[1] and INPUT in found[0]
            bytes_ = {k: self.LARGE.bytes_of(k) for k in found[0] - {INPUT}}
            assert sum(bytes_.values()) <= max(0, flops * rate - 8192)
        assert leaving(2048, [self.LARGE] * 2, 7e-5)[0] == {INPUT, "attention", "residual", "qkv"}
        assert leaving(2048, [self.LARGE] * 2, 3e-4)[0] == {INPUT, *ALL}
        assert leaving(2048, [], 1.0) == []

    def test_some_strips_go_where_all_would_be_too_much(self):
        cut = replace(self.LARGE, strips=8)
        assert leaving(2048, [self.LARGE] * 2, 9e-5)[0] == {INPUT, "attention", "residual", "qkv"}
        assert leaving(2048, [cut] * 2, 9e-5)[0] == {INPUT, "residual", "qkv", "gate_up7", "gate_up6"}

    def test_it_costs_no_budget(self):
        layer = TestBudget.LAYER
        away = [frozenset({INPUT, "residual"}), NONE]
        assert spend(0, 10, 16, [layer] * 2, 0, away) == [{"residual"}, NONE]
        assert spend(128 * 10, 10, 16, [layer] * 2, 0, away) == [{"residual"}, {"residual"}]


class TestHeldWeights:
    """What the budget has left over keeps weights in 16 bits, and nothing else of a step changes."""

    LAYER = TestBudget.LAYER

    def test_activations_of_all_layers_go_first(self):
        activations = 3 * 10 * sum(self.LAYER.bytes_of(k) for k in KINDS)
        weights = self.LAYER.weight_bytes
        assert weights == 2 * 64 * (64 + 2 * 32 + 64 + 3 * 128)
        less = spend(activations + weights - 1, 10, 16, [self.LAYER] * 3)
        assert all(k >= ALL for k in less) and not any(WEIGHTS in k for k in less)
        assert spend(activations + 2 * weights, 10, 16, [self.LAYER] * 3) == [ALL, ALL | {WEIGHTS}, ALL | {WEIGHTS}]
        norms = 10 * self.LAYER.bytes_of(NORMS)
        assert spend(activations + 3 * weights + norms - 1, 10, 16, [self.LAYER] * 3) == [ALL | {WEIGHTS}] * 3
        whole = ALL | {WEIGHTS, NORMS}
        assert spend(activations + 3 * weights + norms, 10, 16, [self.LAYER] * 3)[1:] == [ALL | {WEIGHTS}, whole]
        short = spend(activations - 1, 10, 16, [self.LAYER] * 3)
        assert short[0] != ALL and not any(WEIGHTS in k for k in short)

    @pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=SLOW)])
    def test_a_step_is_the_same_to_the_bit(self, twins, device, family):
        theirs, ours = twins(family)
        keep(ours, NONE)
        first = agree(ours, theirs, batch(device))
        for kinds in (ALL | {WEIGHTS}, ALL | {WEIGHTS, NORMS}, ALL | {WEIGHTS, NORMS}):
            keep(ours, kinds)
            agree(ours, theirs, batch(device), exact=first)
        assert all(g.held.buffer is not None for g in held(ours))

    def test_weights_are_written_once_and_factors_once_a_step(self, twins, device, monkeypatch):
        _, ours = twins("llama")
        keep(ours, ALL | {WEIGHTS})
        written = []
        into = Weight.into
        monkeypatch.setattr(Weight, "into", lambda self, out: (written.append(out.shape), into(self, out))[1])
        families.step(ours, **batch(device, length=7))
        assert len(written) == 2 * 7  # layers, projections
        before = [g.held.serial for g in held(ours)]
        families.step(ours, **batch(device, length=7))
        assert len(written) == 2 * 7
        assert [g.held.serial for g in held(ours)] == [n + 1 for n in before]

    def test_two_forwards_before_their_backwards_have_their_own_factors(self, twins, device):
        theirs, ours = twins("llama")
        keep(ours, ALL | {WEIGHTS})
        for model in (theirs, ours):
            model.zero_grad()
        data = batch(device, length=7)
        for model in (theirs, ours):
            losses = [model(**data, use_cache=False).loss for _ in range(2)]
            for loss in losses:
                loss.backward()
        wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        assert families.worst(found, wanted)[0] < 2e-5

    @pytest.mark.parametrize("change", ["in place", pytest.param("other memory", marks=SLOW), "another factor"])
    def test_a_weight_that_changed_is_written_again(self, twins, device, change):
        theirs, ours = twins("llama")
        keep(ours, ALL | {WEIGHTS})
        agree(ours, theirs, batch(device, length=7))
        for model in (theirs, ours):
            q = model.get_base_model().model.layers[0].self_attn.q_proj
            if change == "in place":
                with torch.no_grad():
                    q.base_layer.weight.mul_(1.5)
            elif change == "other memory":
                q.base_layer.weight.data = q.base_layer.weight.data * 1.5
            else:
                q.lora_A["default"].weight.data = q.lora_A["default"].weight.data * 2
        agree(ours, theirs, batch(device, length=7))

    def test_they_go_when_the_budget_or_checkpointing_does_and_stay_in_evaluation(self, twins, device):
        _, ours = twins("llama")
        keep(ours, NONE)
        set_memory_budget(ours, float("inf"))
        data = batch(device, length=3)
        ours(**data, use_cache=False)
        kept = [g.held.buffer for g in held(ours)]
        assert all(b is not None for b in kept)
        ours.eval()
        with torch.no_grad():
            ours(**data, use_cache=False)
        assert all(g.held.buffer is b for g, b in zip(held(ours), kept, strict=True))
        ours.train()
        set_memory_budget(ours, 0)
        ours(**data, use_cache=False)
        assert all(g.held.buffer is None for g in held(ours))

    def test_another_stream_does_not_write_over_what_one_reads(self, twins, device):
        if device.type != "cuda":
            pytest.skip("streams need a GPU")
        theirs, ours = twins("llama")
        keep(ours, ALL | {WEIGHTS})
        first = agree(ours, theirs, batch(device, length=7))
        old = [g.held.buffer for g in held(ours)]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            agree(ours, theirs, batch(device, length=7), exact=first)
        torch.cuda.synchronize()
        assert all(g.held.buffer is not b for g, b in zip(held(ours), old, strict=True))


def held(model):
    """All groups of a model's layers, as they were last read."""
    return [g for layer in model.get_base_model().model.layers for g in parts_of(layer).groups]
