"""Asks the CUDA driver itself for device properties and prints one JSON document: `python -m
sparkproof.facts.driver_child`.

No torch, no context, no memory: what a GPU is can be told even where torch is a CPU build or too old to have the
property. It runs in a process of its own since a wedged driver hangs in cuInit.
"""

from __future__ import annotations

import ctypes
import json
import uuid
from typing import Any

GIB = 2.0**30
# CUdevice_attribute of cuda.h
ATTRIBUTES = {
    "sm_count": 16,
    "integrated": 18,
    "major": 75,
    "minor": 76,
    "shared_memory_per_block_optin": 97,
}


def main() -> None:
    """Print {"gpus": [...], "error": text or null}."""
    document: dict[str, Any] = {"gpus": [], "error": None}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        code = driver.cuInit(0)
        count = ctypes.c_int()
        if code == 0:
            code = driver.cuDeviceGetCount(ctypes.byref(count))
        document["error"] = f"CUDA error {code}" if code else None
        document["gpus"] = [describe(driver, index) for index in range(count.value)]
    except (OSError, AttributeError) as e:
        document["error"] = str(e)
    print(json.dumps(document))


def describe(driver: ctypes.CDLL, index: int) -> dict[str, Any]:
    """One device under the names of `model.Gpu`; what the driver does not answer is None."""
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    total = ctypes.c_size_t()
    known = driver.cuDeviceTotalMem_v2(ctypes.byref(total), device) == 0
    identity = (ctypes.c_ubyte * 16)()
    has_identity = driver.cuDeviceGetUuid(ctypes.byref(identity), device) == 0
    values = {key: attribute(driver, which, device) for key, which in ATTRIBUTES.items()}
    major, minor = values.pop("major"), values.pop("minor")
    integrated = values.pop("integrated")
    return {
        "name": name.value.decode(errors="replace"),
        "uuid": f"GPU-{uuid.UUID(bytes=bytes(identity))}" if has_identity else None,
        "compute_capability": None if major is None else f"{major}.{minor}",
        "integrated": None if integrated is None else bool(integrated),
        "memory_total_gib": round(total.value / GIB, 2) if known else None,
        **values,
    }


def attribute(driver: ctypes.CDLL, which: int, device: ctypes.c_int) -> int | None:
    """cuDeviceGetAttribute."""
    value = ctypes.c_int()
    return value.value if driver.cuDeviceGetAttribute(ctypes.byref(value), which, device) == 0 else None


if __name__ == "__main__":
    main()
