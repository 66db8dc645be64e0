"""The table that everything is chosen from: for each weight and each type it can take, the bytes and what they cost in KL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparktune.quant.dynamic import calibrate
from sparktune.quant.dynamic.formats import GGUF_TYPES, NF4_TYPES, Type
from sparktune.quant.dynamic.names import gguf_namer

Format = Literal["nf4", "gguf"]
LAYOUT = 1


@dataclass(frozen=True)
class Option:
    """One type for one weight."""

    bytes: int
    kl: float
    """Predicted KL a token of this weight alone, nats."""
    output_error: float
    """|D x|^2 / |W x|^2 on calibration text: weight and activation together."""
    weight_error: float
    """|D|^2 / |W|^2."""


@dataclass(frozen=True)
class Row:
    """One weight; `name` is the checkpoint's, `target` what the consumer calls it: llama.cpp's tensor, or the module."""

    name: str
    target: str
    shape: tuple[int, ...]
    options: dict[str, Option]


@dataclass(frozen=True)
class Table:
    """A model's weights, measured."""

    model: str
    format: Format
    tokens: int
    sequences: int
    fixed_bytes: int
    """Of what is not chosen: norms and biases; for nf4 embeddings and head too."""
    rows: list[Row]
    kept: list[str]
    """For nf4: modules that transformers must leave in 16 bits besides those chosen, such as the head."""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps({"layout": LAYOUT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Table:
        """Errors: ValueError for a file that is no table."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("layout") != LAYOUT:
                raise ValueError(f"{path} is a table of another layout: measure again.")
            data["rows"] = [
                Row(r["name"], r["target"], tuple(r["shape"]), {k: Option(**o) for k, o in r["options"].items()})
                for r in data["rows"]
            ]
            return cls(**data)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a table of measured weights: make one with --table.") from error


def measure(
    model: Any, sequences: Tensor, format: Format, types: Sequence[str] = (), draws: int = 2, seed: int = 0, name: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> Table:  # fmt: skip
    """Measure every linear layer of a 16-bit (or fp32) causal language model on `sequences` [S, T] of token ids.

    format: "nf4" weighs nf4 against 16 bits for each linear layer but the head; "gguf" weighs `types` for every matrix,
    embeddings too. types: names of `formats.GGUF_TYPES` (all where empty); a weight gets those that fit its rows.
    Errors: ValueError for experts in stacks, a quantised model, an unknown type, or a weight that no type fits.
    """
    if format not in ("nf4", "gguf"):
        raise ValueError(f"format='{format}' is not known: use 'nf4' or 'gguf'.")
    wanted = [Type.named(t) for t in (types or (NF4_TYPES if format == "nf4" else GGUF_TYPES))]
    for kind in wanted:
        if (kind.name in NF4_TYPES) != (format == "nf4"):
            raise ValueError(f"The type {kind.name} has no place in the format {format}.")
    head = model.get_output_embeddings()
    take: Callable[[str, nn.Module], bool] = (
        (lambda _n, m: isinstance(m, nn.Linear) and m is not head) if format == "nf4" else (lambda _n, _m: True)
    )
    weights = calibrate.weights_of(model, take)
    target = (lambda n: n.removesuffix(".weight")) if format == "nf4" else gguf_namer(model.config)
    targets = [target(w.name) for w in weights]  # fails before the hours
    choices = [_fitting(w, wanted) for w in weights]
    samples = calibrate.collect(model, weights, sequences, draws, seed, progress)
    rows = []
    for index, (weight, kinds) in enumerate(zip(weights, choices, strict=True)):
        importance = _importance(weight, head, format)
        plain = weight.parameter.detach().float()
        deltas = [kind.round_trip(plain, importance) - plain for kind in kinds]
        predicted = calibrate.sensitivity(weight, deltas, samples)
        rows.append(
            Row(
                weight.name,
                targets[index],
                tuple(plain.shape),
                {
                    kind.name: Option(
                        kind.nbytes(tuple(plain.shape)),
                        kl,
                        calibrate.output_error(weight, delta),
                        float(delta.square().sum() / plain.square().sum().clamp_min(1e-30)),
                    )
                    for kind, kl, delta in zip(kinds, predicted, deltas, strict=True)
                },
            )
        )
        weight.uses = []  # what was measured is let go
        progress(f"weights: {index + 1} of {len(weights)}")
    chosen = {id(w.parameter) for w in weights}
    width = 4 if format == "gguf" else 2
    fixed = sum(width * p.numel() for p in model.parameters() if id(p) not in chosen)
    kept = [n for n, m in model.named_modules() if format == "nf4" and m is head]
    return Table(name or str(model.config.name_or_path), format, sequences.numel(), len(sequences), fixed, rows, kept)


def _fitting(weight: calibrate.Weight, wanted: list[Type]) -> list[Type]:
    kinds = [kind for kind in wanted if kind.fits(tuple(weight.parameter.shape))]
    if not kinds:
        raise ValueError(
            f"{weight.name} has rows of {weight.parameter.shape[-1]}, which none of the types takes: add f16 or bf16."
        )
    return kinds


def _importance(weight: calibrate.Weight, head: nn.Module | None, format: Format) -> Tensor | None:
    """What llama-quantize will have: llama-imatrix sees neither embeddings nor, unless told to, the head."""
    if format == "nf4" or head in weight.modules or any(isinstance(m, nn.Embedding) for m in weight.modules):
        return None
    return calibrate.second_moment(weight)


def sequences_of(tokenizer: Any, text: str, tokens: int, length: int) -> Tensor:
    """`tokens` // `length` sequences [S, length] of ids, spread evenly over the text. Errors: ValueError for too short a text."""
    if length < 8 or tokens < length:
        raise ValueError(
            f"{tokens} tokens in sequences of {length} is too little: use at least 8 a sequence and one of them."
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    count = tokens // length
    if len(ids) < count * length:
        raise ValueError(
            f"The text has {len(ids)} tokens and {count * length} are asked for: give a longer one or ask for fewer."
        )
    step = len(ids) // count
    return torch.stack([ids[i * step : i * step + length] for i in range(count)])
