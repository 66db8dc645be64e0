"""Read what lies outside Python: Debian packages, start-up files, variables. Nothing here is ever removed, only compared."""

# ruff: noqa: PTH118
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sparkproof.rollback.model import Dpkg, Machine, Profiles, Variables

PROFILE_FILES = (
    ".bashrc", ".bash_profile", ".bash_login", ".profile", ".zshenv", ".zshrc", ".zprofile", ".config/fish/config.fish",
)  # fmt: skip
SYSTEM_FILES = ("/etc/environment", "/etc/profile", "/etc/bash.bashrc", "/etc/zsh/zshenv", "/etc/zsh/zshrc")
DROP_INS = ("/etc/profile.d", "/etc/ld.so.conf.d", ".config/environment.d")
PATH_LIKE = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
MOVED_BY = (
    "BNB_", "CUDA", "CUDNN", "DOCKER_", "HF_", "HUGGINGFACE_", "LD_", "NCCL_", "NVIDIA_", "OLLAMA_", "PIP_", "PYTHON", "PYTORCH",
    "TORCH", "TRANSFORMERS_", "TRITON_", "UNSLOTH_", "UV_", "VLLM_",
)  # fmt: skip


def machine() -> Machine:
    """Which machine this is."""
    try:
        text = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        text = ""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""
    return Machine(id=digest, hostname=socket.gethostname(), uid=os.getuid())


def profiles(home: str) -> Profiles:
    """Digests of the files that set up this user's shells and sessions, and the loader's search path."""
    found = Profiles()
    paths = [*(os.path.join(home, f) for f in PROFILE_FILES), *SYSTEM_FILES]
    for folder in DROP_INS:
        paths += sorted(str(p) for p in Path(home, folder).glob("*") if p.is_file())
    for path in paths:
        try:
            found.files[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        except FileNotFoundError:
            found.files[path] = ""
        except OSError as e:
            found.not_read[path] = e.strerror or str(e)
    return found


def dpkg() -> Dpkg:
    """Installed Debian packages."""
    if not shutil.which("dpkg-query"):
        return Dpkg()
    command = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}\t${Package}:${Architecture}\t${Version}\n"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return Dpkg(installed=True, not_read=f"dpkg-query: {e}")
    rows = [line.split("\t") for line in out.splitlines() if line.startswith(("ii", "hi"))]
    packages = {row[1]: row[2] for row in rows if len(row) == 3}
    text = "".join(f"{n} {v}\n" for n, v in sorted(packages.items()))
    return Dpkg(installed=True, packages=packages, digest=hashlib.sha256(text.encode()).hexdigest())


def variables(env: Mapping[str, str]) -> Variables:
    """Those variables of `env` that move a fine-tuning stack."""
    found = Variables()
    for name, value in sorted(env.items()):
        if name in PATH_LIKE:
            found.values[name] = value
        elif name.startswith(MOVED_BY):
            found.values[name] = "digest " + hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:12]
    return found
