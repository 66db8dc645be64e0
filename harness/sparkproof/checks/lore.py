"""Tables that checks compare with, read from `data/lore.toml`: versions with reports against them, healthy figures."""

from __future__ import annotations

import tomllib
from importlib import resources

from pydantic import Field

from sparkproof.results import Strict


class Bad(Strict):
    """A version with reports against it."""

    version: str
    says: str
    source: str


class Stale(Strict):
    """An image tag that is no longer renewed."""

    tag: str
    says: str


class Canary(Strict):
    """The lowest figures of a healthy device."""

    copy_gb_s: float
    gemv_gb_s: float
    gemm_tflops: float
    clock_mhz: int
    source: str


class Usable(Strict):
    """MemTotal of one product."""

    usable_gib: tuple[float, float]
    smaller_gib: float = Field(description="Less than this is another variant, not a cap.")


class Lore(Strict):
    """The whole file."""

    bad_kernel: list[Bad]
    bad_driver: list[Bad]
    no_arm_wheel: dict[str, str]
    fast_path: dict[str, list[str]]
    stale_image: list[Stale]
    canary: dict[str, Canary]
    memory: dict[str, Usable]


LORE = Lore.model_validate(
    tomllib.loads(resources.files(__package__).joinpath("data", "lore.toml").read_text(encoding="utf-8"))
)
