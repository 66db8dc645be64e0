"""The gradients that other engines are held to: hf's own case gives them where it has passed, or a process makes them, once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from sparkproof.runners.train import Training, plain_of
from sparkproof.scenario import TrainScenario


class Context:
    """As much of a run's as is asked for here."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def case_dir(self, case: Any) -> Path:
        """Where a case's files go."""
        (self.run_dir / "cases").mkdir(exist_ok=True)
        return self.run_dir / "cases"


@pytest.fixture
def training(tmp_path: Path) -> Any:
    """(engine, seed) -> its case's training, whose processes give gradients with their number for a loss."""
    processes: list[str] = []

    def make(engine: str, seed: int = 1) -> Training:
        fields: dict[str, Any] = {
            "kind": "train",
            "summary": "A model learns one answer.",
            "profile": "smoke",
            "model": "tiny:llama",
            "engine": engine,
            "seed": seed,
            "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj"]},
            "gate": {
                "first_loss": [1.0, 9.0],
                "first_grad_norm": [0.1, 9.0],
                "min_loss_fall": 0.5,
                "canary_prompt": "What is it?",
                "canary_answer": "amber",
            },
        }
        scenario = TrainScenario.model_validate(fields)
        made = Training(None, Context(tmp_path), scenario, time.monotonic() + 60)  # type: ignore[arg-type]

        def phase(name: str, entry: str, **more: Path) -> tuple[dict[str, Any], Any]:
            processes.append(name)
            return {"fp32": {"loss": float(len(processes)), "file": "made.safetensors", "token_losses": [1.0]}}, None

        made.phase = phase  # type: ignore[method-assign]
        return made

    make.processes = processes  # type: ignore[attr-defined]
    return make


def gradients(folder: Path, loss: float = 7.0) -> dict[str, dict[str, Any]]:
    """What hf's second process leaves, plain PyTorch's among them."""
    found = {}
    for name in ("bf16", "fp32", "plain-bf16", "plain-fp32"):
        file = folder / f"gradients-{name}.safetensors"
        file.write_bytes(name.encode())
        found[name] = {"loss": loss, "file": str(file), "token_losses": [loss], "fed": {"not": "for others"}}
    return found


def test_what_hf_left_is_the_reference_and_no_process_is_started(training: Any, tmp_path: Path) -> None:
    own = gradients(tmp_path)
    assert sorted(plain_of(own)) == sorted(plain_of(own, False)) == ["bf16", "fp32"]
    training("hf").offer(plain_of(own, False))
    for g in own.values():
        Path(g["file"]).unlink()  # as the case does, once it is judged
    found = training("sparktune").reference()
    assert training.processes == []
    assert {n: (g["loss"], Path(g["file"]).read_bytes()) for n, g in found.items()} == {
        "bf16": (7.0, b"bf16"), "fp32": (7.0, b"fp32"),
    }  # fmt: skip
    assert all(set(g) == {"loss", "file", "token_losses"} for g in found.values())


def test_another_scenario_has_another_reference(training: Any, tmp_path: Path) -> None:
    training("hf").offer(plain_of(gradients(tmp_path), False))
    assert training("sparktune", seed=2).reference()["fp32"]["loss"] == 1.0
    assert training.processes == ["reference"]


def test_one_that_is_there_or_being_made_is_left_alone(training: Any, tmp_path: Path) -> None:
    first = training("unsloth").reference()
    training("hf").offer(plain_of(gradients(tmp_path), False))
    assert training("sparktune").reference() == first and training.processes == ["reference"]
    other = training("hf", seed=3)
    stem, note = other._shared()
    with FileLock(f"{stem}.lock"):
        other.offer(plain_of(gradients(tmp_path), False))
    assert not note.exists()
    other.offer(plain_of(gradients(tmp_path), False))
    assert json.loads(note.read_text())["fp32"]["loss"] == 7.0
