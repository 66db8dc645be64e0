"""What `sparkproof bench export` writes: a versioned JSON document. Its schema is reports/schema/bench-export-1.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparkproof.bench.document import Interval, schema_text
from sparkproof.bench.train.document import Canary
from sparkproof.results import Strict

VERSION = 1
Device = Literal["cuda", "cpu"]
Backend = Literal["gpu", "cpu", "mixed", "unproven"]
Status = Literal["measured", "written", "missing", "wrong backend", "failed", "not reached"]


class Proof(Strict):
    """Which backend ran a model, by what its consumer itself says of it."""

    backend: Backend = Field(
        description="gpu: all of it that counts. mixed: in part. unproven: the consumer said too little to tell."
    )
    devices: list[str] = Field(default_factory=list, description="All that the consumer's build or torch can use here.")
    weights_mib: dict[str, float] = Field(
        default_factory=dict,
        description="llama.cpp: buffer -> MiB of weights in it. torch: device -> MiB of parameters.",
    )
    cache_mib: dict[str, float] = Field(
        default_factory=dict, description="llama.cpp: buffer -> MiB of keys and values."
    )
    compute_mib: dict[str, float] = Field(default_factory=dict, description="llama.cpp: buffer -> MiB for computation.")
    layers_offloaded: int | None = Field(
        default=None, description="llama.cpp: on GPUs, by its log; null: it said nothing."
    )
    layers: int | None = Field(default=None, description="llama.cpp: of so many, the output counted as one.")
    gpu_kernels: int | None = Field(default=None, description="torch: kernels that one forward launched on a GPU.")
    kernels: list[str] = Field(default_factory=list, description="torch: products and attention of that forward.")
    modules: dict[str, int] = Field(
        default_factory=dict, description="torch: class of 4-bit and LoRA layers -> how many there are."
    )
    lines: list[str] = Field(default_factory=list, description="llama.cpp: its log's own lines about this.")


class Write(Strict):
    """One export, in a process of its own."""

    number: int = Field(description="The round, from 1.")
    seconds: float = Field(description="From the call to bytes on the disk, libraries loaded before.")
    process_s: float = Field(description="The whole process, with its imports.")
    peak_gib: float | None = Field(description="Resident memory above the start, mapped files counted; null: not told.")
    gpu_gib: float | None = Field(description="Peak allocated on the GPU; null on a CPU.")


class Read(Strict):
    """One consumer with the export in it, in a process of its own."""

    number: int = Field(description="The round, from 1.")
    load_s: float = Field(description="Until it can answer, libraries loaded before, the file just written.")
    prefill_tokens_s: list[float] = Field(description="Prompt tokens a second, each repeat.")
    decode_tokens_s: list[float] = Field(description="Tokens a second after the first, each repeat.")
    peak_gib: float | None = Field(description="Resident memory above the start, mapped files counted; null: not told.")
    gpu_gib: float | None = Field(description="On the GPU: torch's peak, or llama.cpp's buffers; null on a CPU.")
    proof: Proof = Field(description="What it ran on.")
    copy_gb_s: float | None = Field(default=None, description="A large copy on the GPU afterwards.")
    versions: dict[str, str] = Field(description="Package -> version.")


class Row(Strict):
    """One format."""

    format: str = Field(description="Key, as --formats takes it.")
    consumer: str = Field(description="What reads it.")
    status: Status = Field(
        description="written: its reading can't be measured here. missing: this model has no such format. wrong backend: the "
        "consumer ran elsewhere than expected, or nothing proves where; no speed of it is kept. not reached: no time was left."
    )
    reason: str = Field(default="", description="Why not all of it was measured.")
    fix: str = Field(default="", description="What to do about it.")
    failure_row: int = Field(default=0, description="Row of docs/failures.md that this is; 0: none.")
    bytes: int | None = Field(default=None, description="Of the exported file, or of all files of the folder.")
    types: dict[str, int] = Field(default_factory=dict, description="GGUF: type -> tensors that have it.")
    fallbacks: int = Field(default=0, description="GGUF: tensors whose shape did not allow the format's type.")
    write_s: Interval | None = Field(default=None, description="Median of the rounds.")
    write_peak_gib: float | None = Field(default=None, description="The largest of the rounds.")
    load_s: Interval | None = Field(default=None, description="Median of the rounds.")
    read_peak_gib: float | None = Field(default=None, description="The largest of the rounds; the GPU's is beside it.")
    read_gpu_gib: float | None = Field(default=None, description="The largest of the rounds; null on a CPU.")
    prefill_tokens_s: Interval | None = Field(default=None, description="Median of the rounds' medians.")
    decode_tokens_s: Interval | None = Field(default=None, description="Median of the rounds' medians.")
    proof: Proof | None = Field(default=None, description="Of the last round; that which was refused, if one was.")
    writes: list[Write] = Field(default_factory=list, description="Each round's.")
    reads: list[Read] = Field(default_factory=list, description="Each round's.")
    failed_round: int = Field(default=0, description="In which it failed; 0: none.")
    log: str = Field(default="", description="The end of what a process that failed printed.")


class Model(Strict):
    """What was exported."""

    name: str = Field(description="As --model names it.")
    revision: str = Field(description="Hub commit, or a digest of what it was made from.")
    parameters: int = Field(description="Of the base.")
    bytes: int = Field(description="Of the base's weights.")
    window: int | None = Field(default=None, description="Tokens that it was made for, by its configuration.")
    adapter: str = Field(description="The adapter: the folder that was given, or how it was made.")
    adapter_parameters: int = Field(description="Of the adapter.")


class Document(Strict):
    """One run of `sparkproof bench export`."""

    schema_version: Literal[1] = Field(default=1, description="Of this document.")
    kind: Literal["bench-export"] = Field(default="bench-export", description="Of document.")
    device: str = Field(description="The GPU, or the processor where consumers were to run on it.")
    device_type: Device = Field(description="Where consumers were to run: every row's proof is held to it.")
    gpu_present: bool = Field(description="Whether this machine has an NVIDIA GPU, usable or not.")
    threads: int = Field(description="Of the CPU, for every process.")
    model: Model | None = Field(description="Null: the run ended before it was there.")
    prompt_tokens: int = Field(description="Random tokens of each prompt.")
    new_tokens: int = Field(description="Greedy tokens after it.")
    repeats: int = Field(description="Timed prompts a process, after one that is not timed.")
    rounds: int = Field(description="Asked for.")
    software: dict[str, str] = Field(description="Package -> version.")
    rows: list[Row] = Field(description="In the formats' order.")
    canary: Canary | None = Field(default=None, description="Copies on the GPU; null where none could be measured.")
    trusted: bool = Field(description="Whether the canary held; always on a CPU, where there is none.")
    partial: str = Field(default="", description="Why not all that was asked for was measured; empty: it was.")
    interrupted: bool = Field(default=False, description="Whether a person ended it.")
    notes: list[str] = Field(default_factory=list, description="What else a reader should know.")
    seconds: float = Field(default=0.0, description="The whole run.")


def export_schema() -> str:
    """The JSON Schema, as committed."""
    return schema_text(Document, f"sparkproof bench export, version {VERSION}")
