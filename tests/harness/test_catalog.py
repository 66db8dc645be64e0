"""Loading scenarios: names, matrices, selection, and one clear line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sparkproof import catalog
from sparkproof.errors import UserError
from sparkproof.scenario import Profile

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"kind": "kernel", "summary": "rms_norm equals its reference", "op": "rms_norm"}


def write(root: Path, name: str, body: object) -> Path:
    path = root / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body if isinstance(body, str) else yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    return path


def test_the_projects_own_scenarios_are_all_valid() -> None:
    found = catalog.load(ROOT / "scenarios")
    assert found.problems == []
    assert {c.kind for c in found.cases.values()} == set(catalog.KIND_ORDER)


def test_each_export_case_names_a_train_case_that_exists() -> None:
    found = catalog.load(ROOT / "scenarios")
    sources = [c.scenario.source for c in found.cases.values() if c.scenario.kind == "export"]
    assert sources and all(s.startswith("tiny:") or found.cases[s].kind == "train" for s in sources)


def test_matrix_gives_stable_unique_names(tmp_path: Path) -> None:
    write(
        tmp_path, "kernels/rms_norm", {**KERNEL, "matrix": {"dtype": ["fp32", "bf16"], "variant": ["llama", "gemma"]}}
    )
    names = list(catalog.load(tmp_path).cases)
    assert names == [
        "kernels/rms_norm[dtype=fp32,variant=llama]",
        "kernels/rms_norm[dtype=fp32,variant=gemma]",
        "kernels/rms_norm[dtype=bf16,variant=llama]",
        "kernels/rms_norm[dtype=bf16,variant=gemma]",
    ]
    assert catalog.load(tmp_path).cases[names[2]].scenario.dtype == "bf16"  # type: ignore[union-attr]


@given(
    st.lists(st.sampled_from(["fp32", "fp16", "bf16"]), min_size=1, unique=True),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
)
def test_expansion_is_the_product_with_unique_names(dtypes: list[str], variants: list[str]) -> None:
    expanded = list(catalog.expand({**KERNEL, "matrix": {"dtype": dtypes, "variant": variants}}))
    assert len({suffix for suffix, _ in expanded}) == len(dtypes) * len(variants)
    assert {(f["dtype"], f["variant"]) for _, f in expanded} == {(d, v) for d in dtypes for v in variants}


@pytest.mark.parametrize(
    ("body", "line", "key", "says"),
    [
        ("kind: kernal\nsummary: a long enough text\n", 1, "kind", "Did you mean 'kernel'?"),
        ("summary: a long enough text\n", 1, "kind", "required"),
        ("kind: kernel\nsummary: a long enough text\nop: x\ndtpye: bf16\n", 4, "dtpye", "Did you mean 'dtype'?"),
        ("kind: kernel\nsummary: a long enough text\nop: x\ndtype: bf61\n", 4, "dtype", "Did you mean 'bf16'?"),
        ("kind: kernel\nsummary: a long enough text\n", 1, "op", "required"),
        ("kind: kernel\nsummary: a long enough text\nop: x\ntimeout_s: -1\n", 4, "timeout_s", "greater than 0"),
        ("kind: kernel\nsummary: a long enough text\nop: x\nrequires:\n  gpus: true\n", 5, "requires.gpus", "'gpu'"),
        (
            "kind: kernel\nsummary: a long enough text\nop: x\nmatrix:\n  dtyp: [a]\n",
            4,
            "matrix",
            "Did you mean 'dtype'?",
        ),
        ("kind: kernel\nsummary: a long enough text\nop: x\nmatrix: {dtype: []}\n", 4, "matrix", "at least one value"),
        ("kind: kernel\nsummary: a long enough text\nop: x\nop: y\n", 4, "op", "written twice"),
        ("kind: kernel\nsummary: [unclosed\n", 3, "", "not valid YAML"),
        ("just text\n", 1, "", "expected keys and values"),
        ("", 1, "", "expected keys and values"),
    ],
)
def test_a_wrong_file_is_named_with_its_line_and_the_others_load(
    tmp_path: Path, body: str, line: int, key: str, says: str
) -> None:
    write(tmp_path, "kernels/good", KERNEL)
    write(tmp_path, "kernels/wrong", body)
    found = catalog.load(tmp_path)
    assert list(found.cases) == ["kernels/good"]
    problem = found.problems[0]
    assert (problem.line, problem.key) == (line, key)
    assert says in problem.message
    assert "wrong.yaml" in str(problem)


def test_one_bad_cell_of_a_matrix_is_reported_once_and_empties_the_file(tmp_path: Path) -> None:
    write(tmp_path, "k", {**KERNEL, "matrix": {"dtype": ["fp32", "int8"], "variant": ["a", "b"]}})
    found = catalog.load(tmp_path)
    assert not found.cases and len(found.problems) == 1


def test_a_hub_model_without_a_revision_is_refused(tmp_path: Path) -> None:
    body = yaml.safe_load((ROOT / "scenarios/train/smollm2/135m_qlora_single_device.yaml").read_text())
    write(tmp_path, "train/x", {**body, "model": "someone/model"})
    found = catalog.load(tmp_path)
    assert "revision" in found.problems[0].message


def test_selecting(tmp_path: Path) -> None:
    write(tmp_path, "kernels/a", {**KERNEL, "tags": ["norm"], "matrix": {"dtype": ["fp32", "bf16"]}})
    write(tmp_path, "kernels/b", {**KERNEL, "profile": "full"})
    found = catalog.load(tmp_path)

    def names(**kwargs: object) -> list[str]:
        return [c.name for c in found.select(**kwargs)]  # type: ignore[arg-type]

    assert names(profile=Profile.SMOKE) == ["kernels/a[dtype=bf16]", "kernels/a[dtype=fp32]"]
    assert names(profile=Profile.FULL)[-1] == "kernels/b"
    assert names(profile=Profile.SMOKE, patterns=["kernels/a[dtype=bf16]"]) == ["kernels/a[dtype=bf16]"]
    assert names(profile=Profile.SMOKE, patterns=["*dtype=fp*"]) == ["kernels/a[dtype=fp32]"]
    assert names(profile=Profile.SMOKE, patterns=["kernels/b"]) == ["kernels/b"], "an exact name needs no profile"
    assert names(tags=["norm"], kinds=["kernel"]) == names(profile=Profile.SMOKE)
    with pytest.raises(UserError, match="Did you mean"):
        names(patterns=["kernels/a[dtype=fp23]"])
    with pytest.raises(UserError, match="--profile full"):
        names(profile=Profile.SMOKE, patterns=["nels/b"])


def test_the_digest_follows_what_would_run_and_not_its_description(tmp_path: Path) -> None:
    path = write(tmp_path, "k", KERNEL)
    one = catalog.digest(catalog.load(tmp_path).cases["k"])
    path.write_text(yaml.safe_dump({**KERNEL, "summary": "another sentence about it"}))
    assert catalog.digest(catalog.load(tmp_path).cases["k"]) == one
    path.write_text(yaml.safe_dump({**KERNEL, "dtype": "bf16"}))
    assert catalog.digest(catalog.load(tmp_path).cases["k"]) != one
