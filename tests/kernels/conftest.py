"""Tests marked `kernels` run kernels: on the GPU where torch has one, and in Triton's interpreter otherwise.

The interpreter is chosen when Triton is imported. `pytest tests/kernels` alone imports nothing before this file, so
it is switched on here for the whole process. In a run of all tests others have imported Triton, and must not find it
interpreting: there each such test runs in a process of its own.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: runs kernels, on a GPU or in Triton's interpreter")
    alone = all(HERE in (p := Path(a.split("::")[0]).resolve()).parents or p == HERE for a in config.args)
    if not GPU and alone and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


def _here() -> bool:
    from sparktune.ops import dispatch

    return GPU or dispatch.INTERPRETED


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    mark = pyfuncitem.get_closest_marker("kernels")
    if mark is None or _here():
        return None
    # Short tests share one child for their file, since starting one costs more than they do.
    together = mark.kwargs.get("together", False)
    node = pyfuncitem.nodeid.split("::")[0] if together else pyfuncitem.nodeid
    passed, output = _in_child(node, pyfuncitem.config.rootpath)
    if f"{pyfuncitem.nodeid} PASSED" not in passed:
        pytest.fail(f"in the interpreter:\n{output[-8000:]}", pytrace=False)
    return True


@functools.cache
def _in_child(node: str, root: Path) -> tuple[str, str]:
    """(lines of the tests that passed, all output) of a pytest that interprets kernels."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--show-capture=no",
        node,
    ]
    done = subprocess.run(
        command, cwd=root, env=env | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "\n".join(x for x in done.stdout.splitlines() if " PASSED" in x), done.stdout + done.stderr


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
