"""Stock trainers over FastLanguageModel: accumulation, resuming, packing, the 8-bit optimiser, torch.compile."""

from itertools import chain

import export_tiny
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sparktune import FastLanguageModel
from sparktune.optim import AdamW8bit, adamw8bit
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny")


def lora(base, four_bit=False, **changes):
    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=64, load_in_4bit=four_bit, device_map={"": "cpu"}, use_gradient_checkpointing=False
    )
    return FastLanguageModel.get_peft_model(model, **{"r": 4, "use_gradient_checkpointing": False, **changes})


def rows(count=8):
    """Token lists of unequal lengths, so that a mean of means is another number than the mean."""
    g = torch.Generator().manual_seed(4)
    return [torch.randint(3, 300, (int(n),), generator=g).tolist() for n in torch.randint(4, 30, (count,), generator=g)]


def collate(batch):
    """Right padding; labels -100 there."""
    width = max(len(row["input_ids"]) for row in batch)
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in batch:
        ids, pad = row["input_ids"], width - len(row["input_ids"])
        out["input_ids"].append(ids + [2] * pad)
        out["attention_mask"].append([1] * len(ids) + [0] * pad)
        out["labels"].append(ids + [-100] * pad)
    return {k: torch.tensor(v) for k, v in out.items()}


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        "optim": "adamw_torch",
        **changes,
    }
    return TrainingArguments(**settings)


def train(model, folder, resume=None, rows_of=rows, **changes):
    trainer = Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=[{"input_ids": row} for row in rows_of()],
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpoint", [False, "unsloth"])
def test_four_micro_batches_are_the_big_batch(base, tmp_path, checkpoint):
    ended = []
    for batch, steps in ((8, 1), (2, 4)):
        model = lora(base, use_gradient_checkpointing=checkpoint)
        trainer = train(
            model, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, num_train_epochs=3
        )
        ended.append((losses(trainer), adapters(model)))
    assert len(ended[0][0]) == 3
    assert ended[1][0] == pytest.approx(ended[0][0], rel=1e-4)
    for name, wanted in ended[0][1].items():
        assert torch.allclose(ended[1][1][name], wanted, rtol=1e-3, atol=2e-5), name


def test_label_smoothing_shifts_the_labels_as_for_a_stock_model(base, tmp_path):
    """Trainer decides by the class's name whether labels are to be shifted."""
    ours = lora(base)
    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=16, target_modules=export_tiny.TARGETS),
    )
    stock.load_state_dict({n: p for n, p in ours.state_dict().items() if "lora_" in n}, strict=False)
    settings = {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 4, "max_steps": 2}
    runs = [losses(train(model, tmp_path, **settings)) for model in (ours, stock)]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_the_count_of_items_normalises_the_loss(base):
    model = lora(base)
    batch = collate([{"input_ids": row} for row in rows(3)])
    with torch.no_grad():
        mean, by_count = model(**batch).loss, model(**batch, num_items_in_batch=7).loss
    assert float(by_count * 7) == pytest.approx(float(mean * (batch["labels"][:, 1:] != -100).sum()), rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(base, tmp_path, optim):
    settings = {"per_device_train_batch_size": 2, "max_steps": 6, "optim": optim}
    model = lora(base, lora_dropout=0.1)
    whole = train(model, tmp_path, save_strategy="steps", save_steps=3, **settings)
    resumed_model = lora(base, lora_dropout=0.1, random_state=1)
    resumed = train(resumed_model, tmp_path, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert len(losses(whole)) == 6 and len(set(losses(whole))) == 6
    assert losses(resumed) == losses(whole)
    for name, wanted in adapters(model).items():
        assert torch.equal(adapters(resumed_model)[name], wanted), name


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit"])
def test_the_trainers_8_bit_adamw_is_sparktunes_for_its_own_models_only(base, tmp_path, optim):
    settings = arguments(tmp_path, optim=optim, learning_rate=3e-3, adam_beta2=0.95, weight_decay=0.1)
    optimizer = Trainer(model=lora(base), args=settings).create_optimizer()
    assert type(optimizer) is AdamW8bit
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.9, 0.95), 0.1)
    stock = AutoModelForCausalLM.from_pretrained(base)
    assert type(Trainer(model=stock, args=settings).create_optimizer()).__module__.startswith("bitsandbytes")
    chosen = Trainer(model=stock, args=settings, optimizer_cls_and_kwargs=adamw8bit(settings, stock))
    assert type(chosen.create_optimizer()) is AdamW8bit


def test_8_bit_adamw_learns_as_fp32_does(base, tmp_path):
    ends = [
        losses(train(lora(base), tmp_path, optim=optim, per_device_train_batch_size=8, max_steps=8))
        for optim in ("adamw_torch", "adamw_8bit")
    ]
    assert ends[0][-1] < ends[0][0] - 0.5
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_embeddings_keep_fp32_moments(base, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=64, full_finetuning=True, device_map={"": "cpu"}, use_gradient_checkpointing=False
    )
    trainer = train(model, tmp_path, optim="adamw_8bit", learning_rate=1e-3, per_device_train_batch_size=4, max_steps=4)
    state = trainer.optimizer.optimizer.state
    assert state[model.model.embed_tokens.weight]["state1"].dtype == torch.float32
    assert state[model.model.layers[0].mlp.up_proj.weight]["state1"].dtype == torch.uint8
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_flattened_batch_is_the_padded_one(base):
    """Documents in one row, told apart by positions that start again: the loss and every gradient are the padded ones."""
    texts, found = rows(4), []
    flat = {
        "input_ids": torch.tensor([list(chain.from_iterable(texts))]),
        "position_ids": torch.cat([torch.arange(len(t)) for t in texts])[None],
        "labels": torch.tensor([[i for t in texts for i in (-100, *t[1:])]]),
    }
    for batch in (collate([{"input_ids": t} for t in texts]), flat):
        model = lora(base, init_lora_weights=False, random_state=2).train()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((float(loss.detach()), [p.grad for p in model.parameters() if p.requires_grad]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for padded, flattened in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(flattened, padded, rtol=1e-3, atol=1e-5 * float(padded.abs().max()) + 1e-9)


@pytest.mark.parametrize("four_bit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_model_has_the_same_loss_and_gradients(tmp_path, four_bit):
    base, found = export_tiny.save_base(tmp_path, num_hidden_layers=1), []
    batch = collate([{"input_ids": row} for row in rows(2)])
    for compiled in (False, True):
        model = lora(base, four_bit, init_lora_weights=False, random_state=2)
        run: nn.Module = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(**batch, use_cache=False).loss
        loss.backward()
        found.append((float(loss.detach()), [p.grad for p in model.parameters() if p.requires_grad]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True))
