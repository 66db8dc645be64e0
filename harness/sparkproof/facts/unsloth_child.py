"""Imports Unsloth and prints one line of JSON: `python -m sparkproof.facts.unsloth_child`.

It writes compiled code into the working folder while it is imported, so that is a folder which ends with this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile


def main() -> None:
    """Print {"error": text or null}."""
    error = None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                import unsloth  # noqa: F401
        except BaseException as e:  # SystemExit too
            error = f"{type(e).__name__}: {e}"[:500]
        os.chdir("/")
    print(json.dumps({"error": error}), flush=True)


if __name__ == "__main__":
    main()
