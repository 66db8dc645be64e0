r"""Tables of cosines and sines for rotary embeddings: what `rope` and `qk_norm_rope` turn by.

    cos[p, i] = a cos(p f_i),  sin[p, i] = a sin(p f_i),    p < L,  i < R / 2

with inverse frequencies f_i and an attention scaling a that depend on the kind. With base b, f = b^(-2i/R), and:

    default       f
    linear        f / factor
    dynamic       b grows with the length l that is served: b ((factor l / m) - (factor - 1))^(R / (R - 2)), l at least
                  m = max_position_embeddings
    llama3        wavelengths 2 pi / f over m / low_freq_factor are divided by factor, those under m / high_freq_factor
                  kept, and between them both are mixed; m is the length before scaling
    yarn          f / factor below, f above a ramp between the dimensions that turn beta_slow and beta_fast times in m;
                  a = 0.1 ln(factor) + 1 unless given
    longrope      f divided by a factor for each dimension: the long ones past m positions, else the short ones;
                  a = sqrt(1 + ln(factor) / ln(m)) unless given
    proportional  f over the whole head's width, zero (no turn) past the rotary share; / factor

Everything is computed in fp32 in the order that transformers computes it, angles included: at position 100000 an fp32
angle is off by up to 0.004, and a model was trained with that. So tables equal transformers' fp32 cos and sin bit for
bit on one device. They depend on the longest sequence for dynamic and longrope alone (`depends_on_length`).

Sources: Su et al. 2021 (default); Chen et al. 2023 (linear); Peng et al., "YaRN", 2023, with NTK-aware scaling (dynamic)
and the ramp; Ding et al., "LongRoPE", 2024; Llama 3.1's and Gemma 4's configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


@dataclass(frozen=True)
class RopeParameters:
    """What fixes the tables of one kind of layer; names as in a transformers configuration."""

    head_dim: int
    theta: float = 10000.0
    kind: str = "default"
    partial: float = 1.0  # share of a head that turns
    factor: float | None = 1.0  # None: max_positions over original_positions (yarn, longrope)
    max_positions: int = 0  # max_position_embeddings
    original_positions: int = 0  # before scaling: llama3, yarn, longrope
    attention_factor: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only one kind has, such as beta_fast or long_factor

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope_tables: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 < self.rotary <= self.head_dim or self.rotary % 2:
            raise ValueError(
                f"rope_tables: {self.partial} of a head of {self.head_dim} turns {self.rotary} elements, which must be "
                "even and between 2 and the head"
            )

    @property
    def rotary(self) -> int:
        """Elements of a head that turn: R."""
        return self.head_dim if self.kind == "proportional" else int(self.head_dim * self.partial)

    @property
    def depends_on_length(self) -> bool:
        """Whether tables must be made anew when sequences get longer than those they were made for."""
        return self.kind in ("dynamic", "longrope")

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None) -> RopeParameters:
        """Of a transformers text configuration; `layer_type` where layers differ, as Gemma 3's do.

        Errors: ValueError for a kind not known here, or a `layer_type` that is missing or unknown.
        """
        found = dict(config.rope_parameters)
        nested = {k: v for k, v in found.items() if isinstance(v, dict)}
        if nested or layer_type is not None:
            if layer_type not in nested:
                raise ValueError(
                    f"rope_tables: layer_type must be one of {', '.join(nested) or None}, got {layer_type!r}"
                )
            found = dict(nested[layer_type])
        maximum = config.max_position_embeddings
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            head_dim=head_dim, theta=found.pop("rope_theta"), kind=found.pop("rope_type", "default"),
            partial=found.pop("partial_rotary_factor", None) or 1.0, factor=found.pop("factor", None),
            max_positions=maximum, original_positions=found.pop("original_max_position_embeddings", None) or maximum,
            attention_factor=found.pop("attention_factor", None), extra=found,
        )  # fmt: skip


def inverse_frequencies(p: RopeParameters, length: int = 0) -> tuple[Tensor, float]:
    """(f [R/2] fp32 on the CPU, attention scaling), for sequences of up to `length` tokens (default: max_positions)."""
    length = length or p.max_positions
    turns, base = torch.arange(0, p.rotary, 2, dtype=torch.float32) / p.rotary, p.theta
    if p.kind == "dynamic":
        m, factor = p.max_positions, p.factor or 1.0
        base = base * ((factor * max(length, m) / m) - (factor - 1)) ** (p.rotary / (p.rotary - 2))
    if p.kind == "longrope":
        return _longrope(p, turns, length)
    if p.kind == "proportional":
        turning = int(p.partial * p.head_dim // 2)
        turns = torch.arange(0, 2 * turning, 2, dtype=torch.float32) / p.head_dim
        f = torch.cat((1.0 / base**turns, torch.zeros(p.head_dim // 2 - turning)))
        return f / (p.factor or 1.0), 1.0
    f = 1.0 / base**turns
    if p.kind == "linear":
        return f / _factor(p), 1.0
    if p.kind == "llama3":
        return _llama3(p, f), 1.0
    if p.kind == "yarn":
        return _yarn(p, base**turns)
    return f, 1.0


def rope_tables(
    p: RopeParameters, length: int, device: torch.device | str = "cpu", served: int = 0
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [length, R/2] fp32 for positions 0 to length - 1, the attention scaling multiplied in.

    `served`: the longest sequence, where tables are made longer than it; dynamic and longrope depend on it.
    """
    if length < 1:
        raise ValueError(f"rope_tables: length must be at least 1, got {length}")
    f, scaling = inverse_frequencies(p, served or length)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * f.to(device)
    return angle.cos() * scaling, angle.sin() * scaling


def _factor(p: RopeParameters) -> float:
    if p.factor is not None:
        return p.factor
    return p.max_positions / p.original_positions


def _llama3(p: RopeParameters, f: Tensor) -> Tensor:
    factor, m = _factor(p), p.original_positions
    low, high = p.extra["low_freq_factor"], p.extra["high_freq_factor"]
    wavelength = 2 * math.pi / f
    scaled = torch.where(wavelength > m / low, f / factor, f)
    smooth = (m / wavelength - low) / (high - low)
    mixed = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < m / high) & ~(wavelength > m / low)
    return torch.where(between, mixed, scaled)


def _yarn(p: RopeParameters, wide: Tensor) -> tuple[Tensor, float]:
    """`wide` is 1 / f."""
    factor, r = _factor(p), p.rotary

    def scaling(of: float, mscale: float = 1.0) -> float:
        return 1.0 if of <= 1 else 0.1 * mscale * math.log(of) + 1.0

    def dimension(rotations: float) -> float:
        """The dimension that turns this often within the length before scaling."""
        return (r * math.log(p.original_positions / (rotations * 2 * math.pi))) / (2 * math.log(p.theta))

    low, high = dimension(p.extra.get("beta_fast") or 32), dimension(p.extra.get("beta_slow") or 1)
    if p.extra.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(r // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    f = 1.0 / (factor * wide) * (1 - kept) + 1.0 / wide * kept
    if p.attention_factor is not None:
        return f, p.attention_factor
    mscale, everywhere = p.extra.get("mscale"), p.extra.get("mscale_all_dim")
    if mscale and everywhere:
        return f, scaling(factor, mscale) / scaling(factor, everywhere)
    return f, scaling(factor)


def _longrope(p: RopeParameters, turns: Tensor, length: int) -> tuple[Tensor, float]:
    factor, m = _factor(p), p.original_positions
    # Without a length transformers begins with the short factors; here a length is always known.
    each = p.extra["long_factor" if length > m else "short_factor"]
    f = 1.0 / (torch.tensor(each, dtype=torch.float32) * p.theta**turns)
    if p.attention_factor is not None:
        return f, p.attention_factor
    return f, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(m))
