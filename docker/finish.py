"""What only the finished environment can tell, written into the image while it is built. Standard library only.

`finish.py environment PREFIX` runs in the environment: gives CUDA's wheels one folder to be found by, asks its nvcc for its
version, and writes the third-party notices from the installed metadata. `finish.py image PREFIX --lock SHA ...` runs last:
holds the lock that was installed against the one that the label names, and writes the key of the compile caches.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata as metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

LICENCE_FILES = ("LICEN", "COPYING", "NOTICE", "COPYRIGHT", "EULA")
RULE = "=" * 100


def stop(message: str) -> None:
    """End the build with one sentence."""
    sys.exit(f"docker/Dockerfile: {message}")


def link_cuda(prefix: Path, cuda: str) -> None:
    """PREFIX/cuda: the folder into which NVIDIA's CUDA 13 wheels unpack bin, include, lib and nvvm."""
    home = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        stop(f"the lock brought no nvcc to {nvcc}.")
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True, timeout=120).stdout
    if f"release {cuda}" not in said:
        stop(f"nvcc is not of CUDA {cuda}: {said.strip().splitlines()[-1]}.")
    (prefix / "cuda").symlink_to(home)


def notices() -> str:
    """Each installed distribution with its version, licence as it states it, and the licence files that it ships."""
    parts = ["Third-party software in this image, from each package's own metadata and licence files.", ""]
    for dist in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        about = dist.metadata
        stated = about.get("License-Expression") or _short(about.get("License"))
        if not stated:
            classes = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
            stated = ", ".join(classes) or "not stated in its metadata; see its files below"
        parts += [RULE, f"{about['Name']} {dist.version}", f"Licence: {stated}"]
        parts += [f"Home: {about['Home-page']}"] if about.get("Home-page") else []
        found = [f for f in dist.files or [] if _is_licence(f)]
        for file in sorted(found, key=str):
            path = Path(str(file.locate()))
            if path.is_file():
                parts += ["", f"--- {file}", path.read_text(encoding="utf-8", errors="replace").strip()]
        if not found:
            parts += ["", "(ships no licence file)"]
        parts.append("")
    return "\n".join(parts)


def _short(text: str | None) -> str:
    """A licence's name; some packages put the whole text there, which follows from its file anyway."""
    return text.strip() if text and "\n" not in text.strip() and len(text) < 120 else ""


def _is_licence(file: metadata.PackagePath) -> bool:
    inside = ".dist-info" in file.parts[0] if file.parts else False
    return inside and (file.name.upper().startswith(LICENCE_FILES) or "licenses" in file.parts)


def environment(prefix: Path, cuda: str) -> None:
    """After the packages are in."""
    link_cuda(prefix, cuda)
    share = prefix / "share"
    share.mkdir(parents=True, exist_ok=True)
    (share / "THIRD_PARTY_NOTICES.txt").write_text(notices(), encoding="utf-8")


def image(prefix: Path, lock: str, argument: str, base: str, revision: str) -> None:
    """After everything is in its place."""
    share = prefix / "share"
    installed = hashlib.sha256((share / "lock.txt").read_bytes()).hexdigest()
    if lock != installed:
        given = f"is {lock}" if lock else "was not given"
        stop(f"{argument} {given}: build with `make image`, or with --build-arg {argument}={installed}")
    key = hashlib.sha256("\n".join((base, installed, revision)).encode()).hexdigest()[:12]
    (share / "cache-key").write_text(f"{key}-triton-{metadata.version('triton')}\n", encoding="utf-8")


def main() -> None:
    """The two moments of a build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moment", choices=("environment", "image"))
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--cuda", default="13.", help="the start of the release that nvcc must be of")
    parser.add_argument("--lock", default="")
    parser.add_argument("--argument", default="LOCK", help="the build argument that --lock came from")
    parser.add_argument("--base", default="")
    parser.add_argument("--revision", default="")
    args = parser.parse_args()
    if args.moment == "environment":
        environment(args.prefix, args.cuda)
    else:
        image(args.prefix, args.lock, args.argument, args.base, args.revision)


if __name__ == "__main__":
    main()
