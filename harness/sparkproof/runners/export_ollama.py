"""The consumer Ollama: a server that is already running, through its documented API (PyPI's `ollama`, its own client).

The model gets a name that nobody else has, and `forget` deletes it again; nothing of the user's is touched. It is created by the
program `ollama` where there is one, so that Ollama itself reads the Modelfile, else through the API from what we read in it.

Ollama gives no distributions, so what is asked for are greedy texts: sampling is switched off, and so is the penalty on
repetitions, which Ollama applies by default even to a greedy choice.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkproof.runners.export_modelfile import Modelfile
from sparkproof.runners.export_probe import Unloadable

GREEDY = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "seed": 0, "num_ctx": 512}
TIMEOUT_S, LOOK_S = 180.0, 5.0
CREATE_S = 600
UNKNOWN = ("unknown model architecture", "unsupported model architecture", "unsupported architecture")


class NotAnswering(Exception):
    """No Ollama is there; the text says what is."""


@dataclass(frozen=True)
class Reply:
    """A greedy answer."""

    text: str
    stopped: bool  # at an end, not since the tokens ran out
    prompt_tokens: int  # that Ollama fed, 0 if it does not say
    load_s: float
    tokens_per_s: float  # 0 when too short to say


class OllamaServer:
    """The server at OLLAMA_HOST, or at Ollama's own port of this machine."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """Find it. Errors: NotAnswering."""
        import httpx
        import ollama

        def seen(response: httpx.Response) -> None:
            self.url = str(response.request.url).rpartition("api/")[0]  # as the client reads OLLAMA_HOST

        self.url = os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434"
        timeout = httpx.Timeout(timeout_s, connect=LOOK_S)
        try:
            # never through a proxy, which would answer for a server that is not there
            self.client = ollama.Client(timeout=timeout, trust_env=False, event_hooks={"response": [seen]})
            self.client.list()
            version = httpx.get(f"{self.url}api/version", timeout=LOOK_S, trust_env=False).raise_for_status()
            self.version = str(version.json()["version"])
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NotAnswering(f"no Ollama answers at {self.url}") from error
        except (ollama.ResponseError, httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            said = " ".join(str(error).split())[:150]
            raise NotAnswering(f"what answers at {self.url} is no Ollama that works ({said})") from error

    def create(self, name: str, folder: Path, read: Modelfile) -> str:
        """Make the model of the folder's Modelfile; say by what. Errors: RuntimeError with Ollama's words."""
        program = shutil.which("ollama")
        if program is not None:
            done = subprocess.run(
                [program, "create", name, "-f", "Modelfile"],
                cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=CREATE_S, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"`ollama create` failed: {done.stderr.strip()[-400:]}")
            return "ollama create"
        files = {read.model.name: self.client.create_blob(read.model)}
        adapters = {read.adapter.name: self.client.create_blob(read.adapter)} if read.adapter else None
        parameters: dict[str, Any] = {**read.parameters, **({"stop": read.stops} if read.stops else {})}
        with self._said("creating the model"):
            self.client.create(
                name, files=files, adapters=adapters, template=read.template or None, system=read.system or None,
                parameters=parameters or None,
            )  # fmt: skip
        return "the API"

    def template(self, name: str) -> str:
        """The template that the model has by its own account."""
        return str(self.client.show(name).template or "")

    def raw(self, name: str, prompt: str, tokens: int) -> Reply:
        """Go on with a text, past every template."""
        with self._said("generating"):
            made = self.client.generate(name, prompt, raw=True, options={**GREEDY, "num_predict": tokens})
        return _reply(made, made.response or "")

    def chat(self, name: str, messages: list[dict[str, str]], tokens: int) -> Reply:
        """Answer a conversation through the Modelfile's template."""
        with self._said("chatting"):
            made = self.client.chat(name, messages, options={**GREEDY, "num_predict": tokens})
        return _reply(made, made.message.content or "")

    def on_gpu(self, name: str) -> bool:
        """Whether the loaded model has memory of a GPU."""
        return any((m.model or "").startswith(name) and int(m.size_vram or 0) > 0 for m in self.client.ps().models)

    def delete(self, name: str) -> None:
        """Remove the model if it is there, and with it its weights. Errors: what the client raises."""
        import ollama

        try:
            self.client.delete(name)
        except ollama.ResponseError as error:
            if error.status_code != 404:  # never made, or gone
                raise

    @contextlib.contextmanager
    def _said(self, doing: str) -> Iterator[None]:
        """Ollama's own words in what is raised."""
        import ollama

        try:
            yield
        except ollama.ResponseError as error:
            if any(word in error.error for word in UNKNOWN):
                raise Unloadable(error.error[:300]) from error
            raise RuntimeError(f"Ollama's error {error.status_code} when {doing}: {error.error[:400]}") from error


def _reply(made: Any, text: str) -> Reply:
    count, nanoseconds = int(made.eval_count or 0), int(made.eval_duration or 0)
    return Reply(
        text, made.done_reason == "stop", int(made.prompt_eval_count or 0), int(made.load_duration or 0) / 1e9,
        count / nanoseconds * 1e9 if count > 1 and nanoseconds > 0 else 0.0,
    )  # fmt: skip


def forget(name: str) -> str:
    """Delete the model; '' or a sentence that it may still be there, for a user who then has it to remove."""
    try:
        OllamaServer(LOOK_S * 4).delete(name)
    except Exception as error:  # whatever a dying server does, the case has its own verdict
        said = " ".join(str(error).split())[:150]
        return f"The model {name} may still be in Ollama ({said}): `ollama rm {name}`."
    return ""
