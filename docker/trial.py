"""Tried inside an image, on any architecture and without a GPU: what is in it imports, compiles for GB10, and trains.

`trial.py serve` tries vLLM's image: it imports up to the server, which without a GPU can't start, and compiles. Prints a line
for each; ends with an exception, or with "all of it works".
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import os
import platform
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
import triton.language as tl

# What the lock pins by name. Unsloth comes last, apart.
PINNED = [
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "trl",
    "torchao",
    "liger_kernel",
    "safetensors",
    "pynvml",
    "pytest",
    "xllamacpp",
    "gguf",
    "sparktune",
    "sparkproof",
]

SERVED = ["torch", "triton", "transformers", "tokenizers", "safetensors", "vllm", "vllm.entrypoints.openai.api_server"]


def timed(start: float) -> str:
    """Seconds since then."""
    return f"{time.monotonic() - start:.1f} s"


def contained() -> None:
    """Not root, and no place to write but the temporary ones."""
    assert os.getuid() != 0, "the image runs as root"
    for place in ("/opt/sparkproof/x", "/usr/local/bin/x", "/etc/x"):
        try:
            Path(place).write_text("x")
        except OSError:
            continue
        raise AssertionError(f"{place} can be written")
    files = (Path(folder, name) for folder, _, names in os.walk("/usr") for name in names)
    lifted = [str(f) for f in files if not f.is_symlink() and f.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)]
    assert not lifted, f"these run with another user's rights: {lifted}"
    print(
        f"uid {os.getuid()} on {platform.machine()}, Python {platform.python_version()}, nothing of the image can be written"
    )


def imports(names: list[str]) -> None:
    """Every one of these."""
    for name in names:
        start = time.monotonic()
        module = importlib.import_module(name)
        print(f"import {name} {getattr(module, '__version__', '')} {timed(start)}", flush=True)
    import torch

    assert torch.version.cuda == "13.0", torch.version.cuda


def unsloth() -> None:
    """The one that changes what it imports."""
    # In a process of its own; the variable lets it go without a GPU.
    start = time.monotonic()
    env = os.environ | {"UNSLOTH_ALLOW_CPU": "1"}
    subprocess.run([sys.executable, "-c", "import unsloth; unsloth.FastLanguageModel"], env=env, check=True)
    print(f"import unsloth {metadata.version('unsloth')} {timed(start)}", flush=True)


@triton.jit
def twice(x_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x *= 2, BLOCK elements a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) * 2.0, mask=at < n)


def compilers() -> None:
    """nvcc and Triton's own assembler, each for GB10."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert "release 13.0," in said, said
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.cu"), Path(folder, "k.cubin")
        source.write_text("__global__ void twice(float *x) { x[threadIdx.x] *= 2.0f; }\n")
        start = time.monotonic()
        subprocess.run(["nvcc", "-arch=sm_121", "-cubin", "-o", str(cubin), str(source)], check=True)
        print(f"nvcc 13.0 for sm_121: {cubin.stat().st_size} bytes {timed(start)}", flush=True)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    start = time.monotonic()
    signature = {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(twice, signature, {"BLOCK": 256}, {})
    built = compile(source, target=GPUTarget("cuda", 121, 32))
    cubin = built.asm["cubin"]
    assert b"sm_121" in built.asm["ptx"].encode() and len(cubin) > 1000
    print(f"Triton for sm_121 by {platform.machine()}'s ptxas: {len(cubin)} bytes {timed(start)}", flush=True)


def lora_step() -> None:
    """A tiny Llama learns: LoRA over frozen weights, a few steps of AdamW, and the adapter changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    # A product with 8 columns, as LoRA's are, came out wrong in an emulator whose vectors have 512 bits.
    x, a = torch.randn(2, 32, 64), torch.randn(8, 64)
    wrong = (torch.nn.functional.linear(x, a).double() - x.double() @ a.double().T).abs().max().item()
    assert wrong < 1e-4, f"torch multiplies wrongly: off by {wrong}"

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 256, (2, 32))
    losses = []
    start = time.monotonic()
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    print(f"LoRA, 5 steps: loss {losses[0]:.3f} to {losses[-1]:.3f} {timed(start)}", flush=True)


def main(served: bool) -> None:
    """All of it."""
    contained()
    imports(SERVED if served else PINNED)
    if not served:
        unsloth()
    compilers()
    if not served:
        lora_step()
    print("all of it works")


if __name__ == "__main__":
    main("serve" in sys.argv[1:])
