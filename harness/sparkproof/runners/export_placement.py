"""Where llama.cpp says that it put a model: its own log, read line by line.

The lines are those of `load_tensors`, `llama_kv_cache` and `sched_reserve` (before, `llama_context`) in llama.cpp's src/:

    load_tensors: offloaded 33/33 layers to GPU
    load_tensors:        CUDA0 model buffer size =  4168.09 MiB
    llama_kv_cache:      CUDA0 KV buffer size =   128.00 MiB
    sched_reserve:       CUDA0 compute buffer size =   258.50 MiB

A name such as CUDA0 is a device's; CUDA_Host is the host's memory, pinned for the GPU's sake. So a buffer is a GPU's when its
name begins with that of a GPU which the library lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BUFFER = re.compile(r"(\S+)\s+(model|LoRA|KV|RS|compute) buffer size =\s+([\d.]+) MiB")
OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
USED = re.compile(r"using device \S+ \(.*\)")
LORA = re.compile(r"loaded (\d+) tensors from lora file")
KEPT = (BUFFER, OFFLOADED, USED, LORA)
KINDS = {"model": "weights", "LoRA": "weights", "KV": "cache", "RS": "cache", "compute": "compute"}
NOT_GPU = ("CPU", "ACCEL")


@dataclass(frozen=True)
class Placement:
    """Buffers as MiB by name, devices by name with what they are, and the lines that say so."""

    devices: Mapping[str, str]  # all that the build has: name -> description
    gpus: frozenset[str]  # those that are GPUs
    weights: Mapping[str, float]  # an adapter's among them
    cache: Mapping[str, float]  # of keys and values, and recurrent states
    compute: Mapping[str, float]  # what a step's graph is computed in
    offloaded: int | None  # layers on GPUs, the output counted as one; None: it said nothing
    layers: int | None
    lora_tensors: int  # of adapters over the model
    lines: Sequence[str]

    def is_gpu(self, buffer: str) -> bool:
        """Whether a buffer lies on a GPU that the library lists."""
        return any(re.fullmatch(rf"{re.escape(name)}(_\w+)?", buffer) for name in self.gpus)

    def gpu_mib(self) -> float:
        """All that it put on GPUs."""
        return sum(
            mib for found in (self.weights, self.cache, self.compute) for b, mib in found.items() if self.is_gpu(b)
        )


def read(log: Sequence[str], devices: Sequence[Mapping[str, object]]) -> Placement:
    """From what llama.cpp told while it loaded, and xllamacpp's `get_device_info()`."""
    sizes: dict[str, dict[str, float]] = {"weights": {}, "cache": {}, "compute": {}}
    offloaded = layers = None
    lora = 0
    for line in log:
        if found := BUFFER.search(line):
            of = sizes[KINDS[found[2]]]
            of[found[1]] = of.get(found[1], 0.0) + float(found[3])
        elif found := OFFLOADED.search(line):
            offloaded, layers = int(found[1]), int(found[2])
        elif found := LORA.search(line):
            lora += int(found[1])
    kind = {str(d["name"]): str(getattr(d["type"], "name", d["type"])) for d in devices}
    return Placement(
        devices={str(d["name"]): str(d.get("description", "")) for d in devices},
        gpus=frozenset(n for n, k in kind.items() if not k.endswith(NOT_GPU)),
        weights=sizes["weights"], cache=sizes["cache"], compute=sizes["compute"], offloaded=offloaded, layers=layers,
        lora_tensors=lora,
        lines=[_plain(line) for line in log if any(p.search(line) for p in KEPT)],
    )  # fmt: skip


def _plain(line: str) -> str:
    """Without the time and level before it, one space between words."""
    return " ".join(re.sub(r"^[\d.]+ [A-Z] ", "", line).split())
