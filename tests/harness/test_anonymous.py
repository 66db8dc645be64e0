"""A bundle for a bug report holds no host name, user, path, serial, address or token, and is judged as before."""

from __future__ import annotations

import getpass
import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sparkproof.checks.registry import run_checks
from sparkproof.cli.doctor import facts as show
from sparkproof.facts.collect import load
from sparkproof.facts.model import Facts
from sparkproof.report import anonymous as module
from sparkproof.report.anonymous import Scrubber, anonymous
from sparkproof.report.redact import Redactor

FOLDER = Path(__file__).parents[1] / "facts"
PLANTED = {
    "host name": "spark-lab-07",
    "qualified host": "spark-lab-07.research.acme.corp",
    "user": "marguerite",
    "home path": "/home/marguerite/work",
    "other path": "/srv/customers/initech/run 1",
    "serial": "1420224012345",
    "board serial": "PN8X-7741-QQ",
    "GPU": "GPU-6f2b9a31-77aa-4c1e-9d0b-3e5b8f00aa11",
    "IPv4": "10.42.17.201",
    "IPv6": "2001:db8:4f:1::7",
    "MAC": "4c:bb:47:2d:11:fe",
    "mail": "m.dupont@acme.corp",
    "token": "hf_ABCDEFGHIJKLMNOPQRSTUVWX",
    "variable": "correct-horse-battery",
    "model": "acme-internal/secret-model-7b",
    "registry": "registry.acme.corp:5000/team/image:7",
}


def planted() -> Facts:
    data: dict[str, Any] = load(FOLDER / "gb10_docker_denied.json").model_dump(mode="json")
    p = PLANTED
    data["gpus"][0]["uuid"] = p["GPU"]
    data["os"]["product"] = f"NVIDIA_DGX_Spark serial: {p['board serial']}"
    data["torch"]["error"] = f"driver of {p['qualified host']} ({p['IPv4']}) said no to {p['user']}; S/N {p['serial']}"
    data["torch"]["file"] = f"{p['home path']}/.venv/lib/python3.12/site-packages/torch/__init__.py"
    data["disk"]["path"] = p["other path"].partition(" ")[0]
    data["network"]["error"] = f"proxy http://{p['user']}:x@{p['qualified host']}:3128/{p['home path']}: {p['mail']}"
    data["container"]["error"] = f"unix://{p['home path']}/docker.sock: denied for {p['host name']}"
    data["container"]["images"] = [{"tags": [p["registry"]], "digest": None, "architecture": "arm64", "created": None}]
    data["env"] = {"LD_LIBRARY_PATH": f"{p['home path']}/lib:/usr/lib/aarch64-linux-gnu", "HF_HOME": p["home path"]}
    data["errors"] = {"nvml": f"token {p['token']} and {p['variable']} at {p['MAC']}, GPU {p['GPU']}"}
    data["gpu_processes"] = [{"pid": 7, "name": p["user"], "memory_gib": 1.0}]
    data["hub_cache"]["models"] = [{"repository": p["model"], "model_type": "llama"}]
    data["fabric"]["links"][0]["addresses"] = [p["IPv4"]]
    data["fabric"]["env"] = {"NCCL_SOCKET_IFNAME": "enp1s0f1np1", "NCCL_COMM_ID": f"[{p['IPv6']}]:4242"}
    data["wheels"]["loaded"] = [f"{p['home path']}/lib/libcudart.so.13"]
    data["pins"]["lock_file"] = f"{p['home path']}/requirements/lock.txt"
    return Facts.model_validate(data)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: PLANTED["host name"])
    monkeypatch.setattr(getpass, "getuser", lambda: PLANTED["user"])


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", PLANTED)
def test_nothing_planted_is_left(kind: str) -> None:
    before = planted().model_dump_json()
    words = [w for w in PLANTED[kind].replace("/home/", " ").split() if len(w) > 3]
    assert any(w in before for w in words), "it was really planted"
    after = anonymous(planted(), {"WANDB_API_KEY": PLANTED["variable"]}).model_dump_json()
    for word in [PLANTED[kind], "marguerite", "initech", "acme", "spark-lab", "secret-model"]:
        assert word not in after


@pytest.mark.usefixtures("named")
def test_what_helps_is_left() -> None:
    clean = anonymous(planted(), {})
    assert clean.torch.file == "[path]/site-packages/torch/__init__.py"
    assert clean.env["LD_LIBRARY_PATH"] == "[path]:/usr/lib/aarch64-linux-gnu"
    assert clean.driver.device_files == planted().driver.device_files
    assert clean.driver.pci_devices == ["000f:01:00.0"] and clean.driver.version == "580.95.05"
    assert clean.fabric.env["NCCL_SOCKET_IFNAME"] == "enp1s0f1np1"
    assert clean.hub_cache.models[0].repository == "model-1" and clean.hub_cache.models[0].model_type == "llama"
    assert clean.packages == planted().packages and clean.memory == planted().memory
    assert clean.origin.endswith("; names, paths and addresses taken out")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_it_is_judged_as_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_own_names", lambda: {"spark-lab-07"})

    def verdicts(facts: Facts) -> list[tuple[str, str, list[str]]]:
        return [(o.check, o.state, [f.severity.value for f in o.findings]) for o in run_checks(facts)]

    facts = load(path)
    assert verdicts(anonymous(facts, {})) == verdicts(facts)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("ptxas 13.3.33 of triton 3.8.0, CUDA 13.0.88, driver 580.173.02", None),
        ("kernel 6.17.0-1008-nvidia at 12:30:45 on 2026-11-24T08:00:11+00:00", None),
        ("PCI 000f:01:00.0, sha256:0fab, libcudart.so.13, torch/lib/libtorch_cuda.so", None),
        ("/usr/local/cuda/bin/ptxas and /dev/nvidia0 and /proc/meminfo", None),
        ("see https://huggingface.co/models?x=1", "see https://huggingface.co"),
        ("see https://git.acme.corp/x", "see [address]"),
        ("in ~/secret/place", "in [path]"),
        ("A=/opt/acme/x:/opt/acme/y", "A=[path]:[path]"),
        ("'/data/acme'", "'[path]'"),
        ("127.0.0.1 and ::1 and 0.0.0.0", None),
        ("at unix:///var/run/docker.sock. Is it running?", None),
        ("at unix:///run/user/1000/docker.sock", "at unix://[path]"),
        ("/device/x and /usrlocal/y", "[path] and [path]"),
        ("192.168.1.5/24", "[address]"),
    ],
)
def test_strings(text: str, left: str | None) -> None:
    assert Scrubber(set(), Redactor({})).text(text) == (text if left is None else left)


@pytest.mark.parametrize("name", ["docker", "nvidia", "torch", "hub", "ok"])
def test_an_odd_name_breaks_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_own_names", lambda: {name})
    facts = load(FOLDER / "gb10_docker_denied.json")
    clean = anonymous(facts, {})
    assert clean.container.engine == "docker" and clean.packages == facts.packages


@given(st.from_regex(r"[a-z][a-z0-9]{5,12}", fullmatch=True), st.sampled_from([" ", ":", "/", "'", "@", "=", ".", "-"]))
def test_a_name_goes_whatever_stands_around_it(name: str, around: str) -> None:
    text = Scrubber({name}, Redactor({})).text(f"1{around}{name}{around}2")
    assert name not in text


def test_the_verb_writes_a_bundle(tmp_path: Path) -> None:
    source, target = tmp_path / "facts.json", tmp_path / "bundle.json"
    source.write_text(planted().model_dump_json(), encoding="utf-8")
    console = Console(file=io.StringIO(), width=100)
    assert show(target, facts_file=source, redact=True, console=console) == 0
    assert "marguerite" not in target.read_text() and "[path]" in target.read_text()
    assert json.loads(target.read_text())["schema_version"] == 1 and load(target).torch.version
