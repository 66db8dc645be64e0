"""Makes the recorded facts in this folder: `python tests/facts/make.py`.

None of the GB10 files was read on a GB10: each is constructed from outputs that were published in the threads it
names, on top of one healthy machine. Every broken file differs from a healthy one by what is written in the modules
beside this one, and by nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from broken_machine import MACHINE
from broken_software import SOFTWARE
from healthy import GB10, LAPTOP, RTX4090
from sparkproof.facts.model import Facts

HERE = Path(__file__).parent
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "n1x_healthy": (
        "gb10_healthy",
        "unsloth PR#11208 (RTX Spark N1X is compute capability 12.1 too, 45.4 GiB pool)",
        {
            "os.product": None,
            "os.dgx_release": None,
            "gpus.0.name": "NVIDIA RTX Spark N1X",
            "gpus.0.sm_count": 40,
            "gpus.0.memory_total_gib": 45.4,
            "memory.total_gib": 45.4,
            "memory.available_gib": 39.8,
            "memory.free_gib": 34.0,
            "memory.cuda_free_gib": 33.6,
            "memory.cuda_total_gib": 45.4,
        },
    ),
    "x86_rtx4090": ("gb10_healthy", "", RTX4090),
    "x86_laptop": ("gb10_healthy", "", LAPTOP),
    "x86_t4": (
        "x86_rtx4090",
        "CUDA programming guide, table of technical specifications (compute capability 7.5: 64 KiB a block)",
        {
            "gpus.0.name": "Tesla T4",
            "gpus.0.compute_capability": "7.5",
            "gpus.0.sm_count": 40,
            "gpus.0.shared_memory_per_block_optin": 65536,
            "gpus.0.memory_total_gib": 14.57,
            "memory.cuda_total_gib": 14.57,
            "memory.cuda_free_gib": 14.0,
        },
    ),
    "x86_slow_card": (
        "x86_rtx4090",
        "NVML's clock and the timings of a card that its power limit holds down",
        {"tried.canaries.load_clock_mhz": 900, "tried.canaries.load_power_w": 150.0, "tried.canaries.gemv_gb_s": 400.0},
    ),
    "x86_avx512_bf16": (
        "x86_laptop",
        "a server CPU with AVX512-BF16, without a GPU",
        {"cpu": {"model": "Intel(R) Xeon(R) Platinum 8481C", "cores": 8, "avx512_bf16": True}},
    ),
}
FILES = MACHINE | SOFTWARE | OTHERS


def document(name: str) -> dict[str, Any]:
    """The facts of one file, as data."""
    if name == "gb10_healthy":
        return Facts.model_validate(GB10).model_dump(mode="json")
    base, published, changes = FILES[name]
    data = document(base)
    for key, value in changes.items():
        place, *rest = key.split(".")
        target: Any = data
        for part in rest:
            target, place = target[int(place) if isinstance(target, list) else place], part
        target[int(place) if isinstance(target, list) else place] = value
    if published:
        data["origin"] = f"constructed from published outputs: {published}; on the base of {base}"
    return Facts.model_validate(data).model_dump(mode="json")


def text(name: str) -> str:
    """What the file must hold."""
    return Facts.model_validate(document(name)).model_dump_json(indent=2, exclude_defaults=False) + "\n"


NAMES = ["gb10_healthy", *FILES]

if __name__ == "__main__":
    for file_name in NAMES:
        (HERE / f"{file_name}.json").write_text(text(file_name), encoding="utf-8")
