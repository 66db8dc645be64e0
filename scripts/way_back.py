"""`python3 scripts/way_back.py VENV VERB [ARGS]`: snapshot, uninstall and verify-rollback from outside the environment that they
may have to remove, and without one. Standard library only; the Makefile calls it.

The verbs need a few small packages, not torch. They are copied out of VENV where that has them (so an air-gapped machine can
uninstall), else installed from the hash lock, into a temporary folder that is removed at the end.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True
import setup_env  # noqa: E402  - beside this file

ROOT = Path(__file__).resolve().parent.parent
LOCK = setup_env.LOCK
VERBS = ("snapshot", "uninstall", "verify-rollback")
# What `sparkproof.cli` and `sparkproof.rollback` import, and what that needs.
NEEDED = (
    "annotated-doc", "annotated-types", "certifi", "charset-normalizer", "click", "docker", "idna", "markdown-it-py", "mdurl",
    "nvidia-ml-py", "packaging", "platformdirs", "psutil", "pydantic", "pydantic-core", "pygments", "pyyaml", "requests", "rich",
    "shellingham", "typer", "typing-extensions", "typing-inspection", "urllib3",
)  # fmt: skip


def stop(message: str) -> None:
    """End with one sentence."""
    sys.exit(f"error: {message}")


def work_folder() -> Path:
    """An empty folder of this user's, always the same: what a killed run left there goes with the next."""
    path = Path(tempfile.gettempdir()) / f"sparkproof-way-back-{os.getuid()}"
    if path.exists() and (path.is_symlink() or path.stat().st_uid != os.getuid()):
        stop(f"{path} belongs to somebody else: set TMPDIR to a folder of your own.")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    return path


def copy_packages(venv: Path, target: Path) -> str:
    """Copy the needed distributions out of an environment. Returns its interpreter's real path, or '' if one is missing."""
    python = venv / "bin" / "python"
    site = next(iter(sorted(venv.glob("lib/python3*/site-packages"))), None)
    if site is None or not python.exists():
        return ""
    infos = {re.sub(r"[-_.]+", "-", p.name.partition("-")[0]).lower(): p for p in site.glob("*.dist-info")}
    records = [infos[n] / "RECORD" for n in NEEDED if n in infos and (infos[n] / "RECORD").is_file()]
    if len(records) != len(needed_here()):
        return ""
    for record in records:
        for row in csv.reader(record.read_text(encoding="utf-8").splitlines()):
            if row and not row[0].startswith(("..", "/")) and not row[0].endswith(".pyc") and (site / row[0]).is_file():
                (target / row[0]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(site / row[0], target / row[0])
    return os.path.realpath(python)


def needed_here() -> list[str]:
    """Those of the needed packages that the lock has; it names none that its requirements do not ask for."""
    text = LOCK.read_text(encoding="utf-8")
    return [n for n in NEEDED if re.search(rf"^{re.escape(n)}==", text, re.MULTILINE)]


def install_packages(folder: Path, target: Path) -> str:
    """Install them from the lock, by the pip of a throwaway environment. Returns this interpreter's path."""
    if importlib.util.find_spec("ensurepip") is None:
        stop("this Python can't make environments: sudo apt install python3-venv")
    blocks = re.split(r"^(?=[a-z0-9])", LOCK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wanted = folder / "lock.txt"
    wanted.write_text("".join(b for b in blocks if b.partition("==")[0] in NEEDED), encoding="utf-8")
    print(
        "sparkproof: fetching the few packages that this needs into a temporary folder ...", file=sys.stderr, flush=True
    )
    venv = folder / "venv"
    env = {**os.environ, **setup_env.uv_settings(), "PIP_NO_CACHE_DIR": "1"}
    for name in ("PYTHONPATH", "PIP_USER", "PIP_TARGET"):
        env.pop(name, None)
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", *options, "--target", str(target), "-r", str(wanted)]
    for command in ([sys.executable, "-m", "venv", str(venv)], pip):
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print("\n".join(done.stdout.splitlines()[-10:]), file=sys.stderr)
            stop(
                "the packages that this needs can't be installed; without a package index, set PIP_INDEX_URL or PIP_FIND_LINKS."
            )
    return sys.executable


def main() -> int:
    """Run the verb; returns its exit code."""
    if len(sys.argv) < 3 or sys.argv[2] not in VERBS:
        stop(f"usage: way_back.py VENV {'|'.join(VERBS)} [ARGS]")
    venv, verb, arguments = Path(sys.argv[1]).absolute(), sys.argv[2], sys.argv[3:]
    folder = work_folder()
    try:
        target = folder / "site"
        target.mkdir()
        python = copy_packages(venv, target) or install_packages(folder, target)
        # VIRTUAL_ENV stays: an active environment of the user's is what a snapshot is about
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(target), str(ROOT / "harness")]),
            "SPARKPROOF_VENV": str(venv),
        }
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        child = subprocess.Popen([python, "-s", "-m", "sparkproof", verb, *arguments], env=env)
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the terminal told the child too; it ends by itself
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
