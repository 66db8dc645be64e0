"""scripts/sanitize.py with a compute-sanitizer that only pretends, and the ops it runs in the interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest

FAKE = """#!/bin/sh
# Writes what the tool would into --log-file and says what it was asked to run.
tool="" ; log="" ; op=""
while [ $# -gt 0 ]; do
  case "$1" in --tool) tool=$2;; --log-file) log=$2;; sparkproof.judge.exercise) shift; op="$*"; break;; esac
  shift
done
name=ERROR; [ "$tool" = racecheck ] && name=RACECHECK
case "$FAULT" in
  "") echo "========= $name SUMMARY: 0" > "$log";;
  dead) echo "killed"; exit 1;;
  *) case "$tool $op" in
       "$FAULT"*|*" $(echo $FAULT | cut -d' ' -f2)"*) [ "${FAULT%% *}" = "$tool" ] && {
         printf '========= Invalid __global__ read\\n========= %s SUMMARY: 2 found\\n' "$name" > "$log"; exit 77; };;
     esac
     echo "========= $name SUMMARY: 0" > "$log";;
esac
"""


@pytest.fixture
def sanitize(pytestconfig):
    path = pytestconfig.rootpath / "scripts" / "sanitize.py"
    info = importlib.util.spec_from_file_location("sanitize", path)
    module = importlib.util.module_from_spec(info)
    sys.modules["sanitize"] = module
    info.loader.exec_module(module)
    return module


@pytest.fixture
def fake(sanitize, tmp_path, monkeypatch):
    path = tmp_path / "compute-sanitizer"
    path.write_text(FAKE)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sanitize, "obstacle", lambda: "")
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--op", "rms_norm", "--op", "swiglu"])
    return sanitize


def test_without_a_gpu_or_the_tool_one_sentence_says_so(sanitize, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    assert sanitize.main() == 2
    assert "compute-sanitizer was not found" in capsys.readouterr().err
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "/somewhere")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sanitize.main() == 2
    err = capsys.readouterr().err
    assert "no GPU" in err and len(err.splitlines()) == 1


def test_clean_ops_give_a_table_and_zero(fake, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", "")
    assert fake.main() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows == [["rms_norm", "clean", "clean"], ["swiglu", "clean", "clean"]]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_fault_is_laid_at_its_ops_door(fake, monkeypatch, capsys, tool):
    monkeypatch.setenv("FAULT", f"{tool} swiglu")
    assert fake.main() == 1
    out = capsys.readouterr().out
    assert f"{tool}, swiglu: 2 found" in out and "Invalid __global__ read" in out
    (row,) = [line for line in out.splitlines() if line.startswith("rms_norm ")]
    assert row.split() == ["rms_norm", "clean", "clean"]


def test_a_tool_that_dies_is_no_pass(fake, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", "dead")
    assert fake.main() == 1
    assert "did not finish: killed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "log", "clean"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", False),
        (77, "========= ERROR SUMMARY: 3 errors", False),
        (1, "========= ERROR SUMMARY: 0 errors", False),
        (0, "", False),
    ],
)
def test_what_counts_as_clean(sanitize, code, log, clean):
    assert sanitize.judge("memcheck", ["x"], code, log, "").clean is clean


def test_an_unknown_op_is_named(sanitize, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--op", "gelu"])
    assert sanitize.main() == 2 and "no op 'gelu'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_runner_calls_an_op_forward_and_backward():
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    code = (
        "import sys\nfrom sparkproof.judge.exercise import main\nfrom sparktune.ops import dispatch\n"
        "assert main(['swiglu', 'grad_norm']) == 0\n"
        "n = dispatch.launches()\n"
        "assert n['sparktune.ops.swiglu.backward_kernel'] > 3 and n['sparktune.ops.grad_norm.prepare_kernel'] > 3, n\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "swiglu: " in done.stdout
