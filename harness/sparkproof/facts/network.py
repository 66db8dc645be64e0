"""Reach of the Hugging Face hub, and the variables that steer downloads and kernels."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from sparkproof.facts.host import Host
from sparkproof.facts.model import Network

TIMEOUT_S = 4.0
TRUE = {"1", "ON", "YES", "TRUE"}
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Names whose values explain behaviour and hold no secret. Tokens, proxies and addresses with credentials stay out.
KEPT = (
    "BNB_CUDA_VERSION",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_DISABLE_XET",
    "HF_HUB_ENABLE_HF_TRANSFER",
    "HF_HUB_OFFLINE",
    "HF_XET_HIGH_PERFORMANCE",
    "LD_LIBRARY_PATH",
    "MAX_JOBS",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PIP_CONSTRAINT",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_CUDA_ARCH_LIST",
    "TRANSFORMERS_OFFLINE",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "TRITON_PTXAS_BLACKWELL_PATH",
    "TRITON_PTXAS_PATH",
    "UNSLOTH_DISABLE_DOUBLE_BUFFER",
    "UNSLOTH_DISABLE_UMA_CLONE_LOAD",
    "UNSLOTH_ENABLE_FLEX_ATTENTION",
)


def read_environment(host: Host) -> dict[str, str]:
    """The kept variables that are set."""
    return {name: host.environ[name] for name in KEPT if name in host.environ}


def token_present(host: Host) -> bool:
    """Whether a hub token is set or stored; the value is not read."""
    if any(host.environ.get(name) for name in TOKENS):
        return True
    home = host.environ.get("HF_HOME") or str(Path(host.environ.get("HOME", "/root")) / ".cache" / "huggingface")
    stored = host.environ.get("HF_TOKEN_PATH") or f"{home}/token"
    return host.exists(stored)


def read_network(host: Host, timeout_s: float = TIMEOUT_S) -> Network:
    """One HEAD request. Name resolution has no timeout of its own, so it runs in a thread that may be left behind."""
    if host.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE:
        return Network(hub_reachable=False, error="HF_HUB_OFFLINE is set, so the hub is not asked")
    endpoint = host.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return Network(hub_reachable=False, error="HF_ENDPOINT is not an http or https address")
    answer = Network(hub_reachable=False, error=f"{parts.hostname} did not answer within {timeout_s:g} s")
    done: list[Network] = []
    thread = threading.Thread(target=lambda: done.append(_ask(endpoint, parts.hostname or "", timeout_s)), daemon=True)
    thread.start()
    thread.join(timeout_s + 0.5)
    return done[0] if done else answer


def _ask(endpoint: str, name: str, timeout_s: float) -> Network:
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout_s):
            return Network(hub_reachable=True)
    except urllib.error.HTTPError as e:
        # The hub itself asks for a login (401) or for patience (429); anything else came from something in between.
        if e.code in (401, 429):
            return Network(hub_reachable=True)
        return Network(hub_reachable=False, error=f"{name} answered {e.code} {e.reason}")
    except Exception as e:
        return Network(hub_reachable=False, error=f"{name}: {getattr(e, 'reason', None) or e}")
