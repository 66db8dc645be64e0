"""Snapshots: what they hold, how they are kept, and that reading never fails or guesses."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollback_machine import SITE, Machine
from sparkproof.errors import UserError
from sparkproof.rollback import caches, environment, snapshot, tree
from sparkproof.rollback.diff import compare, diff
from sparkproof.rollback.model import AREAS


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_distribution_in_full(machine: Machine) -> None:
    machine.install(
        "torch", "2.14.1", requires=("sympy>=1.13", "pytest; extra == 'test'", "tomli; python_version < '3.0'")
    )
    machine.install("helper-lib", requested=False, script="helper")
    found = {d.name: d for d in machine.snap().environments[0].distributions}
    torch = found["torch"]
    assert (torch.version, torch.installer, torch.requested, torch.requires) == ("2.14.1", "pip", True, ["sympy"])
    assert (
        torch.folder == f"{SITE}/torch-2.14.1.dist-info" and torch.paths and f"{SITE}/torch/__init__.py" in torch.paths
    )
    assert torch.bytes >= (machine.site / "torch/__init__.py").stat().st_size > 0 and torch.digest
    assert found["helper-lib"].requested is False and "bin/helper" in (found["helper-lib"].paths or [])


def test_this_very_environment_in_time() -> None:
    start = time.monotonic()
    found = environment.read(sys.prefix)
    names = {d.name for d in found.distributions}
    assert {"pytest", "pydantic", "torch"} <= names and found.present and not found.not_read
    assert sum(len(d.paths or ()) for d in found.distributions) > 5000
    assert time.monotonic() - start < 10


def test_taking_one_changes_nothing_and_is_repeatable(machine: Machine) -> None:
    machine.install("mine")
    machine.put(machine.hub / "a/b", "x")
    seen = machine.tree()
    first, second = machine.snap(), machine.snap()
    assert machine.tree() == seen and diff(first, second).is_empty
    cache = next(c for c in first.caches if c.name == "huggingface")
    assert cache.bytes == 1 and cache.files == 1 and cache.digest and list(cache.listing) == ["hub/a/b"]


def test_saved_and_read_back_equal(machine: Machine) -> None:
    machine.install("mine")
    Path(os.fsdecode(os.fsencode(machine.home) + b"/.triton")).mkdir()
    Path(os.fsdecode(os.fsencode(machine.home) + b"/.triton/caf\xe9")).write_bytes(b"x")
    found = machine.snap()
    snapshot.save(found, machine.path)
    assert snapshot.load(machine.path) == found
    assert json.loads(machine.path.read_text())["schema"] == "sparkproof-snapshot/2"


def test_all_areas_without_any_tool(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = snapshot.take([machine.venv, machine.root / "missing"], machine.home, env=machine.env, cwd=machine.work)
    assert found.areas == list(AREAS) and not found.dpkg.installed
    assert [e.present for e in found.environments] == [True, False]


def test_profiles_hold_digests_and_never_content(machine: Machine) -> None:
    machine.put(machine.home / ".bashrc", "export HF_TOKEN=hf_secret\n")
    before = machine.before()
    assert "hf_secret" not in machine.path.read_text() and before.profiles.files[f"{machine.home}/.bashrc"]
    machine.put(machine.home / ".bashrc", "export HF_TOKEN=hf_other\n")
    machine.put(machine.home / ".zshrc", "x")
    states = {Path(p.place).name: p for p in diff(before, machine.snap()).of("profiles")}
    assert states[".bashrc"].changed and states[".zshrc"].added and states[".profile"].state == "equal"


def test_what_only_one_looked_at_is_unknown(machine: Machine) -> None:
    whole = machine.snap()
    part = snapshot.take([machine.venv], machine.home, env=machine.env, cwd=machine.work, areas=["python"])
    difference = diff(part, whole)
    assert {p.area: p.state for p in difference.parts} == {
        "python": "equal",
        "files": "equal",
        "caches": "unknown",
        "profiles": "unknown",
    }
    assert not difference.is_empty and "unknown" in difference.text()
    assert not diff(part.model_copy(update={"areas": []}), part.model_copy(update={"areas": []})).is_empty


def test_out_of_time_is_not_read_and_not_equal(machine: Machine) -> None:
    machine.put(machine.hub / "a/b")
    late = snapshot.take([machine.venv], machine.home, env=machine.env, cwd=machine.work, areas=["caches"], budget_s=-1)
    cache = next(c for c in late.caches if c.name == "huggingface")
    assert "too large" in cache.not_read
    assert "unknown" in {p.state for p in diff(late, late).parts}


def test_too_many_files_is_not_read(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / str(i)).touch()
    assert "more than 3" in tree.scan(str(tmp_path), limit=3).why and not tree.scan(str(tmp_path)).why


@pytest.mark.parametrize(
    ("variables", "name", "expected"),
    [
        ({}, "huggingface", "/h/.cache/huggingface"),
        ({"XDG_CACHE_HOME": "/x"}, "huggingface", "/x/huggingface"),
        ({"HF_HOME": "/big/hf"}, "huggingface", "/big/hf"),
        ({"HF_HUB_CACHE": "/big/hub"}, "huggingface", "/big/hub"),
        ({"TRITON_CACHE_DIR": "/t"}, "triton", "/t"),
        ({"TRITON_HOME": "/t"}, "triton", "/t/.triton"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/i"}, "inductor", "/i"),
        ({"TMPDIR": "/scratch", "USER": "u"}, "inductor", "/scratch/torchinductor_u"),
        ({"CUDA_CACHE_PATH": "/c"}, "cuda", "/c"),
        ({"PIP_CACHE_DIR": "rel"}, "pip", "/w/rel"),
        ({}, "unsloth", "/w/unsloth_compiled_cache"),
        ({"UNSLOTH_COMPILE_LOCATION": "/u"}, "unsloth", "/u"),
        ({"SPARKPROOF_CACHE": "/s"}, "sparkproof", "/s"),
    ],
)
def test_where_caches_are(variables: dict[str, str], name: str, expected: str) -> None:
    assert caches.roots({"LOGNAME": "", **variables}, "/h", "/w").get(expected) == name


def test_a_variable_never_makes_the_home_a_cache() -> None:
    for root in ("/h", "/", "/w", "/h/.cache", "/tmp"):
        assert root not in caches.roots({"HF_HOME": root, "TRITON_CACHE_DIR": root + "/"}, "/h", "/w")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": "sparkproof-snapshot/1"}', '{"schema": "sparkproof-snapshot/2"}']
)
def test_a_file_that_is_no_snapshot(tmp_path: Path, content: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"s\.json"):
        snapshot.load(path)
    with pytest.raises(UserError, match="no snapshot at"):
        snapshot.load(tmp_path / "missing.json")


def test_a_place_that_cannot_be_written(machine: Machine) -> None:
    blocker = machine.put("file")
    with pytest.raises(UserError, match="can't be written"):
        snapshot.save(machine.snap(), blocker / "s.json")


NAMES = st.lists(st.sampled_from(["a", "b", "cc"]), min_size=1, max_size=3).map("/".join)
STAMPS = st.dictionaries(NAMES, st.sampled_from(["f:1:1", "f:2:2", "l:x", "d"]), max_size=6)


@given(STAMPS, STAMPS)
def test_compare_misses_nothing_and_invents_nothing(before: dict[str, str], after: dict[str, str]) -> None:
    added, removed, changed = compare(before, after)
    assert not set(added) & set(before) and not set(removed) & set(after)
    assert {p for p in added if after[p] != "d"} == {p for p in after if p not in before and after[p] != "d"}
    assert {p for p in removed if before[p] != "d"} == {p for p in before if p not in after and before[p] != "d"}
    assert set(changed) == {p for p in before if p in after and before[p] != after[p]}


@given(st.binary(min_size=1, max_size=12).filter(lambda b: b"\0" not in b and b"/" not in b))
def test_any_file_name_survives_json(name: bytes) -> None:
    text = json.loads(json.dumps(tree.to_text(os.fsdecode(name))))
    text.encode("utf-8")
    assert os.fsencode(tree.to_path(text)) == name
