"""Ollama over HTTP: make a model from a Modelfile's folder, ask it once, remove it.

Source: Ollama's docs/api.md (blobs, create, chat, delete) and docs/modelfile.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "sparkproof-round-trip"
TIMEOUT_S = 300
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # never through a proxy


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says."""

    weights: str  # FROM, relative to the Modelfile
    template: str = ""
    system: str = ""
    adapter: str = ""
    parameters: dict[str, list[str]] = field(default_factory=dict)

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return self.parameters.get("stop", [])

    @classmethod
    def read(cls, path: Path) -> Modelfile:
        """Errors: ValueError for a Modelfile without FROM or with an instruction that is not known."""
        text = path.read_text(encoding="utf-8")
        found: dict[str, str] = {}
        parameters: dict[str, list[str]] = {}
        for match in INSTRUCTION.finditer(text):
            word, value = match["word"].upper(), match["long"] if match["long"] is not None else match["short"].strip()
            if word == "PARAMETER":
                name, _, setting = value.partition(" ")
                parameters.setdefault(name, []).append(_unquoted(setting.strip()))
            elif word in ("FROM", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"):
                found[word] = value if match["long"] is not None else _unquoted(value)
            else:
                raise ValueError(f"the Modelfile has {word}, which is no instruction")
        if "FROM" not in found:
            raise ValueError("the Modelfile has no FROM")
        get = found.get
        return cls(found["FROM"], get("TEMPLATE", ""), get("SYSTEM", ""), get("ADAPTER", ""), parameters)


INSTRUCTION = re.compile(
    r'^(?P<word>[A-Za-z]+)[ \t]+(?:"""(?P<long>.*?)"""|(?P<short>[^\n]*))[ \t]*$', re.MULTILINE | re.DOTALL
)


def _unquoted(text: str) -> str:
    return text[1:-1].replace('\\"', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def address() -> str:
    """Where the server is: OLLAMA_HOST, else 127.0.0.1:11434."""
    host = os.environ.get("OLLAMA_HOST", "").strip() or "127.0.0.1:11434"
    host = host if "://" in host else f"http://{host}"
    return host if re.search(r":\d+/?$", host) else f"{host.rstrip('/')}:11434"


def answers(timeout_s: float = 2.0) -> bool:
    """Whether an Ollama server answers."""
    try:
        with _open(f"{address()}/api/version", timeout=timeout_s) as response:
            return "version" in json.loads(response.read())
    except (OSError, ValueError):
        return False


def create(folder: Path, name: str = NAME) -> Modelfile:
    """Make the model `name` of the folder's Modelfile. Errors: RuntimeError with the server's words."""
    said = Modelfile.read(folder / "Modelfile")
    body: dict[str, Any] = {"model": name, "stream": False, "files": {}}
    file = folder / said.weights
    digest = _digest(file)
    request = urllib.request.Request(f"{address()}/api/blobs/{digest}", data=file.open("rb"), method="POST")
    request.add_header("Content-Length", str(file.stat().st_size))
    _read(request)
    body["files"] = {file.name: digest}
    if said.template:
        body["template"] = said.template
    if said.system:
        body["system"] = said.system
    if said.parameters:
        body["parameters"] = {k: _parameter(k, v) for k, v in said.parameters.items()}
    _post("/api/create", body)
    return said


def chat(messages: list[dict[str, str]], max_tokens: int, name: str = NAME) -> dict[str, Any]:
    """One greedy answer: `text`, `stopped`, `tokens_per_s`, and `processor`, what the server says that it runs on."""
    options = {"temperature": 0, "seed": 0, "num_predict": max_tokens}
    said = _post("/api/chat", {"model": name, "messages": messages, "stream": False, "options": options})
    running = json.loads(_read(urllib.request.Request(f"{address()}/api/ps"))).get("models", [])
    mine: dict[str, Any] = next((m for m in running if m.get("name", "").partition(":")[0] == name), {})
    size, on_gpu = mine.get("size", 0), mine.get("size_vram", 0)
    return {
        "text": said["message"]["content"],
        "stopped": said.get("done_reason") == "stop",
        "tokens_per_s": said["eval_count"] / said["eval_duration"] * 1e9 if said.get("eval_duration") else 0.0,
        "processor": f"{on_gpu / size:.0%} of the model in GPU memory" if size else "not told",
    }


def version() -> str:
    """The server's."""
    return str(json.loads(_read(urllib.request.Request(f"{address()}/api/version")))["version"])


def remove(name: str = NAME) -> None:
    """Delete the model from the server."""
    body = json.dumps({"model": name}).encode()
    _read(urllib.request.Request(f"{address()}/api/delete", data=body, method="DELETE"))


def _parameter(name: str, values: list[str]) -> Any:
    """As the API wants it: stops as a list, numbers as numbers."""
    if name == "stop":
        return values
    try:
        return json.loads(values[-1])
    except ValueError:
        return values[-1]


def _post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(address() + path, data=data, headers={"Content-Type": "application/json"})
    found: dict[str, Any] = json.loads(_read(request))
    if "error" in found:
        raise RuntimeError(f"Ollama refused {path}: {found['error']}")
    return found


def _read(request: urllib.request.Request) -> bytes:
    try:
        with _open(request, timeout=TIMEOUT_S) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        raise RuntimeError(
            f"Ollama refused {request.selector}: {error.read().decode(errors='replace')[:300]}"
        ) from error


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}"
