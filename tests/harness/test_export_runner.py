"""The export runner on a tiny fine-tuned Llama, through the real consumers; then each planted fault must be caught.

The phases run in this process to be quick, but for one case that goes through processes of its own.
"""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from sparkproof.errors import UserError
from sparkproof.facts.model import Cpu, Facts, Memory
from sparkproof.results import ReasonClass, Verdict
from sparkproof.runners import export, export_source
from sparkproof.runners.base import Context
from sparkproof.runners.export_formats import FORMATS
from sparkproof.runners.process import Outcome
from sparkproof.scenario import Case, ExportScenario, TrainScenario
from sparktune.export import ExportError, export_gguf, hf
from sparktune.export import gguf as gguf_module
from sparktune.export.lora import Adapter

sys.path.insert(0, str(Path(__file__).parents[1] / "sparktune"))
import export_tiny

FACTS = Facts(
    origin="constructed for a test", arch="x86_64", cpu=Cpu(cores=2), memory=Memory(total_gib=24.0, available_gib=20.0)
)
BOUNDS = {"adapter": 1e-6, "merged_16bit": 2e-3, "gguf_f16": 2e-4, "gguf_q8_0": 0.05}


class SameProcess(Context):
    """Phases as calls: what they raise becomes an Outcome, as it does across processes."""

    def spawn(self, entry, payload, *, case, phase, timeout_s, env=None):
        module, _, name = entry.partition(":")
        try:
            result = getattr(importlib.import_module(module), name)(payload)
        except Exception as error:
            return Outcome(status="error", error_type=type(error).__name__, error=str(error), stage="the phase")
        return Outcome(status="ok", result=result)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    base = export_tiny.save_base(folder / "base")
    return base, export_tiny.save_adapter(base, folder / "lora", steps=80)


def train_case(base):
    gate = {
        "first_loss": (0, 9),
        "first_grad_norm": (0, 9),
        "min_loss_fall": 1,
        "canary_prompt": export_tiny.PROMPT,
        "canary_answer": export_tiny.ANSWER,
    }
    return Case(
        name="train/tiny",
        file="train/tiny.yaml",
        scenario=TrainScenario(kind="train", summary="a tiny model", model=str(base), gate=gate),
    )


def export_case(format_, **changes):
    scenario = ExportScenario(
        **{
            "kind": "export",
            "summary": "a tiny export",
            "source": "train/tiny",
            "format": format_,
            "consumer": FORMATS[format_].consumers[0],
            "max_kl": BOUNDS[format_],
            "timeout_s": 120,
            **changes,
        }
    )
    return Case(name=f"export/tiny-{format_}", file="export/tiny.yaml", scenario=scenario)


@pytest.fixture
def context(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(export_source, "ensure_trained", lambda case, context: tiny[1])
    return SameProcess(
        run_dir=tmp_path / "run",
        facts=FACTS,
        cache_dir=tmp_path / "cache",
        memory_floor_gib=0.2,
        cases={"train/tiny": train_case(tiny[0])},
    )


def failed(result):
    return {a.name.split("(")[0] for a in result.assertions if not a.passed}


@pytest.mark.parametrize("format_", list(BOUNDS))
def test_a_correct_export_passes(context, format_):
    result = export.run(export_case(format_), context)
    assert result.verdict is Verdict.PASSED, result.reason
    assert len(result.assertions) == {"adapter": 15, "merged_16bit": 17, "gguf_q8_0": 21}.get(format_, 18)
    names = {m.name for m in result.measurements}
    assert {"KL, mean", "KL, largest", "top-1 agreement", "export size", "export time", "load time"} <= names
    assert "base16+adapter" in result.notices[0]
    assert result.evidence["backend"]["device"] == "cpu"
    assert (result.evidence["family"], result.evidence["format"]) == ("tiny", format_)
    assert result.evidence["canary"]["exported"].startswith(export_tiny.ANSWER)
    kept = context.run_dir / "cases" / f"export-tiny-{format_}" / format_
    assert kept.exists() is (format_ == "adapter")


def test_the_quantised_base_is_another_reference(context):
    """Merged into 16 bits, against the 4-bit base that was trained over: the difference is the base's quantisation."""
    case = export_case("merged_16bit", reference="base4+adapter", max_kl=1e-4)
    result = export.run(case, context)
    assert "mean KL" in failed(result)
    assert "4-bit" in result.notices[0]


@pytest.mark.slow
def test_in_processes_of_its_own(context):
    own = Context(**vars(context))
    result = export.run(export_case("gguf_q8_0"), own)
    assert result.verdict is Verdict.PASSED, result.reason
    folder = own.run_dir / "cases/export-tiny-gguf_q8_0"
    assert (folder / "write.log").exists() and (folder / "consume.log").exists()


def plant_merged_twice(monkeypatch):
    once = Adapter.apply

    def twice(self, name, weight):
        return once(self, name, once(self, name, weight))

    monkeypatch.setattr(Adapter, "apply", twice)


def plant_not_merged(monkeypatch):
    def nothing(self, name, weight):
        self.used.add(name.removesuffix(".weight"))
        return weight

    monkeypatch.setattr(Adapter, "apply", nothing)
    monkeypatch.setattr(Adapter, "check_used", lambda self: None)


def plant_wrong_scale(monkeypatch):
    right = Adapter.scale
    monkeypatch.setattr(Adapter, "scale", lambda self, *of: right(self, *of) * 1.25)


def plant_one_module_lost(monkeypatch):
    right = Adapter.apply

    def all_but_one(self, name, weight):
        return weight if name.endswith("layers.1.mlp.down_proj.weight") else right(self, name, weight)

    monkeypatch.setattr(Adapter, "apply", all_but_one)
    monkeypatch.setattr(Adapter, "check_used", lambda self: None)


@pytest.mark.parametrize("format_", ["merged_16bit", "gguf_f16"])
@pytest.mark.parametrize("plant", [plant_merged_twice, plant_not_merged, plant_wrong_scale, plant_one_module_lost])
def test_a_wrong_merge_is_caught(context, monkeypatch, format_, plant):
    plant(monkeypatch)
    result = export.run(export_case(format_), context)
    assert result.verdict is Verdict.FAILED
    assert {"mean KL", "distance of the weights from base and update"} <= failed(result)


def test_a_lost_adapter_loses_the_canary(context, monkeypatch):
    plant_not_merged(monkeypatch)
    result = export.run(export_case("gguf_q8_0"), context)
    assert {"canary answer from the consumer", "times that the update is in the weights"} <= failed(result)
    assert (context.run_dir / result.artifacts["export"]).exists(), "a failed export stays for whoever looks"


@pytest.mark.parametrize("wrong_name", ["smollm", "llama-bpe"])
def test_a_wrong_pre_tokenizer_is_caught(context, monkeypatch, tmp_path, wrong_name):
    base = export_tiny.save_base(tmp_path / "base", pre="gpt-2")
    adapter = export_tiny.save_adapter(base, tmp_path / "lora", steps=80)
    context.cases["train/tiny"] = train_case(base)
    monkeypatch.setattr(export_source, "ensure_trained", lambda case, context: adapter)
    assert export.run(export_case("gguf_f16"), context).verdict is Verdict.PASSED
    monkeypatch.setattr(gguf_module, "pre_tokenizer", lambda definition: wrong_name)
    result = export.run(export_case("gguf_f16"), context)
    assert "hard strings tokenised otherwise" in failed(result)


def test_a_cut_vocabulary_is_caught(context, monkeypatch):
    monkeypatch.setattr("sparktune.export.export_gguf", functools.partial(cut_vocabulary, 1))
    result = export.run(export_case("gguf_f16"), context)
    assert {"parameters in the file", "tokens of the vocabulary without a probability"} <= failed(result)


def test_a_prompt_beyond_a_cut_vocabulary_fails_the_case(context, monkeypatch):
    monkeypatch.setattr("sparktune.export.export_gguf", functools.partial(cut_vocabulary, 90))
    result = export.run(export_case("gguf_f16"), context)
    assert result.verdict is Verdict.FAILED and "llama.cpp refused /completion" in result.reason


def cut_vocabulary(lost, base, out, qtype, adapter, name):
    """The export of a base whose last `lost` embedding rows are gone."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    cut = out.parent / "cut"
    shutil.copytree(base, cut)
    weights = load_file(cut / "model.safetensors")
    rows = len(weights["model.embed_tokens.weight"]) - lost
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:rows].clone()
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    tokenizer = json.loads((cut / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"] = {t: i for t, i in tokenizer["model"]["vocab"].items() if i < rows}
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) in vocab]
    (cut / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = export_gguf(cut, out, qtype, adapter, name)
    shutil.rmtree(cut)
    return done


def test_a_changed_chat_template_is_caught(context, monkeypatch):
    right = hf.copy_files

    def changed(source, target, names):
        right(source, target, names)
        template = target / "chat_template.jinja"
        template.write_text(template.read_text() + "\n\n")

    monkeypatch.setattr(hf, "copy_files", changed)
    result = export.run(export_case("merged_16bit"), context)
    assert "chat template" in failed(result)


@pytest.mark.parametrize("format_", ["gguf_f16", "merged_16bit"])
def test_a_truncated_file_is_caught(context, monkeypatch, format_):
    name = "export_gguf" if format_ == "gguf_f16" else "export_merged"
    right = getattr(sys.modules["sparktune.export"], name)

    def truncated(*args):
        done = right(*args)
        file = done.path if done.path.is_file() else done.path / "model.safetensors"
        with file.open("r+b") as f:
            f.truncate(file.stat().st_size - 4096)
        return done

    monkeypatch.setattr(f"sparktune.export.{name}", truncated)
    result = export.run(export_case(format_), context)
    assert result.verdict is Verdict.FAILED
    assert failed(result) == {"files that are not whole"}


def test_a_family_that_has_no_such_format_skips_with_its_reason(context, monkeypatch):
    def refuse(*args):
        raise ExportError(
            "llama.cpp can't convert it (NotImplementedError: Architecture 'X' not supported!).", "Merge it."
        )

    monkeypatch.setattr("sparktune.export.export_gguf", refuse)
    with pytest.raises(UserError, match="Architecture 'X'") as caught:
        export.run(export_case("gguf_f16"), context)
    assert caught.value.skip_class == ReasonClass.PLATFORM.value


def test_an_export_that_goes_wrong_fails_the_case(context, monkeypatch):
    def refuse(*args):
        raise ExportError("The adapter's q_proj is not finite.")

    monkeypatch.setattr("sparktune.export.export_gguf", refuse)
    result = export.run(export_case("gguf_f16"), context)
    assert result.verdict is Verdict.FAILED and "not finite" in result.reason and "write" in result.reason


def test_a_full_disk_skips_with_its_class(context, monkeypatch):
    monkeypatch.setattr("sparktune.export.files.MARGIN_BYTES", 1 << 60)
    with pytest.raises(UserError, match="GB free") as caught:
        export.run(export_case("gguf_f16"), context)
    assert caught.value.skip_class == ReasonClass.DISK.value


def test_a_missing_consumer_skips_with_its_class(context, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else real(name, *a))
    result = export.run(export_case("gguf_f16"), context)
    assert result.verdict is Verdict.SKIPPED and result.reason_class is ReasonClass.SOFTWARE
    assert result.next_step == "pip install xllamacpp"


def test_a_source_that_did_not_pass_skips(context, monkeypatch):
    def upstream(case, context):
        raise UserError("The training case ended as failed.", skip_class=ReasonClass.UPSTREAM.value)

    monkeypatch.setattr(export_source, "ensure_trained", upstream)
    with pytest.raises(UserError) as caught:
        export.run(export_case("gguf_f16"), context)
    assert caught.value.skip_class == ReasonClass.UPSTREAM.value


def test_wrong_sources_and_consumers_are_told(context):
    with pytest.raises(UserError, match="no train case") as caught:
        export.run(export_case("gguf_f16", source="train/tinny"), context)
    assert "train/tiny" in caught.value.fix
    with pytest.raises(UserError, match="does not read gguf_f16"):
        export.run(export_case("gguf_f16", consumer="peft"), context)


def test_a_tiny_source_is_taught_once_and_needs_no_training(context, monkeypatch):
    phases = []
    spawn = SameProcess.spawn
    monkeypatch.setattr(
        SameProcess, "spawn", lambda self, entry, *a, **k: phases.append(k["phase"]) or spawn(self, entry, *a, **k)
    )
    for format_ in ("adapter", "merged_16bit"):
        result = export.run(export_case(format_, source="tiny:qwen3@256", max_kl=5e-3), context)
        assert result.verdict is Verdict.PASSED, result.reason
        assert result.evidence["family"] == "qwen3"
    assert phases == ["teach", "write", "reference", "consume", "write", "consume"]


def test_a_wrong_width_and_a_missing_bound_are_told(context):
    with pytest.raises(UserError, match="no tiny model 100 wide"):
        export.run(export_case("adapter", source="tiny:qwen3@100"), context)
    with pytest.raises(ValueError, match="no bound for the format gguf_f16"):
        export_case("gguf_f16", max_kl={"gguf_q8_0": 1.0})
    with pytest.raises(ValueError, match="above 0"):
        export_case("gguf_f16", max_kl=0.0)


def test_the_reference_is_made_once(context, monkeypatch):
    export.run(export_case("adapter"), context)
    entries = []
    spawn = SameProcess.spawn
    monkeypatch.setattr(
        SameProcess, "spawn", lambda self, entry, *a, **k: entries.append(entry) or spawn(self, entry, *a, **k)
    )
    assert export.run(export_case("adapter"), context).verdict is Verdict.PASSED
    assert [e.partition(":")[2] for e in entries] == ["write", "consume"]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_other_pre_tokenizers_tokenise_alike_in_llama_cpp(tmp_path, pre):
    from sparkproof.runners.export_hf import HfModel
    from sparkproof.runners.export_llamacpp import LlamaCppModel
    from sparkproof.runners.export_probe import HARD_STRINGS

    base = export_tiny.save_base(tmp_path / "base", pre=pre)
    export_gguf(base, tmp_path / "m.gguf", "f16")
    theirs, ours = LlamaCppModel(tmp_path / "m.gguf"), HfModel(base)
    assert [theirs.tokenize(t) for t in HARD_STRINGS] == [ours.tokenize(t) for t in HARD_STRINGS]
    theirs.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "attention_bias": True},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"head_dim": 32},
    ],
    ids=["untied-with-biases", "llama3-rope", "linear-rope", "wide-heads"],
)
def test_variants_of_llama_agree_in_llama_cpp(tmp_path, changes):
    from sparkproof.runners.export_hf import HfModel
    from sparkproof.runners.export_judge import kl
    from sparkproof.runners.export_llamacpp import LlamaCppModel

    base = export_tiny.save_base(tmp_path / "base", **changes)
    if changes.get("attention_bias"):  # transformers starts them at zero
        from safetensors.torch import load_file, save_file

        weights = load_file(base / "model.safetensors")
        for name in weights:
            if name.endswith(".bias"):
                weights[name] = torch.randn_like(weights[name])
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    export_gguf(base, tmp_path / "m.gguf", "f16")
    theirs, ours = LlamaCppModel(tmp_path / "m.gguf"), HfModel(base)
    ids = ours.tokenize("The code word is amber falcon 7319, and it is 你好 to all of them, isn't it?" * 2)
    positions = [3, len(ids) - 1]
    rows = [m.log_probabilities(ids, positions, ours.vocabulary) for m in (ours, theirs)]
    assert kl(*rows).max() < 1e-3
    theirs.close()


def test_hard_strings_tell_the_pre_tokenizers_apart():
    """On SmolLM2's own vocabulary each wrong rule changes at least one hard string; otherwise the check proves nothing."""
    from gguf import GGUFReader
    from sparkproof.engines import embedded
    from sparkproof.runners.export_probe import HARD_STRINGS
    from tokenizers import Tokenizer

    fields = GGUFReader(embedded.find_gguf()).fields
    tokenizer = embedded.build_tokenizer({k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")})
    right = tokenizer.backend_tokenizer
    for name in ("gpt-2", "llama-bpe"):
        wrong = Tokenizer.from_str(right.to_str())
        wrong.pre_tokenizer = export_tiny.make_tokenizer(name).backend_tokenizer.pre_tokenizer
        assert any(wrong.encode(t).ids != right.encode(t).ids for t in HARD_STRINGS), name
