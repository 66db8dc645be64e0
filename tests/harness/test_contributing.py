"""CONTRIBUTING's recipe for a kernel, followed to the letter in a copy: its files, its commands, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILE = re.compile(r"`(?P<path>[\w./]+)`:\n\n```\w+\n(?P<body>.*?)```\n", re.DOTALL)
COMMAND = re.compile(r"^    sparkproof (.+)$", re.MULTILINE)


@pytest.fixture
def recipe(pytestconfig) -> tuple[dict[str, str], list[list[str]]]:
    """(path -> text of each file, words of each command) of the section."""
    text = (pytestconfig.rootpath / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Add a kernel\n")[1].split("\n## ")[0]
    return {m["path"]: m["body"] for m in FILE.finditer(section)}, [c.split() for c in COMMAND.findall(section)]


@pytest.fixture
def checkout(pytestconfig, tmp_path) -> Path:
    """A copy of the kernels and scenarios, to which a kernel is added."""
    for name in ("kernels", "scenarios"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(pytestconfig.rootpath / name, tmp_path / name, ignore=ignored)
    return tmp_path


def write(checkout: Path, files: dict[str, str]) -> None:
    for path, body in files.items():
        target = checkout / path
        assert target.parent.is_dir() and not target.exists(), f"{path} must be new, in a folder that is there"
        target.write_text(body, encoding="utf-8")


def run(checkout: Path, root: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(checkout / "kernels"), str(root / "harness")))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "sparkproof", *words]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)


def test_the_recipe_is_one_file_one_scenario_and_three_commands(recipe):
    files, commands = recipe
    (op,) = (Path(p) for p in files if p.startswith("kernels/"))
    (scenario,) = (Path(p) for p in files if p.startswith("scenarios/"))
    assert op.parent == Path("kernels/sparktune/ops") and scenario == Path(f"scenarios/kernels/{op.stem}.yaml")
    assert [c[0] for c in commands] == ["validate", "selftest", "compile"]
    assert all(op.stem in c[-1] for c in commands)
    assert len(files[str(op)].splitlines()) < 160


def test_its_code_passes_the_linter(recipe, checkout, pytestconfig):
    write(checkout, recipe[0])
    paths = [str(checkout / p) for p in recipe[0] if p.endswith(".py")]
    config = str(pytestconfig.rootpath / "pyproject.toml")
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", "--config", config, *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_it_compiles_and_without_the_one_file_nothing_runs(recipe, checkout, pytestconfig):
    files, commands = recipe
    root = pytestconfig.rootpath
    write(checkout, {p: b for p, b in files.items() if p.startswith("scenarios/")})
    for words in commands[1:]:
        done = run(checkout, root, words)
        assert done.returncode != 0 and "There is no op" in done.stdout + done.stderr, (words, done.stdout, done.stderr)
    write(checkout, {p: b for p, b in files.items() if p.startswith("kernels/")})
    done = run(checkout, root, commands[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 do not fit" in done.stdout


@pytest.mark.slow
def test_followed_to_the_letter_it_gives_a_proven_kernel(recipe, checkout, pytestconfig):
    files, commands = recipe
    write(checkout, files)
    for words in commands:
        done = run(checkout, pytestconfig.rootpath, words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        if words[0] == "validate":
            assert done.stdout.count("[  OK  ]") == 3, done.stdout  # fp32, bf16, fp16


@pytest.mark.slow
def test_without_the_one_file_the_first_command_fails_too(recipe, checkout, pytestconfig):
    files, commands = recipe
    write(checkout, {p: b for p, b in files.items() if p.startswith("scenarios/")})
    assert run(checkout, pytestconfig.rootpath, commands[0]).returncode != 0
