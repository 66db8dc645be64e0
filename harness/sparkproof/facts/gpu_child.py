"""Short trials on the GPU: `python -m sparkproof.facts.gpu_child kernels|flex` prints JSON lines.

Nothing is assumed of the device but what it says of itself: sizes follow its shared memory, results are held against
float64 on the CPU, and no tensor is larger than a MiB.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

from sparkproof.facts.child import reason, relative, say

HEAD_SIZES = (64, 128, 256)
LENGTH = 128
DEPTH = 1024  # of the product that fills a block's shared memory; every pipeline that is tried is shorter


def shared_memory(torch: Any) -> dict[str, Any]:
    """The deepest pipeline of a tiled product that fits into a block's shared memory, and the first that does not."""
    limit = getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", None)
    if limit is None:
        return {"limit": 0, "error": "this torch does not tell how much shared memory a block may use"}
    from sparkproof.facts.pipeline_kernel import BLOCK, BUFFER_BYTES, launch, shared_bytes

    found: dict[str, Any] = {"limit": limit}
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=generator).bfloat16().cuda() for n in ((BLOCK, DEPTH), (DEPTH, BLOCK)))
    want = a.double().cpu() @ b.double().cpu()

    def right(stages: int) -> bool:
        return relative(launch(a, b, stages), want) < 0.02

    sizes = {}
    for stages in range(max(1, limit // BUFFER_BYTES - 1), limit // BUFFER_BYTES + 4):
        sizes[stages] = shared_bytes(a, b, stages)
        if sizes[stages] > limit:
            break
    fits = max((s for s in sizes if sizes[s] <= limit), default=None)
    over = next((s for s in sizes if sizes[s] > limit), None)
    if fits is None or over is None:
        return found | {"error": f"no pair of pipelines was found around the limit: {sorted(sizes.values())}"}
    found |= {"fits_bytes": sizes[fits], "over_bytes": sizes[over]}
    try:
        found["fits_ran"] = right(fits)
    except Exception as e:
        found |= {"fits_ran": False, "error": reason(e)}
    try:
        launch(a, b, over)
        torch.cuda.synchronize()
    except Exception as e:
        found["over_raised"] = reason(e)
    try:
        found["alive_after"] = right(1)
    except Exception as e:
        found |= {"alive_after": False, "error": reason(e)}
    return found


def attention(torch: Any) -> list[dict[str, Any]]:
    """Every backend of scaled_dot_product_attention, by dtype, head size and direction, against float64 on the CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    rows: list[dict[str, Any]] = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for size, (label, dtype) in itertools.product(HEAD_SIZES, dtypes.items()):
        case = Case(torch, size, dtype)
        for name, backend in backends.items():
            say(stage=f"it tried {name} attention in {label} with heads of {size}")

            def call(q: Any, k: Any, v: Any, backend: Any = backend) -> Any:
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            rows += [{"backend": name, "dtype": label, "head_size": size, **r} for r in case.rows(call)]
        say(attention=rows)
    return rows


class Case:
    """Causal attention of one shape and dtype, with its float64 answers."""

    def __init__(self, torch: Any, size: int, dtype: Any) -> None:
        generator = torch.Generator().manual_seed(size)
        q, k, v, dy = (torch.randn(1, 2, LENGTH, size, generator=generator).to(dtype) for _ in range(4))
        self.torch, self.inputs, self.dy = torch, [q, k, v], dy
        exact = [t.double().requires_grad_() for t in (q, k, v)]
        scores = exact[0] @ exact[1].transpose(-1, -2) / size**0.5
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        self.want = scores.masked_fill(mask, float("-inf")).softmax(-1) @ exact[2]
        self.want_grads = torch.autograd.grad(self.want, exact, dy.double())

    def rows(self, call: Callable[[Any, Any, Any], Any], once: bool = False) -> list[dict[str, Any]]:
        """Forward and backward of one implementation; `once`: forward not without gradients too, which may do more.

        A backend may refuse a forward pass that will be differentiated, and take it otherwise.
        """
        torch = self.torch
        leaves = [t.cuda().requires_grad_() for t in self.inputs]
        try:
            with torch.set_grad_enabled(once):
                y = call(*leaves)
            forward = {"direction": "forward", "error": relative(y, self.want)}
        except Exception as e:
            return [{"direction": d, "refused": reason(e)} for d in ("forward", "backward")]
        try:
            grads = torch.autograd.grad(y if once else call(*leaves), leaves, self.dy.cuda())
            worst = max(relative(g, w) for g, w in zip(grads, self.want_grads, strict=True))
            backward: dict[str, Any] = {"direction": "backward", "error": worst}
        except Exception as e:
            backward = {"direction": "backward", "refused": reason(e)}
        return [forward, backward]


def flex(torch: Any) -> list[dict[str, Any]]:
    """Compiled flex_attention with heads of 256, as Gemma 3 has them; its caches are new and end with the parent's
    folder."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(module.flex_attention)
    mask = module.create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device="cuda")
    case = Case(torch, 256, torch.bfloat16)
    rows = case.rows(lambda q, k, v: compiled(q, k, v, block_mask=mask), once=True)  # each compilation takes seconds
    return [{"backend": "flex", "dtype": "bf16", "head_size": 256, **r} for r in rows]


def convolution(torch: Any) -> dict[str, Any]:
    """A small convolution, which goes through cuDNN, against the CPU."""
    try:
        generator = torch.Generator().manual_seed(0)
        x, w = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(8, 4, 3, 3, generator=generator)
        got = torch.nn.functional.conv2d(x.cuda(), w.cuda())
        error = relative(got, torch.nn.functional.conv2d(x.double(), w.double()))
        return {"convolution": error < 0.01, "convolution_error": None if error < 0.01 else f"off by {error:.3g}"}
    except Exception as e:
        return {"convolution": False, "convolution_error": reason(e)}


def main(what: str) -> None:
    """One group of trials; each stage says what it is about to do."""
    say(stage="it imported torch")
    import torch

    if what == "kernels":
        say(stage="it ran a convolution")
        say(**convolution(torch))
        say(stage="it filled a block's shared memory")
        try:
            say(shared_memory=shared_memory(torch))
        except Exception as e:
            say(shared_memory={"limit": 0, "error": reason(e)})
        attention(torch)
    else:
        say(stage="it compiled flex_attention with heads of 256")
        try:
            say(attention=flex(torch))
        except Exception as e:
            refused = {"backend": "flex", "dtype": "bf16", "head_size": 256, "refused": reason(e)}
            say(attention=[{**refused, "direction": d} for d in ("forward", "backward")])
    say(done=True)


if __name__ == "__main__":
    main(sys.argv[1])
