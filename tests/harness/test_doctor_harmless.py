"""Nothing that the doctor runs can harm a machine, held to by its source: checks are pure, and probes are bounded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from sparkproof.checks.catalogue import TOPICS

HARNESS = Path(__file__).parents[2] / "harness" / "sparkproof"
PURE = {"__future__", "collections", "packaging", "typing", "dataclasses", "re"}
OURS = {"sparkproof.results", "sparkproof.measure.memory"}
OURS |= {f"sparkproof.facts.{m}" for m in ("model", "installed", "tried", "fabric", "toolchain")}
PROBES = sorted((HARNESS / "facts").glob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.Call))


@pytest.mark.parametrize("topic", TOPICS)
def test_checks_touch_nothing(topic: str) -> None:
    tree = ast.parse((HARNESS / "checks" / f"{topic}.py").read_text(encoding="utf-8"))
    for name in imports(tree):
        allowed = name.split(".")[0] in PURE or name in OURS or name.startswith("sparkproof.checks")
        assert allowed, f"{topic} imports {name}"
    assert not [
        c for c in calls(tree) if isinstance(c.func, ast.Name) and c.func.id in ("open", "exec", "eval", "print")
    ]


@pytest.mark.parametrize("path", PROBES, ids=lambda p: p.stem)
def test_every_command_goes_through_the_host_with_a_timeout(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.stem != "host":
        assert "subprocess" not in set(imports(tree)), "host.run alone starts processes: it ends them in time"
    for call in calls(tree):
        function = ast.unparse(call.func)
        if function in ("host.run", "self.host.run", "host.run_python"):
            assert len(call.args) >= 2, f"{path.name}:{call.lineno} has no timeout"
            bound = ast.unparse(call.args[1])
            assert bound == "timeout_s" or bound.endswith("TIMEOUT_S"), f"{path.name}:{call.lineno}: {bound}"
        assert function not in ("os.system", "os.popen", "shutil.rmtree", "os.remove", "os.unlink", "os.kill")


@pytest.mark.parametrize("path", PROBES, ids=lambda p: p.stem)
def test_probes_need_no_root_and_name_no_dangerous_tool(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " not in n.value
    }
    assert not words & {
        "sudo",
        "su",
        "modprobe",
        "rmmod",
        "reboot -f",
        "drop_caches",
        "swapoff",
        "kill",
        "rm",
        "nvidia-smi",
    }


def test_trials_allocate_a_bounded_amount() -> None:
    from sparkproof.facts import canaries_child

    two_copies, matrix = 2 * canaries_child.COPY_BYTES, 2 * canaries_child.GEMV_SHAPE[0] * canaries_child.GEMV_SHAPE[1]
    products = 3 * 2 * canaries_child.GEMM_SIZE**2
    assert (two_copies + matrix + products) / 2**30 < canaries_child.NEEDED_GIB < 2
