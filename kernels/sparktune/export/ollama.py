"""A folder for `ollama create`: the GGUF and a Modelfile with template, system prompt, stops and parameters.

Ollama ignores the chat template in a GGUF's metadata where a Modelfile has TEMPLATE, which is Go's text/template over
`.System` and `.Messages` (https://github.com/ollama/ollama/blob/main/docs/template.mdx). Every text is a quoted Go string, so
that no white space is lost between actions. Two things differ by Ollama's own doing: it joins consecutive messages of one
role, and lifts every system message to the top.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from sparktune.export.chat_form import DATES, ChatForm, derive, renderer
from sparktune.export.files import ExportError, atomic_folder
from sparktune.export.gguf import export_gguf
from sparktune.export.hf import Exported, exported, tokenizer_folder
from sparktune.export.lora_gguf import export_lora_gguf
from sparktune.export.progress import Progress, silent
from sparktune.export.vocabulary import adds_ends

MODELFILE = "Modelfile"
# https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx, "Valid Parameters and Values"
PARAMETERS: dict[str, type] = {
    "num_ctx": int, "num_predict": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float, "seed": int,
    "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip
FROM_GENERATION = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip


def export_ollama(
    base: Path,
    out: Path,
    qtype: str = "q4_k_m",
    adapter: Path | None = None,
    name: str = "",
    *,
    system: str = "",
    parameters: Mapping[str, int | float] | None = None,
    stops: Sequence[str] = (),
    template: str = "",
    keep_adapter: bool = False,
    tensor_types: Mapping[str, str] | None = None,
    imatrix: Path | None = None,
    progress: Progress = silent,
) -> Exported:
    """Make the folder `out`: a GGUF as of `export_gguf`, and a Modelfile for `ollama create NAME -f Modelfile` in it.

    keep_adapter: the base's GGUF and the adapter's beside it (ADAPTER), in place of a merged one.
    system, parameters, stops, template: as for `modelfile`.

    Errors: ExportError, NoSpaceError.
    """
    start = time.monotonic()
    if keep_adapter and adapter is None:
        raise ExportError("keep_adapter needs an adapter.", "Give adapter=FOLDER.")
    text, notes = modelfile(
        tokenizer_folder(base, adapter), f"model.{qtype.upper()}.gguf", "adapter.gguf" if keep_adapter else "",
        system=system, parameters=parameters, stops=stops, template=template, generation=base,
    )  # fmt: skip
    with atomic_folder(out) as part:
        merged = None if keep_adapter else adapter
        options: dict[str, Any] = {"tensor_types": tensor_types, "imatrix": imatrix, "progress": progress}
        done = export_gguf(base, part / f"model.{qtype.upper()}.gguf", qtype, merged, name or base.name, **options)
        if keep_adapter and adapter is not None:
            export_lora_gguf(base, adapter, part / "adapter.gguf")
        (part / MODELFILE).write_text(text, encoding="utf-8")
    account = exported(
        out, done.tensors, done.merged, done.parameters, start, types=done.types, fallbacks=done.fallbacks
    )
    return replace(account, notes=[*done.notes, *notes])


def modelfile(
    tokenizer: Path,
    model: str,
    adapter: str = "",
    *,
    system: str = "",
    parameters: Mapping[str, int | float] | None = None,
    stops: Sequence[str] = (),
    template: str = "",
    generation: Path | None = None,
) -> tuple[str, list[str]]:
    """(a Modelfile's text, what the user should know) for the GGUF file `model`, beside it.

    tokenizer: folder of the tokenizer with its chat template. system: SYSTEM; where it is empty, the template's own
    default holds.
    parameters: names of PARAMETERS, over those of generation_config.json in the folder `generation`. stops: besides the
    model's own end tokens. template: a Go template, in place of the one made of the chat template.

    Errors: ExportError for a chat template that Ollama's language can't say, or an unknown parameter.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    settings, ends = _generation(generation or tokenizer, loaded)
    for key, value in (parameters or {}).items():
        if key not in PARAMETERS:
            raise ExportError(f"Ollama has no parameter {key!r}.", f"Use {', '.join(PARAMETERS)}; stops are apart.")
        settings[key] = PARAMETERS[key](value)
    notes: list[str] = []
    if template:
        go = template
    else:
        form = derive(renderer(loaded), (date.today().isoformat(), DATES[0]))
        add_bos = adds_ends(tokenizer)["tokenizer.ggml.add_bos_token"]
        form, told = without_bos(form, loaded.bos_token or "", add_bos)
        if system and form.before is None:
            raise ExportError("The chat template refuses system messages.", "Leave system empty.")
        notes = [*form.notes, *told]
        go = go_template(form)
        ends = [*end_of_turn(form.turn, loaded), *ends]
    lines = [*(f"# {note}" for note in notes), f"FROM ./{model}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter else []
    lines += [f"TEMPLATE {quoted(go)}"] + ([f"SYSTEM {quoted(system)}"] if system else [])
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in dict.fromkeys([*ends, *stops])]
    lines += [f"PARAMETER {key} {value}" for key, value in settings.items()]
    return "\n".join(lines) + "\n", notes


def quoted(text: str) -> str:
    """`text` as a Modelfile takes it: between quotes, or three of them, and nothing is escaped. Errors: ExportError."""
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    if '"""' in text or text.endswith('"') or text.startswith('"'):
        raise ExportError(f"A Modelfile can't quote {text[:60]!r}.", "Leave out quotes at its ends and three in a row.")
    return f'"""{text}"""'


def without_bos(form: ChatForm, bos: str, add_bos: bool) -> tuple[ChatForm, list[str]]:
    """The form for a runtime that itself puts `bos` in front where `add_bos` says so, and what differs."""
    if not bos or not add_bos:
        return form, []
    if not form.head.startswith(bos):
        return form, [f"llama.cpp and Ollama put {bos} before a chat, which the chat template does not."]
    before = form.before.removeprefix(bos) if form.before is not None else None
    return replace(form, head=form.head.removeprefix(bos), before=before), []


def go_template(form: ChatForm) -> str:
    """The form in Go's text/template."""

    def text(value: str) -> str:
        return f"{{{{ {json.dumps(value, ensure_ascii=False)} }}}}" if value else ""

    if form.before is None:
        head = text(form.head)
    else:
        with_system = f"{text(form.before)}{{{{ .System }}}}{text(form.after or '')}"
        alone = "(le (len .Messages) 2) " if form.system_last else ""
        condition = f"and .System {alone}".strip() if alone else ".System"
        head = f"{{{{- if {condition} }}}}{with_system}{{{{ else }}}}{text(form.head)}{{{{ end }}}}"
    turn = text(form.turn)
    if form.system_last is not None:
        first, second = form.system_last
        near_end = "(eq (len (slice $.Messages $i)) 2)"
        with_system = f"{text(first)}{{{{ $.System }}}}{text(second)}"
        turn = f"{{{{ if and $.System {near_end} }}}}{with_system}{{{{ else }}}}{turn}{{{{ end }}}}"
    return (
        f"{head}\n"
        "{{- range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        f'{{{{- if eq .Role "user" }}}}{{{{ .Content }}}}{{{{ if $last }}}}{text(form.opening)}{{{{ else }}}}{text(form.reply)}'
        "{{ end }}\n"
        f'{{{{- else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ if not $last }}}}{turn}{{{{ end }}}}\n'
        "{{- end }}\n"
        "{{- end }}"
    )


def end_of_turn(turn: str, tokenizer: Any) -> list[str]:
    """What stands after an answer: a special token, else the first line of the text."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    found = [t for t in sorted(special, key=len, reverse=True) if turn.lstrip("\n ").startswith(t)][:1]
    line = next((line.strip() for line in turn.splitlines() if line.strip()), "")
    return found or ([line] if line else [])


def _generation(folder: Path, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """(parameters of generation_config.json as Ollama names them, end tokens of it and the tokenizer)."""
    try:
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise ExportError(f"{folder / 'generation_config.json'} can't be read ({error}).") from error
    settings = {
        ours: PARAMETERS[ours](config[theirs])
        for theirs, ours in FROM_GENERATION.items()
        if config.get(theirs) is not None
    }
    ids = config.get("eos_token_id")
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    ends = tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, *ids]) if tokenizer.eos_token_id is not None else []
    return settings, list(dict.fromkeys(t for t in ends if t))
