"""The record: whole after every kind of bad luck, and never the carrier of a secret."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_sample import case, evil_result, laptop, mixed_results, record_of, spark
from sparkproof.errors import UserError
from sparkproof.report import record as records
from sparkproof.report.redact import Redactor, is_secret_name
from sparkproof.results import Verdict

SECRET = "s3cr3t/Value+With:odd chars"


def planned(*names: str) -> list[records.Planned]:
    return [records.Planned(name=n, kind="kernel", digest="1") for n in names]


def begin(folder: Path, *names: str) -> tuple[Path, records.Recorder]:
    run_dir = records.new_run_dir(folder / "reports")
    return run_dir, records.Recorder.create(run_dir, profile="quick", planned=planned(*names), facts=spark())


def test_a_run_from_begin_to_end(tmp_path: Path) -> None:
    run_dir, recorder = begin(tmp_path, "k/a", "k/b")
    recorder.append(case("k/a"), "1")
    half = records.load(run_dir)
    assert half.interrupted and half.end is None and [p.name for p in half.missing] == ["k/b"] and half.exit_code == 2
    recorder.append(case("k/b"), "1")
    recorder.end()
    whole = records.load(run_dir)
    assert not whole.interrupted and not whole.missing and whole.exit_code == 0 and whole.end is not None
    assert whole.end.exit_code == 0 and [r.name for r in whole.results] == ["k/a", "k/b"]
    kinds = [json.loads(x)["type"] for x in (run_dir / "record.jsonl").read_text().splitlines()]
    assert kinds == ["run", "case", "case", "end"]
    assert whole.header.facts == spark() and whole.header.versions["python"] and whole.header.command


@pytest.mark.parametrize(
    ("verdicts", "strict", "code"),
    [
        (["passed", "passed"], False, 0),
        (["passed", "failed", "broken"], False, 1),
        (["passed", "broken", "retest"], False, 2),
        (["passed", "retest"], False, 3),
        (["passed", "skipped"], True, 1),
        ([], False, 2),
    ],
)
def test_exit_codes(tmp_path: Path, verdicts: list[str], strict: bool, code: int) -> None:
    results = [case(f"k/{i}", verdict=Verdict(v)) for i, v in enumerate(verdicts)]
    assert record_of(tmp_path, results, strict=strict).exit_code == code
    assert record_of(tmp_path, results, strict=strict, interrupted=True).exit_code == 130


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=1, max_value=4000))
def test_every_cut_of_the_last_line_loses_that_line_alone(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run_dir = tmp_path_factory.mktemp("cut")
    record_of(run_dir, [case("k/a"), case("k/b", output_tail="x" * 500)], ended=False)
    path = run_dir / "record.jsonl"
    data = path.read_bytes()
    last = len(data.splitlines(keepends=True)[-1])
    path.write_bytes(data[: len(data) - min(cut, last)])
    record = records.load(run_dir)
    assert [r.name for r in record.results] == ["k/a"] and [p.name for p in record.missing] == ["k/b"]
    assert record.torn_bytes == last - min(cut, last)


def test_zeros_after_a_power_cut_are_a_torn_line(tmp_path: Path) -> None:
    record_of(tmp_path, [case("k/a")], ended=False)
    with (tmp_path / "record.jsonl").open("ab") as f:
        f.write(b"\0" * 4096)
    assert records.load(tmp_path).torn_bytes == 4096


def test_resume_cuts_the_torn_line_and_says_so(tmp_path: Path) -> None:
    run_dir, recorder = begin(tmp_path, "k/a", "k/b", "k/c")
    recorder.append(case("k/a"), "1")
    recorder.append(case("k/b"), "1")
    recorder.close()
    with (run_dir / "record.jsonl").open("ab") as f:
        f.write(b'{"type": "case", "result": {"na')
    recorder, before = records.Recorder.resume(run_dir, spark())
    assert before.resumed[0].lost_bytes == 31 and "torn" in before.resumed[0].note
    assert before.to_run({"k/a": "1", "k/b": "2", "k/c": "1"}) == ["k/b", "k/c"], "b changed, c has no result"
    assert before.to_run({"k/a": "1"}) == [], "cases whose file is gone can't be run"
    recorder.append(case("k/b", verdict=Verdict.FAILED, reason="it did"), "2")
    recorder.append(case("k/c"), "1")
    recorder.end()
    after = records.load(run_dir)
    assert {r.name: r.verdict.value for r in after.results} == {"k/a": "passed", "k/b": "failed", "k/c": "passed"}
    assert after.changed == ["k/b"] and after.exit_code == 1 and after.torn_bytes == 0


def test_an_ended_run_that_is_resumed_has_not_ended(tmp_path: Path) -> None:
    run_dir, recorder = begin(tmp_path, "k/a")
    recorder.end(interrupted=True)
    assert records.load(run_dir).exit_code == 130
    recorder, before = records.Recorder.resume(run_dir)
    assert before.end is None and before.interrupted
    recorder.close()


def test_a_run_is_not_resumed_on_another_device(tmp_path: Path) -> None:
    run_dir, recorder = begin(tmp_path, "k/a")
    recorder.close()
    size = (run_dir / "record.jsonl").stat().st_size
    with pytest.raises(UserError, match="another device"):
        records.Recorder.resume(run_dir, laptop())
    assert (run_dir / "record.jsonl").stat().st_size == size


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    run_dir, recorder = begin(tmp_path, "k/a")
    with pytest.raises(UserError, match="Another process"):
        records.Recorder.resume(run_dir)
    recorder.close()
    with pytest.raises(UserError, match="in the way"):
        records.Recorder.create(run_dir, profile="smoke", planned=[], facts=spark())


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    names = [f"k/{i}" for i in range(24)]
    run_dir, recorder = begin(tmp_path, *names)
    threads = [threading.Thread(target=recorder.append, args=(case(n, output_tail="y" * 20_000), "1")) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    recorder.end()
    record = records.load(run_dir)
    assert sorted(r.name for r in record.results) == sorted(names) and not record.missing


KILLED = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
from report_sample import case, spark
from sparkproof.report import record as records
run_dir = pathlib.Path(sys.argv[1])
planned = [records.Planned(name=f"k/{i}", kind="kernel") for i in range(10**5)]
recorder = records.Recorder.create(run_dir, profile="quick", planned=planned[:500], facts=spark())
for i in range(10**5):
    recorder.append(case(f"k/{i}", output_tail="z" * 30_000))
    print(i, flush=True)
"""


def test_kill_dash_nine_keeps_every_case_that_was_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = -1
    for line in process.stdout:
        told = int(line)
        if told >= 12:
            process.send_signal(signal.SIGKILL)
            break
    rest = process.stdout.read().split()
    process.wait()
    told = max([told, *map(int, rest)])
    names = [r.name for r in records.load(tmp_path).results]
    assert names[: told + 1] == [f"k/{i}" for i in range(told + 1)] and len(names) <= told + 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("partly", [False, True])
def test_no_space_keeps_the_record_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, partly: bool
) -> None:
    run_dir, recorder = begin(tmp_path, "k/a", "k/b")
    recorder.append(case("k/a"), "1")
    before = (run_dir / "record.jsonl").read_bytes()
    real = os.write

    def refuse(fd: int, data: bytes) -> int:
        if partly:
            return real(fd, data[:100])
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as m:
        m.setattr(os, "write", refuse)
        with pytest.raises(UserError, match="read-only" if number == errno.EROFS and not partly else "disk is full"):
            recorder.append(case("k/b"), "1")
    assert (run_dir / "record.jsonl").read_bytes() == before
    recorder.append(case("k/b"), "1")
    assert len(records.load(run_dir).results) == 2, "once there is space again, it goes on"


def test_a_device_that_is_really_full() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("platform: no /dev/full")
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as e:
            os.write(fd, b"x")
    finally:
        os.close(fd)
    from sparkproof.report.rundir import storage_error

    error = storage_error(e.value, "The record", Path("x"))
    assert "disk is full" in error.message and "--reports" in error.fix


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello\n", "not the record"),
        (b"\x00\xff\xfe\n\n", "not the record"),
        (b'{"type": "end", "ended": "", "exit_code": 0}\n', "does not begin"),
        (b'{"type": "run", "schema": "sparkproof-record-9"}\n', "another version"),
        (b"[1, 2]\n", "not the record"),
    ],
)
def test_nonsense_gets_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "record.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=says):
        records.load(tmp_path)


def test_damage_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    record_of(tmp_path, [case("k/a"), case("k/b")])
    path = tmp_path / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:40] + b"\n", *lines[2:]]))
    with pytest.raises(UserError, match="line 2"):
        records.load(tmp_path)
    path.write_bytes(lines[0] + lines[0])
    with pytest.raises(UserError, match="two runs"):
        records.load(tmp_path)
    with pytest.raises(UserError, match="can't be read"):
        records.load(tmp_path / "nowhere")


def test_hostile_text_and_numbers_survive_as_strict_json(tmp_path: Path) -> None:
    run_dir, recorder = begin(tmp_path)
    result = evil_result()
    result.output_tail += "\udc80\u2028\r\n\x85"
    recorder.append(result)
    recorder.end()

    def forbid(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    for line in (run_dir / "record.jsonl").read_bytes().split(b"\n")[:-1]:
        json.loads(line, parse_constant=forbid)
    back = records.load(run_dir).results[0]
    assert back.output_tail == result.output_tail and back.name == result.name
    assert math.isnan(back.measurements[1].value) and back.measurements[1].samples == [math.inf, -math.inf]


# --- secrets ---


PLANTED = {
    "HF_TOKEN": "hub-value-0001",
    "HUGGING_FACE_HUB_TOKEN": "hub-value-0002",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_SERVICE_SECRET": SECRET,
    "DB_PASSWORD": "hunter22",
    "PGPASSWORD": "postgres-pw",
    "SSH_PRIVATE_KEY": "line-one-of-a-private-key-xyz\nline-two-of-a-private-key-xyz",
}


def test_planted_secrets_reach_no_line_and_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    run_dir, recorder = begin(tmp_path, "k/a")
    log = run_dir / "cases" / "k-a" / "main.log"
    log.parent.mkdir(parents=True)
    everything = " ".join(PLANTED.values())
    log.write_text(f"begin {everything} end\n")
    result = case(
        "k/a",
        reason=everything,
        output_tail=everything,
        evidence={"deep": [{everything: everything}], "HF_TOKEN": "something else"},
        rerun=f"HF_TOKEN={PLANTED['HF_TOKEN']} sparkproof validate",
    )
    recorder.append(result, "1")
    recorder.end()
    for path in (run_dir / "record.jsonl", log):
        text = path.read_text()
        for value in PLANTED.values():
            for part in value.split("\n"):
                assert part not in text, (path.name, part)
        assert "[redacted" in text
    assert "something else" not in (run_dir / "record.jsonl").read_text()
    assert records.load(run_dir).results[0].name == "k/a"


@pytest.mark.parametrize(
    "text",
    [
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123",
        "ghp_0123456789abcdefghijABCDEFGHIJ012345",
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuv",
        "Authorization: Bearer abc.DEF-123_456",
        "https://user:p4ss-w0rd@host/simple",
        "https://bucket/x?X-Amz-Signature=deadbeef123&b=1",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n-----END OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg cut off here",
        "export NGC_API_KEY=abcd1234efgh",
        "sk-proj-0123456789abcdefghijklmnop",
        "nvapi-0123456789abcdefghijklmnop",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def",
    ],
)
def test_shapes_of_secrets(text: str) -> None:
    out = Redactor({}).text(f"before {text} after" if "cut off" not in text else f"before {text}")
    assert "redacted" in out and out.startswith("before ")
    for secret in (
        "AbCdEfGhIj", "0123456789abcdefghij", "abcdefghijkl", "DEF-123", "p4ss", "deadbeef", "b3Blbn", "MIIEvQ",
        "abcd1234", "eyJzdWI",
    ):  # fmt: skip
        assert secret not in out


@pytest.mark.parametrize(
    "text",
    [
        "tokens_per_s 3461, eos_token: <|im_end|>, tokenizer ok",
        "sha256 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "kernels/rms_norm[dtype=bf16] hf_engine basic authentication, bearer of news",
        "https://huggingface.co/a/b?revision=main and C:8080 and 12:30@noon",
        "TOKENIZERS_PARALLELISM=false",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redactor({"TOKENIZERS_PARALLELISM": "false-value", "X_TOKEN": "1"}).text(text) == text


def test_a_password_that_is_a_word_of_the_schema_breaks_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_PASSWORD", "passed")
    monkeypatch.setenv("B_PASSWORD", "kernel")
    monkeypatch.setenv("C_PASSWORD", "duration_s")
    run_dir, recorder = begin(tmp_path, "x/a")
    recorder.append(case("x/a", reason="the password is passed"), "1")
    recorder.end()
    result = records.load(run_dir).results[0]
    assert result.verdict is Verdict.PASSED and result.reason == "the password is [redacted A_PASSWORD]"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "X_SECRET", "PGPASSWORD", "MY_PASSWORD_2", "AWS_SECRET_ACCESS_KEY"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "PATH", "AUTHOR", "KEYBOARD"])
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


# --- folders ---


def test_latest_moves_and_falls_back_to_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, a = begin(tmp_path, "k/a")
    second, b = begin(tmp_path, "k/a")
    a.close()
    b.close()
    assert first != second
    for run_dir in (first, second):
        assert records.point_latest(run_dir).is_symlink()
        assert records.find_run("latest", tmp_path / "reports").resolve() == run_dir.resolve()

    def no_links(self: Path, target: object, target_is_directory: bool = False) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    pointer = records.point_latest(first)
    assert pointer.name == "latest.txt" and not (tmp_path / "reports" / "latest").exists()
    assert records.find_run("latest", tmp_path / "reports") == first
    assert not list((tmp_path / "reports").glob(".latest*")), "nothing half is left"


def test_find_run_by_name_start_path_and_not(tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    with pytest.raises(UserError, match="holds none"):
        records.find_run("latest", reports)
    run_dir, recorder = begin(tmp_path, "k/a")
    recorder.close()
    for which in (run_dir.name, run_dir.name[:-2], str(run_dir), str(run_dir / "record.jsonl")):
        assert records.find_run(which, reports) == run_dir
    with pytest.raises(UserError, match="Did you mean"):
        records.find_run(run_dir.name[:-1] + "zz", reports)
    other = reports / (run_dir.name[:-1] + "!")
    other.mkdir()
    (other / "record.jsonl").write_text("")
    with pytest.raises(UserError, match="several"):
        records.find_run(run_dir.name[:-1], reports)


def test_a_folder_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        records.new_run_dir(tmp_path / "file" / "reports")
    with pytest.raises(UserError, match="--reports"):
        records.new_run_dir(Path("/proc/reports"))
    with pytest.raises(UserError, match="too long"):
        records.new_run_dir(tmp_path / ("x" * 300))


def test_results_keep_their_planned_order(tmp_path: Path) -> None:
    results = mixed_results()
    record = record_of(tmp_path, results)
    assert [r.name for r in record.results] == [r.name for r in results]
