"""Make the virtual environment: `python3 scripts/setup_env.py VENV`. Standard library only; the Makefile calls it.

What it does, in order: names each missing prerequisite with the command that cures it; makes the venv; installs the hash lock;
installs torch, a CPU build where no NVIDIA driver answers (a CUDA build is gigabytes), the CUDA build otherwise; puts
llama.cpp's converter beside them (scripts/llama_converter.py); installs this project in place. A second call compares one digest
and ends.

Mirrors and find-links: pip reads its own configuration; uv's (UV_* variables and uv.toml) is translated to pip's, so that either
way of naming an air-gapped site's mirror works.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import llama_converter

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
# The newest release with a CPU build on both architectures that the whole stack was tried with, and the release whose
# aarch64 wheel on PyPI is a CUDA 13.0 build.
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CUDA = "torch==2.14.1"
TORCH_CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
SUPPORTED = ((3, 11), (3, 13))


def stop(message: str) -> None:
    """End with one sentence."""
    sys.exit(f"sparkproof set-up: {message}")


def check_prerequisites() -> None:
    """Name what is missing, each with its cure."""
    here = sys.version_info[:2]
    if not SUPPORTED[0] <= here <= SUPPORTED[1]:
        stop(
            f"Python {here[0]}.{here[1]} is not supported (3.11 to 3.13 are): install one, for example "
            "`sudo apt install python3.12 python3.12-venv`, and run `make PYTHON=python3.12 ...`."
        )
    missing = []
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        missing.append("python3-venv")
    if not any(shutil.which(c) for c in (os.environ.get("CC", "cc"), "gcc", "clang")):
        missing.append("build-essential")  # Triton compiles its launcher on a GPU machine
    if not shutil.which("git"):
        missing.append("git")
    if missing:
        stop(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: sudo apt install {' '.join(missing)}"
        )


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver answers: its kernel module is loaded, or nvidia-smi lists a GPU."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    smi = shutil.which("nvidia-smi")
    if not smi:
        return False
    try:
        r = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return r.returncode == 0 and "GPU 0" in r.stdout


def uv_settings() -> dict[str, str]:
    """uv's index and find-links settings as pip's variables; pip's own win where both are set."""
    config: dict[str, object] = {}
    home = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    for path in (
        Path("/etc/uv/uv.toml"),
        home / "uv" / "uv.toml",
        Path(os.environ.get("UV_CONFIG_FILE", "/nonexistent")),
    ):
        if path.is_file():
            with path.open("rb") as f:
                data = tomllib.load(f)
            config.update(data.get("pip", {}))
            config.update({k: v for k, v in data.items() if k != "pip"})
    indexes = [i for i in config.get("index", []) if isinstance(i, dict)]  # type: ignore[attr-defined]
    default = next((str(i["url"]) for i in indexes if i.get("default")), str(config.get("index-url", "")))
    extra = [str(i["url"]) for i in indexes if not i.get("default")] + list(config.get("extra-index-url", []))  # type: ignore[call-overload]
    links = [str(x) for x in config.get("find-links", [])]  # type: ignore[attr-defined]
    env = os.environ
    found = {
        "PIP_INDEX_URL": env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL") or default,
        "PIP_EXTRA_INDEX_URL": env.get("UV_INDEX") or env.get("UV_EXTRA_INDEX_URL") or " ".join(extra),
        "PIP_FIND_LINKS": env.get("UV_FIND_LINKS", "").replace(",", " ") or " ".join(links),
        "PIP_NO_INDEX": "1" if env.get("UV_NO_INDEX") or config.get("no-index") else "",
    }
    return {k: v for k, v in found.items() if v and k not in env}


def own_pip_cache() -> Path:
    """A pip cache of our own, so that `make uninstall` finds what set-up downloaded, which the user's own cache would hide."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SPARKPROOF_CACHE") or Path(cache) / "sparkproof") / "pip"


def own(path: Path, kind: str) -> None:
    """List a folder as ours, in the form of sparkproof.rollback.manifest. A list that can't be written is no error."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sparkproof"
    target = Path(os.environ.get("SPARKPROOF_MANIFEST") or state / "manifest.jsonl")
    try:
        st = path.stat()
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        entry = {"path": str(path.resolve()), "kind": kind, "added": now, "device": st.st_dev, "inode": st.st_ino}
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
    except OSError as e:
        print(f"sparkproof set-up: {path} could not be listed as sparkproof's own ({e.strerror})", file=sys.stderr)


def digest(torch_spec: str) -> str:
    """What the environment was made from; a change of any part makes it again."""
    h = hashlib.sha256()
    for path in (LOCK, llama_converter.PIN, ROOT / "pyproject.toml", Path(__file__), Path(llama_converter.__file__)):
        h.update(path.read_bytes())
    h.update(f"{sys.version}|{platform.machine()}|{torch_spec}|{ROOT}".encode())
    return h.hexdigest()


def pip(python: Path, what: str, *arguments: str, env: dict[str, str], fatal: bool = True) -> bool:
    """Run pip quietly; on failure show its last lines and say what could not be installed."""
    print(f"sparkproof set-up: {what} ...", flush=True)
    start = time.monotonic()
    if arguments[0] != "download":
        arguments = ("install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile", *arguments)
    command = [str(python), "-m", "pip", *arguments]
    r = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if r.returncode == 0:
        print(f"sparkproof set-up: {what}: done in {time.monotonic() - start:.0f} s", flush=True)
        return True
    if fatal:
        print("\n".join(r.stdout.splitlines()[-15:]), file=sys.stderr)
        space = shutil.disk_usage(python.parent).free / 2**30
        hint = (
            f"only {space:.1f} GiB are free on that disk: make room and run the same command again."
            if "No space left" in r.stdout or space < 1
            else "if this machine reaches no package index, set PIP_INDEX_URL or PIP_FIND_LINKS to your mirror."
        )
        stop(f"{what} failed; {hint}")
    return False


def compile_all(python: Path) -> None:
    """Byte code of all packages but their tests, on every core: pip's own, one after the other, was half of its 118 s.

    Where PYTHONDONTWRITEBYTECODE is set, as in many images, an import without it costs twice as much for ever.
    """
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    print("sparkproof set-up: byte code ...", flush=True)
    start = time.monotonic()
    # Some packages carry files of other Pythons, which don't compile; pip passes over them too.
    command = [str(python), "-m", "compileall", "-q", "-j", "0", "-x", "/tests?/", site.stdout.strip()]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    print(f"sparkproof set-up: byte code: done in {time.monotonic() - start:.0f} s", flush=True)


def install_torch(python: Path, spec: str, env: dict[str, str]) -> None:
    """A CPU build comes from the configured mirror or find-links if they have it, else from PyTorch's own CPU index."""
    if spec == TORCH_CPU:
        # The +cpu suffix is on no CUDA wheel, so neither try can fetch one.
        if pip(python, f"{spec} from the configured sources", "--no-deps", spec, env=env, fatal=False):
            return
        pip(python, f"{spec} from {TORCH_CPU_INDEX}", "--no-deps", "--extra-index-url", TORCH_CPU_INDEX, spec, env=env)
        return
    pip(python, f"{spec} (CUDA build, about 3 GB)", spec, env=env)


def main() -> None:
    """Set up the environment named on the command line."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv").resolve()
    check_prerequisites()
    gpu = has_nvidia_gpu()
    spec = os.environ.get("TORCH_SPEC") or (TORCH_CUDA if gpu else TORCH_CPU)
    stamp = target / "sparkproof-setup.json"
    wanted = digest(spec)
    python = target / "bin" / "python"
    if stamp.is_file() and python.exists() and json.loads(stamp.read_text())["digest"] == wanted:
        return
    stamp.unlink(missing_ok=True)
    print(
        f"sparkproof set-up: {target}, {'NVIDIA GPU found' if gpu else 'no NVIDIA GPU: CPU build of torch'}", flush=True
    )
    env = {**os.environ, **uv_settings()}
    if "PIP_CACHE_DIR" not in env and "PIP_NO_CACHE_DIR" not in env:
        cache = own_pip_cache()
        fresh = not cache.parent.exists()
        cache.mkdir(parents=True, exist_ok=True)
        if fresh:
            own(cache.parent, "cache")
        env["PIP_CACHE_DIR"] = str(cache)
    for name in ("PYTHONPATH", "PIP_USER", "PIP_TARGET"):
        env.pop(name, None)
    r = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(target)], capture_output=True, text=True, check=False
    )
    if r.returncode:
        stop(
            f"the virtual environment could not be made ({(r.stderr or r.stdout).strip().splitlines()[-1]}): "
            "sudo apt install python3-venv, and look at the free space"
        )
    own(target, "venv")
    pip(python, "locked packages", "--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(LOCK), env=env)
    install_torch(python, spec, env)
    with tempfile.TemporaryDirectory() as folder:
        pip(python, "llama.cpp's converter (77 MB)", *llama_converter.download(Path(folder)), env=env)
        llama_converter.unpack(next(Path(folder).glob("*.tar.gz")), target)
    compile_all(python)
    pip(python, "sparkproof itself", "--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT), env=env)
    stamp.write_text(json.dumps({"digest": wanted, "torch": spec, "python": sys.version}))


if __name__ == "__main__":
    main()
