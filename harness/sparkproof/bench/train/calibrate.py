"""Speed of light: what the products and the attention that no implementation can skip take on this GPU, measured.

The sum is a floor, not a goal: it holds no norm, activation, optimiser or LoRA product, no time to unpack 4 bits, and the
short loops it is measured in may run at a higher clock than a whole step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from sparkproof.bench.train.setting import Setting
from sparkproof.bench.train.step import labelled_tokens
from sparkproof.measure.gpu_time import gpu_ms

CALLS = 20
HOLD_CYCLES = 1_000_000  # about 0.5 ms
HEAD_ROWS = 4096  # logits of more tokens at once need not fit


def floor(s: Setting) -> dict[str, Any]:
    """{"floor_ms", "parts": what -> milliseconds a step, "attention": backend -> milliseconds a layer, or why not}."""
    parts = products(s)
    ways, best = attention(s)
    parts["attention"] = best * s.layers
    return {"floor_ms": sum(parts.values()), "parts": parts, "attention": ways}


def time_ms(run: Callable[[], Any], calls: int = CALLS) -> float:
    """Median milliseconds of a call between two CUDA events."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return statistics.median(gpu_ms(torch, run, HOLD_CYCLES) for _ in range(calls))


def products(s: Setting) -> dict[str, float]:
    """Part -> milliseconds a step in bare bf16 products: each forward and for its input's gradient, weights being frozen.

    Several projections of one input count as one product where that is faster. The first layer's input needs no gradient:
    embeddings are frozen. The head counts tokens that have a loss.
    """
    shape, m = s.shape, s.tokens
    sizes = shape.linears
    q, k, o = (sizes[f"self_attn.{n}_proj"] for n in "qko")
    gate, down = sizes["mlp.gate_proj"], sizes["mlp.down_proj"]
    both = {n: product(m, *n) for n in {q, k, o, gate, down}}
    qkv, gate_up = product(m, q[0] + 2 * k[0], q[1]), product(m, 2 * gate[0], gate[1])
    forward = min(both[q][0] + 2 * both[k][0], qkv[0])
    backward = min(both[q][1] + 2 * both[k][1], qkv[1])
    labelled = labelled_tokens(s)
    rows = min(labelled, HEAD_ROWS)
    head = product(rows, shape.vocab, shape.hidden)
    return {
        "qkv": s.layers * forward + (s.layers - 1) * backward,
        "o": s.layers * sum(both[o]),
        "gate and up": s.layers * sum(min(2 * one, two) for one, two in zip(both[gate], gate_up, strict=True)),
        "down": s.layers * sum(both[down]),
        "head": sum(head) * labelled / rows,
    }


def product(m: int, n: int, k: int) -> tuple[float, float]:
    """Milliseconds of y = x W^T and of dx = dy W, x [m, k], W [n, k]."""
    x, w, dy = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((m, k), (n, k), (m, n)))
    return time_ms(lambda: x @ w.t()), time_ms(lambda: dy @ w)


def attention(s: Setting) -> tuple[dict[str, Any], float]:
    """(backend -> forward and backward milliseconds a layer, or why not; the fastest sum). Errors: RuntimeError, none ran."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    documents = s.documents()
    rows, columns = len(documents), min(documents)
    # The last document of a packed row may be longer than the others.
    scale = sum(d * d for d in documents) / (rows * columns**2)
    ways: dict[str, Any] = {}
    sums = []
    for name, backend in backends.items():
        try:
            with sdpa_kernel([backend]):
                forward, backward = _attention(s, rows, columns)
            ways[name] = {"forward_ms": scale * forward, "backward_ms": scale * backward}
            sums.append(scale * (forward + backward))
        except Exception as e:
            ways[name] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:160]}"
    if not sums:
        raise RuntimeError(f"no attention backend runs here: {ways}")
    return ways, min(sums)


def _attention(s: Setting, rows: int, columns: int) -> tuple[float, float]:
    shape = s.shape
    q, k, v = (
        torch.randn(rows, h, columns, shape.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (shape.heads, shape.kv_heads, shape.kv_heads)
    )

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        alone = time_ms(forward)
    dy = torch.randn_like(forward())
    whole = time_ms(lambda: torch.autograd.grad(forward(), (q, k, v), dy))
    return alone, whole - alone
