"""The same against a real Podman, in storage of its own: skipped where there is none, and slow where there is.

The image holds a shell and a stand-in for sparkproof, copied from this machine, so nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rollback_machine import Machine
from sparkproof.cli import way_back
from sparkproof.containers import attached, image, launch, work
from sparkproof.containers.engine import connect
from sparkproof.errors import UserError
from sparkproof.facts.place import RunsIn
from sparkproof.run import Request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("podman") is None, reason="no podman here: apt install podman runc"),
]
PROGRAMS = ("bash", "sleep", "id", "touch", "cat", "mkdir", "ln", "grep", "true")
STAND_IN = """#!/bin/bash
trap 'echo interrupted; exit 130' INT
echo "uid $(id -u)"
echo "args $*"
mkdir /work/reports/run && echo '{}' > /work/reports/run/record.jsonl && ln -s run /work/reports/latest
touch /elsewhere 2> /dev/null && echo "the root can be written"
touch /cache/kept && echo "the cache can be written"
grep -E "CapEff|NoNewPrivs" /proc/self/status
if [ "${!#}" = hang ]; then echo waiting; for i in {1..600}; do sleep 0.1; done; fi
exit 3
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Podman with storage, and the image in it. Named limits: some machines refuse Podman's own wishes."""
    folder = tmp_path_factory.mktemp("podman")
    as_root = '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    networks = f'[network]\nnetwork_config_dir = "{folder}/networks"\n'
    (folder / "containers.conf").write_text((as_root if os.getuid() == 0 and shutil.which("runc") else "") + networks)
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    before = dict(os.environ)
    os.environ |= {"CONTAINERS_CONF": f"{folder}/containers.conf", "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf"}
    os.environ |= {"XDG_RUNTIME_DIR": str(folder), "DOCKER_HOST": f"unix://{folder}/no-docker.sock"}
    os.environ.pop("CONTAINER_HOST", None)
    try:
        tar = rootfs(folder)
        labels = ["LABEL io.sparkproof.project=sparkproof", "USER 10001:10001", "WORKDIR /work"]
        changes = [word for c in labels for word in ("--change", c)]
        done = subprocess.run(
            ["podman", "import", *changes, str(tar), "localhost/sparkproof:local"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        yield folder
    finally:
        for words in (["rm", "-af"], ["volume", "prune", "-f"], ["rmi", "-af"]):
            subprocess.run(["podman", *words], capture_output=True, check=False)
        os.environ.clear()
        os.environ.update(before)


def rootfs(folder: Path) -> Path:
    root = folder / "rootfs"
    for name in ("bin", "etc", "proc", "sys", "dev", "run", "tmp", "cache", "work"):
        (root / name).mkdir(parents=True)
        if name in ("tmp", "cache", "work"):
            (root / name).chmod(0o1777)
    for name in PROGRAMS:
        path = Path(shutil.which(name) or "").resolve()
        shutil.copy(path, root / "bin" / name)
        said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/\S+) \(0x", said):
            target = root / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(library).resolve(), target)
    (root / "bin/sparkproof").write_text(STAND_IN)
    (root / "bin/sparkproof").chmod(0o755)
    subprocess.run(["tar", "-C", str(root), "-cf", str(folder / "rootfs.tar"), "."], check=True)
    return folder / "rootfs.tar"


def validate(reports: Path, *names: str) -> int:
    with connect("podman") as engine:
        found = image.require(engine)
        where = RunsIn(where="container", engine="podman", image=found.tag, digest=found.digest)
        return work.validate(engine, found, where, Request(reports=reports, names=list(names)))


def containers() -> str:
    return subprocess.run(["podman", "ps", "-aq"], capture_output=True, text=True, check=True).stdout.strip()


def test_hardened_and_the_reports_are_this_users(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "has_gpu", lambda: False)
    assert validate(tmp_path / "reports", "kernels/*") == 3
    said = capfd.readouterr().out
    inside = os.getuid() or 10001
    assert f"uid {inside}" in said and "args validate kernels/*" in said and "the cache can be written" in said
    assert (
        "the root can be written" not in said
        and re.search(r"CapEff:\s+0{16}", said)
        and re.search(r"NoNewPrivs:\s+1", said)
    )
    files = [tmp_path / "reports", *(tmp_path / "reports").rglob("*")]
    assert len(files) == 4 and {p.lstat().st_uid for p in files} == {os.getuid()}
    assert not containers()


def test_ctrl_c_ends_the_container(storage: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def press() -> None:
        while not (tmp_path / "reports/latest").exists():
            time.sleep(0.1)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    start = time.monotonic()
    assert validate(tmp_path / "reports", "hang") == 130
    assert time.monotonic() - start < 45 and "interrupted" in capfd.readouterr().out and not containers()


def test_a_missing_gpu_and_a_program_that_is_not_there(storage: Path) -> None:
    with connect("podman") as engine:
        found = image.require(engine)
        with pytest.raises(UserError) as error:
            attached.gpu_inside(engine, launch.Spec(found, [], "probe"))
        assert "nvidia.com/gpu" in error.value.message and "cdi generate" in error.value.fix
        with pytest.raises(UserError) as error:
            attached.run(engine, launch.Spec(found, ["no-such-program"], "test"))
        assert "no-such-program" in error.value.message and "\n" not in error.value.message
        with pytest.raises(UserError, match="no image sparkproof:serve"):
            image.require(engine, "serve")
    assert not containers()


def test_uninstall_takes_off_what_podman_holds_of_ours(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(tmp_path)
    for name, value in {**machine.env, "PATH": os.environ["PATH"]}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(machine.work)
    podman = ["podman", "--cgroup-manager", "cgroupfs"]
    label = ["--label", "io.sparkproof.project=sparkproof"]
    subprocess.run([*podman, "tag", "localhost/sparkproof:local", "localhost/theirs:1"], check=True)
    with connect("podman") as engine:
        key = launch.create(
            engine, launch.Spec(image.require(engine), ["bash", "-c", "sleep 600"], "serve", network=False)
        )
        engine.api.start(key)
    subprocess.run([*podman, "network", "create", *label, "sparkproof-test"], check=True, capture_output=True)
    subprocess.run([*podman, "volume", "create", "users"], check=True, capture_output=True)
    assert way_back.uninstall(dry_run=True) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "which runs" in shown and "network sparkproof-test" in shown and "volume sparkproof-cache" in shown
    assert key[:12] in containers()
    assert way_back.uninstall(yes=True) == 1, "the image carries a tag of somebody else's"
    assert "localhost/theirs:1" in " ".join(capsys.readouterr().out.split())
    assert not containers()
    rest = subprocess.run([*podman, "volume", "ls", "-q"], capture_output=True, text=True, check=True).stdout.split()
    tags = subprocess.run(
        [*podman, "images", "--format", "{{.Repository}}"], capture_output=True, text=True, check=True
    ).stdout
    assert rest == ["users"] and tags.split() == ["localhost/theirs"]
    subprocess.run([*podman, "untag", "localhost/theirs:1"], check=True)
    assert way_back.uninstall(yes=True) == 0, capsys.readouterr().out
