"""Every native library on the import path, by its ELF header: for which architecture and which CUDA was it built?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sparkproof.facts.elf import read_elf
from sparkproof.facts.host import Host
from sparkproof.facts.installed import Library, Wheels

MOST_FILES = 20_000
CUDA_LIBRARY = re.compile(r"lib(cudart|nvrtc|cublas|cublasLt|cusparse|cusolver|cufft|nvJitLink)\.so\.(\d+)")
RUNTIME = re.compile(r"libcudart\.so\.(\d+)")
# A library that names its architecture, beside one for this architecture, is meant; a compiled module is not.
VERSIONED = re.compile(r"cuda_?\d{2,3}")  # one of several that are chosen from by torch's CUDA version
NAMED_ARCH = re.compile(r"amd64|x86|x64|i386|arm64|aarch64", re.IGNORECASE)
MODULE = re.compile(r"\.(cpython-\w+|abi3)")


def read_wheels(host: Host, folders: list[Path] | None = None) -> Wheels:
    """Scan the folders of installed packages (sys.path's by default)."""
    own = platform.machine()
    found = Wheels(scanned=0)
    needing: dict[tuple[str, tuple[str, ...]], Library] = {}
    roots = folders if folders is not None else site_folders()
    for root, path in _libraries(roots):
        if (found.scanned or 0) >= MOST_FILES:
            break
        elf = read_elf(path)
        if elf is None:
            continue
        found.scanned = (found.scanned or 0) + 1
        inside = path.relative_to(root)
        package = inside.parts[0].removesuffix(".libs")
        if elf.machine != own and not (NAMED_ARCH.search(path.name) and not MODULE.search(path.name)):
            found.foreign.append(Library(package=package, file=str(inside), machine=elf.machine))
        needs = tuple(sorted(n for n in elf.needed if CUDA_LIBRARY.fullmatch(n)))
        if needs and package != "nvidia" and not VERSIONED.search(path.name):
            needing.setdefault((package, needs), Library(package=package, file=str(inside), needs=list(needs)))
    found.cuda = [needing[key] for key in sorted(needing)]
    if found.cuda or found.foreign:
        distributions = importlib.metadata.packages_distributions()
        for library in (*found.cuda, *found.foreign):
            # what pip calls it: flash_attn_2_cuda.cpython-312-aarch64-linux-gnu.so came with flash-attn
            library.package = next(iter(distributions.get(library.package.partition(".")[0], [])), library.package)
    found.cuda_majors_present = runtimes(host, roots)
    return found


def site_folders() -> list[Path]:
    """The folders that hold installed packages."""
    paths = [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return [p for p in dict.fromkeys(paths) if p.is_dir()]


def runtimes(host: Host, roots: list[Path]) -> list[int]:
    """Major versions of libcudart in the places where a loader or a wheel looks."""
    places = [d for root in roots for d in (root / "torch" / "lib", *root.glob("nvidia/*/lib"))]
    places += [host.path(p) for p in ("/usr/lib/aarch64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/lib64")]
    places += [d for c in host.glob("/usr/local", "cuda*") for d in (c / "lib64", *c.glob("targets/*/lib"))]
    places += [Path(p) for p in host.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    majors = set()
    for place in places:
        try:
            names = [p.name for p in place.glob("libcudart*.so.*")]
        except OSError:
            continue
        majors |= {int(m.group(1)) for n in names if (m := RUNTIME.match(n))}
    return sorted(majors)


def _libraries(roots: list[Path]) -> Iterator[tuple[Path, Path]]:
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                if ".so" in name and (name.endswith(".so") or ".so." in name):
                    path = Path(folder, name)
                    if not path.is_symlink():
                        yield root, path
