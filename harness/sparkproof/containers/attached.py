"""Run a container in the foreground: its output here, Ctrl-C there, its exit code back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, BinaryIO

import docker
import docker.errors

from sparkproof.containers.engine import Engine
from sparkproof.containers.failures import explain, refused
from sparkproof.containers.launch import Spec, container
from sparkproof.errors import UserError
from sparkproof.results import ReasonClass

POLL_S = 0.2
OUT_OF_MEMORY = UserError(
    "The container was ended for lack of memory.",
    "Close other programs, or choose smaller cases; sparkproof doctor --topic memory says what holds it.",
)


def run(engine: Engine, spec: Spec, out: BinaryIO | None = None, err: BinaryIO | None = None) -> int:
    """Run to the end; returns the exit code.

    The first Ctrl-C (or SIGTERM) asks the program inside to end, as it would on the host, so that a run still closes its
    record; the second kills it. Errors: UserError where it does not start.
    """
    out, err = out or sys.stdout.buffer, err or sys.stderr.buffer
    with container(engine, spec) as key, _interrupts() as asked:
        try:
            stream = engine.api.attach(key, stdout=True, stderr=True, stream=True, demux=True)
            pump = threading.Thread(target=_pump, args=(stream, out, err), daemon=True)
            pump.start()
            engine.api.start(key)
        except docker.errors.APIError as e:
            raise refused(e, engine) from None
        _fit_terminal(engine, spec, key)
        told = 0
        while pump.is_alive():
            pump.join(POLL_S)
            if len(asked) > told:
                told = len(asked)
                _signal(engine, key, "SIGINT" if told == 1 else "SIGKILL")
        try:
            code = int(engine.api.wait(key)["StatusCode"])
            state = engine.api.inspect_container(key)["State"]
        except docker.errors.APIError as e:
            raise refused(e, engine) from None
    if state.get("OOMKilled"):
        raise OUT_OF_MEMORY
    if state.get("Error") and code in (125, 126, 127, 128):
        raise explain(str(state["Error"]), engine)
    return code


def read(engine: Engine, spec: Spec) -> tuple[int, str]:
    """Run something short; returns its exit code and all that it said. Errors: UserError where it does not start."""
    with _Buffer() as said:
        code = run(engine, spec, said, said)
        return code, said.text()


class _Buffer:
    """Bytes from two streams in the order in which they came."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: bytes) -> int:
        self.parts.append(data)
        return len(data)

    def flush(self) -> None:
        pass

    def text(self) -> str:
        return b"".join(self.parts).decode(errors="replace")


def interactive(engine: Engine, spec: Spec) -> int:
    """Give the terminal to a container by the engine's own command; returns its exit code. Errors: UserError."""
    with container(engine, spec) as key:
        command = engine.command("start", "--attach", "--interactive", key)
        with _no_interrupt():
            return subprocess.run(command, check=False).returncode


def gpu_inside(engine: Engine, spec: Spec) -> None:
    """Look whether a container of this kind really sees the GPU. Errors: UserError that says how to hand it in."""
    probe = Spec(spec.image, ["nvidia-smi", "-L"], "probe", gpu=True, network=False)
    code, said = read(engine, probe)
    if code or "GPU 0" not in said:
        last = next(iter(said.strip().splitlines()[-1:]), "nvidia-smi said nothing")
        cure = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
        if engine.kind == "podman":
            cure = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        raise UserError(
            f"This machine has an NVIDIA driver, but a container of {engine.title} sees no GPU: {last}", cure,
            skip_class=ReasonClass.CONTAINER,
        )  # fmt: skip


def _pump(stream: Iterator[tuple[bytes | None, bytes | None]], out: BinaryIO, err: BinaryIO) -> None:
    with suppress(OSError, ValueError):  # the engine went away, or our own output did: the exit code tells
        for a, b in stream:
            for data, target in ((a, out), (b, err)):
                if data:
                    target.write(data)
                    target.flush()


def _signal(engine: Engine, key: str, name: str) -> None:
    """By a connection of its own: the first one is busy with the output."""
    api = docker.APIClient(base_url=engine.address, version="auto", timeout=10)
    try:
        with suppress(docker.errors.APIError):  # it ended by itself in the meantime
            api.kill(key, signal=name)
    finally:
        api.close()


def _fit_terminal(engine: Engine, spec: Spec, key: str) -> None:
    if spec.terminal:
        with suppress(OSError, docker.errors.APIError):
            size = os.get_terminal_size(sys.stdout.fileno())
            engine.api.resize(key, height=size.lines, width=size.columns)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of raising: an exception in the middle of a request would lose the container."""
    asked: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C is the terminal's inside; we only wait."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
