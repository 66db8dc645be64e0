"""A server with Ollama's API and a transformers model behind it, which can be told to answer wrongly or to die.

Blobs are checked against their digest and `create` against the blobs, as Ollama does; what `generate` and `chat` say comes from
the base and adapter themselves, through the tokenizer's own chat template: a right answer is one that Ollama would give.
"""

import hashlib
import json
import os
import socket
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sparkproof.runners.export_hf import HfModel


class Brain:
    """Greedy answers of a fine-tuned model."""

    def __init__(self, base, adapter):
        self.model = HfModel(base, adapter)

    def chat_text(self, messages):
        return self.model.render(messages)

    def go_on(self, text, tokens):
        """(text, prompt tokens, stopped)."""
        import torch

        ids = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        rows = torch.tensor([ids])
        out = self.model.model.generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )[0, len(ids) :]
        stopped = int(out[-1]) == self.model.tokenizer.eos_token_id
        return self.model.tokenizer.decode(out, skip_special_tokens=True), len(ids), stopped


class FakeOllama:
    """`wrong` names what it does otherwise; `calls` are (method, path, body)."""

    def __init__(self, brain, wrong=""):
        self.brain, self.wrong = brain, wrong
        self.calls, self.blobs, self.models = [], {}, {"the-users-own:latest": {}}

    def answer(self, method, path, body):
        """(status, JSON)."""
        match method, path.split("/")[2:]:
            case "GET", ["version"]:
                return 200, {"version": "0.33.2"}
            case "GET", ["tags"]:
                return 200, {"models": [{"model": name, "name": name} for name in self.models]}
            case "GET", ["ps"]:
                loaded = [{"model": f"{n}:latest", "size": 9, "size_vram": 0} for n in self.models if ":" not in n]
                return 200, {"models": loaded}
            case "POST", ["blobs", digest]:
                if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
                    return 400, {"error": "digest does not match"}
                self.blobs[digest] = len(body)
                return 201, {}
            case _, ["delete"]:
                asked = json.loads(body)["model"]
                if self.wrong == "keeps":
                    return 500, {"error": "busy"}
                return (200, {}) if self.models.pop(asked, None) is not None else (404, {"error": "not found"})
        asked = json.loads(body)
        if path == "/api/create":
            return self.create(asked)
        model = self.models.get(asked["model"])
        if model is None:
            return 404, {"error": f"model '{asked['model']}' not found"}
        if path == "/api/show":
            extra = " {{ .Extra }}" if self.wrong == "template" else ""
            return 200, {"template": model["template"] + extra, "model_info": {"general.architecture": "llama"}}
        return self.say(path, asked)

    def create(self, asked):
        if self.wrong == "refuses":
            return 400, {"error": "invalid file magic"}
        if not asked.get("files") or any(digest not in self.blobs for digest in asked["files"].values()):
            return 400, {"error": "file not found"}
        self.models[asked["model"]] = asked
        return 200, {"status": "success"}

    def say(self, path, asked):
        options = asked["options"]
        assert options["temperature"] == 0 and options["repeat_penalty"] == 1
        if self.wrong == "architecture":
            return 500, {"error": "error loading model: unknown model architecture: 'llama'"}
        if path == "/api/chat":
            text = self.brain.chat_text(asked["messages"])
            text = text.replace("user\n", "user \n", 1) if self.wrong == "space" else text
        else:
            assert asked["raw"] is True
            text = asked["prompt"]
        said, fed, stopped = self.brain.go_on(text, options["num_predict"])
        said = {"says": "I don't know.", "runs on": said + "<|im_end|>\n<|im_start|>"}.get(self.wrong, said)
        if self.wrong == "runs on":
            stopped = False
        fed += self.wrong == "doubled"
        ends = {"done": True, "done_reason": "stop" if stopped else "length", "prompt_eval_count": fed,
                "eval_count": 9, "eval_duration": 10**8, "load_duration": 10**8}  # fmt: skip
        if path == "/api/chat":
            return 200, {"model": asked["model"], "message": {"role": "assistant", "content": said}, **ends}
        return 200, {"model": asked["model"], "response": said, **ends}


@contextmanager
def serving(fake, monkeypatch, program=False):
    """Run it, with OLLAMA_HOST set and no program `ollama` in sight unless it is asked for.

    A fake that `dies` goes when it is first asked to chat.
    """

    class Handler(BaseHTTPRequestHandler):
        def do(self):
            body = self.read()
            fake.calls.append((self.command, self.path, body if len(body) < 9999 else b""))
            if fake.wrong == "dies" and self.path == "/api/chat":
                server.socket.close()  # nobody listens any more, and this one hears no answer
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            status, answer = fake.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do

        def read(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # a proxy must not be asked
    if not program:
        hide("ollama", monkeypatch)
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def hide(program, monkeypatch):
    """Nothing of this name is on the path."""
    import shutil

    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == program else real(name, *a, **k))


def install(folder, text, monkeypatch):
    """A program `ollama` on the path."""
    folder.mkdir()
    program = folder / "ollama"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
