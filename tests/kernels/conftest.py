"""Tests marked `kernels` run kernels: on the GPU where torch has one, and in Triton's interpreter otherwise.

The interpreter is chosen when Triton is imported. `pytest tests/kernels` alone imports nothing before this file, so
it is switched on here for the whole process. In a run of all tests others have imported Triton, and must not find it
interpreting: there each such test runs in a process of its own.
"""

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
    if pyfuncitem.get_closest_marker("kernels") is None or _here():
        return None
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", pyfuncitem.nodeid]
    done = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=env | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0 or "1 passed" not in done.stdout:
        pytest.fail(f"in the interpreter:\n{done.stdout[-6000:]}{done.stderr[-2000:]}", pytrace=False)
    return True


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
