"""The phases of an Ollama case, each the entry of a fresh process: `parity` with Go alone, `converse` with the server.

Neither judges; both read the Modelfile that was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.results import ReasonClass
from sparkproof.runners import export_go, export_modelfile
from sparkproof.runners.child import progress, under_test
from sparkproof.runners.export_ollama import NotAnswering, OllamaServer, Reply
from sparkproof.runners.export_probe import Unloadable
from sparkproof.runners.export_talks import Writer, first_difference

REPLACEMENT = "\ufffd"  # a token that ends inside a character


def parity(payload: dict[str, Any]) -> dict[str, Any]:
    """Render the exported template with Go, and the same conversations with the chat template.

    Keys: out, base, adapter, cache_dir. Returns: conversations (their number), differ (a sentence each), notes.
    """
    from sparktune.export.hf import tokenizer_folder

    talks = Writer(tokenizer_folder(Path(payload["base"]), Path(payload["adapter"]))).talks()
    progress("building the renderer of Go's templates")
    program = export_go.build(Path(payload["cache_dir"]))
    progress("rendering with Go")
    with under_test("the exported Modelfile"):
        read = export_modelfile.read(Path(payload["out"]))
        made = export_go.render(program, read.template, read.system, [t.messages for t in talks])
    differ = [
        f"Conversation {i} differs {first_difference(t.text, text)}."
        for i, (t, text) in enumerate(zip(talks, made, strict=True), 1)
        if t.text != text
    ]
    return {"conversations": len(talks), "differ": differ, "notes": read.notes}


def converse(payload: dict[str, Any]) -> dict[str, Any]:
    """Create the model in Ollama and put the questions to it.

    Keys: out, base, adapter, name, questions, probabilities (the reference's), margin in nats.
    """
    from sparktune.export.hf import tokenizer_folder

    questions = json.loads(Path(payload["questions"]).read_text(encoding="utf-8"))
    writer = Writer(tokenizer_folder(Path(payload["base"]), Path(payload["adapter"])))
    out, name = Path(payload["out"]), payload["name"]
    try:
        server = OllamaServer()
    except NotAnswering as error:
        return _skip(f"Ollama went away: {error}.", ReasonClass.SOFTWARE)
    try:
        with under_test("creating the model in Ollama"):
            read = export_modelfile.read(out)
            progress("creating the model in Ollama")
            how = server.create(name, out, read)
        with under_test("answers of Ollama"):
            asked = writer.talk([{"role": "user", "content": questions["canary_prompt"]}])
            progress("asking for the canary")
            chat = server.chat(name, asked.messages, questions["canary_tokens"])
            raw = server.raw(name, asked.text, questions["canary_tokens"])
            fed: list[list[int]] = [[asked.tokens, reply.prompt_tokens] for reply in (chat, raw)]
            for talk in writer.talks():
                progress(f"conversation of {len(talk.messages)} messages")
                fed.append([talk.tokens, server.chat(name, talk.messages, 1).prompt_tokens])
            firsts = list(_firsts(server, name, writer, questions, payload))
            device = "cuda" if server.on_gpu(name) else "cpu"
            template = server.template(name)
    except Unloadable as error:
        return _skip(f"Ollama can't load this model: {error}", ReasonClass.PLATFORM)
    return {
        "chat": vars(chat), "raw": vars(raw), "fed": fed,
        "firsts": firsts, "template": [read.template, template], "stops": read.stops, "notes": read.notes, "device": device,
        "backend": {"device": device, "server": server.url, "created by": how}, "versions": {"ollama": server.version},
    }  # fmt: skip


def _firsts(
    server: OllamaServer, name: str, writer: Writer, questions: dict[str, Any], payload: dict[str, Any]
) -> Iterator[dict[str, str]]:
    """(prompt, want, got): the first token of the answer to each prompt, where the reference is sure and a token is a text."""
    import numpy as np

    rows = np.load(payload["probabilities"])
    end = 0
    for number, sequence in enumerate(questions["sequences"][:-1], 1):  # the last is the canary's, with its answer
        end += len(sequence["positions"])
        row = rows[end - 1]
        best, second = np.argsort(row)[[-1, -2]]
        want = writer.tokenizer.decode([int(best)], skip_special_tokens=True)
        if row[best] - row[second] <= payload["margin"] or not want.strip() or REPLACEMENT in want:
            continue
        progress(f"first token of prompt {number}")
        asked = writer.talk([{"role": "user", "content": sequence["text"]}])
        reply: Reply = server.raw(name, asked.text, 1)
        yield {"prompt": sequence["text"], "want": want, "got": reply.text}


def _skip(sentence: str, reason: ReasonClass) -> dict[str, Any]:
    error = UserError(sentence, skip_class=reason.value)
    return {"user_error": {"message": error.message, "fix": error.fix, "skip_class": error.skip_class}}
