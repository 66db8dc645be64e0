"""Collecting, saving and loading: never raises, says what was not read, and reads back equal."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sparkproof.errors import UserError
from sparkproof.facts import collect as collecting
from sparkproof.facts.collect import collect, join, load, save
from sparkproof.facts.host import Host, Ran
from sparkproof.facts.installed import Unsloth
from sparkproof.facts.model import Facts, Gpu
from sparkproof.facts.toolchain import Torch, Triton
from sparkproof.facts.tried import Attention, Canaries, Compilation, FourBit, SharedMemory, Tried


@pytest.fixture(scope="module")
def here() -> Facts:
    return collect(network=False, trials=False)


def test_this_machine(here: Facts, tmp_path: Path) -> None:
    assert here.origin.startswith("read on ")
    assert here.errors == {}
    assert here.arch and here.os.kernel and here.memory.total_gib and here.memory.available_gib
    assert here.torch.version and here.torch.file and here.torch.cuda_available is not None
    assert all(g.usable_by_torch is not None for g in here.gpus)
    assert here.triton.live_ptxas and here.bitsandbytes.version
    assert here.packages["pytest"] and here.limits.nofile and here.disk.free_gib and here.shm.size_gib is not None
    assert here.wheels.scanned and not here.wheels.foreign and here.hub_cache.path and here.places
    assert here.fabric.ports is not None and here.pins.missing is not None
    assert here.network.hub_reachable is None and here.network.error == "not asked"
    save(here, tmp_path / "facts.json")
    assert load(tmp_path / "facts.json") == here


def test_silent(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(collecting.torch_probe, "read_torch", lambda host: collecting.torch_probe.TorchAnswer())
    collect(network=False, progress=told.append, trials=False)
    assert capfd.readouterr() == ("", "")
    assert "reading memory" in told and "reading torch" in told


def test_every_probe_may_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every function that collect calls raises: facts are still made, and each failure is written down."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("probe broke")

    for module in (
        "companions", "container", "history", "hub", "links", "memory", "network", "nvidia", "pins", "software", "system",
        "torch_probe", "tried", "triton_probe", "wheels",
    ):  # fmt: skip
        probes = getattr(collecting, module)
        for name in dir(probes):
            if name.startswith("read_") or name == "token_present":
                monkeypatch.setattr(probes, name, fail)
    facts = collect()
    assert facts.gpus == [] and facts.memory.total_gib is None and facts.packages == {}
    # fmt: off
    assert set(facts.errors) == {
        "bitsandbytes", "compiler", "container", "cpu", "cuda driver", "cuda toolkit", "disk", "driver", "environment",
        "fabric", "history", "hub cache", "hub token", "limits", "llama.cpp", "memory", "network", "nvml", "ollama", "os",
        "packages", "packages tried", "pins", "places", "python", "script", "shm", "torch", "triton", "unsloth", "wheels",
    }
    # fmt: on
    assert set(facts.errors.values()) == {"RuntimeError: probe broke"}
    save(facts, tmp_path / "facts.json")
    assert load(tmp_path / "facts.json") == facts


def test_no_secret_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_SECRETsecretSECRETsecret123456"
    monkeypatch.setattr(collecting.torch_probe, "read_torch", lambda host: collecting.torch_probe.TorchAnswer())
    monkeypatch.setattr(collecting.triton_probe, "read_triton", lambda host: Facts(origin="x").triton)
    host = Host(
        environ={**os.environ, "HF_TOKEN": secret, "OPENAI_API_KEY": secret, "HTTPS_PROXY": f"http://u:{secret}@p"}
    )
    facts = collect(network=False, host=host, trials=False)
    assert facts.hub_token_present is True
    assert secret not in facts.model_dump_json()


def gpu(name: str, uuid: str | None = None, **fields: Any) -> Gpu:
    return Gpu(name=name, uuid=uuid, **fields)


def test_join_completes_by_uuid_in_torch_order() -> None:
    torch = [gpu("A", "2", integrated=True, usable_by_torch=True), gpu("B", "1", usable_by_torch=True)]
    driver = [gpu("B", "1", sm_count=40), gpu("A", "2", sm_count=48, integrated=False)]
    nvml = [gpu("b", "1", temperature_c=40), gpu("a", "2", temperature_c=50), gpu("C", "3", temperature_c=60)]
    joined = join(torch, driver, nvml)
    assert [(g.name, g.sm_count, g.temperature_c, g.usable_by_torch) for g in joined] == [
        ("A", 48, 50.0, True),
        ("B", 40, 40.0, True),
        ("C", None, 60.0, False),
    ]
    assert joined[0].integrated is True, "the earlier list wins"


def test_join_without_uuid() -> None:
    one = join([gpu("NVIDIA GB10", usable_by_torch=True)], [], [gpu("NVIDIA GB10", "1", temperature_c=38)])
    assert len(one) == 1 and one[0].temperature_c == 38 and one[0].usable_by_torch is True
    two = join([gpu("A"), gpu("B")], [gpu("A", "1"), gpu("B", "2")])
    assert len(two) == 4, "which is which is not guessed"


def test_join_of_gpus_that_torch_does_not_see() -> None:
    joined = join([], [gpu("NVIDIA GB10", "1", integrated=True)], [gpu("NVIDIA GB10", "1", temperature_c=38)])
    assert len(joined) == 1
    assert joined[0].integrated is True and joined[0].temperature_c == 38 and joined[0].usable_by_torch is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not valid JSON"),
        ("[]", "has no schema_version"),
        ("{}", "has no schema_version"),
        ('{"schema_version": 99, "origin": "x"}', "facts of schema 99"),
        ('{"schema_version": 1}', "origin: Field required"),
        ('{"schema_version": 1, "origin": "x", "gpus": [{"sm_count": 1}]}', r"gpus\.0\.name: Field required"),
        ('{"schema_version": 1, "origin": "x", "extra": 1}', "extra: Extra inputs"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert caught.value.fix and "\n" not in caught.value.message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no facts file"):
        load(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        save(Facts(origin="x"), tmp_path / "no" / "folder.json")


def test_unread_is_not_no() -> None:
    empty = Facts(origin="x")
    assert empty.gpu is None and not empty.is_target and not empty.has_nvidia_hardware
    assert json.loads(empty.model_dump_json())["memory"]["total_gib"] is None
    with pytest.raises(ValidationError):
        Facts.model_validate({"origin": "x", "memory": {"total": 1}})


def test_with_a_gpu_canaries_come_first_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine with a GPU nothing else runs beside the canaries, and every trial's answer reaches the facts."""
    running: set[str] = set()
    order: list[str] = []

    def trial(name: str, answer: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert name != "canaries" or not running
            running.add(name)
            order.append(name)
            time.sleep(0.05)
            running.discard(name)
            return answer

        return call

    gpu_seen = collecting.torch_probe.TorchAnswer(gpus=[gpu("NVIDIA GB10", usable_by_torch=True)], cuda_free_gib=90.0)
    monkeypatch.setattr(collecting.torch_probe, "read_torch", lambda host: gpu_seen)
    monkeypatch.setattr(collecting.triton_probe, "read_triton", lambda host: Triton(version="3.8.0"))
    monkeypatch.setattr(collecting.tried, "read_compilation", trial("compilation", Compilation(target="sm_121a")))
    monkeypatch.setattr(collecting.tried, "read_canaries", trial("canaries", Canaries(copy_gb_s=187.0)))
    kernels = Tried(shared_memory=SharedMemory(limit=101376), convolution=True)
    monkeypatch.setattr(collecting.tried, "read_kernels", trial("kernels", kernels))
    flex = Attention(backend="flex", dtype="bf16", head_size=256, direction="forward", error=0.003)
    monkeypatch.setattr(collecting.tried, "read_flex", trial("flex", [flex]))
    packages = Tried(four_bit=[FourBit(device="cuda")])
    monkeypatch.setattr(collecting.tried, "read_packages_tried", trial("packages", packages))
    monkeypatch.setattr(collecting.companions, "read_unsloth", lambda packages: Unsloth(version="2026.10.1"))
    monkeypatch.setattr(collecting.companions, "import_unsloth", trial("unsloth", Ran(0, '{"error": null}')))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    facts = collect(network=False, host=Host(root=tmp_path))
    assert order[:2] == ["compilation", "canaries"] and set(order[2:]) == {"kernels", "flex", "packages", "unsloth"}
    t = facts.tried
    assert t.canaries and t.canaries.copy_gb_s == 187.0 and t.attention == [flex] and t.convolution is True
    assert t.shared_memory and t.four_bit[0].device == "cuda" and t.compilation and facts.unsloth.imported is True
    quick = collect(network=False, host=Host(root=tmp_path), trials=False)
    assert quick.tried == Tried() and len(order) == 6, "without trials none is made"


def test_a_wedged_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    visible: list[bool] = []
    answer = collecting.torch_probe.TorchAnswer(torch=Torch(error="torch stopped while it started CUDA"))
    monkeypatch.setattr(collecting.torch_probe, "read_torch", lambda host: answer)
    monkeypatch.setattr(collecting.triton_probe, "read_triton", lambda host: Triton())
    monkeypatch.setattr(collecting.tried, "read_packages_tried", lambda host, see: visible.append(see) or Tried())
    monkeypatch.setattr(collecting.tried, "read_canaries", lambda host: pytest.fail("it would hang"))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    collect(network=False, host=Host(root=tmp_path))
    assert visible == [False]
