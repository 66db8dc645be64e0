"""The Hugging Face cache on this disk: which models are ready, and is what lies there whole? Nothing is downloaded.

A safetensors file says itself how long it is: 8 bytes of header length, the header (JSON), and data up to the largest
`data_offsets` end. One that is shorter was cut off.
"""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from typing import Any

from sparkproof.facts.host import Host
from sparkproof.facts.installed import CachedModel, HubCache

MOST_MODELS = 200
LONGEST_HEADER = 100_000_000  # the format's own bound
STALE_S = 600  # a download that goes on touches its file
TOKEN_TIMEOUT_S = 6
TYPE_NAME = re.compile(r"\(\s*\"([\w.-]+)\",\s*\"")


def cache_path(host: Host) -> Path:
    """Where huggingface_hub keeps downloads: HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub."""
    env = host.environ
    if env.get("HF_HUB_CACHE"):
        return Path(env["HF_HUB_CACHE"]).expanduser()
    home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or env.get('HOME', '/root') + '/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"


def read_hub_cache(host: Host, transformers: Path | None) -> HubCache:
    """Models and compiled kernels in the cache; `transformers` is the folder of the installed package, if any."""
    root = cache_path(host)
    found = HubCache(path=str(root))
    if not root.is_dir():
        return found
    known = known_types(transformers)
    for folder in sorted(root.glob("*--*"))[:MOST_MODELS]:
        kind, _, name = folder.name.partition("--")
        if kind not in ("models", "kernels"):
            continue
        repository = name.replace("--", "/")
        if any(time.time() - p.stat().st_mtime > STALE_S for p in folder.glob("blobs/*.incomplete")):
            found.incomplete.append(repository)
        for snapshot in sorted(folder.glob("snapshots/*")):
            builds = sorted(p.name for p in snapshot.glob("build/*") if p.is_dir())
            if builds:
                found.kernels[repository] = sorted({*found.kernels.get(repository, []), *builds})
            elif (snapshot / "config.json").exists():
                found.models.append(read_model(repository, snapshot, known))
    return found


def read_model(repository: str, snapshot: Path, known: frozenset[str] | None) -> CachedModel:
    """One snapshot: its configuration, and whether its weights are whole."""
    model = CachedModel(repository=repository)
    config = _json(snapshot / "config.json")
    model.model_type = config.get("model_type") if isinstance(config.get("model_type"), str) else None
    if known is not None and model.model_type is not None:
        model.known = model.model_type in known or "auto_map" in config
    for scaling in (config.get("rope_scaling"), config.get("rope_parameters")):
        factor = scaling.get("attention_factor") if isinstance(scaling, dict) else None
        if isinstance(factor, int | float):
            model.attention_factor = float(factor)
    files = sorted(snapshot.glob("*.safetensors"))
    model.truncated = [p.name for p in files if not whole(p)]
    index = _json(snapshot / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict) and files:
        there = {p.name for p in files}
        model.truncated += [f"{name} (missing)" for name in sorted(set(index.values()) - there)]
    return model


def whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(LONGEST_HEADER, size):
                return False
            header = json.loads(f.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        return bool(size >= 8 + length + max(ends, default=0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return False


def known_types(transformers: Path | None) -> frozenset[str] | None:
    """The model types that the installed transformers has, from its tables' text; None if they cannot be read."""
    if transformers is None:
        return None
    names: set[str] = set()
    for file in ("auto_mappings.py", "configuration_auto.py"):
        path = transformers / "models" / "auto" / file
        if path.exists():
            names |= set(TYPE_NAME.findall(path.read_text(encoding="utf-8", errors="replace")))
    return frozenset(names) or None


def token_accepted(host: Host) -> bool | None:
    """Whether the hub knows the token, by `hf auth whoami`, which reads it itself; only its exit code is kept.

    None: there is no such command, or the hub was not reached.
    """
    hf = host.which("hf")
    if hf is None:
        return None
    ran = host.run([hf, "auth", "whoami"], TOKEN_TIMEOUT_S)
    said = (ran.out + ran.err).lower()
    if ran.code == 0 and "not logged in" not in said:
        return True
    return False if "invalid" in said or "401" in said or "not logged in" in said else None


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
