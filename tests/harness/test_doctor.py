"""What the doctor prints, its JSON and its exit code; and the runner that makes a case of the same checks."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console
from sparkproof.checks.catalogue import CATALOGUE, TOPICS
from sparkproof.cli import app
from sparkproof.cli.doctor import catalogue, doctor, facts
from sparkproof.cli.doctor_view import summary
from sparkproof.errors import UserError
from sparkproof.facts.collect import load
from sparkproof.facts.model import Facts
from sparkproof.facts.toolchain import Bitsandbytes, Torch, Triton
from sparkproof.report.verdict import NOT_FOR_TARGET
from sparkproof.results import ReasonClass, Verdict
from sparkproof.runners.base import Context
from sparkproof.runners.environment import run
from sparkproof.scenario import Case, EnvironmentScenario

FOLDER = Path(__file__).parents[1] / "facts"


def recorded(name: str) -> Path:
    return FOLDER / f"{name}.json"


def printed(name: str, width: int = 100, topic: str = "all") -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width)
    code = doctor(recorded(name), console=console, topic=topic)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_healthy_spark() -> None:
    code, text = printed("gb10_healthy")
    assert code == 0
    assert text.startswith("NVIDIA GB10, 12.1, 48 SMs, 119.7 GiB unified\n")
    assert "HARMLESS nvidia-smi shows no memory" in text and "nothing to do" in text
    assert "0 errors, 0 warnings, 1 harmless" in text
    assert text.rstrip().endswith("Next: sparkproof validate")


def test_errors_come_first_and_the_end_says_one_thing() -> None:
    code, text = printed("gb10_neighbours")
    assert code == 1
    assert text.index("ERROR") < text.index("WARNING") < text.index("HARMLESS")
    assert text.rstrip().splitlines()[-1] == "Next: ps aux --sort=-rss | head  # then stop what is not needed"


def test_warnings_alone_exit_0_and_still_name_the_next_step() -> None:
    code, text = printed("gb10_page_cache")
    assert code == 0
    assert text.rstrip().endswith("Next: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_fixes_can_be_copied_at_any_width(width: int) -> None:
    _, text = printed("gb10_no_nvidia_runtime", width)
    assert "  fix     sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker\n" in text


def test_brackets_in_evidence_are_not_markup() -> None:
    _, text = printed("gb10_no_nvidia_runtime", 200)
    assert "[[gpu]]" in text


def test_unjudged_checks_are_named() -> None:
    _, text = printed("gb10_wedged")
    assert "could not be judged: memory.nvml" in text


def test_what_was_not_read_is_shown(tmp_path: Path) -> None:
    broken = load(recorded("gb10_healthy")).model_copy(update={"errors": {"nvml": "OSError: gone"}})
    path = tmp_path / "f.json"
    path.write_text(broken.model_dump_json(), encoding="utf-8")
    console = Console(file=io.StringIO(), width=100)
    doctor(path, console=console)
    assert "not read: nvml: OSError: gone" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "code"), [("gb10_triton35", 1), ("gb10_healthy", 0), ("x86_laptop", 0)])
def test_json(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(recorded(name), json_out=True) == code
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sparkproof-doctor-1"
    assert document["exit_code"] == code
    assert document["is_target"] is name.startswith("gb10")
    assert document["origin"].startswith("constructed")
    errors = [f for f in document["findings"] if f["severity"] == "error"]
    assert bool(errors) is bool(code)
    assert all(f["evidence"] and f["cause"] and f["source"] for f in document["findings"])
    assert {c["state"] for c in document["checks"]} <= {"ok", "found", "not applicable", "not read"}


def test_what_did_not_answer_is_not_said_to_be_missing() -> None:
    facts = load(recorded("gb10_healthy"))
    rows = dict(summary(facts))
    assert rows["torch"].startswith("2.") and ", CUDA 13" in rows["torch"]
    late = "torch stopped while it was imported: no answer within 40 s"
    gone = "import torch: ModuleNotFoundError: torch"
    for error, said in ((late, f"not read: {late}"), (gone, "not there")):
        asked = facts.model_copy(update={"torch": Torch(error=error), "triton": Triton(error=error)})
        assert (dict(summary(asked))["torch"], dict(summary(asked))["triton"]) == (said, said)


def test_one_topic() -> None:
    code, text = printed("gb10_triton35", topic="memory")
    assert code == 0 and "8 checks:" in text
    with pytest.raises(UserError, match="no topic"):
        printed("gb10_triton35", topic="nonsense")


def test_strict_makes_warnings_and_unjudged_checks_fail() -> None:
    assert doctor(recorded("gb10_page_cache"), console=quiet_console(), strict=True) == 1
    assert doctor(recorded("gb10_healthy"), console=quiet_console(), strict=True) == 0, "what is harmless never fails"
    unread = "gb10_wedged"
    assert doctor(recorded(unread), console=quiet_console(), topic="memory", strict=False) == 0
    assert doctor(recorded(unread), console=quiet_console(), topic="memory", strict=True) == 1


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_fix_prints_every_command_once_worst_first_and_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("no command may be run"))
    console = quiet_console()
    doctor(recorded("gb10_small_shm"), console=console, fix=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    block = text.partition("Commands, in this order (none of them was run):\n")[2].partition("\n\n")[0]
    assert block.splitlines() == [
        "  # container.shm",
        "  docker run --gpus all --shm-size=8g --ulimit memlock=-1 --ulimit stack=67108864 ...",
    ], "two findings, one cure"
    worst = quiet_console()
    doctor(recorded("gb10_neighbours"), console=worst, fix=True)
    order = [line for line in worst.file.getvalue().splitlines() if line.startswith("  # ")]  # type: ignore[attr-defined]
    assert order == ["  # memory.floor", "  # memory.neighbours", "  # memory.allocator"]
    healthy = quiet_console()
    doctor(recorded("gb10_healthy"), console=healthy, fix=True)
    assert "No command to give" in healthy.file.getvalue()  # type: ignore[attr-defined]


def test_memory_is_accounted_for() -> None:
    _, text = printed("gb10_page_cache", 120)
    assert "Memory (GiB)" in text and "2.9 free + 49.1 reclaimable = 52.0" in text
    assert "2.8, which is 49.2 less than can be had: page cache counts as used" in text
    _, other = printed("gb10_page_cache", 120, topic="triton")
    assert "Memory (GiB)" not in other


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_every_answer_fits_the_schema(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(path, json_out=True)
    document = json.loads(capsys.readouterr().out)
    schema = json.loads((FOLDER.parents[1] / "reports/schema/doctor-1.json").read_text())
    jsonschema.validate(document, schema)
    counts = document["counts"]
    assert (
        sum(counts[s] for s in ("ok", "found", "not applicable", "not read"))
        == len(document["checks"])
        == len(CATALOGUE)
    )
    assert len(document["findings"]) == counts["error"] + counts["warning"] + counts["info"]
    assert document["verdict"] == ("failed" if counts["error"] else "passed")


def test_the_catalogue_in_words_and_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    console = quiet_console()
    assert catalogue(console=console) == 0
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "60 rows: 57 have a check, 3 a test alone, 0 neither." in text
    assert catalogue(json_out=True) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctor", "--catalogue", "--fix"], "--catalogue examines nothing."),
        (["doctor", "--catalogue", "--facts", "x.json"], "--catalogue examines nothing."),
        (["doctor", "--json", "--fix"], "--fix is for people."),
        (["doctor", "--topic", "trition"], "Did you mean 'triton'?"),
    ],
)
def test_what_does_not_go_together_is_an_error(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        app(arguments, standalone_mode=False)
    assert said in str(caught.value)


def test_a_wrong_topic_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkproof.cli.doctor.collect", lambda **k: pytest.fail("half a minute for nothing"))
    with pytest.raises(UserError):
        doctor(topic="trition", console=quiet_console())


def test_facts_are_not_written_over_what_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(recorded("gb10_healthy").read_text(), encoding="utf-8")
    with pytest.raises(UserError, match="written over"):
        facts(path, facts_file=path, redact=True, console=quiet_console())


def test_bad_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no facts file"):
        doctor(tmp_path / "none.json")


def test_facts_shown_saved_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "saved.json"
    console = Console(file=io.StringIO(), width=100)
    assert facts(target, facts_file=recorded("gb10_healthy"), console=console) == 0
    assert f"sparkproof doctor --facts {target}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert load(target) == load(recorded("gb10_healthy"))
    assert facts(json_out=True, facts_file=target) == 0
    assert Facts.model_validate_json(capsys.readouterr().out) == load(target)


# --- the runner


def case(topic: str) -> Case:
    scenario = EnvironmentScenario(kind="environment", summary="for this test alone", topic=topic)
    return Case(name=f"environment/{topic}", file="x.yaml", scenario=scenario)


def context(read: Facts, tmp_path: Path) -> Context:
    return Context(run_dir=tmp_path, facts=read, cache_dir=tmp_path, memory_floor_gib=1.0)


def test_runner_passes_with_evidence_of_every_check(tmp_path: Path) -> None:
    result = run(case("all"), context(load(recorded("gb10_healthy")), tmp_path))
    assert result.verdict is Verdict.PASSED and result.mode == "host"
    assert len(result.assertions) == 54 and all(a.passed and a.detail for a in result.assertions)
    assert result.evidence["checks"]["container.limits"]["state"] == "not applicable"
    assert not [a for a in result.assertions if a.name.startswith("container.limits")]
    assert [n for n in result.notices if n.startswith("Harmless: nvidia-smi")]


def test_runner_fails_with_the_fix_of_the_worst(tmp_path: Path) -> None:
    result = run(case("triton"), context(load(recorded("gb10_triton35")), tmp_path))
    assert result.verdict is Verdict.FAILED
    assert result.next_step == "export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas"
    assert "12.8.93" in result.reason
    assert [a.passed for a in result.assertions] == [False, True]  # the others are explained by the first


def test_a_strict_run_fails_for_warnings(tmp_path: Path) -> None:
    strict = dataclasses.replace(context(load(recorded("gb10_page_cache")), tmp_path), strict=True)
    result = run(case("memory"), strict)
    assert result.verdict is Verdict.FAILED and "memory.page_cache" in result.reason
    assert result.next_step.startswith("sync; echo 3")
    healthy = dataclasses.replace(context(load(recorded("gb10_healthy")), tmp_path), strict=True)
    assert run(case("memory"), healthy).verdict is Verdict.PASSED


def test_runner_takes_warnings_as_notices(tmp_path: Path) -> None:
    result = run(case("memory"), context(load(recorded("gb10_page_cache")), tmp_path))
    assert result.verdict is Verdict.PASSED
    assert any("CUDA counts page cache" in n and "drop_caches" in n for n in result.notices)


@pytest.mark.parametrize(
    ("topic", "changes", "reason"),
    [
        ("gpu", {}, ReasonClass.GPU),
        ("driver", {}, ReasonClass.GPU),
        ("torch", {}, ReasonClass.GPU),
        ("bitsandbytes", {"bitsandbytes": Bitsandbytes()}, ReasonClass.SOFTWARE),
        ("unsloth", {}, ReasonClass.PLATFORM),
        ("cluster", {}, ReasonClass.PLATFORM),
    ],
)
def test_runner_skips_a_topic_that_does_not_apply(
    topic: str, changes: dict[str, object], reason: ReasonClass, tmp_path: Path
) -> None:
    laptop = load(recorded("x86_laptop")).model_copy(update=changes)
    result = run(case(topic), context(laptop, tmp_path))
    assert result.verdict is Verdict.SKIPPED and result.reason_class is reason
    assert not result.assertions and result.reason


def test_runner_without_facts_is_broken_not_passed(tmp_path: Path) -> None:
    result = run(case("python"), context(Facts(origin="nothing was read"), tmp_path))
    assert result.verdict is Verdict.BROKEN and "not read" in result.reason


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_runs_on_every_recording(topic: str, tmp_path: Path) -> None:
    for path in sorted(FOLDER.glob("*.json")):
        result = run(case(topic), context(load(path), tmp_path))
        assert result.verdict in (Verdict.PASSED, Verdict.FAILED, Verdict.SKIPPED), f"{path.name}: {result.reason}"
        assert bool(result.next_step) or result.verdict is Verdict.PASSED


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("name", ["gb10_healthy", "gb10_two_sparks", "n1x_healthy"])
def test_what_is_optional_keeps_no_spark_from_being_validated(topic: str, name: str, tmp_path: Path) -> None:
    """A Spark without Unsloth, Ollama or a second Spark lacks nothing that a profile requires."""
    result = run(case(topic), context(load(recorded(name)), tmp_path))
    assert result.verdict is Verdict.PASSED or result.reason_class in NOT_FOR_TARGET
