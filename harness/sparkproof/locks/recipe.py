"""How each lock is made: its inputs, and the one resolver call that turns them into hashes for both architectures.

The inputs hold exact pins. Each is given the marker of the two platforms that an image is built for, since a universal resolution
would otherwise also lock what macOS and Windows need. The lock holds no address of an index, so that a mirror serves as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from sparkproof.errors import UserError

PYTHON = "3.12"  # the image's; the oldest that the locks hold for
PLATFORMS = 'sys_platform == "linux" and (platform_machine == "aarch64" or platform_machine == "x86_64")'
TIMEOUT_S = 300
COMMAND = "make lock-image"


@dataclass(frozen=True)
class Recipe:
    """One lock: `inputs` are files beside it; `project` adds this distribution's own requirements."""

    name: str
    inputs: tuple[str, ...]
    overrides: str | None = None
    project: bool = False
    dependencies: bool = True
    wheels: bool = True  # False: only its source archive is used

    @property
    def file(self) -> str:
        """The lock's name in docker/."""
        return f"{self.name}.lock"


RECIPES = (
    Recipe("runtime", ("runtime.in",), "runtime-overrides.txt", project=True),
    Recipe("serve", ("serve.in",), "serve-overrides.txt"),
    Recipe("build", ("build.in",)),
    Recipe("llama", ("llama.in",), dependencies=False, wheels=False),
)


def requirements(folder: Path, names: tuple[str, ...]) -> list[Requirement]:
    """The requirements in files of `folder`, comments left out. Errors: UserError for a line that is none."""
    found = []
    for name in names:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            text = re.split(r"(?:^|\s)#", line)[0].strip()
            if text:
                try:
                    found.append(Requirement(text))
                except ValueError as error:
                    raise UserError(f"{folder / name}: {text!r} is no requirement: {error}.", "Correct it.") from error
    return found


def project_requirements(pyproject: Path, extra: str = "embedded") -> list[Requirement]:
    """This distribution's own requirements, with one extra."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"][extra]]]


def for_platforms(requirement: Requirement) -> str:
    """The requirement, on the two platforms only."""
    bare = Requirement(str(requirement))
    bare.marker = None
    own = f"({requirement.marker}) and " if requirement.marker else ""
    return f"{bare} ; {own}{PLATFORMS}"


def compile_lock(recipe: Recipe, folder: Path, pyproject: Path, output: Path) -> None:
    """Resolve into `output`; pins that are there already and still fit are kept, so only a changed input changes it.

    Errors: UserError without uv, or when nothing fits, with the resolver's own words.
    """
    wanted = requirements(folder, recipe.inputs)
    if recipe.project:
        wanted += project_requirements(pyproject)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, f"{recipe.name}.in")
        source.write_text("\n".join(for_platforms(r) for r in wanted) + "\n", encoding="utf-8")
        command = [_uv(), "pip", "compile", str(source), "--universal", "--python-version", PYTHON, "--generate-hashes"]
        command += ["--no-annotate", "--quiet", "--custom-compile-command", COMMAND, "--output-file", str(output)]
        command += ["--overrides", str(folder / recipe.overrides)] if recipe.overrides else []
        command += [] if recipe.dependencies else ["--no-deps"]
        # A folder of wheels that this machine happens to have must not decide what is locked.
        env = {k: v for k, v in os.environ.items() if k not in ("PIP_FIND_LINKS", "UV_FIND_LINKS", "PIP_CONSTRAINT")}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"uv did not resolve {recipe.file} in {TIMEOUT_S} s.", "Look at the way to the package index."
            ) from error
    if done.returncode:
        raise UserError(f"{recipe.file} has no solution: {done.stderr.strip()}", f"Change docker/{recipe.inputs[0]}.")


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise UserError("uv is not installed.", "pip install uv")
    return found
