"""Where fine-tuning libraries keep what they download and compile, by the variables that move each of them.

Sources: the libraries' documentation of HF_HOME, TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR, TORCH_EXTENSIONS_DIR,
PIP_CACHE_DIR, UV_CACHE_DIR, CUDA_CACHE_PATH, VLLM_CACHE_ROOT, FLASHINFER_WORKSPACE_BASE; unsloth_zoo's
`UNSLOTH_COMPILE_LOCATION`, by default `unsloth_compiled_cache` in the current folder or the temporary one.
"""

# ruff: noqa: PTH111, PTH118
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from pathlib import Path

from sparkproof.rollback import tree
from sparkproof.rollback.model import Cache

OWN = "sparkproof"


def roots(env: Mapping[str, str], home: str, cwd: str) -> dict[str, str]:
    """Folder -> name of the library, in a fixed order; a folder inside another one listed is left to that one."""
    cache = env.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    tmp = env.get("TMPDIR") or "/tmp"
    hf = env.get("HF_HOME") or os.path.join(cache, "huggingface")
    named = [
        (hf, "huggingface"),
        (env.get("HF_HUB_CACHE", ""), "huggingface"),
        (env.get("HF_DATASETS_CACHE", ""), "huggingface"),
        (env.get("HF_XET_CACHE", ""), "huggingface"),
        (env.get("TRITON_CACHE_DIR") or os.path.join(env.get("TRITON_HOME") or home, ".triton"), "triton"),
        (env.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tmp, f"torchinductor_{_user(env)}"), "inductor"),
        (env.get("TORCH_EXTENSIONS_DIR") or os.path.join(cache, "torch_extensions"), "torch_extensions"),
        (env.get("TORCH_HOME") or os.path.join(cache, "torch"), "torch"),
        (env.get("PIP_CACHE_DIR") or os.path.join(cache, "pip"), "pip"),
        (env.get("UV_CACHE_DIR") or os.path.join(cache, "uv"), "uv"),
        (env.get("CUDA_CACHE_PATH") or os.path.join(home, ".nv", "ComputeCache"), "cuda"),
        (env.get("VLLM_CACHE_ROOT") or os.path.join(cache, "vllm"), "vllm"),
        (os.path.join(env.get("FLASHINFER_WORKSPACE_BASE") or home, ".cache", "flashinfer"), "flashinfer"),
        (os.path.join(cwd, env.get("UNSLOTH_COMPILE_LOCATION") or "unsloth_compiled_cache"), "unsloth"),
        (os.path.join(tmp, "unsloth_compiled_cache"), "unsloth"),
        (os.path.join(home, ".unsloth"), "unsloth"),
        (env.get("SPARKPROOF_CACHE") or os.path.join(cache, "sparkproof"), OWN),
    ]
    found: dict[str, str] = {}
    for path, name in named:
        path = os.path.normpath(os.path.join(cwd, os.path.expanduser(path))) if path else ""
        if path and path not in (os.path.normpath(home), "/", cache, tmp, os.path.normpath(cwd)):
            found.setdefault(path, name)
    return {p: n for p, n in found.items() if not any(str(q) in found for q in Path(p).parents)}


def _user(env: Mapping[str, str]) -> str:
    try:
        return env.get("LOGNAME") or env.get("USER") or getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def read(root: str, name: str, deadline: float = float("inf")) -> Cache:
    """List one cache. Never raises."""
    cache = Cache(name=name, root=root, real=os.path.realpath(root), own=name == OWN)
    try:
        os.lstat(root)
    except FileNotFoundError:
        cache.above = next((str(p) for p in Path(cache.real).parents if p.is_dir()), "/")
        return cache
    except OSError as e:
        cache.present, cache.not_read = True, f"{root}: {e.strerror}"
        return cache
    cache.present = True
    listing = tree.scan(cache.real, deadline)
    cache.bytes, cache.files, cache.digest = listing.bytes, listing.files, listing.digest
    cache.listing, cache.not_read = listing.stamps, listing.why
    return cache
