"""The consumer llama.cpp, through PyPI's xllamacpp: the server itself, in this process, on a local port.

`/completion` with one token to predict and `n_probs` as large as the vocabulary returns every log-probability before
sampling (`post_sampling_probs` false); the prompt is a list of token ids, and the prompt cache makes each further
position of a text cost one token. The answer is 4.7 MB of JSON for 49152 tokens, so two requests overlap: one is
computed while the other is read.

The one predicted token is of no interest but must be text: where the model would end, or break off inside a character,
the server says nothing, and no probabilities either. So sampling is biased to the letter a; what `n_probs` reports is
computed from the unbiased logits.

Probabilities come from fp32 `exp`, divided by an fp32 running sum, whence sums that miss 1 by some 1e-4: the judge
normalises. What underflows is reported as the lowest float, and read here as `LOWEST`, the log of fp32's smallest
positive number.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from numpy import ndarray

from sparkproof.runners import export_placement
from sparkproof.runners.export_placement import Placement
from sparkproof.runners.export_probe import Said, Unloadable

LOWEST = -103.28
TIMEOUT_S = 120
LONG_S = 1800  # of a long prompt to a large model on a slow device


@contextlib.contextmanager
def _told() -> Iterator[Callable[[], list[str]]]:
    """A function that gives the lines which native code has written to standard error since; they go there afterwards too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def lines() -> list[str]:
            file.seek(0)
            return file.read().decode(errors="replace").splitlines()

        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            sys.stderr.write("\n".join(lines()) + "\n")


class LlamaCppModel:
    """One GGUF in llama.cpp's server."""

    def __init__(
        self, file: Path, gpu_layers: int = 0, context: int = 1024, threads: int = 0, lora: Path | None = None
    ) -> None:
        """Load `file`, with `gpu_layers` of its layers on a GPU if this build can (-1: all), and the adapter `lora` over it.

        threads: that compute; 0: half of the cores.

        Errors: Unloadable for an architecture that llama.cpp does not know; RuntimeError with its words for anything else.
        """
        import xllamacpp

        start = time.perf_counter()
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = gpu_layers
        params.warmup = False
        params.verbosity = 4  # says into which buffers the weights went
        threads = threads or max(1, len(os.sched_getaffinity(0)) // 2)  # they spin: leave room for the reader
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        with _told() as log:
            try:
                self.server = xllamacpp.Server(params)
            except RuntimeError as error:
                said = "; ".join(line.partition(" E ")[2] for line in log() if " E " in line)
                if "unknown model architecture" in said:
                    raise Unloadable(said[:300]) from error
                raise RuntimeError(f"llama.cpp refused the file: {said[:500] or error}") from error
            self.told = log()
        self.url: str = self.server.listening_address
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # never through a proxy
        self.load_s = time.perf_counter() - start
        self.made_up: list[str] = []  # llama.cpp refuses a file that lacks a tensor
        self.template = str(self._call("/props")["chat_template"])
        self.harmless = self.tokenize("a")[-1]

    def _call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = TIMEOUT_S) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with self._open(request, timeout=timeout_s) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"llama.cpp refused {path}: {error.read().decode(errors='replace')[:300]}") from error

    @property
    def vocabulary(self) -> int:
        """As the server tells it."""
        return int(self._call("/v1/models")["data"][0]["meta"]["n_vocab"])

    def log_probabilities(self, ids: list[int], positions: list[int], vocabulary: int) -> ndarray:
        """Every token's log-probability after each prefix."""
        import numpy as np

        def after(position: int) -> ndarray:
            answer = self._call(
                "/completion",
                {
                    "prompt": ids[: position + 1],
                    "n_predict": 1,
                    "n_probs": vocabulary,
                    "post_sampling_probs": False,
                    "temperature": 0.0,
                    "logit_bias": [[self.harmless, 1000.0]],
                    "cache_prompt": True,
                },
            )
            row = np.full(vocabulary, np.nan, dtype=np.float32)
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                if entry["id"] < vocabulary:
                    row[entry["id"]] = max(entry["logprob"], LOWEST)
            return row

        with ThreadPoolExecutor(2) as pool:
            return np.stack(list(pool.map(after, positions)))

    def tokenize(self, text: str) -> list[int]:
        """Ids as the server makes them from a text prompt."""
        return list(self._call("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def render(self, messages: list[dict[str, str]]) -> str:
        """The embedded chat template, rendered by llama.cpp's own Jinja."""
        return str(self._call("/apply-template", {"messages": messages})["prompt"])

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of the rendered conversation, as the chat endpoint makes them: it parses specials and may add a beginning."""
        return self.tokenize(self.render(messages))

    def timed(self, ids: list[int], tokens: int) -> dict[str, float]:
        """The server's own `timings` of `tokens` greedy tokens after `ids`, none of them an end, nothing taken from its cache."""
        answer = self._call(
            "/completion",
            {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False},
            LONG_S,
        )
        return dict(answer["timings"])

    def generate(self, prompt: str, max_tokens: int) -> Said:
        """Greedy answer through `/v1/chat/completions`."""
        answer = self._call(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0.0},
        )
        timings = answer.get("timings") or {}
        speed = timings.get("predicted_per_second", 0.0) if timings.get("predicted_n", 0) > 1 else 0.0
        choice = answer["choices"][0]
        return Said(str(choice["message"]["content"]), float(speed), choice["finish_reason"] == "stop")

    def placement(self) -> Placement:
        """Where llama.cpp said that it put weights, cache and computation."""
        import xllamacpp

        return export_placement.read(self.told, xllamacpp.get_device_info())

    def backend(self) -> dict[str, str]:
        """The devices that this build has, and the buffers into which llama.cpp says it put the weights."""
        import xllamacpp

        found = self.placement()
        on_gpu = any(found.is_gpu(name) for name in found.weights)
        return {
            "device": "gpu" if on_gpu else "cpu", "build's devices": ", ".join(found.devices),
            "weights in": ", ".join(sorted(found.weights)),
            "instructions": str(xllamacpp.get_system_info()).strip()[:200],
        }  # fmt: skip

    def close(self) -> None:
        """Stop the server."""
        del self.server
