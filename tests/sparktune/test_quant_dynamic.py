"""Dynamic quantisation on a tiny model: bytes, predictions, the knapsack, and what the consumers make of the result."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_tiny import TEXT, save_base
from sparktune.quant.dynamic import (
    Choice,
    Judge,
    Option,
    Row,
    Table,
    calibrate,
    frontier,
    measure,
    sequences_of,
    stored_as,
    to_target,
    total,
    within_budget,
    within_kl,
)
from sparktune.quant.dynamic.__main__ import main
from sparktune.quant.dynamic.choose import hull
from sparktune.quant.dynamic.formats import GGUF_TYPES, Type

PROSE = " ".join(TEXT) * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama; its gate projections read rows of 64, its down projections rows of 256, so K-quants fit only those."""
    return save_base(tmp_path_factory.mktemp("dynamic") / "base", intermediate_size=256, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, torch.Tensor]:
    """The model in fp32 and 64 sequences of 16 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, sequences_of(AutoTokenizer.from_pretrained(folder), PROSE, 1024, 16)


@pytest.fixture(scope="module")
def tables(loaded: tuple[Any, torch.Tensor]) -> dict[str, Table]:
    model, sequences = loaded
    return {
        "nf4": measure(model, sequences, "nf4", draws=4),
        "gguf": measure(model, sequences, "gguf", ("q4_0", "q4_K", "q6_K", "q8_0", "f16"), draws=4),
    }


def test_what_comes_back_is_what_an_independent_quantiser_gives() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    weight = np.random.default_rng(0).standard_normal((70, 256)).astype(np.float32)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q5_1):
        right = torch.from_numpy(dequantize(quantize(weight, kind), kind))
        assert torch.equal(Type(kind.name.lower()).round_trip(torch.from_numpy(weight)), right), kind.name


def test_importance_moves_the_error_to_the_columns_that_matter_less() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.where(torch.arange(256) % 8 == 0, 100.0, 0.01)
    heavy = importance > 1
    for name in ("q4_K", "q4_0", "q3_K", "iq4_xs"):
        plain = (Type(name).round_trip(weight) - weight).square()
        aimed = (Type(name).round_trip(weight, importance) - weight).square()
        assert aimed[:, heavy].mean() < 0.9 * plain[:, heavy].mean(), name


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_bytes_are_what_is_written_and_more_bits_err_less(name: str) -> None:
    from gguf.quants import quant_shape_to_byte_shape

    kind, shape = Type(name), (32, 512)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert kind.nbytes(shape) == 32 * quant_shape_to_byte_shape((512,), kind.ggml)[0]
    error = float((kind.round_trip(weight) - weight).square().mean())
    bits = min(8 * kind.nbytes(shape) / weight.numel(), 12)  # f16 has 11 bits of mantissa, whatever its exponent costs
    assert 0 < error < 0.02 * 4 ** (4.5 - bits)


@pytest.mark.parametrize(
    ("columns", "values", "best"),
    [
        (96, "normal", ["mxfp4", "iq4_nl", "q5_0", "q5_1", "q8_0", "f16"]),
        (96, "positive", ["mxfp4", "iq4_nl", "q4_1", "q5_1", "q8_0", "f16"]),
        (96, "on q4_1's grid", ["mxfp4", "iq4_nl", "q4_1"]),
        (256, "normal", ["q2_K", "iq3_s", "iq4_xs", "q5_K", "q6_K", "q8_0", "f16"]),
        (256, "positive", ["q2_K", "iq3_s", "iq4_xs", "q4_K", "q5_K", "q8_0", "f16"]),
    ],
)
def test_types_are_offered_where_they_err_least_for_their_bytes(columns: int, values: str, best: list[str]) -> None:
    """Rows that no K-quant fits have the types that llama.cpp falls back on; which are worth their bytes, weights decide."""
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    if values == "positive":
        weight = weight.abs()
    elif values != "normal":
        weight = Type("q4_1").round_trip(weight)
    shape, importance = (64, columns), torch.ones(columns)
    options = {
        name: Option(
            Type(name).nbytes(shape),
            float((Type(name).round_trip(weight, importance) - weight).square().mean()),
            0.0,
            0.0,
        )
        for name in GGUF_TYPES
        if Type(name).fits(shape)
    }
    assert hull(options) == best


@pytest.mark.parametrize("name", ["nf4", "nf4-plain"])
def test_bytes_of_nf4_are_what_bitsandbytes_holds(name: str) -> None:
    import bitsandbytes.functional as F

    weight = torch.randn(96, 320)
    codes, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=name == "nf4")
    held = [v for v in state.as_dict(packed=True).values() if torch.is_tensor(v)]
    said = next(v for k, v in state.as_dict(packed=True).items() if "bitsandbytes" in k)  # its own JSON, of no account
    tensors = sum(v.numel() * v.element_size() for v in [codes, *held]) - said.numel() * said.element_size()
    assert abs(Type(name).nbytes((96, 320)) - tensors) <= 4  # the offset lies in the JSON


def test_types_that_do_not_fit_a_row_are_not_offered(tables: dict[str, Table]) -> None:
    rows = {row.target: row for row in tables["gguf"].rows}
    assert set(rows["blk.0.attn_q.weight"].options) == {"q4_0", "q8_0", "f16"}  # rows of 64
    assert set(rows["blk.1.ffn_down.weight"].options) == {"q4_0", "q4_K", "q6_K", "q8_0", "f16"}  # rows of 256
    assert "token_embd.weight" in rows and "output.weight" not in rows  # tied
    names = [row.target for row in tables["nf4"].rows]
    assert len(names) == 14 and "lm_head" not in names and tables["nf4"].kept == ["lm_head"]


def test_predicted_kl_is_what_each_weight_alone_is_measured_to_cost(
    loaded: tuple[Any, torch.Tensor], tables: dict[str, Table]
) -> None:
    model, sequences = loaded
    judge = Judge(model, sequences)
    ratios, predicted, measured = [], [], []
    for row in tables["gguf"].rows:
        alone = judge.kl({row.name: "q4_0"})
        ratios.append(row.options["q4_0"].kl / alone)
        predicted.append(row.options["q4_0"].kl)
        measured.append(alone)
    assert all(0.5 < r < 2 for r in ratios), ratios
    assert 0.8 < float(np.median(ratios)) < 1.25
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.9


def test_predictions_add_up(loaded: tuple[Any, torch.Tensor], tables: dict[str, Table]) -> None:
    model, sequences = loaded
    for table in tables.values():
        mix = frontier(table)[0].mix
        measured = Judge(model, sequences).kl(mix)
        assert 0.6 < total(table, mix)[1] / measured < 1.6


def test_a_wrong_sensitivity_would_be_seen(loaded: tuple[Any, torch.Tensor]) -> None:
    """Gradients set against the inputs of another sequence say something else: the prediction hangs on the pairing."""
    model, sequences = loaded
    weights = calibrate.weights_of(model, lambda n, _m: n.endswith("0.mlp.down_proj"))
    samples = calibrate.collect(model, weights, sequences)
    weight = weights[0]
    delta = Type("q4_0").round_trip(weight.parameter.detach()) - weight.parameter.detach()
    right = calibrate.sensitivity(weight, [delta], samples)[0]
    g = torch.cat(weight.uses[0].gradients[0]).float()
    x = torch.cat(weight.uses[0].inputs).float()
    by_hand = sum(float((g[i : i + 16].T @ x[i : i + 16] * delta).sum()) ** 2 for i in range(0, 1024, 16)) / 2048
    assert right == pytest.approx(by_hand, rel=1e-3)
    weight.uses[0].inputs.reverse()
    assert calibrate.sensitivity(weight, [delta], samples)[0] != pytest.approx(right, rel=1e-2)


def test_measuring_leaves_the_model_as_it_was(loaded: tuple[Any, torch.Tensor]) -> None:
    model, sequences = loaded
    before = {k: v.clone() for k, v in model.state_dict().items()}
    needing = [p.requires_grad for p in model.parameters()]
    with stored_as(model, {"model.layers.0.mlp.down_proj.weight": "q4_0"}):
        assert not torch.equal(
            model.model.layers[0].mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"]
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needing
    assert not any(m._forward_hooks for m in model.modules())
    assert sequences.shape == (64, 16)


def made_up(rows: int, seed: int) -> Table:
    draw = random.Random(seed)
    made = []
    for i in range(rows):
        kl = sorted((draw.random() ** 3 for _ in range(3)), reverse=True)
        size = sorted(draw.sample(range(1, 30), 3))
        options = {f"t{k}": Option(size[k], kl[k], 0.0, 0.0) for k in range(3)}
        made.append(Row(f"w{i}", f"w{i}", (1, 1), options))
    return Table("made up", "gguf", 1, 1, 5, made, [])


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_within_one_step_of_the_best_there_is(seed: int) -> None:
    table = made_up(6, seed)
    every = [
        total(table, {row.name: kind for row, kind in zip(table.rows, kinds, strict=True)})
        for kinds in itertools.product(("t0", "t1", "t2"), repeat=6)
    ]
    least, most = min(b for b, _ in every), max(b for b, _ in every)
    for budget in range(least, most + 1, 7):
        size, kl = total(table, within_budget(table, budget))
        best = min(k for b, k in every if b <= budget)
        step = max(row.options["t0"].kl - row.options["t2"].kl for row in table.rows)
        assert size <= budget and best - 1e-12 <= kl <= best + step
    for point in frontier(table):  # what lies on the hull can't be beaten
        assert point.kl <= min(k for b, k in every if b <= point.bytes) + 1e-12
    with pytest.raises(ValueError, match="more than the budget"):
        within_budget(table, least - 1)


def test_a_target_is_met_by_measurement_not_by_prediction(
    loaded: tuple[Any, torch.Tensor], tables: dict[str, Table]
) -> None:
    model, sequences = loaded
    judge = Judge(model, sequences[:16])
    points = frontier(tables["nf4"])
    worst = judge.kl(points[0].mix)
    mix, kl = to_target(tables["nf4"], judge, worst / 3)
    assert kl <= worst / 3 and judge.kl(mix) == pytest.approx(kl)
    size = total(tables["nf4"], mix)[0]
    smaller = [p for p in points if p.bytes < size]
    assert judge.kl(smaller[-1].mix) > worst / 3
    with pytest.raises(ValueError, match="more than the target"):
        within_kl(tables["nf4"], -1.0)


def test_a_choice_beats_others_of_the_same_bytes(loaded: tuple[Any, torch.Tensor], tables: dict[str, Table]) -> None:
    """On sequences that were not measured on: lower KL than the first layers, the last, and than any of five drawn by lot."""
    model, sequences = loaded
    table = measure(model, sequences[::2], "nf4", draws=2)
    judge = Judge(model, sequences[1::2])
    small, large = (total(table, {r.name: k for r in table.rows})[0] for k in ("nf4", "bf16"))
    budget = (2 * small + large) // 3
    ours = judge.kl(within_budget(table, budget))
    others = []
    orders = [table.rows, table.rows[::-1], *(random.Random(s).sample(table.rows, len(table.rows)) for s in range(5))]
    for order in orders:
        mix, size = {r.name: "nf4" for r in table.rows}, small
        for row in order:
            more = row.options["bf16"].bytes - row.options["nf4"].bytes
            if size + more <= budget:
                mix[row.name], size = "bf16", size + more
        others.append(judge.kl(mix))
    assert ours <= min(others) and ours < 0.8 * float(np.median(others)), (ours, others)


def test_stock_transformers_loads_the_layers_as_chosen(
    folder: Path, loaded: tuple[Any, torch.Tensor], tables: dict[str, Table], tmp_path: Path
) -> None:
    import bitsandbytes as bnb
    from sparktune.quant.cpu_repack import keep_layout
    from transformers import AutoModelForCausalLM

    keep_layout()
    model, sequences = loaded
    table = tables["nf4"]
    mix = within_budget(table, total(table, {r.name: "nf4" for r in table.rows})[0] + 60_000)
    choice = Choice.of(table, mix, Judge(model, sequences[:4]).kl(mix))
    choice.write(tmp_path / "layers.json")
    assert Choice.read(tmp_path / "layers.json") == choice
    config = choice.bitsandbytes_config(torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    four = {n for n, m in stock.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert four == {n for n, kind in choice.types.items() if kind == "nf4"} and 0 < len(four) < 14
    kl = 0.0
    with torch.no_grad():
        for ids in sequences[:4]:
            right = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            got = stock(input_ids=ids[None]).logits[0].log_softmax(-1)
            kl += float((right.exp() * (right - got)).sum(-1).mean()) / 4
    assert choice.measured_kl is not None and kl == pytest.approx(choice.measured_kl, rel=0.02)


def test_fast_language_model_trains_over_a_choice_and_refuses_what_does_not_fit(
    folder: Path, tables: dict[str, Table], tmp_path: Path
) -> None:
    import bitsandbytes as bnb
    from sparktune import FastLanguageModel

    table = tables["nf4"]
    choice = Choice.of(table, within_budget(table, total(table, {r.name: "nf4" for r in table.rows})[0] + 60_000))
    path = tmp_path / "layers.json"
    choice.write(path)
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=64, dynamic=path)
    kept = [n for n, kind in choice.types.items() if kind == "bf16"]
    assert kept and not any(isinstance(model.get_submodule(n), bnb.nn.Linear4bit) for n in kept)
    peft = FastLanguageModel.get_peft_model(model, r=4)
    ids = torch.arange(3, 35)[None]
    losses = []
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    gguf = Choice.of(tables["gguf"], frontier(tables["gguf"])[0].mix)
    with pytest.raises(ValueError, match="GGUF types can't be trained over"):
        FastLanguageModel.from_pretrained(folder, dynamic=gguf)
    with pytest.raises(ValueError, match="needs load_in_4bit=True"):
        FastLanguageModel.from_pretrained(folder, dynamic=choice, load_in_4bit=False)
    other = Choice(**{**choice.__dict__, "types": {**choice.types, "model.layers.9.mlp.up_proj": "nf4"}})
    with pytest.raises(ValueError, match=r"1 layers of this model don't fit it, model\.layers\.9"):
        FastLanguageModel.from_pretrained(folder, dynamic=other)
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a choice of types"):
        FastLanguageModel.from_pretrained(folder, dynamic=tmp_path / "no.json")


def test_the_command_writes_types_that_llama_quantize_reads(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text(PROSE)
    out, lines, table = tmp_path / "mix.json", tmp_path / "mix.txt", tmp_path / "table.json"
    base = [str(folder), "--text", str(tmp_path / "text.txt"), "--format", "gguf", "--tokens", "256", "--length", "32"]
    more = ["--out", str(out), "--table", str(table)]
    code = main([*base, *more, "--budget-gib", "0.0001", "--types", "q4_0,q8_0", "--llama-types", str(lines)])
    assert code == 0 and "GiB, KL" in capsys.readouterr().out
    choice = json.loads(out.read_text())
    assert choice["bytes"] <= 0.0001 * 2**30 and choice["measured_kl"] > 0
    first = lines.read_text().splitlines()[0]
    assert first in ("^token_embd\\.weight$=q4_0", "^token_embd\\.weight$=q8_0")
    assert len(lines.read_text().split()) == len(choice["types"]) == 15
    assert main([*base, *more, "--target-kl", "1"]) == 0  # from the table that is there
    assert json.loads(out.read_text())["measured_kl"] <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "gguf", "--budget-gib", "1e-6"], "more than the budget"),
        (["--format", "gguf", "--target-kl", "1e-9", "--types", "q4_0"], "more than the target"),
        (["--format", "gguf", "--budget-gib", "1", "--types", "q4_9"], "'q4_9' is not a type"),
        (["--format", "gguf", "--budget-gib", "1", "--types", "q4_K"], "none of the types takes"),
        (["--format", "gguf", "--budget-gib", "1", "--types", "nf4"], "no place in the format"),
        (["--format", "gguf", "--budget-gib", "-1"], "not above zero"),
        (["--format", "nf4", "--budget-gib", "1", "--types", "q4_0"], "--types needs --format gguf"),
        (["--format", "nf4", "--budget-gib", "1", "--llama-types", "x"], "--llama-types needs --format gguf"),
        (["--format", "nf4", "--budget-gib", "1", "--tokens", "99999"], "99968 are asked for"),
        (["--format", "nf4", "--budget-gib", "1", "--device", "moon"], "is not a device"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: Any, arguments: list[str], said: str
) -> None:
    (tmp_path / "text.txt").write_text(PROSE)
    small = [] if "--tokens" in arguments else ["--tokens", "32", "--length", "16"]
    fixed = [str(folder), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "o.json")]
    assert main([*fixed, *small, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "o.json").exists()
