"""All views of a run, made from its record alone, so that `sparkproof report RUN` can make them again at any time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from sparkproof.errors import UserError
from sparkproof.report import html, junit, model, summary
from sparkproof.report.rundir import storage_error
from sparkproof.report.runrecord import RunRecord

VIEWS: dict[str, Callable[[RunRecord], str]] = {
    "report.json": model.render,
    "junit.xml": junit.render,
    "summary.md": summary.render,
    "report.html": html.render,
}


def write_all(record: RunRecord, run_dir: Path) -> dict[str, Path]:
    """Write every view into `run_dir`; name -> path.

    Each replaces its older self in one step, and one that fails does not keep the others from being written.
    Errors: UserError, after all were tried, that names those that could not be made.
    """
    paths: dict[str, Path] = {}
    errors: list[UserError] = []
    for name, render in VIEWS.items():
        path = run_dir / name
        try:
            write_text(path, render(record))
            paths[name] = path
        except OSError as e:
            errors.append(storage_error(e, f"{name}", path))
        except Exception as e:  # the others must still be written, and the record is whole
            if os.environ.get("SPARKPROOF_DEBUG"):
                raise
            message = f"{name} could not be made: {type(e).__name__}: {e}."
            errors.append(
                UserError(message, f"The record is whole: `sparkproof report {record.run_id}` makes it again.")
            )
    if errors:
        more = f" (and {len(errors) - 1} more views)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0].message}{more}", errors[0].fix)
    return paths


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    tmp = path.with_name(f".{path.name}.part")
    try:
        with tmp.open("w", encoding="utf-8", errors="replace", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise
