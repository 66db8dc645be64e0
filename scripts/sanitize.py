"""Look for memory errors and shared-memory races in every kernel: `python scripts/sanitize.py [--op OP]...`.

Runs NVIDIA's compute-sanitizer over `sparkproof.judge.exercise`, which calls each op at small sizes, forward and backward,
in one process: memcheck for reads and writes outside of tensors, racecheck for threads of a block that don't wait for each
other. When a tool finds something, the ops are run again one by one, so that the table says which. Exit 0: nothing was
found; 1: something was; 2: it could not be run here.

PyTorch's caching allocator is switched off for it: within a cached block a read past a tensor's end would look allowed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
FOUND = 77  # what compute-sanitizer exits with when the program succeeded and the tool found something
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
GET_IT = "it comes with the CUDA toolkit, or: pip install nvidia-cuda-sanitizer-api"


@dataclass(frozen=True)
class Finding:
    """What one tool said of some ops."""

    ops: tuple[str, ...]
    tool: str
    clean: bool
    said: str  # in a few words
    log: str


def sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, in a CUDA toolkit, or in NVIDIA's wheel; None if it is nowhere."""
    if found := shutil.which("compute-sanitizer"):
        return found
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    places = [t / "bin" / "compute-sanitizer" for t in toolkits]
    for folder in map(Path, sys.path):
        places += sorted(folder.glob("nvidia/*/compute-sanitizer/compute-sanitizer"))
    return next((str(p) for p in places if p.is_file() and os.access(p, os.X_OK)), None)


def obstacle() -> str:
    """Why nothing can be checked here, as a sentence; empty when it can."""
    if sanitizer() is None:
        return f"compute-sanitizer was not found: {GET_IT}."
    import torch

    if not torch.cuda.is_available():
        return "There is no GPU that torch can use, and compute-sanitizer watches a GPU."
    return ""


def run(tool: str, ops: list[str]) -> Finding:
    """One tool over some ops in one process."""
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        log = Path(folder) / "log"
        command = [
            str(sanitizer()), "--tool", tool, "--error-exitcode", str(FOUND), "--log-file", str(log),
            "--target-processes", "application-only", "--launch-timeout", "0",
            *(["--report-api-errors", "no"] if tool == "memcheck" else []),
            sys.executable, "-m", "sparkproof.judge.exercise", *ops,
        ]  # fmt: skip
        # What torch asks the driver and gets refused is not reported: no kernel has to do with it.
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return judge(tool, ops, done.returncode, text, done.stdout + done.stderr)


def judge(tool: str, ops: list[str], code: int, log: str, output: str) -> Finding:
    """Clean only when the program ended well, the tool wrote its summary, and that counts nothing."""
    counts = [int(n) for n in SUMMARY.findall(log)]
    last = output.strip().splitlines()[-1:] or [""]
    if sum(counts):
        return Finding(tuple(ops), tool, False, f"{sum(counts)} found", log)
    if not counts:
        return Finding(tuple(ops), tool, False, f"did not finish: {last[0][:200]}", log + output)
    if code:
        return Finding(tuple(ops), tool, False, f"the program ended with {code}: {last[0][:200]}", log + output)
    return Finding(tuple(ops), tool, True, "clean", log)


def check(ops: list[str]) -> list[Finding]:
    """Every tool over all ops at once, then over each alone where something was found."""
    found = []
    for tool in TOOLS:
        print(f"{tool} over {len(ops)} ops in one process ...", flush=True)
        whole = run(tool, ops)
        if whole.clean or len(ops) == 1:
            found.append(whole)
            continue
        print(f"{tool}: {whole.said}; now one op a process, to say which ...", flush=True)
        each = [run(tool, [op]) for op in ops]
        found += each if not all(f.clean for f in each) else [whole]
    return found


def table(ops: list[str], found: list[Finding]) -> str:
    """A row an op, a column a tool, and then the logs of what was found."""
    said = {(op, f.tool): f.said for f in found for op in f.ops}
    width = max(map(len, ops))
    lines = [f"{'op':{width}}  " + "  ".join(f"{t:24}" for t in TOOLS)]
    lines += [f"{op:{width}}  " + "  ".join(f"{said[op, t][:60]:24}" for t in TOOLS) for op in ops]
    for f in found:
        if not f.clean:
            lines += ["", f"{f.tool}, {', '.join(f.ops)}: {f.said}", f.log[:6000]]
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Parse the command line, check, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
    wanted = parser.parse_args().op
    from sparktune.ops import op_names

    known = op_names()
    for op in wanted:
        if op not in known:
            print(f"There is no op '{op}'. Known: {', '.join(known)}.", file=sys.stderr)
            return 2
    if why := obstacle():
        print(f"Nothing was checked. {why}", file=sys.stderr)
        return 2
    ops = wanted or known
    found = check(ops)
    print(table(ops, found))
    return 0 if all(f.clean for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
