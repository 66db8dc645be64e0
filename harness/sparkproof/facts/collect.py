"""Read the machine once: run every probe, guarded and bounded, and put the answers together.

Probes that start processes or wait for the network run side by side. None can raise through: what a probe could
not read stays None and `Facts.errors` says why.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from sparkproof.errors import UserError
from sparkproof.facts import container, memory, network, nvidia, software, system, torch_probe, triton_probe
from sparkproof.facts.host import Host
from sparkproof.facts.model import SCHEMA_VERSION, Bitsandbytes, Driver, Facts, Gpu, Network, Python
from sparkproof.facts.model import Container as ContainerFacts

T = TypeVar("T")


def collect(network: bool = True, progress: Callable[[str], None] | None = None, host: Host | None = None) -> Facts:
    """Facts of this machine. `network=False` asks nothing of the network; `progress` is told each probe's name."""
    return _Collector(host or Host(), progress or (lambda text: None)).run(ask_network=network)


class _Collector:
    """One reading: the host, and the errors met on the way."""

    def __init__(self, host: Host, progress: Callable[[str], None]) -> None:
        self.host = host
        self.progress = progress
        self.errors: dict[str, str] = {}

    def guard(self, name: str, probe: Callable[[], T], default: T) -> T:
        """What the probe says, or `default` with the reason written down."""
        self.progress(f"reading {name}")
        try:
            return probe()
        except Exception as e:
            self.errors[name] = f"{type(e).__name__}: {e}"
            return default

    def run(self, ask_network: bool) -> Facts:
        host, guard = self.host, self.guard
        facts = Facts(origin=f"read on {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}")
        with ThreadPoolExecutor(max_workers=8, thread_name_prefix="facts") as pool:
            # memory first: the torch probe's own context would be counted
            facts.memory = guard("memory", lambda: memory.read_memory(host), facts.memory)
            torch = pool.submit(guard, "torch", lambda: torch_probe.read_torch(host), torch_probe.TorchAnswer())
            triton = pool.submit(guard, "triton", lambda: triton_probe.read_triton(host), facts.triton)
            nvml = pool.submit(guard, "nvml", lambda: nvidia.read_nvml(host), (Driver(), [], None))
            cuda = pool.submit(guard, "cuda driver", lambda: nvidia.read_cuda_driver(host), ([], None))
            engine = pool.submit(guard, "container", lambda: container.read_container(host), ContainerFacts())
            toolkit = pool.submit(guard, "cuda toolkit", lambda: nvidia.read_cuda_toolkit(host), facts.cuda)
            compiler = pool.submit(guard, "compiler", lambda: software.read_compiler(host), facts.compiler)
            if ask_network:
                hub = pool.submit(guard, "network", lambda: network.read_network(host), facts.network)
            facts.arch = guard("arch", platform.machine, None)
            facts.os = guard("os", lambda: system.read_os(host), facts.os)
            facts.cpu = guard("cpu", lambda: system.read_cpu(host), facts.cpu)
            facts.limits = guard("limits", system.read_limits, facts.limits)
            facts.disk = guard("disk", system.read_disk, facts.disk)
            facts.shm = guard("shm", lambda: system.read_shm(host), facts.shm)
            facts.env = guard("environment", lambda: network.read_environment(host), {})
            facts.hub_token_present = guard("hub token", lambda: network.token_present(host), None)
            facts.packages = guard("packages", software.read_packages, {})
            packages = facts.packages
            facts.python = guard("python", lambda: software.read_python(host, packages), Python())
            facts.bitsandbytes = guard("bitsandbytes", lambda: software.read_bitsandbytes(packages), Bitsandbytes())
            driver = guard("driver", lambda: nvidia.read_driver(host), facts.driver)
            said, nvml_gpus, facts.gpu_processes = nvml.result()
            cuda_gpus, cuda_error = cuda.result()
            driver.version, driver.cuda_version = said.version, said.cuda_version
            driver.nvml_errors, driver.cuda_error = said.nvml_errors, cuda_error
            facts.driver = driver
            facts.triton, facts.container = triton.result(), engine.result()
            facts.cuda, facts.compiler = toolkit.result(), compiler.result()
            facts.network = hub.result() if ask_network else Network(error="not asked")
            answer = torch.result()
        facts.torch, facts.gpus = answer.torch, join(answer.gpus, cuda_gpus, nvml_gpus)
        facts.memory.cuda_free_gib, facts.memory.cuda_total_gib = answer.cuda_free_gib, answer.cuda_total_gib
        facts.errors = dict(sorted(self.errors.items()))
        return facts


def join(from_torch: list[Gpu], *others: list[Gpu]) -> list[Gpu]:
    """GPUs in torch's order, each completed by what the CUDA driver and NVML say of it; then those that torch cannot
    use.

    Earlier lists win. UUIDs decide what is the same GPU; without them, one GPU on either side is, and more are not
    guessed at.
    """
    joined = list(from_torch)
    for more in others:
        left = list(more)
        for index, gpu in enumerate(joined):
            twin = next((g for g in left if g.uuid and g.uuid == gpu.uuid), None)
            if twin is None and len(joined) == len(more) == 1:
                twin = left[0]
            if twin is not None:
                left.remove(twin)
                joined[index] = twin.model_copy(update=gpu.model_dump(exclude_none=True, exclude_defaults=True))
        joined += [g.model_copy(update={"usable_by_torch": False}) for g in left]
    return joined


def save(facts: Facts, path: Path) -> None:
    """Write facts as JSON that `load` reads back equal."""
    try:
        path.write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"The facts cannot be written to {path}: {e.strerror}.", "Give another --save FILE.") from e


def load(path: Path) -> Facts:
    """Read saved facts; a file that holds something else gets one sentence, not a traceback."""
    fix = "Make one with `sparkproof facts --save FILE`."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no facts file {path}.", fix) from None
    except OSError as e:
        raise UserError(f"The facts file {path} cannot be read: {e.strerror}.", fix) from e
    except ValueError as e:
        raise UserError(f"{path} is not a facts file: it is not valid JSON ({e}).", fix) from e
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version is None:
        raise UserError(f"{path} is not a facts file: it has no schema_version.", fix)
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has facts of schema {version}; this version reads schema {SCHEMA_VERSION}.", fix)
    try:
        return Facts.model_validate(document)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise UserError(f"{path} is not a valid facts file: {where}: {first['msg']}.", fix) from e
