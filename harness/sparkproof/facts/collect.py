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
from sparkproof.facts import (
    companions,
    container,
    history,
    hub,
    links,
    memory,
    network,
    nvidia,
    pins,
    place,
    software,
    system,
    torch_probe,
    triton_probe,
    wheels,
)
from sparkproof.facts import trials as tried
from sparkproof.facts.host import Host
from sparkproof.facts.model import SCHEMA_VERSION, Driver, Facts, Gpu, Network
from sparkproof.facts.model import Container as ContainerFacts
from sparkproof.facts.toolchain import Bitsandbytes, Python, Triton
from sparkproof.facts.tried import Compilation, Tried

T = TypeVar("T")


def collect(
    network: bool = True,
    progress: Callable[[str], None] | None = None,
    host: Host | None = None,
    trials: bool = True,
) -> Facts:
    """Facts of this machine.

    `network=False` asks nothing of the network; `progress` is told each probe's name; `trials=False` leaves out what
    is compiled, quantised and timed: those take seconds, and half a minute where there is a GPU.
    """
    return _Collector(host or Host(), progress or (lambda text: None)).run(network, trials)


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

    def run(self, ask_network: bool, trials: bool) -> Facts:
        """Read what is there side by side; then, with a GPU, time it alone; then try the rest on it."""
        facts = Facts(origin=f"read on {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}")
        # memory first: the torch probe's own context would be counted
        facts.memory = self.guard("memory", lambda: memory.read_memory(self.host), facts.memory)
        alone = not (self.host.exists("/dev/nvidiactl") or self.host.exists("/dev/dxg"))
        self.read(facts, ask_network, trials, packages=trials and alone)
        if trials and facts.gpu is not None and facts.gpu.usable_by_torch:
            self.try_gpu(facts)
        elif trials and not alone:  # a GPU that torch cannot use may hang whoever touches it
            self.keep_packages(facts, self.try_packages(visible=False))
        facts.errors = dict(sorted(self.errors.items()))
        return facts

    def read(self, facts: Facts, ask_network: bool, trials: bool, packages: bool) -> None:
        """Everything but the trials on the GPU. What starts processes or waits goes to threads.

        `packages`: also call what is built beside torch, which on a GPU would be counted as somebody's memory.
        """
        host, guard = self.host, self.guard
        with ThreadPoolExecutor(max_workers=8, thread_name_prefix="facts") as pool:
            torch = pool.submit(guard, "torch", lambda: torch_probe.read_torch(host), torch_probe.TorchAnswer())
            beside = pool.submit(self.try_packages) if packages else None
            compiled = pool.submit(guard, "triton", lambda: self.read_triton(trials), (facts.triton, None))
            nvml = pool.submit(guard, "nvml", lambda: nvidia.read_nvml(host), (Driver(), [], None))
            cuda = pool.submit(guard, "cuda driver", lambda: nvidia.read_cuda_driver(host), ([], None))
            engine = pool.submit(guard, "container", lambda: container.read_container(host), ContainerFacts())
            toolkit = pool.submit(guard, "cuda toolkit", lambda: nvidia.read_cuda_toolkit(host), facts.cuda)
            compiler = pool.submit(guard, "compiler", lambda: software.read_compiler(host), facts.compiler)
            ollama = pool.submit(guard, "ollama", lambda: companions.read_ollama(host), facts.ollama)
            llama = pool.submit(guard, "llama.cpp", lambda: companions.read_llama_cpp(host), facts.llama_cpp)
            past = pool.submit(guard, "history", lambda: history.read_history(host), facts.history)
            fabric = pool.submit(guard, "fabric", lambda: links.read_fabric(host), facts.fabric)
            if ask_network:
                hub_reach = pool.submit(guard, "network", lambda: network.read_network(host), facts.network)
            self.read_system(facts)
            self.read_software(facts)
            facts.hub_token_present = guard("hub token", lambda: network.token_present(host), None)
            said, nvml_gpus, facts.gpu_processes = nvml.result()
            cuda_gpus, cuda_error = cuda.result()
            driver = guard("driver", lambda: nvidia.read_driver(host), facts.driver)
            driver.version, driver.cuda_version = said.version, said.cuda_version
            driver.nvml_errors, driver.cuda_error = said.nvml_errors, cuda_error
            facts.driver = driver
            facts.container, facts.cuda, facts.compiler = engine.result(), toolkit.result(), compiler.result()
            facts.pins = guard("pins", lambda: pins.read_pins(host, facts.packages, facts.cuda.nvcc), facts.pins)
            facts.network = hub_reach.result() if ask_network else Network(error="not asked")
            if facts.network.hub_reachable and facts.hub_token_present:
                facts.hub_cache.token_accepted = guard("hub token use", lambda: hub.token_accepted(host), None)
            facts.ollama, facts.llama_cpp = ollama.result(), llama.result()
            facts.history, facts.fabric = past.result(), fabric.result()
            facts.triton, facts.tried.compilation = compiled.result()
            if beside is not None:
                self.keep_packages(facts, beside.result())
            answer = torch.result()
        facts.torch, facts.gpus = answer.torch, join(answer.gpus, cuda_gpus, nvml_gpus)
        facts.memory.cuda_free_gib, facts.memory.cuda_total_gib = answer.cuda_free_gib, answer.cuda_total_gib
        facts.wheels.loaded = answer.loaded

    def try_packages(self, visible: bool = True) -> Tried:
        """Extensions and the 4-bit round trip; with `visible=False` on the CPU whatever there is."""
        return self.guard("packages tried", lambda: tried.read_packages_tried(self.host, visible), Tried())

    @staticmethod
    def keep_packages(facts: Facts, said: Tried) -> None:
        """Write them into the facts."""
        facts.tried.four_bit, facts.tried.extensions = said.four_bit, said.extensions

    def read_triton(self, trials: bool) -> tuple[Triton, Compilation | None]:
        """Its assemblers; and, if it is there, what it compiles with them."""
        found = triton_probe.read_triton(self.host)
        if not trials or found.version is None:
            return found, None
        compilation = self.guard("compilation", lambda: tried.read_compilation(self.host), None)
        if compilation is not None:
            compilation.fp4 = tried.read_fp4(self.host, found, compilation.target)
        return found, compilation

    def read_system(self, facts: Facts) -> None:
        """The machine without its GPU."""
        host, guard = self.host, self.guard
        facts.arch = guard("arch", platform.machine, None)
        facts.os = guard("os", lambda: system.read_os(host), facts.os)
        facts.runs_in = guard("place", lambda: place.read_place(host), facts.runs_in)
        facts.cpu = guard("cpu", lambda: system.read_cpu(host), facts.cpu)
        facts.limits = guard("limits", system.read_limits, facts.limits)
        facts.disk = guard("disk", system.read_disk, facts.disk)
        facts.shm = guard("shm", lambda: system.read_shm(host), facts.shm)
        facts.places = guard("places", lambda: companions.read_places(host), None)
        facts.env = guard("environment", lambda: network.read_environment(host), {})

    def read_software(self, facts: Facts) -> None:
        """What is installed, from files alone."""
        host, guard = self.host, self.guard
        packages = facts.packages = guard("packages", software.read_packages, {})
        facts.python = guard("python", lambda: software.read_python(host, packages), Python())
        facts.bitsandbytes = guard("bitsandbytes", lambda: software.read_bitsandbytes(packages), Bitsandbytes())
        facts.wheels = guard("wheels", lambda: wheels.read_wheels(host), facts.wheels)
        facts.unsloth = guard("unsloth", lambda: companions.read_unsloth(packages), facts.unsloth)
        facts.script = guard("script", companions.read_script, facts.script)
        facts.hub_cache = guard(
            "hub cache",
            lambda: hub.read_hub_cache(host, software.package_folder("transformers")),
            facts.hub_cache,
        )

    def try_gpu(self, facts: Facts) -> None:
        """The canaries with the machine to themselves; then the slower trials side by side."""
        host, guard, tests = self.host, self.guard, facts.tried
        tests.canaries = guard("canaries under load", lambda: tried.read_canaries(host), None)
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="trials") as pool:
            packages = pool.submit(self.try_packages)
            kernels = pool.submit(guard, "kernels tried", lambda: tried.read_kernels(host), Tried())
            flex = pool.submit(guard, "flex attention compiled", lambda: tried.read_flex(host), [])
            if facts.unsloth.version is not None:
                ran = pool.submit(guard, "unsloth imported", lambda: companions.import_unsloth(host), None).result()
                facts.unsloth.imported, facts.unsloth.import_error = companions.judge_import(ran)
            self.keep_packages(facts, packages.result())
            done = kernels.result()
            rows = [*(done.attention or []), *flex.result()]
        tests.attention = rows or None
        tests.shared_memory = done.shared_memory
        tests.convolution, tests.convolution_error = done.convolution, done.convolution_error


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
