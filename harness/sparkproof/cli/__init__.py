"""The command line. Verbs live in modules of their own; this one wires them and turns errors into one sentence."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from sparkproof import __version__
from sparkproof.cli import bench, compare, container, fit, listing, machine, proof, validate
from sparkproof.errors import UserError

app = typer.Typer(
    help="Can this machine fine-tune language models, correctly and fast, and can everything be taken off it again?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 passed, 1 something about the machine failed, 2 the harness or its input is wrong, "
    "3 speed must be measured again, 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sparkproof {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options that come before the verb."""
    if debug:
        os.environ["SPARKPROOF_DEBUG"] = "1"


validate.register(app)
listing.register(app)
machine.register(app)
proof.register(app)
container.register(app)
bench.register(app)
fit.register(app)
compare.register(app)


def main() -> None:
    """Entry point: a UserError is one sentence and its exit code; anything else is ours, said in one line."""
    if "--debug" in sys.argv:  # accepted anywhere on the line
        sys.argv.remove("--debug")
        os.environ["SPARKPROOF_DEBUG"] = "1"
    debug = bool(os.environ.get("SPARKPROOF_DEBUG"))
    try:
        app()
    except UserError as e:
        if debug:
            traceback.print_exc()
        print(f"error: {e.message}", file=sys.stderr)
        if e.fix:
            print(f"  fix: {e.fix}", file=sys.stderr)
        sys.exit(e.exit_code)
    except Exception as e:
        if debug:
            traceback.print_exc()
        else:
            print(f"error: sparkproof itself failed: {type(e).__name__}: {e}", file=sys.stderr)
            print("  fix: run it again with --debug and report the traceback.", file=sys.stderr)
        sys.exit(2)
