"""The scenario schema: one YAML file, one scenario; a matrix makes it several cases.

A scenario is data only. Its `kind` chooses the model below (a discriminated union), its path under `scenarios/` is its
name, and each key of its `matrix` must be a field of that kind: expansion overrides the field with every value in turn,
so `matrix: {dtype: [fp32, bf16]}` gives `kernels/rms_norm[dtype=fp32]` and `kernels/rms_norm[dtype=bf16]`. Names depend on
the file alone, never on order or on the machine.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from sparkproof.results import Strict


class Profile(StrEnum):
    """Nested levels: a case of `smoke` also runs in `quick`, `full` and `soak`."""

    SMOKE = "smoke"
    QUICK = "quick"
    FULL = "full"
    SOAK = "soak"

    @property
    def level(self) -> int:
        """Position in the nesting, 0 for smoke."""
        return list(Profile).index(self)


DType = Literal["fp32", "fp16", "bf16"]
EngineName = Literal["hf", "liger", "unsloth", "sparktune"]


class Requires(Strict):
    """Capabilities a case needs; one that Facts lack skips the case with that reason class."""

    gpu: bool = Field(default=False, description="A CUDA GPU that torch can use.")
    min_compute_capability: float | None = Field(default=None, description="Lowest CUDA compute capability, e.g. 8.0.")
    unified_memory: bool = Field(default=False, description="CPU and GPU share one memory pool (GB10).")
    arch: list[Literal["aarch64", "x86_64"]] = Field(default_factory=list, description="CPU architectures; empty: any.")
    memory_gib: float = Field(default=0, ge=0, description="Memory that must be available before the start, in GiB.")
    gpu_memory_gib: float = Field(
        default=0, ge=0, description="GPU memory that must be free (the pool, if unified), GiB."
    )
    disk_gib: float = Field(default=0, ge=0, description="Free disk under the reports folder, in GiB.")
    network: bool = Field(default=False, description="The Hugging Face hub must be reachable.")
    container_engine: bool = Field(default=False, description="Docker or Podman must answer.")
    packages: list[str] = Field(default_factory=list, description="Python distributions that must be installed.")


class ScenarioBase(Strict):
    """What every kind has."""

    summary: str = Field(description="One sentence: what passing this proves.", min_length=10)
    profile: Profile = Field(default=Profile.SMOKE, description="The lowest profile that runs it.")
    tags: list[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]] = Field(
        default_factory=list, description="Words to select by; they become pytest marks, so letters, digits and _ only."
    )
    requires: Requires = Field(default_factory=Requires, description="Capabilities matched against Facts.")
    timeout_s: float = Field(default=300, gt=0, description="Wall-clock limit of one case, in seconds.")
    matrix: dict[str, list[Any]] = Field(
        default_factory=dict, description="Field -> values; the product makes the cases."
    )

    @property
    def timed(self) -> bool:
        """Whether the case measures speed and so must have its GPU to itself."""
        return False

    @property
    def place(self) -> dict[str, str]:
        """Where the case stands in a table of its kind, also when it was skipped; {} for kinds without one."""
        return {}


class EnvironmentScenario(ScenarioBase):
    """Checks of the machine: each named check must not report a finding of severity `error`."""

    kind: Literal["environment"]
    topic: str = Field(description="Topic of checks to run (a file of `checks/`), or 'all'.")


class KernelScenario(ScenarioBase):
    """One op of sparktune, proven against its reference."""

    kind: Literal["kernel"]
    op: str = Field(
        description="Name of the op: a file of kernels/sparktune/ops/. In a matrix, [all] stands for every op there is."
    )
    task: Literal["correctness", "mutants", "compile", "speed"] = Field(
        default="correctness",
        description="correctness: against the oracle; mutants: every planted fault must be caught; "
        "compile: ahead of time, held to the target's limits; speed: against this device's own copy bandwidth.",
    )
    dtype: DType = Field(default="fp32", description="Element type of the activations.")
    variant: str = Field(default="", description="Variant of the op, e.g. 'llama' or 'gemma' for rms_norm; empty: all.")
    arch: list[str] = Field(default_factory=lambda: ["sm_121"], description="Targets of the compile task.")
    min_copy_fraction: float = Field(
        default=0.0, ge=0, le=1, description="speed: lowest fraction of this device's measured copy bandwidth, 0 to 1."
    )
    min_matrix_fraction: float = Field(
        default=0.0, ge=0, le=1, description="speed: lowest fraction of this device's measured matrix rate, 0 to 1."
    )

    @property
    def timed(self) -> bool:
        """Only the speed task is."""
        return self.task == "speed"


class LoraSpec(Strict):
    """LoRA hyperparameters."""

    rank: int = Field(default=16, ge=1, description="Rank r.")
    alpha: float = Field(default=32, gt=0, description="Scale numerator: the update is alpha / rank * B A x.")
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Linear modules that get adapters.",
    )


class LearningGate(Strict):
    """What a training run must show. Exit code 0 is not among it."""

    first_loss: tuple[float, float] = Field(description="Band of the first step's loss, in nats a token.")
    first_grad_norm: tuple[float, float] = Field(description="Band of the first step's gradient norm.")
    min_loss_fall: float = Field(
        gt=0, description="Mean loss of the first fifth of the steps less that of the last fifth, at least, in nats."
    )
    canary_prompt: str = Field(description="Question whose answer the base model cannot know.")
    canary_answer: str = Field(description="Answer that is absent before training and generated after.")
    repeat_steps: int = Field(
        default=5,
        ge=0,
        description="Steps that a second fresh process repeats bit for bit; 0: the engine promises none.",
    )
    no_packing: dict[EngineName, str] = Field(
        default_factory=dict,
        description="Engine -> why it is not held to learning from packed rows: a fault known of it.",
    )
    parity_loss: float = Field(default=0.02, gt=0, description="Largest step-0 loss difference from hf, in nats.")
    parity_grad: float = Field(
        default=0.02, gt=0, description="Largest relative L2 difference of all LoRA gradients from hf."
    )


class TrainScenario(ScenarioBase):
    """A short QLoRA run that must learn."""

    kind: Literal["train"]
    model: str = Field(
        default="embedded:smollm2-135m",
        description="'embedded:smollm2-135m', 'tiny:<family>' (random weights, made on the spot), a folder, or a hub id.",
    )
    revision: str = Field(default="", description="Hub commit of the model; required for a hub id.")
    model_dir: str = Field(
        default="",
        description="Folder of local models that stand in for the hub's (--model-dir): the model itself, or holding "
        "owner/name or name.",
    )
    licence: str = Field(default="", description="Licence of the hub model, as its page names it.")
    gated: bool = Field(default=False, description="The hub asks for a token of an account that accepted the terms.")
    engine: EngineName = Field(default="hf", description="Which engine trains.")
    dataset: str = Field(
        default="chatterbot:english", description="'chatterbot:english', or a JSON Lines file of messages."
    )
    steps: int = Field(default=40, ge=5, description="Optimiser steps.")
    batch: int = Field(default=2, ge=1, description="Rows a step.")
    seq_len: int = Field(default=64, ge=16, description="Tokens a row, at most; longer conversations are cut.")
    learning_rate: float = Field(default=2e-3, gt=0, description="AdamW's peak learning rate.")
    seed: int = Field(default=1234, description="Seed of LoRA's A, of the data order and of dropout.")
    load_in_4bit: bool = Field(default=True, description="NF4 base with double quantisation; otherwise 16 bits.")
    lora: LoraSpec = Field(default_factory=LoraSpec)
    gate: LearningGate

    @property
    def timed(self) -> bool:
        """Always: tokens a second are measured."""
        return True

    @model_validator(mode="after")
    def _validate_revision(self) -> TrainScenario:
        is_hub_id = "/" in self.model and not self.model.startswith(("embedded:", "tiny:", "/", "./", "~"))
        if is_hub_id and not self.revision:
            raise ValueError("a hub model needs `revision`, the commit it was tested at")
        return self


Shape = Literal["", "llama31-8b", "qwen3-8b", "mistral-7b", "llama32-1b", "tiny"]


class OnOneModel(ScenarioBase):
    """What is asked of one model: a train case's, or random weights in a real model's shapes."""

    source: str = Field(
        default="", description="Name of a train case: its model and its LoRA modules are used. Or give `shape`."
    )
    shape: Shape = Field(
        default="", description="A real model's widths with random weights, written on the spot: no download."
    )
    layers: int = Field(default=0, ge=0, description="With `shape`: decoder layers, 0 for all of the model's.")
    checkpointing: bool = Field(default=True, description="Gradient checkpointing, each engine in its own way.")
    load_in_4bit: bool = Field(default=True, description="NF4 base with double quantisation; otherwise 16 bits.")
    rank: int = Field(default=16, ge=1, description="Of LoRA on every linear layer.")
    seed: int = Field(default=1234, description="Of LoRA, of the data and of random weights.")

    @property
    def timed(self) -> bool:
        """Always: nothing may run beside it."""
        return True

    @model_validator(mode="after")
    def _validate_model(self) -> OnOneModel:
        if bool(self.source) == bool(self.shape):
            raise ValueError("it needs `source`, a train case, or `shape`, and not both")
        if self.layers and not self.shape:
            raise ValueError("`layers` goes with `shape`: a train case's model has the layers that it has")
        return self


class ComparisonScenario(OnOneModel):
    """Engines side by side on one model: interleaved blocks of steps, each engine's speed and memory as ratios to hf's."""

    kind: Literal["comparison"]
    engines: list[EngineName] = Field(
        default=["hf", "liger", "unsloth", "sparktune"],
        description="Which are compared; hf is what the others are compared with. One that is not installed is named.",
    )
    dataset: str = Field(default="chatterbot:english", description="As for training; random tokens with `shape`.")
    batch: int = Field(default=2, ge=1, description="Rows a step, each filled to seq_len with conversations.")
    seq_len: int = Field(default=2048, ge=16, description="Tokens a row.")
    warm_up: int = Field(default=4, ge=1, description="Steps before the first block; the first is compared with hf's.")
    steps: int = Field(default=4, ge=1, description="Steps of a block.")
    rounds: int = Field(default=6, ge=2, description="Blocks of each engine at least, in turn with the others'.")
    more_rounds_s: float = Field(
        default=45, ge=0, description="Further rounds are run, four times as many in all at most, while this lasts."
    )

    @model_validator(mode="after")
    def _validate_engines(self) -> ComparisonScenario:
        if "hf" not in self.engines or len(set(self.engines)) < max(2, len(self.engines)):
            raise ValueError("`engines` needs hf, which the others are compared with, and another, each once")
        return self


class FitScenario(OnOneModel):
    """The largest batch that fits at each context, by prediction and then upward with measured peaks, never by running out."""

    kind: Literal["fit"]
    engine: EngineName = Field(default="sparktune", description="Which engine steps.")
    contexts: list[Annotated[int, Field(ge=16)]] = Field(
        default=[512, 2048, 8192], min_length=1, description="Tokens a row, one search each, in rising order."
    )
    limit_gib: float = Field(
        default=0, ge=0, description="Memory that a step may take; 0: what is available, less the watchdog's floor."
    )
    most_batch: int = Field(default=256, ge=1, description="No larger batch is tried.")
    most_step_s: float = Field(default=20, gt=0, description="A batch whose step would take longer is predicted only.")


ExportFormat = Literal[
    "adapter", "merged_16bit", "gguf_f32", "gguf_f16", "gguf_bf16", "gguf_q8_0", "gguf_q6_k",
    "gguf_q5_k_m", "gguf_q4_k_m", "gguf_q4_0", "gguf_mxfp4", "ollama_q8_0",
]  # fmt: skip


class ExpectedDifference(Strict):
    """One assertion that a consumer is known not to meet, and by how much."""

    families: list[str] = Field(min_length=1, description="Whose exports it holds for, as in `source`.")
    assertion: str = Field(description="The assertion's name.")
    formats: list[ExportFormat] = Field(default_factory=list, description="In which formats; empty: in all.")
    value: int | float | str | None = Field(
        default=None, description="What is seen: another value fails. Left out: any, if the evidence has `shows`."
    )
    shows: str = Field(default="", description="A text that the assertion's evidence has.")
    reason: str = Field(min_length=20, description="Why, in a sentence.")
    source: str = Field(
        default="",
        pattern="^(https://.*)?$",
        description="Where that is known from; empty: the evidence itself proves it.",
    )

    @model_validator(mode="after")
    def _validate_told_apart(self) -> ExpectedDifference:
        if self.value is None and not self.shows:
            raise ValueError(
                "a declared difference needs `value` or `shows`: without either it would pass whatever is seen"
            )
        if not self.source and not self.shows:
            raise ValueError("a declared difference needs `source`, or `shows`, evidence that proves it")
        return self


class ExportScenario(ScenarioBase):
    """What was trained goes out in a format and comes back through its real consumer."""

    kind: Literal["export"]
    source: str = Field(
        description="Name of the train case whose adapter is exported; or 'tiny:<family>', 'tiny:<family>@256' or "
        "'tiny:<family>@256+head', a tiny model that is taught one answer on the spot.",
    )
    format: ExportFormat = Field(
        description="What is written; ollama_q8_0: a folder with a GGUF in q8_0 and a Modelfile."
    )
    consumer: Literal["transformers", "peft", "llama.cpp", "vllm", "ollama"] = Field(
        description="What loads it, in a fresh process; vllm in an environment of its own, ollama in a server that is running: "
        "where none is, Go renders its template and the case is skipped.",
    )
    reference: Literal["base16+adapter", "base4+adapter"] = Field(
        default="base16+adapter",
        description="What it must agree with: merging happens into the 16-bit base, training ran over the 4-bit one.",
    )
    max_kl: float | dict[ExportFormat, float] = Field(
        default=0.0,
        description="Largest mean KL(reference || exported) over positions, in nats; one number, or one for each format. Not for "
        "ollama, which gives texts and no distributions.",
    )
    max_kl_16_bit: float | dict[ExportFormat, float] = Field(
        default=0.0,
        description="The same where the consumer itself computes in 16 bits, as vLLM does on a GPU; 0, or a format that is not "
        "named: max_kl.",
    )
    max_kl_file: float = Field(
        default=0.02,
        gt=0,
        description="Largest mean KL(transformers over a quantised GGUF's own weights || consumer), in nats: what its "
        "arithmetic may add, whatever the format loses.",
    )
    clear_margin: float | dict[ExportFormat, float] = Field(
        default=0.5,
        description="Top-1 must agree where the reference leads by this, in nats; one number, or one a format.",
    )
    expected: list[ExpectedDifference] = Field(
        default_factory=list, description="What the consumer is known not to do; everything else fails as ever."
    )
    prompts: list[str] = Field(
        default_factory=lambda: [
            "What is the capital of France?",
            "Write 3 numbers: 12, 4096 and 007.",
            "Say hello in Chinese (你好) and with an emoji 🙂.",
        ],
        description="Texts whose next-token distributions are compared.",
        min_length=1,
    )

    def kl_bound(self, sixteen_bits: bool = False) -> float:
        """The bound of this case's format, in nats; `sixteen_bits`: for a consumer that computes in them."""
        bound = self.max_kl[self.format] if isinstance(self.max_kl, dict) else self.max_kl
        if not sixteen_bits:
            return bound
        wider = self.max_kl_16_bit
        return (wider.get(self.format, 0.0) if isinstance(wider, dict) else wider) or bound

    @property
    def margin(self) -> float:
        """The lead of this case's format, in nats; 0.5 for a format that has none of its own."""
        return self.clear_margin.get(self.format, 0.5) if isinstance(self.clear_margin, dict) else self.clear_margin

    @property
    def family(self) -> str:
        """The family that the source names: 'llama' of 'tiny:llama@256', 'smollm2' of 'train/smollm2/135m...'."""
        if self.source.startswith("tiny:"):
            return self.source.removeprefix("tiny:").partition("@")[0]
        return self.source.removeprefix("train/").partition("/")[0]

    @property
    def place(self) -> dict[str, str]:
        """Family, format and consumer."""
        return {"family": self.family, "format": self.format, "consumer": self.consumer}

    @model_validator(mode="after")
    def _validate_bound(self) -> ExportScenario:
        if self.consumer == "ollama":
            if self.max_kl or self.max_kl_16_bit:
                raise ValueError("ollama gives no distributions to hold to `max_kl`: leave it out")
            return self
        if isinstance(self.max_kl, dict) and self.format not in self.max_kl:
            raise ValueError(f"`max_kl` has no bound for the format {self.format}")
        if not self.kl_bound() > 0:
            raise ValueError("an export needs `max_kl`, the largest mean KL that passes, above 0")
        if self.kl_bound(sixteen_bits=True) < self.kl_bound():
            raise ValueError("`max_kl_16_bit` is below `max_kl`: arithmetic in 16 bits is no more exact than in 32")
        return self


class RollbackScenario(ScenarioBase):
    """What an uninstall leaves behind, on a throwaway environment."""

    kind: Literal["rollback"]
    procedure: Literal["playbook", "sparkproof"] = Field(description="Which way back is tried.")
    packages: Literal["stand-in", "real"] = Field(
        default="stand-in",
        description="stand-in: empty wheels with the recorded dependency graph, offline; real: from the package index.",
    )
    expect: Literal["leftovers", "clean"] = Field(description="What the diff against the snapshot must show.")


Scenario = Annotated[
    EnvironmentScenario
    | KernelScenario
    | TrainScenario
    | ComparisonScenario
    | FitScenario
    | ExportScenario
    | RollbackScenario,
    Field(discriminator="kind"),
]
SCENARIO_ADAPTER: TypeAdapter[Scenario] = TypeAdapter(Scenario)
KINDS: dict[str, type[ScenarioBase]] = {
    "environment": EnvironmentScenario,
    "kernel": KernelScenario,
    "train": TrainScenario,
    "comparison": ComparisonScenario,
    "fit": FitScenario,
    "export": ExportScenario,
    "rollback": RollbackScenario,
}


class Case(Strict):
    """One expanded scenario: what a runner gets."""

    name: str = Field(description="Stable and unique: path under scenarios/ without .yaml, then [field=value,...].")
    file: str = Field(description="Path of the YAML file.")
    scenario: Scenario

    @property
    def kind(self) -> str:
        """The scenario's kind."""
        return self.scenario.kind

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in self.name).strip("-")
