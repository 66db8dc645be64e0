"""What torch is and whether it can really compute on the GPU, asked in a process of its own.

A wedged CUDA context hangs the process that touches it and a live one holds memory, so this process never imports
torch: the child writes one JSON object a line as it gets further, and what it wrote before a timeout still counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from sparkproof.facts.host import Host
from sparkproof.facts.model import Gpu, Torch

TIMEOUT_S = 40.0


@dataclass
class TorchAnswer:
    """Torch's facts, the GPUs it sees, and cudaMemGetInfo."""

    torch: Torch = field(default_factory=Torch)
    gpus: list[Gpu] = field(default_factory=list)
    cuda_free_gib: float | None = None
    cuda_total_gib: float | None = None
    loaded: list[str] = field(default_factory=list)


def read_torch(host: Host, timeout_s: float = TIMEOUT_S) -> TorchAnswer:
    """Run the child and put together whatever it managed to say."""
    ran = host.run_python("sparkproof.facts.torch_child", timeout_s)
    said = merge(ran.out)
    answer = TorchAnswer(
        torch=Torch(**said.get("torch", {})),
        gpus=[Gpu(**g) for g in said.get("gpus", [])],
        cuda_free_gib=said.get("cuda_free_gib"),
        cuda_total_gib=said.get("cuda_total_gib"),
        loaded=said.get("loaded", []),
    )
    if ran.error and not said.get("done"):
        stage = said.get("stage", "it was started")
        answer.torch.error = f"torch stopped while {stage}: {ran.error}"
    return answer


def merge(lines: str) -> dict[str, Any]:
    """Later lines complete earlier ones; a line torn by a kill is dropped, and so is anything a library printed."""
    said: dict[str, Any] = {}
    for line in lines.splitlines():
        try:
            update = json.loads(line)
        except ValueError:
            continue
        if isinstance(update, dict):
            torch = {**said.get("torch", {}), **update.get("torch", {})}
            said |= {**update, "torch": torch}
    return said
