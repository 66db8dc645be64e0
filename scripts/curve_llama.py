"""llama.cpp's own tools, as `dynamic_curve.py` runs them: llama-imatrix, llama-quantize, llama-perplexity."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any


class Llama:
    """The tools of one folder, one model in f16, and what is made of it in the folder `at`."""

    def __init__(self, tools: Path, at: Path, source: Path, length: int, threads: int) -> None:
        """length: tokens a sequence; threads: that each tool computes with."""
        self.tools, self.at, self.source = tools, at, source
        self.tokens = ("-c", length, "-b", 512, "-t", threads, "--chunks")
        self.length, self.threads = length, threads
        self.ask: tuple[Any, ...] = ()

    def run(self, tool: str, *arguments: Any) -> str:
        """What the tool printed; its failure ends the script."""
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.tools)}
        command = [str(self.tools / tool), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{tool} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def prepare(self, calibration: Path, tokens: int, held_out: Path, held_tokens: int) -> None:
        """The importance matrix of one text, and the 16-bit model's predictions on the other; kept for the next time."""
        matrix, base = self.at / "imatrix.gguf", self.at / "base.kld"
        if not matrix.exists():
            part = matrix.with_suffix(".part.gguf")
            told = ("-f", calibration, "-o", part, "--no-ppl", *self.tokens, tokens // self.length)
            self.run("llama-imatrix", "-m", self.source, *told)
            part.rename(matrix)
        chunks = held_tokens // self.length
        self.ask = ("-f", held_out, "--kl-divergence-base", base, *self.tokens, chunks)
        if not base.exists():
            part = base.with_suffix(".part")
            self.run(
                "llama-perplexity",
                "-m",
                self.source,
                "-f",
                held_out,
                "--kl-divergence-base",
                part,
                *self.tokens,
                chunks,
            )
            part.rename(base)

    def quantise(self, preset: str, *more: Any) -> Path:
        """Write out.gguf, with the importance matrix, and return it."""
        out = self.at / "out.gguf"
        out.unlink(missing_ok=True)
        self.run("llama-quantize", "--imatrix", self.at / "imatrix.gguf", *more, self.source, out, preset, self.threads)
        return out

    def divergence(self) -> tuple[float, float, float]:
        """Of out.gguf: mean KL from the 16-bit model, its standard error, share of equal first choices."""
        said = self.run("llama-perplexity", "-m", self.at / "out.gguf", *self.ask, "--kl-divergence")
        mean = re.search(r"Mean\s+KLD:\s+([\d.]+) ±\s+([\d.]+)", said)
        top = re.search(r"Same top p:\s+([\d.]+)", said)
        if not mean or not top:
            raise SystemExit("llama-perplexity printed no divergence.")
        return float(mean[1]), float(mean[2]), float(top[1]) / 100
