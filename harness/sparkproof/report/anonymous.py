"""Facts for a bug report: whose machine it was can no longer be told from them, what it was still can.

Taken out of every string: credentials (see `redact`), host and user names, e-mail, IP, MAC and host addresses, serial
numbers and UUIDs, names of models and images that are not public, and paths, of which those that every machine has
(/usr/bin, /dev/nvidia0, ...) and the part from site-packages on stay. What is left is valid facts, so
`sparkproof doctor --facts FILE` judges them as before.
"""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

from sparkproof.facts.model import Facts
from sparkproof.report.redact import Redactor

UUID = re.compile(r"\b(?:GPU-|MIG-)?[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b")
MAC = re.compile(r"\b(?:[0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}\b")
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
SERIAL = re.compile(r"\b(serial(?:[ _-]?(?:number|no\.?))?|s/n)(\s*[:=#]?\s*)[A-Z0-9][A-Z0-9-]{4,}", re.IGNORECASE)
LONG_NUMBER = re.compile(r"(?<![\w.])\d{9,}(?![\w.])")
IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7})(?:/\d{1,3})?(?![\w:])"
)
HOST = re.compile(
    r"\b(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+"
    r"(?:com|net|org|io|co|ai|dev|edu|gov|eu|de|uk|fr|ch|nl|jp|cn|in|local|lan|home|internal|intranet|corp|example|arpa|cloud)"
    r"(?::\d+)?\b",
    re.IGNORECASE,
)
PUBLIC_HOST = re.compile(
    r"(?:^|\.)(?:huggingface\.co|hf\.co|pypi\.org|pytorch\.org|nvcr\.io|nvidia\.com|docker\.io|ghcr\.io|github\.com)(?::\d+)?$",
    re.IGNORECASE,
)
URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^\s'\"<>]*)", re.IGNORECASE)
PATH = re.compile(r"(?<![\w./~:-])(?:~|/[\w.+@%-])[^\s'\":;,()=\[\]{}<>]*|(?<=[:=])/[\w.+@%-][^\s'\":;,()=\[\]{}<>]*")
ORDINARY_PATH = re.compile(
    r"^/(?:bin|sbin|lib\w*|usr/(?:s?bin|lib\w*|include)|usr/local/(?:cuda[\w.-]*|bin/nvcc|nvidia)|dev|proc|sys|etc/(?:pip|cdi|os-release|dgx-release)"
    r"|var/run/docker\.sock|run/docker\.sock|workspace)(?!\w)"
)
HOME = re.compile(r"(?:/home/|/Users/)([^/\s:]+)")
PUBLIC_ORGANISATION = re.compile(
    r"^(?:unsloth|microsoft|meta-llama|google|Qwen|mistralai|HuggingFaceTB|openai|nvidia|kernels-community|nvcr\.io/nvidia|vllm|ollama|pytorch|ubuntu|debian)(?:/|:|$)"
)
SHORTEST_NAME = 2
# Names that say nothing of whose machine it is, and that occur in what must stay.
GENERIC_NAMES = frozenset(
    {
        "root",
        "user",
        "admin",
        "localhost",
        "ubuntu",
        "debian",
        "nvidia",
        "docker",
        "podman",
        "dgx",
        "spark",
        "gpu",
        "vm",
    }
)


def anonymous(facts: Facts, environ: Mapping[str, str] | None = None) -> Facts:
    """A copy of the facts without what tells whose they are. Errors: none; what cannot be told apart is taken out."""
    data = facts.model_dump(mode="json")
    words = _own_names() | {m for text in _strings(data) for m in HOME.findall(text)}
    scrub = Scrubber(words, Redactor(environ))
    for index, model in enumerate(data["hub_cache"]["models"]):
        model["repository"] = _public(model["repository"], f"model-{index + 1}")
    data["hub_cache"]["incomplete"] = [
        _public(n, f"download-{i + 1}") for i, n in enumerate(data["hub_cache"]["incomplete"])
    ]
    data["hub_cache"]["kernels"] = {
        _public(n, f"kernel-{i + 1}"): builds for i, (n, builds) in enumerate(data["hub_cache"]["kernels"].items())
    }
    for index, image in enumerate(data["container"]["images"] or []):
        image["tags"] = [_public(t, f"image-{index + 1}") for t in image["tags"]]
    for index, link in enumerate(data["fabric"]["links"] or []):
        link["addresses"] = [f"[address {index + 1}]" for _ in link["addresses"]]
    for gid in data["fabric"]["gids"] or []:
        gid["address"] = "[address]" if gid["address"] else None
    for gpu in data["gpus"]:
        gpu["uuid"] = None
    clean = scrub.data(data)
    clean["origin"] = f"{clean['origin']}; names, paths and addresses taken out"
    return Facts.model_validate(clean)


class Scrubber:
    """Takes names, addresses and paths out of strings, and out of all that is made of them."""

    def __init__(self, words: set[str], secrets: Redactor) -> None:
        own = {w for w in words if len(w) >= SHORTEST_NAME and w.lower() not in GENERIC_NAMES}
        usable = sorted(own, key=lambda w: (-len(w), w))
        self._words = re.compile(rf"(?<![\w])(?:{'|'.join(map(re.escape, usable))})(?![\w])", re.I) if usable else None
        self._secrets = secrets

    def data(self, value: Any) -> Any:
        """The same shape with clean strings."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {k: self.data(v) for k, v in value.items()}  # names of fields, variables, packages and probes
        if isinstance(value, list):
            return [self.data(v) for v in value]
        return value

    def text(self, s: str) -> str:
        """One string."""
        s = self._secrets.text(s)
        s = URL.sub(_url, s)
        s = EMAIL.sub("[e-mail]", s)
        s = UUID.sub("[serial]", s)
        s = MAC.sub("[address]", s)
        s = SERIAL.sub(r"\1\2[serial]", s)
        s = PATH.sub(_path, s)
        s = IP.sub(_address, s)
        s = HOST.sub(lambda m: m[0] if PUBLIC_HOST.search(m[0]) else "[host]", s)
        s = LONG_NUMBER.sub("[serial]", s)
        return self._words.sub("[name]", s) if self._words else s


def _path(match: re.Match[str]) -> str:
    path = match[0]
    if ORDINARY_PATH.match(path):
        return path
    _, mark, inside = path.partition("/site-packages/")
    return f"[path]{mark}{inside}"


def _url(match: re.Match[str]) -> str:
    scheme, rest = match[1], match[2]
    if rest.startswith("/"):  # unix:///var/run/docker.sock, file:///...
        return scheme + PATH.sub(_path, rest)
    host = rest.partition("/")[0].rpartition("@")[2]
    return scheme + host if PUBLIC_HOST.search(host) else "[address]"


def _address(match: re.Match[str]) -> str:
    text = match[0].partition("/")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return match[0]
    # four numbers with dots may also be a version: those of tools here begin above 0 and are not in private ranges
    return match[0] if found.is_unspecified or found.is_loopback else "[address]"


def _public(name: str, instead: str) -> str:
    return name if PUBLIC_ORGANISATION.match(name) else instead


def _own_names() -> set[str]:
    """Names of this host and this user; facts of another machine hold only those of their paths."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], os.environ.get("USER", "")}
    with contextlib.suppress(KeyError, OSError):  # a user without an entry, as in containers
        names.add(getpass.getuser())
    return names


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [s for v in value.values() for s in _strings(v)]
    return [s for v in value for s in _strings(v)] if isinstance(value, list) else []
