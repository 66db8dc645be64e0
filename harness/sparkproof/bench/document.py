"""What `sparkproof bench ops` writes: a versioned JSON document. Its schema is reports/schema/bench-ops-1.json."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from sparkproof.judge import stats
from sparkproof.results import Strict

VERSION = 1
Verdict = Literal["faster", "slower", "no difference", ""]


class Interval(Strict):
    """A median with its 95% bootstrap interval."""

    value: float = Field(description="The median.")
    low: float = Field(description="Lower end.")
    high: float = Field(description="Upper end.")

    @classmethod
    def of(cls, i: stats.Interval) -> Interval:
        """From the statistics' own."""
        return cls(value=i.value, low=i.low, high=i.high)


class EngineInfo(Strict):
    """One engine of the run."""

    name: str = Field(description="Key, as --engine takes it.")
    words: str = Field(description="What it is.")
    version: str = Field(default="", description="Of its package.")
    missing: str = Field(default="", description="Why nothing was measured with it; empty where something was.")


class EngineTime(Strict):
    """One engine in one pass of a row."""

    name: str = Field(description="Key of the engine.")
    status: Literal["timed", "missing", "failed", "wrong"] = Field(
        description="missing: it has no such op. failed: an error. wrong: not the reference's result, so not timed."
    )
    reason: str = Field(default="", description="Why it was not timed.")
    ms: Interval | None = Field(default=None, description="GPU time a call, without launch overhead.")
    samples: list[float] = Field(default_factory=list, description="Milliseconds a call, each sample.")
    fraction: Interval | None = Field(
        default=None, description="Of the yardstick: its time over this engine's. 1 is as fast as it."
    )
    big_copy_fraction: Interval | None = Field(
        default=None, description="Bandwidth over that of a copy far larger than L2; memory-bound ops only."
    )
    method: Literal["", "graph", "events"] = Field(
        default="", description="graph: replays of a CUDA graph. events: calls between events, launches included."
    )
    note: str = Field(default="", description="What is different about this number.")
    call_us: float | None = Field(default=None, description="Microseconds the CPU takes to issue one eager call.")
    output_error: float | None = Field(default=None, description="Relative L2 of the worst output.")
    gradient_error: float | None = Field(default=None, description="Relative L2 of the first input's gradient.")


class PassTimes(Strict):
    """One direction of a row."""

    which: Literal["forward", "backward", "forward+backward", "step"] = Field(description="The direction.")
    bytes: int = Field(description="Bytes that can't be avoided; 0 for matrix-bound ops.")
    flops: int = Field(description="Of the bare GEMMs; 0 for memory-bound ops.")
    yardstick: str = Field(description="What fractions are of.")
    yardstick_ms: Interval | None = Field(default=None, description="Its time, measured in turn with the engines.")
    engines: list[EngineTime] = Field(description="In the engines' order.")
    best_peer: str = Field(default="", description="The fastest other engine.")
    speedup: Interval | None = Field(default=None, description="Its time over sparktune's.")
    verdict: Verdict = Field(default="", description="Against the best peer; no difference when the interval spans 1.")
    sentence: str = Field(default="", description="The verdict in words.")


class RowTimes(Strict):
    """One op at one model's shape."""

    op: str = Field(description="The op.")
    part: str = Field(default="", description="Which of the model's layers, where it has several of the kind.")
    model: str = Field(description="The model.")
    tokens: int = Field(description="0 where they make no difference.")
    bound: Literal["memory", "matrix"] = Field(description="What limits it.")
    dims: dict[str, int] = Field(description="The shape.")
    input_sets: int = Field(description="Sets of inputs in turn, together past L2.")
    passes: list[PassTimes] = Field(description="Its directions.")
    error: str = Field(default="", description="Why the whole row could not be measured.")
    seconds: float = Field(default=0.0, description="It took.")


class LeftOut(Strict):
    """A row that was not reached."""

    row: str = Field(description="What it would have measured.")
    reason: str = Field(description="Why it was not.")


class Canary(Strict):
    """A large copy before and after, GB/s: whether the clock held."""

    before: list[float] = Field(description="Samples.")
    after: list[float] = Field(description="Samples.")
    drift: float = Field(description="Median after over before, less 1.")
    band: float = Field(description="The drift that is accepted.")


class Document(Strict):
    """One run of `sparkproof bench ops`."""

    schema_version: Literal[1] = Field(default=1, description="Of this document.")
    kind: Literal["bench-ops"] = Field(default="bench-ops", description="Of document.")
    device: str = Field(description="The GPU.")
    multiprocessors: int = Field(description="Its SMs.")
    l2_bytes: int = Field(description="Its L2 cache.")
    software: dict[str, str] = Field(description="Package -> version.")
    engines: list[EngineInfo] = Field(description="All engines asked for.")
    canary: Canary = Field(description="The copy that tells whether speed can be judged.")
    trusted: bool = Field(description="Whether the canary held; without it no verdict stands.")
    copy_gb_s: Interval = Field(description="The large copy's bandwidth.")
    rows: list[RowTimes] = Field(description="What was measured.")
    left_out: list[LeftOut] = Field(default_factory=list, description="What was not, and why.")
    notes: list[str] = Field(default_factory=list, description="What else a reader should know.")
    seconds: float = Field(default=0.0, description="The whole run.")


def schema_text(document: type[Strict], title: str) -> str:
    """The JSON Schema of a bench's document, as all three commit theirs."""
    schema = document.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = title
    return json.dumps(schema, indent=2) + "\n"


def bench_schema() -> str:
    """The JSON Schema, as committed."""
    return schema_text(Document, f"sparkproof bench ops, version {VERSION}")
