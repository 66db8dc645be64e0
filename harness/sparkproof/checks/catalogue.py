"""The known failures, read from `data/`: what each check covers, and what became of every row of the list of failures
seen on DGX Spark. `docs/failures.md` is made of both.

`data/<topic>.toml` has the checks of a topic, in the order in which they are judged:

    id        topic.name, and the function that is registered under it
    rows      row numbers of the list of failures; [] for one found by this project
    severity  error: fine-tuning fails or lies; warning: it may; info: harmless, explained
    fix       a command to copy; empty when there is nothing to do

A check may give a narrower cause, fix or severity with a finding. `data/rows.toml` has the rows themselves.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, Literal

from pydantic import Field

from sparkproof.checks.finding import Severity
from sparkproof.results import Strict

CATALOGUE_SCHEMA = "sparkproof-failures-1"
TOPICS: tuple[str, ...] = (
    "gpu", "driver", "torch", "triton", "attention", "bitsandbytes", "memory", "power", "python", "wheels", "build",
    "unsloth", "playbook", "models", "downloads", "container", "export", "cluster",
)  # fmt: skip


class Entry(Strict):
    """One known failure that a check looks for."""

    id: str = Field(pattern=r"^[a-z_]+\.[a-z0-9_]+$", description="topic.name.")
    rows: list[int] = Field(description="Rows of the list of failures; empty for one found by this project.")
    severity: Severity
    title: str = Field(min_length=10)
    detects: str = Field(min_length=10, description="How it is told.")
    cause: str = Field(min_length=10)
    fix: str = Field(description="A command to copy; empty when there is nothing to do.")
    source: str = Field(min_length=5, description="Public threads and pages that report it.")

    @property
    def topic(self) -> str:
        """The file of checks it belongs to."""
        return self.id.partition(".")[0]


class Row(Strict):
    """One row of the list of failures seen on DGX Spark, and what becomes of it."""

    row: int
    failure: str = Field(min_length=10, description="The symptom, in a few words.")
    tests: list[str] = Field(
        default_factory=list, description="Scenarios and tests of this project that would catch it, as paths."
    )
    note: str = Field(
        default="", description="What no check can see beforehand, and why; required where there is no check."
    )

    @property
    def checks(self) -> list[Entry]:
        """The checks that cover it."""
        return [e for e in CATALOGUE.values() if self.row in e.rows]

    @property
    def kind(self) -> Literal["check", "test", "not detectable"]:
        """What became of it: a check before anything is trained, else a test, else neither."""
        return "check" if self.checks else "test" if self.tests else "not detectable"


def _data(name: str) -> dict[str, Any]:
    text = resources.files(__package__).joinpath("data", f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _read() -> dict[str, Entry]:
    entries = [Entry.model_validate(e) for topic in TOPICS for e in _data(topic)["check"]]
    by_id = {e.id: e for e in entries}
    if len(by_id) != len(entries):
        raise ValueError("an id occurs twice in checks/data")
    return by_id


CATALOGUE: dict[str, Entry] = _read()
ROWS: dict[int, Row] = {r["row"]: Row.model_validate(r) for r in _data("rows")["row"]}


def document() -> dict[str, Any]:
    """What `sparkproof doctor --catalogue --json` prints."""
    rows = [
        {**r.model_dump(mode="json"), "kind": r.kind, "checks": [e.id for e in r.checks]}
        for r in sorted(ROWS.values(), key=lambda r: r.row)
    ]
    return {
        "schema": CATALOGUE_SCHEMA,
        "rows": rows,
        "checks": [{"topic": e.topic, **e.model_dump(mode="json")} for e in CATALOGUE.values()],
    }


def markdown() -> str:
    """The whole of docs/failures.md."""
    kinds = [r.kind for r in ROWS.values()]
    lines = [
        "# Known failures, and how they are found",
        "",
        "<!-- Made from harness/sparkproof/checks/data by `sparkproof schemas`. -->",
        "",
        "`sparkproof doctor` reads the machine once and judges what it read; `sparkproof doctor --facts FILE` judges facts",
        "that were saved elsewhere, `sparkproof doctor --catalogue --json` prints this page as data. Failures were collected",
        "from public threads, named under each as its source.",
        "",
        "Severity: `error` means that fine-tuning fails or gives wrong results, `warning` that it may, `info` that it",
        "looks wrong and is harmless. A check may lower or raise it by what else it sees.",
        "",
        "## The list of failures seen on DGX Spark",
        "",
        f"{len(ROWS)} rows: {kinds.count('check')} have a check, {kinds.count('test')} a test alone, "
        f"{kinds.count('not detectable')} neither.",
        "",
        "| row | failure | check | test that would catch it | what can't be seen beforehand |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in sorted(ROWS.values(), key=lambda r: r.row):
        checks = ", ".join(f"[`{e.id}`](#{_anchor(e.id)})" for e in r.checks)
        tests = ", ".join(f"`{t}`" for t in r.tests)
        cells = [str(r.row), _cell(r.failure), checks or "-", tests or "-", _cell(r.note) or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## The checks", "", "| check | rows | severity | failure |", "| --- | --- | --- | --- |"]
    lines += [
        f"| [`{e.id}`](#{_anchor(e.id)}) | {', '.join(map(str, e.rows)) or '-'} | {e.severity} | {_cell(e.title)} |"
        for e in CATALOGUE.values()
    ]
    for topic in TOPICS:
        lines += ["", f"## {topic}"]
        for e in (e for e in CATALOGUE.values() if e.topic == topic):
            lines += ["", f"### {e.id}", "", f"**{e.title}** ({e.severity})", "", f"- How it is told: {e.detects}"]
            lines += [f"- Cause: {e.cause}", f"- Fix: `{e.fix}`" if e.fix else "- Fix: nothing to do."]
            lines += [f"- Source: {e.source}"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(heading: str) -> str:
    return heading.replace(".", "")
