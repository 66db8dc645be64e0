"""The throwaway machine of a rollback case: an environment, a home, a temporary and a working folder inside the
case's own folder.

Nothing that runs in it sees the real home, and nothing in it is there before or after the case.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sparkproof.errors import UserError
from sparkproof.results import ReasonClass
from sparkproof.rollback import snapshot, standin
from sparkproof.rollback.model import Snapshot

OLDER, OLDER_VERSION = "packaging", "24.0"  # a dependency that the installation upgrades
USERS = "users-own-package"
TAIL = 25


class StepFailed(Exception):
    """What pip (or Python's venv) said when it failed: a finding about what is tested."""


@dataclass
class Sandbox:
    """The throwaway machine."""

    root: Path
    timeout_s: float

    @property
    def venv(self) -> Path:
        """The environment."""
        return self.root / "venv"

    @property
    def home(self) -> Path:
        """HOME of everything that runs in it."""
        return self.root / "home"

    @property
    def wheels(self) -> Path:
        """Where pip finds stand-ins."""
        return self.root / "wheels"

    @property
    def work(self) -> Path:
        """Current folder of the training script."""
        return self.root / "work"

    def env(self, offline: bool) -> dict[str, str]:
        """Variables: nothing that points out of the sandbox, the index settings apart, which `real` needs."""
        kept = (
            "PATH",
            "LANG",
            "LC_ALL",
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "HTTPS_PROXY",
            "HTTP_PROXY",
            "NO_PROXY",
        )
        indexes = (
            "PIP_INDEX_URL",
            "PIP_EXTRA_INDEX_URL",
            "PIP_FIND_LINKS",
            "PIP_TRUSTED_HOST",
            "PIP_CERT",
            "PIP_NO_INDEX",
        )
        chosen = {k: os.environ[k] for k in (*kept, *(() if offline else indexes)) if k in os.environ}
        chosen |= {"HOME": str(self.home), "TMPDIR": str(self.root / "tmp"), "USER": "user", "LOGNAME": "user"}
        chosen |= {"PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if offline:
            chosen |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        return chosen

    def pip(self, *words: str, offline: bool) -> str:
        """Run the environment's pip. Errors: StepFailed with its last lines."""
        return self.run([str(self.venv / "bin" / "python"), "-m", "pip", *words], self.env(offline))

    def run(self, command: list[str], env: dict[str, str]) -> str:
        """Run a command in the working folder. Errors: StepFailed."""
        try:
            done = subprocess.run(
                command, env=env, cwd=self.work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", timeout=self.timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{' '.join(command[:6])} did not end within {self.timeout_s:.0f} s") from None
        if done.returncode:
            tail = "\n".join(done.stdout.splitlines()[-TAIL:])
            raise StepFailed(f"{' '.join(command[:6])} ended with {done.returncode}:\n{tail}")
        return done.stdout

    def snapshot(self, offline: bool) -> Snapshot:
        """What the sandbox holds; the machine's containers and Debian packages are no part of it."""
        return snapshot.take(
            [self.venv], self.home, env=self.env(offline), cwd=self.work, areas=["python", "caches", "profiles"],
            budget_s=60,
        )  # fmt: skip


def prepare(box: Sandbox, offline: bool = True) -> dict[Path, bytes]:
    """Make the environment with the user's own things in it. `offline=False`: the older dependency is the index's own, since it
    is the index that gives it back. Returns files that must survive, with their content."""
    if importlib.util.find_spec("ensurepip") is None:
        raise UserError(
            "This Python can't make environments with pip in them: it has no ensurepip.",
            "sudo apt install python3-venv",
            skip_class=ReasonClass.SOFTWARE,
        )
    for folder in (box.home, box.work, box.wheels, box.root / "tmp"):
        folder.mkdir(parents=True)
    box.run([sys.executable, "-m", "venv", str(box.venv)], box.env(offline=True))
    if next(box.venv.glob("lib/python3*/site-packages/setuptools"), None):
        # Python 3.11 bundles an old setuptools, which the installation would replace and which only an index could give
        # back; later ones, the playbook's 3.12 among them, don't have it.
        box.pip("uninstall", "-y", "-q", "setuptools", offline=True)
    standin.wheelhouse(box.wheels)
    if offline:
        standin.wheel(box.wheels, OLDER, OLDER_VERSION)
    standin.wheel(box.wheels, USERS, "1.0")
    box.pip("install", "--no-input", "-q", USERS, offline=True)
    box.pip("install", "--no-input", "-q", f"{OLDER}=={OLDER_VERSION}", offline=offline)

    hub = box.home / ".cache/huggingface/hub/models--user--own"
    outside = box.root / "outside" / "thesis.txt"
    files = {
        hub / "blobs/00ff": b"a model of the user's own",
        box.home / ".bashrc": b"export EDITOR=vi\n",
        box.work / "train.py": b"print('the user trains')\n",
        outside: b"reached from a cache through a link only",
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    python = next((box.venv / "lib").glob("python3*"))
    own = python / "site-packages/users_own_package/__init__.py"
    return {**files, own: own.read_bytes()}
