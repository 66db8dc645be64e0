"""TRL's SFTTrainer over FastLanguageModel: LoRA and full fine-tuning, packing, padding-free batches, resuming."""

import logging
import os
import subprocess
import sys

import export_tiny
import families
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sparktune import FastLanguageModel
from sparktune.interface.trl_on_cpu import plain
from sparktune.optim import AdamW8bit
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

SLOW = pytest.mark.slow
TEXTS = [
    "What is the capital of France? It is Paris.",
    "The code word is a secret, isn't it?",
    "Numbers: 12, 4096, 007 and 2026. I'll say it's they've don't we're you'd.",
    "user assistant system hello again please",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny")


def load(base, four_bit=False, **changes):
    settings = {"max_seq_length": 64, "load_in_4bit": four_bit, "device_map": {"": "cpu"}, **changes}
    return FastLanguageModel.from_pretrained(base, **settings)


def lora(base, four_bit=False, **changes):
    model, tokenizer = load(base, four_bit)
    return FastLanguageModel.get_peft_model(model, **{"r": 4, **changes}), tokenizer


def fit(model, tokenizer, folder, resume=None, **changes):
    settings = {
        "output_dir": str(folder),
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "optim": "adamw_8bit",
        **changes,
    }
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_dict({"text": TEXTS * 2}),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("four_bit", [False, True])
def test_lora_learns_and_stock_peft_reads_the_adapter(base, tmp_path, four_bit):
    model, tokenizer = lora(base, four_bit)
    trainer, losses = fit(model, tokenizer, tmp_path)
    assert type(trainer.optimizer.optimizer) is AdamW8bit
    assert losses[-1] < losses[0] - 0.2
    assert model.get_base_model().is_gradient_checkpointing
    trainer.save_model(str(tmp_path / "adapter"))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    read = {n.replace(".default", ""): p for n, p in stock.named_parameters() if "lora_" in n}
    assert len(own) == 28 and own.keys() == read.keys()
    assert all(torch.equal(read[n].to(p.dtype), p) for n, p in own.items())


def test_full_finetuning_trains_every_weight(base, tmp_path):
    model, tokenizer = load(base, full_finetuning=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _, losses = fit(model, tokenizer, tmp_path, learning_rate=1e-3)
    assert losses[-1] < losses[0] - 0.2
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]


@pytest.mark.filterwarnings("ignore:sparktune has no rules")
@pytest.mark.parametrize(
    "family", ["Llama", "Phi3", *(pytest.param(n, marks=SLOW) for n in ("Mistral", "Qwen3", "Gemma2"))]
)
def test_losses_are_those_of_the_model_as_transformers_made_it(tmp_path, family):
    """The same adapter start, data and optimiser over a stock model: sparktune changes the speed, not the run.

    Whether it has rules for the family (yet) or not; Phi3 has none of the default target modules by name.
    """
    tokenizer = export_tiny.make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    config = getattr(transformers, f"{family}Config")(**families.COMMON | {"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    ours, tokenizer = lora(tmp_path / "base", use_gradient_checkpointing=False)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    stock = get_peft_model(bare, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    start = {n: p for n, p in ours.state_dict().items() if "lora_" in n}
    assert start and not stock.load_state_dict(start, strict=False).unexpected_keys
    assert len(start) == sum("lora_" in n for n in stock.state_dict())
    runs = [fit(m, tokenizer, tmp_path, optim="adamw_torch", gradient_checkpointing=False)[1] for m in (ours, stock)]
    assert runs[0] == pytest.approx(runs[1], rel=1e-3) and runs[0][-1] < runs[0][0]


def test_micro_batches_packing_and_padding_free_are_the_padded_batch(base, tmp_path):
    runs = {}
    for name, changes in {
        "padded": {},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "padding-free": {"padding_free": True, "max_length": None},
    }.items():
        model, tokenizer = lora(base)
        runs[name] = fit(model, tokenizer, tmp_path, optim="adamw_torch", **changes)[1]
    assert len(set(runs["padded"])) == 4
    for name, losses in runs.items():
        assert losses == pytest.approx(runs["padded"], rel=2e-3), name


def test_packed_documents_do_not_see_each_other(base, tmp_path):
    model, tokenizer = lora(base)
    trainer, losses = fit(model, tokenizer, tmp_path, packing=True, max_length=128, max_steps=1)
    assert len(trainer.train_dataset) < len(TEXTS) * 2
    ids = tokenizer(TEXTS, add_special_tokens=True)["input_ids"]
    rows = [torch.tensor([row + [tokenizer.eos_token_id] * (row[-1] != tokenizer.eos_token_id)]) for row in ids]
    fresh, _ = lora(base)
    with torch.no_grad():
        sums = [(float(fresh(r, labels=r).loss) * (r.shape[1] - 1), r.shape[1] - 1) for r in rows]
    assert losses[0] == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=2e-3)


def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(base, tmp_path):
    model, tokenizer = lora(base, lora_dropout=0.1)
    _, whole = fit(model, tokenizer, tmp_path, save_strategy="steps", save_steps=2)
    model, tokenizer = lora(base, lora_dropout=0.1, random_state=1)
    _, resumed = fit(model, tokenizer, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert len(set(whole)) == 4 and resumed == whole


def test_the_models_word_on_checkpointing_holds_against_sftconfigs_default(base, tmp_path, caplog):
    model, tokenizer = lora(base, use_gradient_checkpointing=False)
    with caplog.at_level(logging.WARNING, "sparktune"):
        trainer, _ = fit(model, tokenizer, tmp_path, max_steps=1)
    assert trainer.args.gradient_checkpointing and not model.get_base_model().is_gradient_checkpointing
    assert "which holds" in caplog.text


def test_a_peft_config_given_to_the_trainer_works_too(base, tmp_path):
    model, tokenizer = load(base)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    assert isinstance(trainer.model, PeftModel)
    assert type(trainer.create_optimizer()) is not AdamW8bit, "SFTConfig's own default stays"


def test_trls_head_on_a_cpu_gives_what_its_names_say():
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(5, 16, generator=g), torch.randn(40, 16, generator=g)
    targets = torch.tensor([3, 0, 39, 7, 7])
    z = 4.0 * torch.tanh(1.5 * (h @ w.T) / 4.0) / 0.7
    targets[0] = z[0].argmax()
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    log_probs, entropy, squares, mean, top = plain(h, w, None, targets, 0.7, 32, 4.0, 1.5, names)
    p = z.softmax(-1)
    assert torch.allclose(log_probs, -torch.nn.functional.cross_entropy(z, targets, reduction="none"), atol=1e-5)
    assert torch.allclose(entropy, torch.distributions.Categorical(p).entropy(), atol=1e-5)
    assert torch.allclose(squares, (p * p).sum(-1).log(), atol=1e-5)
    assert torch.allclose(mean, z.mean(-1), atol=1e-5)
    assert top.tolist() == (z.argmax(-1) == targets).tolist() and top[0]
    assert plain(h, w, None, targets, 1.0, 32, None, 1.0, ())[1:] == (None,) * 4


@pytest.mark.slow
def test_trls_head_on_a_cpu_is_trls_own():
    """Against TRL's kernel in Triton's interpreter, in a process of its own: every output, and all gradients."""
    script = """
import torch
from sparktune.interface.trl_on_cpu import plain
from trl.kernels import ChunkedLogProbFunction
g = torch.Generator().manual_seed(0)
h, w, b = (torch.randn(s, generator=g, requires_grad=True) for s in ((5, 16), (40, 16), (40,)))
t = torch.tensor([3, 0, 39, 7, 7])
names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
for softcap in (None, 5.0):
    found = []
    for f in (ChunkedLogProbFunction.apply, plain):
        out = f(h, w, b, t, 0.7, 32, softcap, 1.5, names)
        loss = out[0].sum() + 0.3 * (out[1] ** 2).sum()
        found.append([*out, *torch.autograd.grad(loss, (h, w, b))])
    for i, (theirs, ours) in enumerate(zip(*found, strict=True)):
        assert ours.dtype == theirs.dtype and torch.allclose(ours.float(), theirs.float(), rtol=1e-4, atol=1e-5), i
    print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["equal", "equal"], done.stderr[-2000:]
