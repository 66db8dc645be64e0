"""The known failures, read from `catalogue.toml`, and docs/failures.md made of them."""

from __future__ import annotations

import tomllib
from importlib import resources

from pydantic import Field

from sparkproof.checks.finding import Severity
from sparkproof.results import Strict


class Entry(Strict):
    """One known failure."""

    id: str = Field(pattern=r"^[a-z_]+\.[a-z0-9_]+$")
    rows: list[int]
    severity: Severity
    title: str = Field(min_length=10)
    detects: str = Field(min_length=10)
    cause: str = Field(min_length=10)
    fix: str
    source: str = Field(min_length=5)

    @property
    def topic(self) -> str:
        """The file of checks it belongs to."""
        return self.id.partition(".")[0]


def _read() -> dict[str, Entry]:
    text = resources.files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    entries = [Entry.model_validate(e) for e in tomllib.loads(text)["check"]]
    by_id = {e.id: e for e in entries}
    if len(by_id) != len(entries):
        raise ValueError("catalogue.toml has an id twice")
    return by_id


CATALOGUE: dict[str, Entry] = _read()
TOPICS: tuple[str, ...] = tuple(dict.fromkeys(e.topic for e in CATALOGUE.values()))


def markdown() -> str:
    """The whole of docs/failures.md."""
    rows = sorted({row for e in CATALOGUE.values() for row in e.rows})
    lines = [
        "# Known failures, and how they are found",
        "",
        "<!-- Made from harness/sparkproof/checks/catalogue.toml by `python -m sparkproof.checks.catalogue`. -->",
        "",
        "Each is a check of `sparkproof doctor`, which reads the machine once and judges what it read;",
        "`sparkproof doctor --facts FILE` judges facts that were saved elsewhere. Failures were collected from public",
        "threads, named under each as its source. Row numbers are those of the project's list of failures seen on DGX",
        f"Spark. Rows covered so far: {', '.join(map(str, rows))}.",
        "",
        "Severity: `error` means that fine-tuning fails or gives wrong results, `warning` that it may, `info` that it",
        "looks wrong and is harmless. A check may lower or raise it by what else it sees.",
        "",
        "| check | rows | severity | failure |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| [`{e.id}`](#{_anchor(e.id)}) | {', '.join(map(str, e.rows)) or '-'} | {e.severity} | {e.title} |"
        for e in CATALOGUE.values()
    ]
    for topic in TOPICS:
        lines += ["", f"## {topic}"]
        for e in (e for e in CATALOGUE.values() if e.topic == topic):
            lines += ["", f"### {e.id}", "", f"**{e.title}** ({e.severity})", "", f"- How it is told: {e.detects}"]
            lines += [f"- Cause: {e.cause}", f"- Fix: `{e.fix}`" if e.fix else "- Fix: nothing to do."]
            lines += [f"- Source: {e.source}"]
    return "\n".join(lines) + "\n"


def _anchor(heading: str) -> str:
    return heading.replace(".", "")


if __name__ == "__main__":
    print(markdown(), end="")
