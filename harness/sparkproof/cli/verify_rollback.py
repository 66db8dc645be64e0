"""`sparkproof verify-rollback`: the proof that nothing differs, or what does."""

from __future__ import annotations

import json as _json
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sparkproof.cli.way_back import table_of
from sparkproof.rollback import snapshot as snapshots
from sparkproof.rollback import undo
from sparkproof.rollback.diff import diff
from sparkproof.rollback.parts import Part

AREA_WORDS = {
    "python": "packages",
    "files": "files in site-packages",
    "caches": "cache",
    "containers": "images, containers, volumes, networks",
    "dpkg": "Debian packages",
    "profiles": "start-up file",
    "variables": "environment variables",
    "processes": "running processes",
    "gpu": "GPU memory",
}


def verify_rollback(snapshot_file: Path | None = None, json: bool = False, forget: bool = False) -> int:
    """Compare this machine with the snapshot, part by part. Returns 0 if nothing at all differs or is unknown, else 1.

    `forget`: then also remove the snapshot, which is the last trace. Errors: UserError (2).
    """
    path = snapshot_file or snapshots.default_path()
    before = snapshots.load(path)
    undo.check(before)
    console = Console(stderr=json)
    with console.status("comparing with the snapshot ..."):
        found = diff(before, snapshots.again(before))
    if json:
        print(_json.dumps(found.model_dump(mode="json", by_alias=True) | {"is_empty": found.is_empty}, indent=1))
    else:
        table = table_of("what", "where", "is")
        for area in before.areas:
            for part in found.of(area) + (found.of("files") if area == "python" else []):
                if part.state != "equal" or area not in ("profiles", "caches"):
                    table.add_row(AREA_WORDS[part.area], escape(part.place), _state(part))
        console.print(table)
        console.print(escape(found.text()), highlight=False, soft_wrap=True)
    if found.is_empty and forget:
        path.unlink()
        with suppress(OSError):
            path.parent.rmdir()
        console.print("The snapshot was removed too.", highlight=False)
    return 0 if found.is_empty else 1


def _state(part: Part) -> str:
    if part.state == "unknown":
        return "[yellow]unknown[/yellow]"
    if part.state == "equal":
        return "[green]equal[/green]"
    counts = ((len(part.added), "came"), (len(part.removed), "went"), (len(part.changed), "changed"))
    return "[red]" + ", ".join(f"{n} {word}" for n, word in counts if n) + "[/red]"
