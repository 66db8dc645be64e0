"""A machine to take snapshots of: an environment, a home and a working folder in a temporary folder, no pip needed."""

import posixpath
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from sparkproof.rollback import snapshot, standin, undo
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.steps import Group

SITE = "lib/python3.12/site-packages"


@dataclass
class Machine:
    root: Path
    virtual: bool = True
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        for folder in (self.site, self.venv / "bin", self.home, self.work, self.root / "tmp"):
            folder.mkdir(parents=True)
        if self.virtual:
            (self.venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.3\n")
        self.env = {"HOME": str(self.home), "TMPDIR": str(self.root / "tmp"), "USER": "user", "PATH": "", **self.env}

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    @property
    def site(self) -> Path:
        return self.venv / SITE

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def hub(self) -> Path:
        return self.home / ".cache/huggingface/hub"

    @property
    def path(self) -> Path:
        return self.root / "snapshot.json"

    def put(self, path: str | Path, text: str = "content") -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def install(
        self,
        name: str,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
        requested: bool = True,
        installer: str = "pip",
        extra: tuple[str, ...] = (),
        script: str = "",
        direct_url: str = "",
    ) -> Path:
        """Unpack a stand-in wheel as an installer does. `extra`: further lines of RECORD. Returns its dist-info."""
        wheel = standin.wheel(self.root / "tmp", name, version, requires)
        with zipfile.ZipFile(wheel) as z:
            z.extractall(self.site)
        wheel.unlink()
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        (info / "INSTALLER").write_text(installer + "\n")
        lines = [*extra, f"{info.name}/INSTALLER,,"]
        if requested:
            (info / "REQUESTED").touch()
            lines.append(f"{info.name}/REQUESTED,,")
        if script:
            self.put(self.venv / "bin" / script, "#!/bin/sh\n")
            lines.append(posixpath.join("../../../bin", script) + ",,")
        if direct_url:
            (info / "direct_url.json").write_text(direct_url)
        with (info / "RECORD").open("a") as f:
            f.write("\n".join(lines) + "\n")
        return info

    def uninstall(self, name: str, version: str = "1.0") -> None:
        """As pip does: the recorded files, nothing else."""
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        for line in (info / "RECORD").read_text().splitlines():
            (self.site / line.split(",")[0]).unlink(missing_ok=True)
        for folder in (info, self.site / name.replace("-", "_")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def snap(self) -> Snapshot:
        return snapshot.take(
            [self.venv], self.home, env=self.env, cwd=self.work, areas=["python", "caches", "profiles"]
        )

    def before(self) -> Snapshot:
        """Take the snapshot, save it and read it back, as a person does."""
        snapshot.save(self.snap(), self.path)
        return snapshot.load(self.path)

    def rollback(self, before: Snapshot, include: Collection[Group] = ("packages",), **options: object) -> undo.Outcome:
        """As `sparkproof uninstall --include packages` does."""
        return undo.uninstall(before, self.path, env=self.env, include=include, **options)  # type: ignore[arg-type]

    def tree(self) -> dict[str, bytes | str]:
        """All there is, for comparing before and after: path -> content or link target."""
        found: dict[str, bytes | str] = {}
        for top in (self.venv, self.home, self.work, self.root / "tmp"):
            for p in sorted(top.rglob("*")):
                key = str(p.relative_to(self.root))
                found[key] = str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
        return found
