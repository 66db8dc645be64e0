"""Reading a Modelfile that was exported, as `ollama create` reads it: commands, and values bare, quoted, or in three quotes.

Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

NUMBERS = (int, float)
VALUE = r'(?:"""(?P<long>.*?)"""|"(?P<short>[^"\n]*)"|(?P<bare>[^"\s][^\n]*?))[ \t]*(?:\n|\Z)'
COMMAND = re.compile(rf"(?P<word>FROM|ADAPTER|TEMPLATE|SYSTEM|PARAMETER[ \t]+(?P<key>\w+))[ \t]+{VALUE}", re.DOTALL)
COMMENT = re.compile(r"[ \t]*(?:#[ \t]*(?P<text>[^\n]*))?(?:\n|\Z)")


@dataclass
class Modelfile:
    """What it says; `notes` are its comments."""

    model: Path
    adapter: Path | None = None
    template: str = ""
    system: str = ""
    stops: list[str] = field(default_factory=list)
    parameters: dict[str, int | float | str] = field(default_factory=dict)  # but the stops
    notes: list[str] = field(default_factory=list)


def read(folder: Path) -> Modelfile:
    """The Modelfile in `folder`. Errors: ValueError for what `ollama create` would not take."""
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    found = Modelfile(Path())
    at = 0
    while at < len(text):
        comment = COMMENT.match(text, at)
        command = COMMAND.match(text, at) if comment is None else None
        match = comment or command
        if match is None:
            raise ValueError(f"The Modelfile's {text[at : at + 60]!r} is no command with its value.")
        at = match.end()
        if command is not None:
            value = next(v for v in (command["long"], command["short"], command["bare"]) if v is not None)
            _take(found, folder, command["word"].split()[0], command["key"] or "", value)
        elif comment is not None and comment["text"]:
            found.notes.append(comment["text"])
    if found.model == Path():
        raise ValueError("The Modelfile has no FROM.")
    return found


def _take(found: Modelfile, folder: Path, word: str, key: str, value: str) -> None:
    match word:
        case "FROM":
            found.model = folder / value
        case "ADAPTER":
            found.adapter = folder / value
        case "TEMPLATE":
            found.template = value
        case "SYSTEM":
            found.system = value
        case _ if key == "stop":
            found.stops.append(value)
        case _:
            found.parameters[key] = _number(value)


def _number(value: str) -> int | float | str:
    for kind in NUMBERS:
        try:
            return kind(value)
        except ValueError:
            continue
    return value
