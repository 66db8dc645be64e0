"""The phases of an export case, each the entry of a fresh process: `write`, `reference`, `consume`. None judges."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from sparkproof.engines.pretrained import resolve
from sparkproof.errors import UserError
from sparkproof.results import ReasonClass
from sparkproof.runners.child import progress, under_test, write_json
from sparkproof.runners.export_files import inspect
from sparkproof.runners.export_probe import Model, ask, sequences

EXTRA_TOKENS = 3  # room after the canary's answer, as in training


def write(payload: dict[str, Any]) -> dict[str, Any]:
    """Export the adapter in the scenario's format.

    Keys: model, revision, model_dir (optional), cache_dir, adapter, format, out.
    """
    from sparktune.export import NoSpaceError, export_adapter, export_gguf, export_merged

    try:
        base = resolve(payload["model"], payload["revision"], Path(payload["cache_dir"]), payload.get("model_dir", ""))
        adapter, out = Path(payload["adapter"]), Path(payload["out"])
        progress(f"exporting {payload['format']}")
        with under_test(f"exporting {payload['format']}"):
            match payload["format"]:
                case "adapter":
                    done = export_adapter(base.path, adapter, out, base.name)
                case "merged_16bit":
                    done = export_merged(base.path, adapter, out)
                case "gguf_f16":
                    done = export_gguf(base.path, out, "f16", adapter, f"{base.name} fine-tuned")
                case "gguf_q8_0":
                    done = export_gguf(base.path, out, "q8_0", adapter, f"{base.name} fine-tuned")
                case other:
                    raise ValueError(f"unknown format {other}")
    except UserError as error:
        return _user_error(error)
    except NoSpaceError as error:
        return _user_error(UserError(error.message, error.fix, skip_class=ReasonClass.DISK.value))
    with under_test("reading the base's headers"):
        expected = _expected(payload["format"], base.path, adapter)
    return {"exported": done.to_json(), "base": base.to_json(), "expected": expected}


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
    }
    with under_test("the reference's answers"):
        rows, answers = ask(model, questions, model.vocabulary, progress)
    np.save(payload["probabilities"], rows)
    write_json(Path(payload["questions"]), {**questions, "answers": answers, "device": model.device})
    return {"rows": len(rows)}


def consume(payload: dict[str, Any]) -> dict[str, Any]:
    """Load the export with its real consumer and put the questions to it.

    Keys: consumer, path, base, questions, probabilities.
    """
    import numpy as np

    questions = json.loads(Path(payload["questions"]).read_text(encoding="utf-8"))
    path = Path(payload["path"])
    with under_test("reading the exported file"):
        contents = inspect(path)
    progress(f"loading with {payload['consumer']}")
    with under_test(f"loading with {payload['consumer']}"):
        model = _load(payload["consumer"], path, Path(payload["base"]))
    with under_test(f"answers of {payload['consumer']}"):
        rows, answers = ask(model, questions, questions["vocabulary"], progress)
        model.close()
    np.save(payload["probabilities"], rows)
    return {"answers": answers, "file": contents, "versions": _versions(payload["consumer"])}


def _load(consumer: str, path: Path, base: Path) -> Model:
    if consumer == "llama.cpp":
        from sparkproof.runners.export_llamacpp import LlamaCppModel

        return LlamaCppModel(path)
    from sparkproof.runners.export_hf import HfModel

    return HfModel(base, path) if consumer == "peft" else HfModel(path)


def _expected(format_: str, base: Path, adapter: Path) -> dict[str, Any]:
    """Parameters of what was exported, and the base's 16-bit type, read from the sources' own headers."""
    stored = inspect(base)
    kinds = {t["type"] for t in stored["tensors"].values()}
    parameters = inspect(adapter)["parameters"] if format_ == "adapter" else stored["parameters"]
    return {"parameters": parameters, "type": "F16" if kinds == {"F16"} else "BF16"}


def _versions(consumer: str) -> dict[str, str]:
    names = {"llama.cpp": ["xllamacpp", "gguf"], "peft": ["peft", "transformers", "torch"]}
    return {name: importlib.metadata.version(name) for name in names.get(consumer, ["transformers", "torch"])}


def _user_error(error: UserError) -> dict[str, Any]:
    return {"user_error": {"message": error.message, "fix": error.fix, "skip_class": error.skip_class}}
