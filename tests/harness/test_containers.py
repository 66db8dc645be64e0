"""Runs in a container, against an engine that answers as Docker does: hardened, as the user, stopped by Ctrl-C, removed at the
end; and each way in which it can't be had, in one sentence with its cure.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker.errors
import fake_engine
import pytest
from fake_engine import OURS, FakeEngine, Program
from sparkproof.containers import attached, engine, failures, image, launch, place, work
from sparkproof.containers.engine import Engine, connect
from sparkproof.containers.names import LOCK_LABEL, REVISION_LABEL
from sparkproof.errors import UserError
from sparkproof.facts import nvidia
from sparkproof.facts.host import Host
from sparkproof.facts.model import Gpu
from sparkproof.facts.place import RunsIn
from sparkproof.rollback import manifest
from sparkproof.run import Request

GPU_OUT = b"GPU 0: NVIDIA GB10 (UUID: GPU-1)\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    with fake_engine.serving(tmp_path) as found:
        found.image(
            "sha256:" + "ab" * 32, "sparkproof:local", labels={**OURS, LOCK_LABEL: "1" * 64, REVISION_LABEL: "c" * 40}
        )
        found.image("sha256:" + "cd" * 32, "sparkproof:serve", labels=OURS)
        for name in ("CONTAINER_HOST", "SPARKPROOF_IN_IMAGE", "SPARKPROOF_RUNS_IN", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("DOCKER_HOST", found.address)
        monkeypatch.setattr(launch, "has_gpu", lambda: False)
        monkeypatch.setattr(work, "has_gpu", lambda: False)
        yield found


def run_validate(tmp_path: Path, **options: Any) -> tuple[int, Path]:
    reports = tmp_path / "reports"
    with connect("docker") as e:
        found = image.require(e)
        where = RunsIn(where="container", engine="docker 28", image=found.tag, digest=found.digest)
        return work.validate(e, found, where, Request(reports=reports, **options)), reports


def test_a_run_inside_is_hardened_and_comes_back_with_output_and_code(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    fake.programs = [Program(out=b"VALIDATED\n", err=b"progress\n", code=3)]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, reports = run_validate(tmp_path, names=["kernels/*"], kinds=["kernel"], strict=True, workers=1)
    assert code == 3 and capfdbinary.readouterr() == (b"VALIDATED\n", b"progress\n")
    made = fake.created[0]
    assert made["Cmd"] == ["sparkproof", "validate", "kernels/*", "--kind", "kernel", "--workers", "1", "--strict"]
    host = made["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (
        host["Init"] and host["ShmSize"] > 0 and {u["Name"] for u in host["Ulimits"]} == {"memlock", "stack", "nofile"}
    )
    assert (
        f"{reports}:/work/reports:rw" in host["Binds"]
        and "DeviceRequests" not in host
        and "exec" in host["Tmpfs"]["/tmp"]
    )
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else "1000:1000"
    assert made["User"] == user and not made["User"].startswith("0") and made["Labels"].items() >= OURS.items()
    env = dict(e.partition("=")[::2] for e in made["Env"])
    assert env["HF_TOKEN"] == "hf_secret" and '"where":"container"' in env["SPARKPROOF_RUNS_IN"]
    volume = next(iter(fake.volumes.values()))
    assert volume["Labels"].items() >= OURS.items() and any(
        b.startswith(volume["Name"] + ":/cache") for b in host["Binds"]
    )
    assert not fake.containers, "it is removed at the end"
    assert [(e.path, e.kind) for e in manifest.ours()] == [(str(reports.resolve()), "reports")]


def test_folders_of_a_request_are_mounted_read_only(fake: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "mine").mkdir()
    run_validate(tmp_path, model_dir=tmp_path / "models", model=str(tmp_path / "mine"), resume="reports/2026-run")
    made = fake.created[0]
    assert made["Cmd"][2:] == ["--model", "/model", "--model-dir", "/models", "--resume", "2026-run"]
    assert {f"{tmp_path}/models:/models:ro", f"{tmp_path}/mine:/model:ro"} <= set(made["HostConfig"]["Binds"])
    with pytest.raises(UserError, match="no folder"):
        run_validate(tmp_path, scenarios=tmp_path / "missing")


def test_every_option_of_a_request_reaches_the_inside() -> None:
    """A field that `arguments` forgot would be an argument silently ignored."""
    import dataclasses

    from sparkproof.scenario import Profile

    values: dict[str, Any] = {
        "names": ["a"], "profile": Profile.QUICK, "kinds": ["kernel"], "tags": ["t"], "engine": "hf", "model": "o/n",
        "revision": "r", "steps": 3, "resume": "latest", "workers": 2, "memory_floor_gib": 4.0, "strict": True, "wait": True,
        "model_dir": Path("/tmp"), "scenarios": Path("/tmp"),
    }  # fmt: skip
    outside = {"reports", "facts", "runs_in", "opening"}  # a mount; refused; handed in as a variable; said outside
    assert {f.name for f in dataclasses.fields(Request)} == values.keys() | outside
    plain = work.arguments(Request())[0]
    for name, value in values.items():
        assert work.arguments(Request(**{name: value}))[0] != plain, name
    with pytest.raises(UserError, match="another machine"):
        work.arguments(Request(facts=Path("x")))


def interrupt_when_running(fake: FakeEngine, times: int = 1) -> threading.Thread:
    def press() -> None:
        for n in range(times):
            while len(fake.signals) < n or not any(c["State"]["Running"] for c in fake.containers.values()):
                time.sleep(0.02)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT if n == 0 else signal.SIGTERM)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_asks_the_program_inside_and_the_second_one_kills_it(fake: FakeEngine, tmp_path: Path) -> None:
    fake.programs = [Program(hangs=True)]
    interrupt_when_running(fake)
    code, _ = run_validate(tmp_path)
    assert code == 130 and fake.signals == ["SIGINT"] and not fake.containers
    fake.signals.clear()
    fake.programs = [Program(hangs=True, on_signal={"SIGKILL": 137})]
    interrupt_when_running(fake, times=2)
    code, _ = run_validate(tmp_path)
    assert code == 137 and fake.signals == ["SIGINT", "SIGKILL"] and not fake.containers


def test_with_a_gpu_the_inside_is_looked_at_first(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "has_gpu", lambda: True)
    fake.programs = [Program(out=GPU_OUT), Program(code=0)]
    assert run_validate(tmp_path)[0] == 0
    assert [c["Cmd"][0] for c in fake.created] == ["nvidia-smi", "sparkproof"]
    assert all(c["HostConfig"]["DeviceRequests"][0]["Capabilities"] == [["gpu"]] for c in fake.created)
    for said, code in ((b"No devices were found\n", 0), (b"nvidia-smi: not found\n", 127), (b"", 0)):
        fake.programs = [Program(out=said, code=code)]
        with pytest.raises(UserError, match="sees no GPU") as error:
            run_validate(tmp_path)
        assert "nvidia-ctk" in error.value.fix and not fake.containers


REFUSALS = [
    (
        'could not select device driver "" with capabilities: [[gpu]]',
        "not registered",
        "runtime configure --runtime=docker",
    ),
    ("unknown or invalid runtime name: nvidia", "not registered", "nvidia-ctk"),
    (
        "OCI runtime create failed: nvidia-container-cli: initialization error: nvml error: driver not loaded",
        "driver does not answer",
        "nvidia-smi",
    ),
    ("could not inject CDI devices: unresolvable CDI devices nvidia.com/gpu=all", "no CDI description", "cdi generate"),
    ("write /var/lib/docker/tmp/x: no space left on device", "disk is full", "docker system df"),
    ("exec /usr/local/bin/sparkproof-entry: exec format error", "another processor", "make image"),
    ("Bind for 127.0.0.1:8000 failed: port is already allocated", "port is taken", "PORT=8001"),
    ("error setting rlimits for ready process: operation not permitted", "set a limit", "MODE=host"),
    ("something never seen before", "Docker refused: something never seen before", "docker info"),
]


@pytest.mark.parametrize(("said", "sentence", "cure"), REFUSALS)
def test_what_an_engine_refuses_is_one_sentence_with_its_cure(
    fake: FakeEngine, tmp_path: Path, said: str, sentence: str, cure: str
) -> None:
    fake.refuse["POST /containers/.*/start"] = (500, said)
    with pytest.raises(UserError) as error:
        run_validate(tmp_path)
    assert sentence in error.value.message and cure in error.value.fix and "\n" not in error.value.message
    assert not fake.containers, "what did not start is removed all the same"


def test_an_image_that_is_missing_foreign_or_stale(fake: FakeEngine, tmp_path: Path) -> None:
    with connect("docker") as e:
        found = image.require(e)
        assert found.digest == "sha256:" + "ab" * 32 and found.lock == "1" * 64 and found.user == "1000:1000"
        (tmp_path / "docker").mkdir()
        lock = tmp_path / "docker/runtime.lock"
        lock.write_text("torch==1\n")
        assert "another runtime.lock" in image.stale(found, tmp_path)
        same = {**OURS, LOCK_LABEL: hashlib.sha256(lock.read_bytes()).hexdigest()}
        fake.images[found.id]["Config"]["Labels"] = same
        assert image.stale(image.require(e), tmp_path) == ""
        fake.images[found.id]["Architecture"] = "arm64"
        with pytest.raises(UserError, match="for arm64, and this machine is amd64") as error:
            image.require(e)
        assert "make image" in error.value.fix
        fake.images.clear()
        with pytest.raises(UserError, match="no image sparkproof:serve") as error:
            image.require(e, "serve")
        assert "--target serve" in error.value.fix


def failing(kind: str, env: dict[str, str]) -> UserError:
    with pytest.raises(UserError) as error, connect(kind, env):
        pass
    return error.value


def programs(folder: Path, *names: str) -> str:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\necho 'cannot set up a user namespace' >&2\nexit 125\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_no_engine_one_that_does_not_run_and_one_elsewhere(tmp_path: Path) -> None:
    nothing = {"PATH": str(tmp_path / "none"), "XDG_RUNTIME_DIR": str(tmp_path)}
    assert "Neither Docker nor Podman is installed" in failing("auto", nothing).message
    assert "Docker is not installed" in failing("docker", nothing).message
    stopped = failing("docker", {**nothing, "DOCKER_HOST": f"unix://{tmp_path}/gone.sock"})
    assert "installed but not running" in stopped.message and "systemctl enable --now docker" in stopped.fix
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(stale))  # nobody listens, as after a crash
    assert "not running" in failing("docker", {**nothing, "DOCKER_HOST": f"unix://{stale}"}).message
    assert "not running" in failing("auto", {**nothing, "PATH": programs(tmp_path / "a", "dockerd")}).message
    assert (
        "cannot set up a user namespace"
        in failing("podman", {**nothing, "PATH": programs(tmp_path / "b", "podman")}).message
    )
    assert "another machine" in failing("docker", {**nothing, "DOCKER_HOST": "tcp://10.0.0.7:2375"}).message
    assert "no container engine 'dokcer'" in failing("dokcer", nothing).message


def test_a_socket_without_permission_says_which_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(**options: Any) -> None:
        try:
            raise PermissionError(13, "Permission denied")
        except PermissionError as e:
            raise docker.errors.DockerException(f"Error while fetching server API version: {e}") from e

    monkeypatch.setattr(docker, "APIClient", closed)
    error = failing("docker", {"DOCKER_HOST": "unix:///var/run/docker.sock"})
    assert (
        error.message == "This user may not use Docker's socket /var/run/docker.sock."
        and "usermod -aG docker" in error.fix
    )


def test_an_engine_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ANSWER_S", 0.3)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "deaf.sock"))
        s.listen()
        error = failing("docker", {"DOCKER_HOST": f"unix://{tmp_path}/deaf.sock"})
    assert "does not answer within 0.3 s" in error.message and "restart docker" in error.fix


def test_podman_behind_dockers_socket_is_podman(fake: FakeEngine) -> None:
    fake.components = ["Podman Engine", "Conmon"]
    with connect("docker") as e:
        assert e.kind == "podman" and e.title == "Podman"


def chosen(mode: str) -> RunsIn:
    with place.choose(mode, "docker") as found:
        assert (found.engine is not None) == (
            found.place.where == "container" and not found.place.why.startswith("started")
        )
        return found.place


def test_auto_takes_a_container_on_a_spark_with_engine_and_image_else_the_host(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen("host").why == "it was asked for" and chosen("container").digest == "sha256:" + "ab" * 32
    here = chosen("auto")
    assert here.where == "host" and "no DGX Spark" in here.why
    monkeypatch.setattr(place.platform, "machine", lambda: "aarch64")
    gpu = Gpu(name="NVIDIA GB10", compute_capability="12.1", integrated=True)
    monkeypatch.setattr(nvidia, "read_cuda_driver", lambda host: ([gpu], None))
    assert chosen("auto").where == "container" and "DGX Spark" in chosen("auto").why
    assert "docker" in chosen("auto").sentence() and "sha256:abab" in chosen("auto").sentence()
    fake.images.clear()
    without = chosen("auto")
    assert without.where == "host" and "make image" in without.why
    with pytest.raises(UserError, match="no image"):
        chosen("container")
    monkeypatch.setenv("DOCKER_HOST", "unix:///gone.sock")
    assert chosen("auto").where == "host" and "not running" in chosen("auto").why
    monkeypatch.setattr(nvidia, "read_cuda_driver", lambda host: ([], "no driver"))
    assert not place.is_spark(Host())
    with pytest.raises(UserError, match="no mode 'contianer'"):
        chosen("contianer")
    monkeypatch.setenv("SPARKPROOF_IN_IMAGE", "1")
    assert chosen("auto").where == "container"
    with pytest.raises(UserError, match="container already"):
        chosen("container")


def spec(**more: Any) -> launch.Spec:
    found = image.Image("sparkproof:local", "sha256:1", "sha256:1", "amd64", "", "", "10001:10001", 1)
    return launch.Spec(found, ["true"], "test", env={"HF_TOKEN": "hf_secret"}, **more)


def test_podmans_command_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rootless = Engine("podman", "unix:///p.sock", None, {"SecurityOptions": ["name=rootless"]})
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    words = launch.podman_arguments(rootless, spec(gpu=True, port=8000), "sparkproof-cache-1234")
    line = " ".join(words)
    assert "--read-only --cap-drop all --security-opt no-new-privileges" in line and "--userns keep-id" in line
    assert "--device nvidia.com/gpu=all" in line and "--publish 127.0.0.1:8000:8000" in line
    assert "--label io.sparkproof.project=sparkproof" in line and f"--user 1234:{os.getgid()}" in line
    assert words[-2:] == ["sha256:1", "true"] and "hf_secret" not in line, "a token has no place in a process list"
    docker_rootless = Engine("docker", "unix:///d.sock", None, {"SecurityOptions": ["name=rootless"]})
    assert launch.user_of(docker_rootless, spec().image) == "0:0", "which is this user outside"
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert launch.user_of(Engine("docker", "x"), spec().image) == "10001:10001"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_roots_reports_come_back_to_root(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    with launch.owned(tmp_path, "10001:10001"):
        assert tmp_path.stat().st_uid == 10001 and (tmp_path / "old").stat().st_uid == 0
        (tmp_path / "run").mkdir()
        (tmp_path / "run/record.jsonl").write_text("{}")
        (tmp_path / "latest").symlink_to("run")
        for path in (tmp_path / "run", tmp_path / "run/record.jsonl", tmp_path / "latest"):
            os.chown(path, 10001, 10001, follow_symlinks=False)
    assert {p.lstat().st_uid for p in [tmp_path, *tmp_path.rglob("*")]} == {0}


def test_serving_is_for_this_machine_only(fake: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    with connect("docker") as e:
        found = image.require(e, "serve")
        with pytest.raises(UserError, match=r"no config\.json"):
            work.serve(e, found, str(merged), 8000, [], tmp_path)
        with pytest.raises(UserError, match="no folder"):
            work.serve(e, found, "./missing", 8000, [], tmp_path)
        (merged / "config.json").write_text("{}")
        assert work.serve(e, found, str(merged), 8001, ["--enable-lora"], tmp_path) == 0
    made = fake.created[0]
    assert made["HostConfig"]["PortBindings"] == {"8001/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8001"}]}
    assert (
        made["Cmd"][:4] == ["--model", "/model", "--served-model-name", "merged"] and made["Cmd"][-1] == "--enable-lora"
    )
    assert "http://127.0.0.1:8001/v1 serves merged" in capsys.readouterr().out


def test_a_shell_needs_a_terminal_and_a_command_does_not(fake: FakeEngine, tmp_path: Path) -> None:
    fake.programs = [Program(out=b"3.12\n")]
    with connect("docker") as e:
        found = image.require(e)
        with pytest.raises(UserError, match="no terminal"):
            work.shell(e, found, [], tmp_path)
        said = io.BytesIO()
        assert (
            attached.run(e, launch.Spec(found, ["python", "-V"], "shell"), said, said) == 0
            and said.getvalue() == b"3.12\n"
        )


def test_a_container_ended_for_memory_and_one_removed_meanwhile(fake: FakeEngine, tmp_path: Path) -> None:
    fake.refuse["POST /containers/.*/wait"] = (404, "No such container: c0")
    with pytest.raises(UserError, match="removed by somebody else"):
        run_validate(tmp_path)
    fake.refuse.clear()
    fake.programs = [Program(code=137, oom=True)]
    with pytest.raises(UserError, match="for lack of memory"):
        run_validate(tmp_path)


def build_script(folder: Path, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "docker").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "docker").chmod(0o755)


def test_building_goes_by_the_engines_command_with_revision_and_lock(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    for path in ("docker/Dockerfile", "docker/runtime.lock", "harness/x"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x\n")
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(image, "NEEDED_GIB", 0.001)
    build_script(tmp_path / "bin", f'echo "$@" >> {tmp_path}/asked; echo step 1')
    out = io.StringIO()
    with connect("docker") as e:
        found, _ = image.build(e, "runtime", ["LLAMA=cpu"], out=out)
        asked = (tmp_path / "asked").read_text().splitlines()[-1]
        lock = hashlib.sha256(b"x\n").hexdigest()
        assert "step 1" in out.getvalue() and found.tag == "sparkproof:local"
        assert "buildx build --load --platform linux/amd64" in asked and f"--build-arg LOCK={lock}" in asked
        assert "--target runtime --tag sparkproof:local" in asked and "--build-arg LLAMA=cpu" in asked
        with pytest.raises(UserError, match="no build argument"):
            image.build(e, "runtime", ["LLAMA"], out=out)
        build_script(tmp_path / "bin", 'test "$4" = version || { echo "write /x: no space left on device"; exit 1; }')
        with pytest.raises(UserError, match="disk is full"):
            image.build(e, "runtime", [], out=out)
        build_script(tmp_path / "bin", "exit 1")
        with pytest.raises(UserError, match="buildx is not installed"):
            image.build(e, "runtime", [], out=out)
        monkeypatch.setattr(image, "NEEDED_GIB", 1e6)
        with pytest.raises(UserError, match="GiB free at /, and building takes"):
            image.build(e, "runtime", [], out=out)
        monkeypatch.chdir(tmp_path / "bin")
        assert failures.free_gib(e) is not None
