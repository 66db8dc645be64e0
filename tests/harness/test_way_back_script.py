"""scripts/way_back.py: the verbs from outside the environment that they remove, and the list that set-up keeps for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sparkproof.rollback import manifest

ROOT = Path(__file__).parents[2]


def run(home: Path, *words: str, venv: Path | None = None) -> subprocess.CompletedProcess[str]:
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    env = {"HOME": str(home), "PATH": str(home), "TMPDIR": str(home / "tmp"), "COLUMNS": "200"}
    env |= {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    env |= {
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_RUNTIME_DIR": str(home),
        "DOCKER_HOST": f"unix://{home}/no.sock",
    }
    command = [sys.executable, str(ROOT / "scripts/way_back.py"), str(venv or sys.prefix), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False, cwd=home)


def environment_of_ours(folder: Path) -> Path:
    """An environment as `make setup` leaves it, with no more in it than this process's packages, by links."""
    site = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    (folder / site).parent.mkdir(parents=True)
    (folder / site).symlink_to(Path(sys.prefix, site))
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(Path(sys.prefix, "bin/python").resolve())
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "sparkproof-setup.json").write_text("{}")
    return folder


def test_it_removes_the_environment_that_its_packages_came_from(tmp_path: Path) -> None:
    home = tmp_path / "home"
    venv = environment_of_ours(tmp_path / "checkout/.venv")
    shown = run(home, "uninstall", "--dry-run", venv=venv)
    assert shown.returncode == 0 and f"sparkproof's environment {venv}" in shown.stdout, shown.stderr
    done = run(home, "uninstall", "--yes", venv=venv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All that was sparkproof's is gone" in done.stdout and not venv.exists()
    assert Path(sys.prefix, "lib").exists() and not (home / "state/sparkproof").exists()
    assert not list((home / "tmp").iterdir()), "it leaves nothing of its own either"


def test_wrong_verbs_are_refused(tmp_path: Path) -> None:
    wrong = run(tmp_path, "uninstal")
    assert wrong.returncode == 1 and "usage" in wrong.stderr


def test_what_setup_lists_is_what_uninstall_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import setup_env

    folder = tmp_path / "venv"
    folder.mkdir()
    setup_env.own(folder, "venv")
    entry = manifest.ours()[0]
    assert (entry.path, entry.kind) == (str(folder), "venv")
    assert json.loads(manifest.manifest_path().read_text())["inode"] == folder.stat().st_ino


@pytest.mark.slow  # fetches two dozen small packages from the index
def test_without_any_environment_it_fetches_what_it_needs_and_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    missing = tmp_path / "checkout/.venv"
    taken = run(home, "snapshot", venv=missing)
    assert taken.returncode == 0 and "Recorded in" in taken.stdout, taken.stderr
    same = run(home, "verify-rollback", "--json", venv=missing)
    states = {p["area"]: p["unknown"] for p in json.loads(same.stdout)["parts"]}
    assert same.returncode in (0, 1) and not states["python"] and not states["caches"], same.stdout[-2000:]
    assert not missing.exists() and {p.name for p in home.iterdir()} == {"tmp", "state"}
