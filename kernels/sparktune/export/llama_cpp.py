"""llama.cpp's own converter, found on this machine and loaded beside whatever `gguf` package is installed. Nothing is fetched.

convert_hf_to_gguf.py, convert_lora_to_gguf.py, the package `conversion` and gguf-py come together, from a source tree of
llama.cpp: `make setup` puts those of one pinned release into the environment, SPARKTUNE_LLAMA_CPP names another tree. PyPI's
`gguf` lacks what the converter needs, and is what other code of this process may have loaded, so the converter's modules
live in `sys.modules` only while it works.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sparktune.export.files import ExportError

VARIABLE = "SPARKTUNE_LLAMA_CPP"
INSTALLED = Path("share", "sparktune", "llama.cpp")  # in the environment's folder
SCRIPT = "convert_hf_to_gguf.py"
PACKAGES = ("gguf", "conversion", "convert_hf_to_gguf")

_lock = threading.RLock()
_loaded: dict[str, ModuleType] = {}


def folder() -> Path:
    """The source tree of llama.cpp. Errors: ExportError when there is none."""
    named = os.environ.get(VARIABLE)
    place = Path(named) if named else Path(sys.prefix) / INSTALLED
    if not (place / SCRIPT).is_file() or not (place / "gguf-py").is_dir():
        raise ExportError(
            f"llama.cpp's converter is not in {place}, and GGUF files are made by it.",
            f"Run `make setup`, which puts it into the environment, or set {VARIABLE} to a source tree of llama.cpp.",
        )
    return place


@contextlib.contextmanager
def converter() -> Iterator[tuple[Any, Any]]:
    """(module convert_hf_to_gguf, module gguf) of llama.cpp; within, `import gguf` gives the converter's."""
    place = folder()
    with _lock:
        ours = {name: sys.modules.pop(name) for name in _names()}
        path, basic = list(sys.path), logging.basicConfig
        sys.modules.update(_loaded)
        sys.path[:0] = [str(place), str(place / "gguf-py")]
        logging.basicConfig = lambda **_: (
            None
        )  # its scripts set up the root logger; whoever runs this process does that
        loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("hf-to-gguf", "lora-to-gguf")}
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield importlib.import_module("convert_hf_to_gguf"), importlib.import_module("gguf")
        finally:
            logging.basicConfig = basic
            for log, level in loggers.items():
                log.setLevel(level)
            sys.path[:] = path
            _loaded.clear()
            _loaded.update({name: sys.modules.pop(name) for name in _names()})
            sys.modules.update(ours)


def _names() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
