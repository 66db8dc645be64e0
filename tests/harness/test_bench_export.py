"""`sparkproof bench export`: its parent over a stand-in for its processes, its views, its refusals; and once all of it, tiny."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console
from sparkproof.bench.export import formats, run, views, worker
from sparkproof.bench.export.consumers import LlamaCpp, Speed, Vllm, speed
from sparkproof.bench.export.document import Document, Row, export_schema
from sparkproof.bench.export.run import Bench
from sparkproof.cli import app, bench_export, main
from sparkproof.errors import UserError
from sparkproof.measure.peak import HostPeak
from typer.testing import CliRunner

FAKE = Path(__file__).with_name("fake_export_worker.py")
ON_GPU = {"backend": "gpu", "weights_mib": {"CPU_Mapped": 10.0, "CUDA0": 100.0}, "layers_offloaded": 33, "layers": 33}
ROW_55 = {"reason": "llama.cpp ran on the CPU (row 55 of docs/failures.md)", "fix": "build it with CUDA", "row": 55}
THREE = ["adapter", "merged_16bit", "gguf_q4_k_m"]
Measured = Callable[..., Document]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measured:
    """A document of the stand-in's answers; what came in which order is in `order`."""

    def go(plan: dict[str, Any] | None = None, names: list[str] | None = None, **more: Any) -> Document:
        (tmp_path / "plan.json").write_text(json.dumps(plan or {}))
        (tmp_path / "order").write_text("")
        monkeypatch.setenv("PLAN", str(tmp_path / "plan.json"))
        monkeypatch.setenv("ORDER", str(tmp_path / "order"))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(run, "COMMAND", [sys.executable, "-S", str(FAKE)])
        base = {
            "device": "cpu",
            "device_name": "Imaginary CPU",
            "gpu_present": False,
            "threads": 2,
            "rounds": 2,
            "repeats": 2,
        }
        return Bench(model="imaginary", formats=names or THREE, cache_dir=tmp_path, **{**base, **more}).run()

    return go


def by_name(d: Document) -> dict[str, Row]:
    return {r.format: r for r in d.rows}


def shown(d: Document) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(views.table(d))
    return console.export_text()


def test_formats_take_turns_and_each_is_written_read_and_removed(measured: Measured, tmp_path: Path) -> None:
    d = measured({"adapter": {"decode": 20.0}, "gguf_q4_k_m": {"decode": 80.0, "write_s": 3.0}})
    order = (tmp_path / "order").read_text().split()
    turns = [f for f in (*THREE, *THREE[1:], THREE[0])]
    assert order == ["prepare", *(f"{phase}:{f}" for f in turns for phase in ("write", "read"))]
    rows = by_name(d)
    assert all(r.status == "measured" and [x.number for x in r.reads] == [1, 2] for r in d.rows)
    row = rows["gguf_q4_k_m"]
    assert row.decode_tokens_s and row.decode_tokens_s.value == pytest.approx(80.4)
    assert row.prefill_tokens_s and row.prefill_tokens_s.value == pytest.approx(804)
    assert row.write_s and row.write_s.value == 3.0 and row.write_peak_gib == 0.25 and row.bytes == 3 << 20
    assert row.types == {"Q4_K": 3, "Q5_0": 2} and row.fallbacks == 2 and row.proof and row.proof.backend == "cpu"
    assert (d.prompt_tokens, d.new_tokens, d.device) == (512, 128, "Imaginary CPU") and d.trusted and not d.partial
    assert bench_export.exit_code(d, asked=True) == 0
    assert not list(tmp_path.glob("sparkproof-bench-export-*"))


def test_the_wrong_backend_is_a_failure_that_names_its_row_and_no_number(measured: Measured, tmp_path: Path) -> None:
    d = measured(
        {"gguf_q4_k_m": {"refusal": ROW_55, "decode": 77.7}, "adapter": {"proof": ON_GPU, "copy": 100.0}}, device="cuda"
    )
    row = by_name(d)["gguf_q4_k_m"]
    assert (row.status, row.failure_row, row.failed_round) == ("wrong backend", 55, 1)
    assert row.decode_tokens_s is None and row.prefill_tokens_s is None and row.load_s is None and not row.reads
    assert row.write_s and row.bytes  # these do not depend on who reads it
    assert (tmp_path / "order").read_text().split().count("read:gguf_q4_k_m") == 1
    assert bench_export.exit_code(d, asked=False) == 1
    text, page, table = views.markdown(d), views.html(d), shown(d)
    assert "row 55" in next(line for line in table.splitlines() if line.startswith("gguf_q4_k_m"))
    for view in (text, page):
        assert ROW_55["reason"] in view and "Fix: build it with CUDA" in view and "77.7" not in view
    assert "1 not read where it should be (row 55): no speed of it is given." in views.tally(d)


def test_a_backend_that_changes_between_rounds_leaves_no_speed(measured: Measured) -> None:
    row = by_name(measured({"adapter": {"refusal": ROW_55, "from_round": 2}}))["adapter"]
    assert (row.status, row.failed_round) == ("wrong backend", 2) and not row.reads and row.decode_tokens_s is None


def test_failures_say_why_in_one_sentence_and_leave_the_others_alone(measured: Measured) -> None:
    full = {
        "message": "The export needs 2.00 GB and the disk of /tmp has 1.00 GB free.",
        "fix": worker.DISK,
        "skip_class": "disk",
    }
    none = {"message": "llama.cpp has no such model.", "fix": "", "skip_class": "platform"}
    d = measured(
        {
            "merged_16bit": {"write_error": full},
            "gguf_q4_k_m": {"write_error": none},
            "adapter": {"read_raise": "no kernel\nmore", "from_round": 2},
            "gguf_f16": {},
        },
        [*THREE, "gguf_f16"],
    )
    rows = by_name(d)
    assert (rows["merged_16bit"].status, rows["gguf_q4_k_m"].status) == ("failed", "missing")
    assert (
        rows["adapter"].status == "failed"
        and rows["adapter"].decode_tokens_s is None
        and len(rows["adapter"].reads) == 1
    )
    assert rows["gguf_f16"].status == "measured" and len(rows["gguf_f16"].reads) == 2
    said = views.problems(d)
    assert f"merged_16bit: failed in round 1: {full['message']} Fix: {worker.DISK}" in said
    assert "adapter: failed in round 2: RuntimeError: no kernel." in said
    assert bench_export.exit_code(d, asked=False) == 1


def test_what_has_no_reader_here_is_written_and_says_so(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    find = run.export_consumers.importlib.util.find_spec
    monkeypatch.delenv("SPARKPROOF_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(
        run.export_consumers.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name)
    )
    d = measured({}, ["merged_16bit", "gguf_f16", "ollama", "vllm"])
    rows = by_name(d)
    assert {f: r.status for f, r in rows.items()} == {
        "merged_16bit": "measured", "gguf_f16": "written", "ollama": "written", "vllm": "written",
    }  # fmt: skip
    assert all(len(r.writes) == 2 and not r.reads for f, r in rows.items() if f != "merged_16bit")
    said = "\n".join(views.problems(d))
    assert "needs xllamacpp, which is not installed.. Fix" not in said and "Fix: pip install xllamacpp" in said
    assert "`ollama ps`" in said and "vllm: not read: vLLM needs an environment of its own" in said
    assert bench_export.exit_code(d, asked=False) == 0 and bench_export.exit_code(d, asked=True) == 1


def test_an_adapter_as_gguf_needs_the_base_as_gguf(measured: Measured) -> None:
    d = measured({"prepare": {"without_base_gguf": "no place for it"}}, ["adapter", "lora_gguf"])
    row = by_name(d)["lora_gguf"]
    assert (
        row.status == "missing"
        and row.reason == "the base can't be written as GGUF: no place for it"
        and not row.writes
    )
    assert by_name(measured({}, ["lora_gguf"]))["lora_gguf"].status == "measured"


def test_prompts_fit_the_models_window(measured: Measured) -> None:
    d = measured({"prepare": {"window": 256}})
    assert (d.prompt_tokens, d.new_tokens) == (128, 64)
    d = measured({"prepare": {"window": 256}}, prompt_tokens=200)
    assert (d.prompt_tokens, d.new_tokens) == (200, 56)
    d = measured({"prepare": {"window": 256}}, new_tokens=200)
    assert (d.prompt_tokens, d.new_tokens) == (56, 200)
    assert measured({"prepare": {"window": None}}).prompt_tokens == 512
    with pytest.raises(UserError, match="made for 256 tokens, and --prompt and --tokens ask for 300"):
        measured({"prepare": {"window": 256}}, prompt_tokens=200, new_tokens=100)


def test_a_model_that_can_not_be_had_is_one_sentence(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {"message": "The model folder 'x' does not exist.", "fix": "Give another.", "skip_class": ""}
    with pytest.raises(UserError, match="does not exist"):
        measured({"prepare": {"user_error": lost}})
    monkeypatch.setattr(run, "WORKER", "nothing")
    monkeypatch.setenv("PLAN", "x")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="could not be prepared: its process died: exit code 1"):
        measured({})


def test_an_interruption_keeps_what_was_measured(measured: Measured) -> None:
    kept: list[Document] = []

    def progress(line: str) -> None:
        if line == "round 2 of 2: adapter":
            raise KeyboardInterrupt

    d = measured({}, progress=progress, save=kept.append)
    assert {f: len(r.reads) for f, r in by_name(d).items()} == {"adapter": 1, "merged_16bit": 2, "gguf_q4_k_m": 2}
    assert d.interrupted and bench_export.exit_code(d, asked=True) == 130
    assert views.tally(d).startswith("Partial: it was interrupted.")
    assert "adapter: 1 of 2 rounds: it was interrupted" in views.problems(d)
    assert [sum(len(r.reads) for r in k.rows) for k in kept] == [1, 2, 3, 4, 5]  # and a power cut loses one turn
    assert all(k.partial == "it is still running" for k in kept)


def test_an_interruption_between_writing_and_reading_keeps_the_write(measured: Measured, tmp_path: Path) -> None:
    def progress(line: str) -> None:
        if line.startswith("  written"):
            raise KeyboardInterrupt

    d = measured({}, progress=progress)
    row = by_name(d)["adapter"]
    assert row.bytes and len(row.writes) == 1 and row.status == "not reached" and row.reason == "it was interrupted"
    assert not list(tmp_path.glob("sparkproof-bench-export-*"))


def test_a_full_disk_under_the_parent_is_one_sentence_and_keeps_what_was_measured(measured: Measured) -> None:
    def save(d: Document) -> None:
        if len([r for r in d.rows if r.reads]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    d = measured({}, save=save)
    assert "became full. Free some disk space, or point TMPDIR" in d.partial and not d.interrupted
    assert [r.status for r in d.rows] == ["measured", "measured", "not reached"]
    assert bench_export.exit_code(d, asked=False) == 0 and views.tally(d).startswith("Partial: the disk of ")


def test_a_budget_starts_no_process_after_its_end(measured: Measured, tmp_path: Path) -> None:
    ticks = iter(range(10**6))  # the start, then a look a process and a turn
    d = measured({}, budget=4.5, clock=lambda: float(next(ticks)))
    assert (tmp_path / "order").read_text().split() == ["prepare", "write:adapter", "read:adapter"]
    assert d.partial == "the budget of 4 s was used up" and bench_export.exit_code(d, asked=False) == 0
    assert by_name(d)["merged_16bit"].reason == d.partial
    ticks = iter(range(10**6))
    nothing = measured({}, budget=0.5, clock=lambda: float(next(ticks)))
    assert nothing.model is None and bench_export.exit_code(nothing, asked=False) == 1


def test_a_clock_that_moved_is_retest(measured: Measured) -> None:
    plan = {f: {"proof": ON_GPU, "gpu_gib": 1.5, "copy": 100.0} for f in THREE}
    fine = measured(plan, device="cuda", device_name="")
    assert fine.trusted and fine.device == "Imaginary GPU" and bench_export.exit_code(fine, asked=False) == 0
    plan["adapter"]["copy"] = 90.0
    moved = measured(plan, device="cuda")
    assert not moved.trusted and moved.canary and moved.canary.drift == pytest.approx(-0.1)
    assert bench_export.exit_code(moved, asked=False) == 3 and "moved by -10.0%" in views.tally(moved)
    silent = measured({f: {"proof": ON_GPU} for f in THREE}, device="cuda")
    assert silent.canary is None and bench_export.exit_code(silent, asked=False) == 3


def test_views_tell_the_same_story_within_80_columns(measured: Measured) -> None:
    plan = {
        f: {"proof": ON_GPU, "gpu_gib": 14.26, "copy": 100.0, "decode": 1234.5, "bytes": 14 << 30, "write_s": 123.4}
        for f in THREE
    }
    d = measured(plan, [*THREE, "ollama"], device="cuda")
    jsonschema.Draft202012Validator(json.loads(export_schema())).validate(json.loads(d.model_dump_json()))
    assert Document.model_validate_json(d.model_dump_json()) == d
    text, page, table = views.markdown(d), views.html(d), shown(d)
    assert all(len(line) <= 80 for line in table.splitlines()) and "…" not in table
    assert (
        "0.25/14.3" in table
        and "14,336 " in table
        and "123 ±0%" in table
        and "llama.cpp CUDA0" in table
        and "1,241 ±<1%" in table
    )
    for view in (text, page):
        assert views.tally(d) in view.replace("&#39;", "'") and "1,241 ±<1%" in view.replace("&lt;", "<")
        assert "33 of 33 layers offloaded" in view and "LoRA of rank 16" in view
    assert "gguf_q4_k_m: tensors whose rows don't fit their type: 2; it holds 3 Q4_K, 2 Q5_0" in text
    assert page.count("<figure>") == 3 and "<script" not in page and "sparkproof bench export" in page


def test_one_sample_has_no_spread(measured: Measured) -> None:
    d = measured({}, rounds=1)
    assert views.cells(d.rows[0])[2] == "1.00" and "±" in views.cells(d.rows[0])[6]
    assert views.cells(measured({}).rows[0])[2] == "1.00 ±0%"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--formats gguf_q4", "no export format 'gguf_q4'"),
        ("--device tpu", "no device 'tpu'"),
        ("--device cuda", "no NVIDIA GPU in this machine"),
        ("--rounds 0", "--rounds must be 1 or more"),
        ("--repeats 0", "--repeats must be 1"),
        ("--tokens 1", "--tokens must be 2"),
        ("--prompt 3", "--prompt must be 16"),
        ("--threads 0", "--threads must be 1"),
        ("--budget 0", "--budget must be above 0"),
        ("--adapter /no/such/folder", "holds no adapter"),
    ],
)
def test_what_is_not_supported_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    from sparkproof.facts import nvidia
    from sparkproof.facts.model import Driver

    monkeypatch.setattr(nvidia, "read_driver", lambda host: Driver())
    monkeypatch.setattr("sys.argv", ["sparkproof", "bench", "export", *line.split()])
    with pytest.raises(SystemExit) as e:
        main()
    error = capsys.readouterr().err
    assert e.value.code == 2 and said in error and "Traceback" not in error and error.count("error:") == 1


@pytest.mark.parametrize(
    ("device", "driver", "expected"),
    [
        ("auto", {}, ("cpu", False)),
        ("auto", {"pci_devices": ["0000:01:00.0"]}, ("cuda", True)),  # also where torch is a CPU build: that is row 55
        ("auto", {"device_files": ["/dev/nvidia0"]}, ("cuda", True)),
        ("cpu", {"device_files": ["/dev/nvidia0"]}, ("cpu", True)),
    ],
)
def test_a_gpu_in_the_machine_is_what_consumers_are_held_to(
    monkeypatch: pytest.MonkeyPatch, device: str, driver: dict[str, Any], expected: tuple[str, bool]
) -> None:
    from sparkproof.facts import nvidia
    from sparkproof.facts.model import Driver

    monkeypatch.setattr(nvidia, "read_driver", lambda host: Driver(**driver))
    where, name, present = bench_export.place(device)
    assert (where, present) == expected and bool(name) == (where == "cpu")


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Recorded(Bench):
        def run(self) -> Document:
            seen.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "Bench", Recorded)
    monkeypatch.setenv("SPARKPROOF_LOCK_DIR", str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    line = (
        "--model a/b --revision c --formats adapter,gguf --formats vllm --device cpu --prompt 32 --tokens 8 --repeats 4"
    )
    line += f" --rounds 5 --threads 1 --budget 60 --adapter {tmp_path}"
    CliRunner().invoke(app, ["bench", "export", *line.split()])
    (b,) = seen
    ggufs = [f for f in formats.FORMATS if f.startswith("gguf_")]
    assert b.formats == ["adapter", *ggufs, "vllm"] and len(ggufs) == 9
    assert (b.model, b.revision, b.device, b.adapter) == ("a/b", "c", "cpu", tmp_path)
    assert (b.prompt_tokens, b.new_tokens, b.repeats, b.rounds, b.threads, b.budget) == (32, 8, 4, 5, 1, 60)


def test_every_format_that_sparktune_writes_is_measured() -> None:
    from sparktune.export import QTYPES
    from sparktune.export.__main__ import FORMATS

    offered = {f"gguf_{q}" for q in QTYPES} | (set(FORMATS) - {"gguf"})
    assert set(formats.FORMATS) == offered


def test_kept_reports_are_whole(measured: Measured, tmp_path: Path) -> None:
    d = measured({}, save=lambda d: bench_export.keep(d, tmp_path / "new" / "out"))
    kept = Document.model_validate_json((tmp_path / "new" / "out" / "bench-export.json").read_text())
    assert [len(r.reads) for r in kept.rows] == [2, 2, 2] and kept.rows == d.rows
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == ["bench-export.json"]


def test_speeds_count_what_was_made_after_the_first_token() -> None:
    found = speed(100, 0.5, 11, 2.0)
    assert (found.prefill, found.decode) == (200.0, 5.0)
    with pytest.raises(RuntimeError, match="no clock"):
        speed(100, 0.0, 11, 2.0)


class Told:
    """A server or engine that says what it is given to say."""

    device = "cpu"

    def __init__(self, **timings: float) -> None:
        self.timings = timings

    def timed(self, ids: list[int], tokens: int) -> dict[str, float]:
        return self.timings


@pytest.mark.parametrize(
    ("changed", "said"),
    [({}, ""), ({"cache_n": 4}, "4 from its cache"), ({"prompt_n": 6}, "read 6 of 10"), ({"made": 4}, "made 4 of 5")],
)
def test_an_answer_cut_short_or_out_of_a_cache_is_no_speed(changed: dict[str, float], said: str) -> None:
    asked = {"cache_n": 0, "prompt_n": 10, "made": 5, **changed}
    made = asked.pop("made")
    llama, vllm = LlamaCpp.__new__(LlamaCpp), Vllm.__new__(Vllm)
    llama.server = Told(**asked, predicted_n=made, prompt_ms=500.0, predicted_ms=2000.0)  # type: ignore[assignment]
    vllm.engine = Told(**asked, made_n=made, prefill_s=0.5, decode_s=2.0)  # type: ignore[assignment]
    for consumer in (llama, vllm):
        if said:
            with pytest.raises(RuntimeError, match=said):
                consumer.ask([1] * 10, 5)
        else:
            assert consumer.ask([1] * 10, 5) == Speed(20.0, 2.0)  # four tokens after the first, in two seconds


def test_a_polite_kill_is_an_interruption(measured: Measured) -> None:
    from sparkproof.run import terminate

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        d = measured({}, progress=lambda line: os.kill(os.getpid(), signal.SIGTERM) if "merged" in line else None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (
        d.interrupted and by_name(d)["adapter"].status == "measured" and bench_export.exit_code(d, asked=False) == 130
    )


def test_the_peak_begins_anew(tmp_path: Path) -> None:
    peak = HostPeak()
    if peak.why_not:
        pytest.skip(f"this kernel: {peak.why_not}")
    block = bytearray(os.urandom(1 << 20) * 64)
    del block
    grown = peak.gib()
    assert grown is not None and 50 / 1024 < grown < 200 / 1024
    again = HostPeak().gib()
    assert again is not None and again < 30 / 1024
    assert HostPeak(tmp_path / "none").gib() is None


def test_every_field_is_described() -> None:
    schema = json.loads(export_schema())
    for name, definition in [("Document", schema), *schema["$defs"].items()]:
        for key, field in definition["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"


@pytest.mark.slow
def test_a_tiny_model_really_goes_out_and_is_read_by_all_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("SPARKPROOF_LOCK_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    names = ["adapter", "merged_16bit", "merged_4bit", "gguf_q4_k_m", "lora_gguf", "ollama"]
    d = Bench(
        model="tiny:llama@256", formats=names, device="cpu", device_name="CPU", gpu_present=False, threads=1, rounds=1,
        repeats=1, cache_dir=Path(os.environ.get("SPARKPROOF_CACHE") or tmp_path / "cache"),
    ).run()  # fmt: skip
    rows = by_name(d)
    assert {r.status for f, r in rows.items() if f != "ollama"} == {"measured"}, views.problems(d)
    assert rows["ollama"].status == "written" and (d.prompt_tokens, d.new_tokens) == (128, 64)
    for row in d.rows[:-1]:
        assert row.proof and row.proof.backend == "cpu" and row.decode_tokens_s and row.decode_tokens_s.value > 1
    llama = rows["gguf_q4_k_m"].proof
    assert llama and llama.weights_mib and all(b.startswith("CPU") for b in llama.weights_mib)
    assert any("model buffer size" in line for line in llama.lines) and rows["gguf_q4_k_m"].types["Q4_K"] > 0
    four = rows["merged_4bit"].proof
    assert four and four.modules == {"bitsandbytes.nn.modules.Linear4bit": 14}
    assert rows["adapter"].proof and rows["adapter"].proof.modules["peft.tuners.lora.layer.Linear"] == 14
    assert rows["gguf_q4_k_m"].bytes and rows["merged_16bit"].bytes
    assert 0.2 < rows["gguf_q4_k_m"].bytes / rows["merged_16bit"].bytes < 0.5


@pytest.mark.slow
def test_a_tiny_model_is_really_read_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("SPARKPROOF_VLLM_PYTHON"):
        pytest.skip("SPARKPROOF_VLLM_PYTHON names no environment of vLLM's")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    d = Bench(
        model="tiny:llama@256", formats=["vllm", "vllm_adapter"], device="cpu", device_name="CPU", gpu_present=False,
        threads=1, rounds=1, repeats=1, cache_dir=Path(os.environ.get("SPARKPROOF_CACHE") or tmp_path / "cache"),
    ).run()  # fmt: skip
    assert [r.status for r in d.rows] == ["measured", "measured"], views.problems(d)
    plain, lora = (r.proof for r in d.rows)
    assert plain and lora and plain.backend == lora.backend == "cpu"
    assert not [m for m in plain.modules if m.startswith("vllm.lora.")]
    assert [m for m in lora.modules if m.startswith("vllm.lora.")]
