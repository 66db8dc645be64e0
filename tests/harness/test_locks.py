"""The image's locks: made locks and small made wheels, one for each thing that can be wrong with them."""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from sparkproof.errors import UserError
from sparkproof.facts.fatbin import MACHINE_CODE, MAGIC, PTX, architectures
from sparkproof.locks import index, judge
from sparkproof.locks.__main__ import check
from sparkproof.locks.index import Folder
from sparkproof.locks.lockfile import on, read_lock
from sparkproof.locks.recipe import RECIPES, Recipe, for_platforms, requirements
from test_facts_installed import elf

ROOT = Path(__file__).parents[2]
AARCH64, X86 = 183, 62
ARM_TAG = "cp312-cp312-manylinux_2_28_aarch64"
RECIPE = Recipe("mine", ("mine.in",))


def fatbin(*entries: tuple[int, int]) -> bytes:
    """A fat binary with (kind, architecture) entries and payloads of 8 bytes."""
    body = b""
    for kind, number in entries:
        body += (
            struct.pack("<HHIQ", kind, 0x101, 64, 8) + bytes(12) + struct.pack("<I", number) + bytes(32) + b"payload!"
        )
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


class Site:
    """A folder with made wheels, inputs and the lock over them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wheels = path / "wheels"
        self.wheels.mkdir(parents=True)
        self.lines: list[str] = []
        self.inputs: list[str] = []

    def wheel(
        self, name: str, version: str, requires: tuple[str, ...] = (), files: dict[str, bytes] | None = None,
        tag: str = ARM_TAG, pin: str | None = None,
    ) -> None:  # fmt: skip
        stem = f"{name.replace('-', '_')}-{version}"
        path = self.wheels / f"{stem}-{tag}.whl"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr(f"{stem}.dist-info/METADATA", metadata)
            for file, data in (files or {}).items():
                z.writestr(file, data)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.lines.append(f"{name}=={version} \\\n    --hash=sha256:{digest}")
        self.inputs.append(pin or f"{name}=={version}")

    def library(self, machine: int = AARCH64, needed: tuple[str, ...] = ("libc.so.6",)) -> bytes:
        return elf(self.path / "x.so", machine, list(needed)).read_bytes()

    def problems(self, recipe: Recipe = RECIPE) -> list[str]:
        (self.path / "mine.in").write_text("\n".join(self.inputs) + "\n")
        (self.path / "mine.lock").write_text("\n".join(self.lines) + "\n")
        return [p for seen in check(recipe, self.path, Folder(self.wheels), deep=False) for p in seen.problems]

    def torch(self, cuda: str | None = "13.0", runtime: str = "libcudart.so.13") -> None:
        stated = f"cuda: str | None = {cuda!r}\n".encode()
        deps = self.library(needed=(runtime, "libc.so.6"))
        self.wheel("torch", "2.14.1", files={"torch/version.py": stated, "torch/lib/libtorch_global_deps.so": deps})

    def bitsandbytes(self, *code: int) -> None:
        body = self.library() + fatbin(*((MACHINE_CODE, n) for n in code), (PTX, 121))
        self.wheel("bitsandbytes", "0.50.2", files={"bitsandbytes/libbitsandbytes_cuda130.so": body})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def test_a_right_lock_has_no_problem(site: Site) -> None:
    site.torch()
    site.bitsandbytes(90, 121)
    site.wheel("plain", "1.0", ("torch>=2", 'gone>=1; sys_platform == "win32"'), tag="py3-none-any")
    assert site.problems() == []


def test_no_arm64_wheel(site: Site) -> None:
    site.wheel("flash", "1.0", tag="cp312-cp312-manylinux_2_28_x86_64")
    site.wheel("old", "1.0", tag="cp311-cp311-manylinux_2_28_aarch64")
    site.wheel("young", "1.0", tag="cp312-cp312-manylinux_2_41_aarch64")
    assert [p.split(" has ")[0] for p in site.problems()] == ["flash 1.0", "old 1.0", "young 1.0"]


def test_a_wheel_whose_hash_the_lock_has_not(site: Site) -> None:
    site.wheel("swapped", "1.0")
    site.lines[0] = re.sub("[0-9a-f]{64}", "0" * 64, site.lines[0])
    assert site.problems() == ["swapped 1.0 has no wheel for aarch64 with a hash in the lock."]


def test_a_version_that_the_index_has_not(site: Site) -> None:
    site.lines.append(f"absent==1.0 --hash=sha256:{'0' * 64}")
    site.inputs.append("absent==1.0")
    assert site.problems() == ["absent 1.0 has no file on the index."]


def test_a_requirement_that_does_not_hold(site: Site) -> None:
    site.wheel("unsloth", "2026.10.7", ("transformers<=5.17.0", "datasets!=4.4.*"))
    site.wheel("transformers", "5.18.0", tag="py3-none-any")
    assert site.problems() == [
        "unsloth 2026.10.7 needs transformers<=5.17.0, and the lock has 5.18.0.",
        "unsloth 2026.10.7 needs datasets!=4.4.*, and the lock has none.",
    ]


def test_a_requirement_behind_an_extra_that_something_asks_for(site: Site) -> None:
    site.wheel("asks", "1.0", ("toolkit[nvcc]==13.0.3",), tag="py3-none-any")
    site.wheel("toolkit", "13.0.3", ('nvcc-wheel>=2; extra == "nvcc"', 'other; extra == "docs"'), tag="py3-none-any")
    site.wheel("nvcc-wheel", "1.0", tag="py3-none-any")
    assert site.problems() == ["toolkit 13.0.3 needs nvcc-wheel>=2, and the lock has 1.0."]


def test_what_is_left_out_by_an_override_is_not_asked_for(site: Site) -> None:
    site.wheel("unsloth", "1.0", ("xformers>=0.0.27",), tag="py3-none-any")
    (site.path / "out.txt").write_text('xformers ; python_version < "3"  # no aarch64 wheel\n')
    assert site.problems(Recipe("mine", ("mine.in",), "out.txt")) == []
    assert site.problems() == ["unsloth 1.0 needs xformers>=0.0.27, and the lock has none."]


def test_a_quiet_backtrack(site: Site) -> None:
    site.wheel("unsloth", "2026.3.11", tag="py3-none-any", pin="unsloth==2026.10.7")
    site.wheel("trl", "1.0", tag="py3-none-any", pin="trl")
    site.inputs.append("peft==0.21.2")
    assert site.problems() == [
        "mine.in pins unsloth==2026.10.7, and the lock has unsloth 2026.3.11.",
        "mine.in: trl is not an exact pin.",
        "mine.in pins peft==0.21.2, and the lock has no peft.",
    ]


def test_what_decides_must_be_named_at_all() -> None:
    seen = judge.exact([Requirement("torch==2")], {}, "runtime.in", named=("unsloth",))
    assert seen.problems[0] == "runtime.in does not pin unsloth, so a resolver may go back to an old one."


@pytest.mark.parametrize(
    ("cuda", "runtime", "words"),
    [
        ("12.8", "libcudart.so.13", "is built for CUDA 12.8, not CUDA 13"),
        (None, "libcudart.so.13", "is built for CUDA None, not CUDA 13"),
        ("13.0", "libcudart.so.12", "libtorch_global_deps.so needs ['libcudart.so.12']"),
        ("13.0", "libm.so.6", "libtorch_global_deps.so needs no CUDA runtime"),
    ],
)
def test_torch_of_another_cuda(site: Site, cuda: str | None, runtime: str, words: str) -> None:
    site.torch(cuda, runtime)
    assert any(words in p for p in site.problems())


def test_a_compiler_of_another_release_than_the_runtime(site: Site) -> None:
    site.wheel("nvidia-cuda-runtime", "13.0.96", tag="py3-none-any")
    site.wheel("nvidia-nvvm", "13.0.88", tag="py3-none-any")
    assert site.problems() == []
    site.wheel("nvidia-cuda-nvcc", "13.5.37", tag="py3-none-any")
    assert site.problems() == [
        "nvidia-cuda-nvcc 13.5.37 is not of CUDA 13.0, of which the runtime is: name it among the inputs."
    ]


def test_bitsandbytes_without_code_for_gb10(site: Site) -> None:
    site.bitsandbytes(90, 120)  # PTX for 121 is there, and is not machine code
    assert [p.partition(": ")[2] for p in site.problems()] == [
        "bitsandbytes/libbitsandbytes_cuda130.so has machine code for sm_90, sm_120, and none for sm_121."
    ]


def test_bitsandbytes_without_a_cuda_13_library(site: Site) -> None:
    site.wheel("bitsandbytes", "0.50.2", files={"bitsandbytes/libbitsandbytes_cuda128.so": b"x"})
    assert site.problems() == [f"bitsandbytes-0.50.2-{ARM_TAG}.whl has no library for CUDA 13."]


@pytest.mark.parametrize(
    ("file", "machine", "needed", "words"),
    [
        ("pkg/_C.so", X86, (), "pkg/_C.so is for x86_64"),
        ("pkg.libs/libgomp-1.so.1.0.0", X86, (), "libgomp-1.so.1.0.0 is for x86_64"),
        ("pkg/bin/ptxas", X86, (), "pkg/bin/ptxas is for x86_64"),
        ("pkg/_C.so", AARCH64, ("libcudart.so.12",), "needs libcudart.so.12"),
        ("pkg/_C.so", AARCH64, ("libcufft.so.11",), "needs libcufft.so.11"),
        ("nvidia/lib/libcublas.so.12", AARCH64, (), "brings libcublas.so.12"),
    ],
)
def test_a_library_of_another_machine_or_cuda(
    site: Site, file: str, machine: int, needed: tuple[str, ...], words: str
) -> None:
    site.wheel("pkg", "1.0", files={file: site.library(machine, needed)})
    (problem,) = site.problems()
    assert words in problem


def test_libraries_that_are_meant(site: Site) -> None:
    """cuFFT of CUDA 13 is number 12, and one of several libraries chosen by CUDA's version may be another's."""
    files = {
        "pkg/_C.so": site.library(needed=("libcufft.so.12", "libcublas.so.13")),
        "pkg/libpkg_cuda128.so": site.library(needed=("libcudart.so.12",)),
        "pkg/bin/run.sh": b"#!/bin/sh\n",
    }
    site.wheel("pkg", "1.0", files=files)
    assert site.problems() == []


def test_packages_of_another_cuda(site: Site) -> None:
    site.wheel("nvidia-cublas-cu12", "12.9", files={})
    site.wheel("cuda-python", "12.6.2", tag="py3-none-any")
    problems = site.problems()
    assert "cuda-python 12.6.2 is of another CUDA than 13." in problems
    assert "nvidia-cublas-cu12 is a library of another CUDA than 13." in problems


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("torch>=2.14 --hash=sha256:" + "0" * 64, "not an exact pin"),
        ("torch==2.14.1", "not an exact pin with a hash"),
        ("--index-url https://example.org/simple", "names an index"),
        ("torch @@ x", "is no requirement"),
    ],
)
def test_lines_that_a_lock_must_not_have(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "x.lock").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        read_lock(tmp_path / "x.lock")


def test_fat_binaries_torn_anywhere_do_not_raise() -> None:
    whole = b"before" + fatbin((MACHINE_CODE, 90), (MACHINE_CODE, 121)) + b"between" + fatbin((PTX, 120))
    assert architectures(whole) == ({90, 121}, {120})
    for end in range(len(whole)):
        code, ptx = architectures(whole[:end])
        assert code <= {90, 121} and ptx <= {120}


# --- the committed locks, without the net


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_the_committed_locks_hold_their_inputs(recipe: Recipe) -> None:
    folder = ROOT / "docker"
    pins = on(read_lock(folder / recipe.file), "aarch64")
    named = judge.NAMED if recipe.project else ()
    assert judge.exact(requirements(folder, recipe.inputs), pins, recipe.inputs[0], named).problems == []
    assert pins.keys() == on(read_lock(folder / recipe.file), "x86_64").keys()


def test_a_marker_is_kept_beside_the_platforms() -> None:
    text = for_platforms(Requirement("triton>=3.6; platform_system == 'Linux'"))
    assert text.startswith('triton>=3.6 ; (platform_system == "Linux") and sys_platform == "linux"')


class Shaky:
    """A server that cuts the first answers off, or is overloaded, and then serves two bytes."""

    def __init__(self, *answers: int | None) -> None:
        self.answers, self.asked = list(answers), 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        status = self.answers.pop(0) if self.answers else 206
        if status is None:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return httpx.Response(status, content=b"ab", headers={"content-range": "bytes 0-0/2"})


def read_from(server: Shaky, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(index.time, "sleep", lambda seconds: None)
    source = index.HttpIndex({})
    source.client = httpx.Client(transport=httpx.MockTransport(server))
    return source.open(index.File("a.whl", "https://index.test/a.whl", "", 2)).read()


@pytest.mark.parametrize("answers", [(None,), (503, None, 429)])
def test_an_answer_that_was_cut_off_is_asked_for_again(
    answers: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Shaky(*answers)
    assert read_from(server, monkeypatch) == b"ab"
    assert server.asked == len(answers) + 1


def test_an_index_that_never_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Shaky(*[None] * 9)
    with pytest.raises(UserError, match=r"a\.whl can.t be read: Server disconnected"):
        read_from(server, monkeypatch)
    assert server.asked == index.RETRIES + 1


def test_a_file_that_is_missing_is_not_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Shaky(404)
    with pytest.raises(UserError, match="answered 404"):
        read_from(server, monkeypatch)
    assert server.asked == 1
