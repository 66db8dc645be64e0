"""The phases of an export case, each the entry of a fresh process: `teach`, `write`, `reference`, `consume`, `rounded`.

None of them judges. `consume` also runs in vLLM's own environment, so it imports nothing there but the consumer's own module.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.results import ReasonClass
from sparkproof.runners.child import progress, under_test, write_json
from sparkproof.runners.export_probe import Model, Unloadable, ask, sequences

EXTRA_TOKENS = 12  # room after the canary's answer for the stop token


def teach(payload: dict[str, Any]) -> dict[str, Any]:
    """A tiny model that knows one answer. Keys: model, cache_dir, out (the adapter's folder)."""
    from sparkproof.engines.pretrained import resolve
    from sparkproof.runners.export_teach import teach as taught

    try:
        base = resolve(payload["model"], "", Path(payload["cache_dir"]))
    except UserError as error:
        return _user_error(error)
    progress(f"teaching {base.name} an answer")
    out = Path(payload["out"])
    found = taught(base.path, out)
    write_json(out / "taught.json", {**found, "base": base.to_json()})
    return found


def write(payload: dict[str, Any]) -> dict[str, Any]:
    """Export the adapter in the scenario's format, and look into what was written.

    Keys: model, revision, model_dir (optional), cache_dir, adapter, format, out.
    """
    from sparktune.export import ExportError, NoSpaceError

    from sparkproof.engines.pretrained import resolve
    from sparkproof.runners import export_rope, export_weights, export_write
    from sparkproof.runners.export_files import inspect

    format_, adapter, out = payload["format"], Path(payload["adapter"]), Path(payload["out"])
    try:
        base = resolve(payload["model"], payload["revision"], Path(payload["cache_dir"]), payload.get("model_dir", ""))
        progress(f"exporting {format_}")
        with under_test(f"exporting {format_}"):
            done = export_write.write(format_, base.path, base.name, adapter, out)
    except UserError as error:
        return _user_error(error)
    except NoSpaceError as error:
        return _user_error(UserError(error.message, error.fix, skip_class=ReasonClass.DISK.value))
    except ExportError as error:
        if export_write.unsupported(error, made=payload["model"].startswith("tiny:")):
            return _user_error(UserError(error.message, error.fix, skip_class=ReasonClass.PLATFORM.value))
        raise
    with under_test("reading what was exported"):
        stored = inspect(base.path)
        expected = export_write.expected(format_, stored, inspect(adapter)["parameters"])
        progress("reading the exported weights")
        file = inspect(export_write.weights_of(out))
        weights = None
        if export_write.comparable(format_) and not file["broken"]:
            weights = export_weights.measure(export_write.weights_of(out), base.path, adapter, format_)
        rope = None
        if export_write.weights_of(out).suffix == ".gguf" and weights is not None:
            rope = export_rope.measure(export_write.weights_of(out), base.path)
    return {
        "exported": done, "base": base.to_json(), "expected": expected, "file": file, "weights": weights, "rope": rope,
    }  # fmt: skip


def reference(payload: dict[str, Any]) -> dict[str, Any]:
    """The declared reference's answers, written to `questions` and `probabilities`.

    Keys: base, adapter, reference, prompts, canary_prompt, canary_answer, questions, probabilities.
    """
    import numpy as np

    from sparkproof.runners.export_hf import HfModel

    progress(f"loading the reference {payload['reference']}")
    with under_test("loading the reference"):
        model = HfModel(
            Path(payload["base"]), Path(payload["adapter"]), four_bit=payload["reference"] == "base4+adapter"
        )
    canary = (payload["canary_prompt"], payload["canary_answer"])
    questions: dict[str, Any] = {
        "sequences": sequences(model.tokenizer, payload["prompts"], canary),
        "canary_prompt": canary[0],
        "canary_tokens": len(model.tokenizer(canary[1])["input_ids"]) + EXTRA_TOKENS,
        "vocabulary": model.vocabulary,
        "bos": model.tokenizer.bos_token_id,
    }
    with under_test("the reference's answers"):
        rows, answers = ask(model, questions, model.vocabulary, progress)
    np.save(payload["probabilities"], rows)
    write_json(Path(payload["questions"]), {**questions, "answers": answers, "device": model.device})
    return {"rows": len(rows)}


def consume(payload: dict[str, Any]) -> dict[str, Any]:
    """Load the export with its real consumer and put the questions to it.

    Keys: consumer, path, base, format, questions, probabilities.
    """
    import numpy as np

    questions = json.loads(Path(payload["questions"]).read_text(encoding="utf-8"))
    consumer = payload["consumer"]
    progress(f"loading with {consumer}")
    try:
        with under_test(f"loading with {consumer}"):
            model = load(consumer, Path(payload["path"]), Path(payload["base"]), payload["format"])
    except Unloadable as error:
        return _user_error(
            UserError(f"{consumer} can't load this model: {error}", skip_class=ReasonClass.PLATFORM.value)
        )
    with under_test(f"answers of {consumer}"):
        rows, answers = ask(model, questions, questions["vocabulary"], progress)
        backend = model.backend()
        model.close()
    np.save(payload["probabilities"], rows)
    return {"answers": answers, "versions": versions(consumer), "backend": backend, "device": backend["device"]}


def rounded(payload: dict[str, Any]) -> dict[str, Any]:
    """The same questions to transformers over a GGUF's own weights, with inputs rounded as llama.cpp rounds them.

    Or `unplaceable`, why they can't be put back. Keys: file, base, adapter, questions, probabilities.
    """
    import tempfile

    import numpy as np

    from sparkproof.runners import export_layout, export_rounded
    from sparkproof.runners.export_hf import HfModel
    from sparkproof.runners.export_inputs import RoundedInputs

    questions = json.loads(Path(payload["questions"]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="sparkproof-rounded-") as scratch:
        folder = Path(scratch, "model")
        progress("putting the file's weights back where the base has them")
        try:
            found = export_rounded.write(Path(payload["file"]), Path(payload["base"]), Path(payload["adapter"]), folder)
        except export_layout.Unplaceable as error:
            return {"unplaceable": str(error)}
        model = HfModel(folder)
        with RoundedInputs(model.model, found.pop("kinds")) as inputs:
            rows, answers = ask(model, questions, questions["vocabulary"], progress)
    np.save(payload["probabilities"], rows)
    return {**found, "answers": answers, "inputs": len(inputs.rounded)}


def load(consumer: str, path: Path, base: Path, format_: str) -> Model:
    """The consumer with the export in it. Errors: Unloadable where it does not know the architecture."""
    match consumer:
        case "llama.cpp":
            from sparkproof.runners.export_llamacpp import LlamaCppModel

            return LlamaCppModel(path)
        case "vllm":
            from sparkproof.runners.export_vllm import VllmModel

            return VllmModel(base, path) if format_ == "adapter" else VllmModel(path)
        case "peft" | "transformers":
            from sparkproof.runners.export_hf import HfModel

            return HfModel(base, path) if consumer == "peft" else HfModel(path)
    raise ValueError(f"no distributions come from {consumer}")


def versions(consumer: str) -> dict[str, str]:
    """Of what read the export."""
    names = {
        "llama.cpp": ["xllamacpp", "gguf"], "peft": ["peft", "transformers", "torch"],
        "vllm": ["vllm", "transformers", "torch"],
    }  # fmt: skip
    found = {}
    for name in names.get(consumer, ["transformers", "torch"]):
        for known in (name, f"{name}-cpu"):  # vLLM's CPU build has a name of its own
            try:
                found[known] = importlib.metadata.version(known)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def _user_error(error: UserError) -> dict[str, Any]:
    return {"user_error": {"message": error.message, "fix": error.fix, "skip_class": error.skip_class}}
