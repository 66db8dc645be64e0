"""What was chosen, as a file that the consumers take: modules left in 16 bits, or a GGUF type for each tensor."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparktune.quant.dynamic.choose import Mix, total
from sparktune.quant.dynamic.formats import Type
from sparktune.quant.dynamic.table import Format, Table

LAYOUT = 1


@dataclass(frozen=True)
class Choice:
    """A mix of types for one model."""

    model: str
    format: Format
    bytes: int
    """Of all weights; for GGUF without the file's metadata, its vocabulary above all."""
    predicted_kl: float
    """By the sum of the table's predictions, nats a token on the calibration text."""
    measured_kl: float | None
    """Of the mix as a whole on the calibration text; None where it was not measured."""
    types: dict[str, str]
    """llama.cpp's tensor, or for nf4 transformers' module -> type."""
    skip_modules: list[str]
    """For nf4: transformers' `llm_int8_skip_modules`, the head with them; empty for GGUF."""

    @classmethod
    def of(cls, table: Table, mix: Mix, measured_kl: float | None = None) -> Choice:
        """From weights' names and types to the consumer's."""
        size, kl = total(table, mix)
        types = {row.target: mix[row.name] for row in table.rows}
        skip = (
            [module for module, kind in types.items() if Type.named(kind).lossless_16] if table.format == "nf4" else []
        )
        return cls(table.model, table.format, size, kl, measured_kl, types, sorted({*skip, *table.kept}))

    def write(self, path: Path) -> None:
        """As JSON; `read` gives it back."""
        path.write_text(json.dumps({"layout": LAYOUT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Choice:
        """Errors: ValueError for a file that is no choice."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("layout") != LAYOUT:
                raise ValueError(f"{path} was written in another layout: choose again.")
            return cls(**data)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not a choice of types: make one with python -m sparktune.quant.dynamic."
            ) from error

    def llama_lines(self) -> list[str]:
        """For llama-quantize's --tensor-type-file: an anchored pattern a tensor. Errors: ValueError for nf4."""
        if self.format != "gguf":
            raise ValueError("A choice for training has no GGUF types: measure with format gguf.")
        return [f"^{re.escape(name)}$={kind}" for name, kind in self.types.items()]

    def bitsandbytes_config(self, compute_dtype: Any = None) -> Any:
        """transformers' BitsAndBytesConfig with the chosen modules in 16 bits. Errors: ValueError for GGUF."""
        import torch
        from transformers import BitsAndBytesConfig

        if self.format != "nf4":
            raise ValueError("A choice of GGUF types can't be trained over: measure with format nf4.")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype or torch.bfloat16,
            llm_int8_skip_modules=self.skip_modules,
        )
