"""What `sparkproof bench train` writes: a versioned JSON document. Its schema is reports/schema/bench-train-1.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sparkproof.bench.document import EngineInfo, Interval, Verdict, schema_text
from sparkproof.bench.train.setting import Setting
from sparkproof.results import Strict

VERSION = 1
Status = Literal["timed", "missing", "failed", "wrong", "unchecked", "not reached"]


class Memory(Strict):
    """GiB; of the GPU but for the last. Absent where it could not be read, as on a CPU."""

    weights_gib: float | None = Field(
        default=None, description="Allocated once the model stands, before the first step."
    )
    peak_allocated_gib: float | None = Field(
        default=None,
        description="Peak over the timed steps; of recorded ones over those of warm-up too, when they were recorded.",
    )
    peak_reserved_gib: float | None = Field(default=None, description="Peak over them that torch holds of the device.")
    warmup_peak_allocated_gib: float | None = Field(default=None, description="Peak over the steps of warm-up.")
    warmup_peak_reserved_gib: float | None = Field(default=None, description="Peak then that torch held of the device.")
    host_pinned_peak_gib: float | None = Field(
        default=None, description="Peak of pinned host memory over the timed steps."
    )


class Round(Strict):
    """One process of one engine."""

    number: int = Field(description="From 1.")
    step_ms: list[float] = Field(description="Each timed step.")
    forward_ms: float = Field(description="Median.")
    backward_ms: float = Field(description="Median.")
    optimizer_ms: float = Field(description="Median; with zeroing gradients.")
    wall_ms: float = Field(description="A step by the host's clock, over all timed steps.")
    load_s: float = Field(description="Seconds from imports to a model that can train.")
    first_step_s: float = Field(description="Seconds of the first step: compilation and autotuning are in it.")
    loss: list[float | None] = Field(description="Of every step, those of warm-up first; null where not finite.")
    gradient_norm: list[float | None] = Field(description="Of the steps of warm-up.")
    memory: Memory = Field(description="Peaks.")
    trainable: int = Field(description="Trained parameters.")
    copy_gb_s: float | None = Field(default=None, description="A large copy after the steps: whether the clock held.")
    notes: dict[str, Any] = Field(default_factory=dict, description="What the engine says of itself, after the steps.")
    failures: dict[str, str] = Field(default_factory=dict, description="What could not be read -> why.")
    versions: dict[str, str] = Field(description="Package -> version, as this process saw it.")


class EngineSteps(Strict):
    """One engine at one model."""

    name: str = Field(description="Key of the engine.")
    status: Status = Field(
        description="wrong: loss or gradient norm of step 0 is not hf's; shown, not ranked. unchecked: hf's are not there to "
        "compare with; not ranked. missing: not installed, or not for this device. not reached: no time was left."
    )
    reason: str = Field(default="", description="Why it is not counted.")
    step_ms: Interval | None = Field(default=None, description="Median of the rounds' medians.")
    tokens_per_s: Interval | None = Field(default=None, description="Tokens of a batch over the step's time.")
    speedup: Interval | None = Field(default=None, description="hf's time over this engine's; null for hf.")
    useful_tflop_s: float | None = Field(default=None, description="Useful TFLOP of a step over its time.")
    light: float | None = Field(default=None, description="The floor over the step's time: 1 would be speed of light.")
    memory: Memory = Field(default_factory=Memory, description="The largest of the rounds.")
    load_s: float | None = Field(default=None, description="Of the first round.")
    first_step_s: float | None = Field(default=None, description="Of the first round, whose caches are the emptiest.")
    loss_difference: float | None = Field(default=None, description="Of step 0 from hf's, the worst round's.")
    norm_difference: float | None = Field(
        default=None, description="Of step 0's gradient norm from hf's, relative, worst."
    )
    rounds: list[Round] = Field(default_factory=list, description="Everything that was measured.")
    failed_round: int = Field(default=0, description="In which it failed; 0: none.")
    log: str = Field(default="", description="The end of what a process that failed printed.")


class Floor(Strict):
    """Speed of light."""

    floor_ms: float = Field(description="Sum of the parts.")
    parts: dict[str, float] = Field(description="Part -> milliseconds a step.")
    attention: dict[str, Any] = Field(description="Backend -> forward and backward milliseconds a layer, or why not.")


class ModelSteps(Strict):
    """One model's step on every engine."""

    setting: Setting = Field(description="The step.")
    optimizer: str = Field(description="The optimiser.")
    checkpoint_bytes: int | None = Field(default=None, description="Of the NF4 checkpoint that all load.")
    useful_tflop: float = Field(description="TFLOP a step that no implementation can skip, recomputation not counted.")
    floor: Floor | None = Field(default=None, description="What its products and attention alone take; null on a CPU.")
    engines: list[EngineSteps] = Field(description="In the engines' order.")
    best_other: str = Field(default="", description="The fastest other engine that is right.")
    against_best: Interval | None = Field(default=None, description="Its time over sparktune's.")
    verdict: Verdict = Field(default="", description="Against it; no difference when the interval spans 1.")
    sentence: str = Field(default="", description="The verdict in words.")
    error: str = Field(default="", description="Why nothing of it, or no verdict, stands.")


class Canary(Strict):
    """A large copy in every process, GB/s: whether the clock held and nobody else was there."""

    samples: dict[str, float] = Field(description="Model, engine and round -> GB/s.")
    drift: float = Field(description="Largest distance from their median, relative.")
    band: float = Field(description="The drift that is accepted.")


class Document(Strict):
    """One run of `sparkproof bench train`."""

    schema_version: Literal[1] = Field(default=1, description="Of this document.")
    kind: Literal["bench-train"] = Field(default="bench-train", description="Of document.")
    device: str = Field(description="The GPU, or CPU, whose times say nothing about a GPU.")
    device_type: Literal["cuda", "cpu"] = Field(description="cpu: a trial of the road; no verdict is given.")
    multiprocessors: int = Field(default=0, description="The GPU's SMs; 0 on a CPU.")
    memory_gib: float = Field(default=0.0, description="The GPU's; 0 on a CPU.")
    software: dict[str, str] = Field(description="Package -> version, of the process that wrote the checkpoint.")
    engines: list[EngineInfo] = Field(description="All engines of the run.")
    sites: dict[str, list[str]] = Field(default_factory=dict, description="Engine -> import roots of its own.")
    rounds: int = Field(description="Asked for.")
    models: list[ModelSteps] = Field(description="In the order asked for.")
    canary: Canary | None = Field(default=None, description="Null where no process could measure it.")
    trusted: bool = Field(description="Whether the canary held; without it no verdict stands.")
    partial: str = Field(default="", description="Why not all that was asked for was measured; empty: it was.")
    interrupted: bool = Field(default=False, description="Whether a person ended it.")
    notes: list[str] = Field(default_factory=list, description="What else a reader should know.")
    seconds: float = Field(default=0.0, description="The whole run.")


def train_schema() -> str:
    """The JSON Schema, as committed."""
    return schema_text(Document, f"sparkproof bench train, version {VERSION}")
