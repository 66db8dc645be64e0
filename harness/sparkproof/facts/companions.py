"""What stands around torch: Unsloth, the playbook's script, llama.cpp, Ollama, and where outputs and caches are kept."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from sparkproof.facts.host import Host, Ran, scratch_caches
from sparkproof.facts.hub import cache_path
from sparkproof.facts.installed import LlamaCpp, Ollama, Place, Script, Unsloth
from sparkproof.facts.software import package_folder
from sparkproof.facts.system import in_container

COMMAND_TIMEOUT_S = 5
IMPORT_TIMEOUT_S = 30
SCRIPT = "test_unsloth.py"
FAST_INFERENCE_OFF = "DGX Spark detected"
ASKS_FOR_UNIFIED_MEMORY = "_any_device_integrated"
LLAMA_PROGRAMS = ("llama-server", "llama-cli", "llama-quantize")
# 'qwen3:8b  500a1f067a9f  6.0 GB  100% CPU  4096  4 minutes from now'
OLLAMA_ROW = re.compile(r"^(\S+)\s+[0-9a-f]{6,}\s+([\d.]+ [KMGT]?B)\s+(\S.*?)\s{2,}")


def read_unsloth(packages: dict[str, str]) -> Unsloth:
    """Its versions, and two lines that its files have or lack."""
    found = Unsloth(version=packages.get("unsloth"), zoo_version=packages.get("unsloth-zoo"))
    folder, zoo = package_folder("unsloth"), package_folder("unsloth-zoo", "unsloth_zoo")
    if folder is not None:
        found.disables_fast_inference = _holds(folder / "models" / "loader.py", FAST_INFERENCE_OFF)
    if zoo is not None:
        found.knows_unified_memory = _holds(zoo / "gradient_checkpointing.py", ASKS_FOR_UNIFIED_MEMORY)
    return found


def import_unsloth(host: Host) -> Ran:
    """`import unsloth` in a process and a folder of its own, since it writes into the working folder."""
    with scratch_caches() as caches:
        return host.run_python("sparkproof.facts.unsloth_child", IMPORT_TIMEOUT_S, caches)


def judge_import(ran: Ran | None) -> tuple[bool | None, str | None]:
    """Whether it imported, and what it said if not."""
    if ran is None:
        return None, None
    try:
        error = json.loads(ran.out.splitlines()[-1])["error"]
    except (ValueError, IndexError, KeyError, TypeError):
        error = ran.error or "it ended without an answer"
    return error is None, error


def read_script(folder: Path | None = None) -> Script:
    """The playbook's script: is it one, and does the installed trl take what it hands to SFTConfig?"""
    path = (folder or Path.cwd()) / SCRIPT
    if not path.is_file():
        return Script()
    text = path.read_text(encoding="utf-8", errors="replace")
    head = text[:512].lower()
    found = Script(path=str(path), is_web_page="<!doctype html" in head or "<html" in head)
    if not found.is_web_page:
        found.sft_arguments = sft_arguments(text)
        fields = sft_fields(package_folder("trl"), package_folder("transformers"))
        if fields is not None:
            found.unknown_arguments = sorted(set(found.sft_arguments) - fields)
    return found


def sft_arguments(source: str) -> list[str]:
    """Keywords of every SFTConfig(...) call."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    names = (k.arg for c in calls if ast.unparse(c.func).split(".")[-1] == "SFTConfig" for k in c.keywords)
    return sorted({name for name in names if name})


def sft_fields(trl: Path | None, transformers: Path | None) -> frozenset[str] | None:
    """Fields of trl's SFTConfig and of what it inherits from, from their text; None if one of them is not there."""
    if trl is None or transformers is None:
        return None
    own, base = trl / "trainer" / "sft_config.py", transformers / "training_args.py"
    if not own.exists() or not base.exists():
        return None
    names: set[str] = set()
    for file in (own, base, trl / "trainer" / "base_config.py"):
        if not file.exists():
            continue
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        classes = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
        names |= {
            line.target.id
            for c in classes
            for line in c.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
    return frozenset(names)


def read_places(host: Host) -> list[Place]:
    """Where outputs and caches go, and whether each ends with the container."""
    home = host.environ.get("HOME", "/root")
    triton = host.environ.get("TRITON_CACHE_DIR") or f"{home}/.triton/cache"
    places = {"working folder": str(Path.cwd()), "models": str(cache_path(host)), "compiled kernels": triton}
    mounts = _mounts(host.text("/proc/self/mountinfo") or "") if in_container(host) else None
    return [
        Place(name=name, path=path, in_image=None if mounts is None else _in_image(path, mounts))
        for name, path in places.items()
    ]


def read_llama_cpp(host: Host) -> LlamaCpp:
    """A llama.cpp on PATH, where Unsloth builds it, or in the working folder; and whether it can use the GPU.

    Only a program on PATH is run: what lies in a folder is looked at alone.
    """
    found = on_path = [Path(p) for name in LLAMA_PROGRAMS if (p := host.which(name))]
    places = [Path(host.environ.get("HOME", "/root")) / ".unsloth" / "llama.cpp", Path.cwd() / "llama.cpp"]
    for folder in (d for place in places for d in (place, place / "build" / "bin")):
        found = found + [folder / name for name in LLAMA_PROGRAMS if (folder / name).is_file()]
    if not found:
        return LlamaCpp()
    program = found[0].resolve()
    near = (program.parent, program.parent.parent, program.parent.parent / "lib")
    if any(next(d.glob("libggml-cuda*"), None) for d in near if d.is_dir()):
        return LlamaCpp(path=str(program), cuda=True)
    said = ""
    if on_path:
        ran = host.run([str(program), "--list-devices"], COMMAND_TIMEOUT_S)
        said = ran.out + ran.err
    if "vailable devices" in said:
        return LlamaCpp(path=str(program), cuda="CUDA" in said)
    # a program without that option, beside the libraries of a build with its backends apart, and none for CUDA
    apart = any(next(d.glob("libggml-cpu*"), None) for d in near if d.is_dir())
    return LlamaCpp(path=str(program), cuda=False if apart else None)


def read_ollama(host: Host) -> Ollama:
    """Its models by `ollama ps`, and the library that its service is told to use."""
    path = host.which("ollama")
    if path is None:
        return Ollama()
    found = Ollama(path=path, library=host.environ.get("OLLAMA_LLM_LIBRARY"))
    for line in host.run([path, "ps"], COMMAND_TIMEOUT_S).out.splitlines():
        row = OLLAMA_ROW.match(line)
        if row:
            found.running.append(" ".join(row.groups()))
            if row.group(3).strip() == "100% CPU":
                found.on_cpu.append(row.group(1))
    systemctl = host.which("systemctl")
    if found.library is None and systemctl:
        said = host.run([systemctl, "show", "ollama", "--property=Environment"], COMMAND_TIMEOUT_S).out
        variable = re.search(r"OLLAMA_LLM_LIBRARY=([^\s\"]+)", said)
        found.library = variable.group(1) if variable else None
    return found


def _holds(path: Path, words: str) -> bool | None:
    try:
        return words in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _mounts(text: str) -> list[tuple[str, str]]:
    """Mount point and file system of every line of /proc/self/mountinfo."""
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) > 4 and right:
            found.append((fields[4].replace("\\040", " "), right.split()[0]))
    return found


def _in_image(path: str, mounts: list[tuple[str, str]]) -> bool | None:
    around = [m for m in mounts if m[0] == "/" or path == m[0] or path.startswith(f"{m[0]}/")]
    if not around:
        return None
    point, system = max(around, key=lambda m: len(m[0]))
    return point == "/" and system == "overlay"
