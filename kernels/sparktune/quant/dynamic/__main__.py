"""`python -m sparktune.quant.dynamic MODEL --text FILE --budget-gib X --out FILE`: choose where a model's bits go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparktune.export.files import ExportError
from sparktune.quant.dynamic import (
    Choice,
    Judge,
    Table,
    importance_of,
    measure,
    sequences_of,
    to_target,
    within_budget,
)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ExportError) as error:
        print(f"sparktune.quant.dynamic: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparktune.quant.dynamic",
        description="Measure what each weight's rounding costs on calibration text, and choose its type.",
    )
    parser.add_argument("model", help="folder or hub id of the 16-bit model")
    parser.add_argument("--revision", help="commit of a hub model")
    parser.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8, like what the model is for")
    parser.add_argument("--format", choices=("nf4", "gguf"), required=True, help="nf4: training; gguf: llama.cpp")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget-gib", type=float, help="bytes of all weights, in GiB")
    goal.add_argument("--target-kl", type=float, help="measured KL to the 16-bit model, nats a token")
    parser.add_argument("--out", type=Path, required=True, help="where the choice goes (JSON)")
    parser.add_argument(
        "--llama-types", type=Path, help="gguf: also write a file for llama-quantize --tensor-type-file"
    )
    parser.add_argument("--types", default="", help="gguf: the types to choose among, with commas (all)")
    parser.add_argument("--table", type=Path, help="measured weights: read if the file is there, written if not")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to measure on (4096)")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (128)")
    parser.add_argument("--draws", type=int, default=2, help="labels drawn a position (2)")
    parser.add_argument("--device", default=None, help="cuda, cuda:0 or cpu (the GPU if there is one)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.llama_types and options.format != "gguf":
        raise ValueError("--llama-types needs --format gguf.")
    if options.types and options.format != "gguf":
        raise ValueError("--types needs --format gguf: for training there are nf4 and 16 bits.")
    for name in ("budget_gib", "target_kl"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is not above zero.")
    text = options.text.read_text(encoding="utf-8")
    model, tokenizer = _load(options)
    sequences = sequences_of(tokenizer, text, options.tokens, options.length)
    if options.table and options.table.exists():
        table = Table.read(options.table)
        _check_fits(table, model, options)
    else:
        types = [t for t in options.types.split(",") if t]
        table = measure(model, sequences, options.format, types, options.draws, name=options.model, progress=_say)
        if options.table:
            table.write(options.table)
    judge = Judge(model, sequences, importance_of(model, sequences) if options.format == "gguf" else None)
    if options.budget_gib is not None:
        mix = within_budget(table, int(options.budget_gib * 2**30))
        measured = judge.kl(mix)
    else:
        mix, measured = to_target(table, judge, options.target_kl, _say)
    choice = Choice.of(table, mix, measured)
    choice.write(options.out)
    if options.llama_types:
        options.llama_types.write_text("\n".join(choice.llama_lines()) + "\n", encoding="utf-8")
    _say("")
    counts = {kind: list(choice.types.values()).count(kind) for kind in sorted(set(choice.types.values()))}
    print(
        f"{choice.bytes / 2**30:.4f} GiB, KL {measured:.4g} measured on the calibration text, "
        f"{choice.predicted_kl:.4g} predicted: " + ", ".join(f"{n} x {kind}" for kind, n in counts.items())
    )


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer: bf16 on a GPU, fp32 on a CPU. Errors: ValueError, OSError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from sparktune.interface.choices import pick_device, pick_dtype

    logging.disable_progress_bar()
    device = pick_device(options.device)
    source = {"revision": options.revision or "main"}
    if getattr(AutoConfig.from_pretrained(options.model, **source), "quantization_config", None):
        raise ValueError(f"{options.model} is quantised already: give the 16-bit model that it was made from.")
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=pick_dtype(None, device), device_map={"": device}, **source
    )
    return model, AutoTokenizer.from_pretrained(options.model, **source)


def _check_fits(table: Table, model: Any, options: argparse.Namespace) -> None:
    """Refuse a table of another model, format or set of types. Errors: ValueError."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = next((row.name for row in table.rows if shapes.get(row.name) != row.shape), None)
    if wrong or table.format != options.format:
        why = f"another model (its {wrong} is not this one's)" if wrong else f"the format {table.format}"
        raise ValueError(f"{options.table} is a table of {why}: name another file, or remove it.")
    if options.types:
        raise ValueError(f"{options.table} is there already, with its types: leave --types out, or name another file.")


def _say(line: str) -> None:
    """Progress, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
