"""Secrets never reach a report: every string is scrubbed on its way into the record.

Two nets. The values of environment variables whose names say that they hold a secret are replaced wherever they occur,
also percent-encoded. And strings shaped like a credential are replaced whether or not this process ever held them,
since a log may quote somebody else's. What stands in their place names the variable or the kind, never a part of it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparkproof.results import ReasonClass, Verdict
from sparkproof.scenario import KINDS, Profile

SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|TOKENS|SECRET|SECRETS|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY|AUTH)($|_)"
    r"|PASSWORD|APIKEY",
    re.IGNORECASE,
)
NOT_SECRET = re.compile(r"^(TOKENIZERS_|HF_HUB_DISABLE_IMPLICIT_TOKEN$)|_(PATH|FILE|DIR)$", re.IGNORECASE)
SHORTEST = 6  # a shorter value, such as "1" or "true", says nothing and occurs everywhere
SHORTEST_LINE = 20  # of a value with many lines, such as a private key, each long line is a secret by itself

SHAPES: list[tuple[str, re.Pattern[str]]] = [
    (
        "private key",
        re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    ),
    ("Hugging Face token", re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")),
    ("GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{20,})")),
    ("GitLab token", re.compile(r"\bglpat-[A-Za-z0-9_-]{16,}")),
    ("API key", re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|nvapi-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})")),
    ("Slack token", re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}")),
    ("JSON web token", re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+")),
]
BEARER = re.compile(r"\b(Bearer|Basic)(\s+)(?=[A-Za-z0-9._~+/=-]*[0-9._~+/=-])[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:'\"<>]*:[^\s/@'\"<>]+@", re.IGNORECASE)
QUERY = re.compile(
    r"([?&](?:token|access_token|api_?key|password|secret|sig|signature|x-amz-[a-z-]+|policy|key-pair-id)=)[^\s&'\"<>#]+",
    re.IGNORECASE,
)
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{,40}")
VOCABULARY = frozenset({*Verdict, *ReasonClass, *Profile, *KINDS}) | {
    "run", "case", "resumed", "end", "device", "speed", "profile", "selection", "docker", "podman", "scenario", "gpu",
    "interpreter", "ahead-of-time", "reference", "host",
}  # fmt: skip
ASSIGNED = re.compile(r"\b([A-Z][A-Z0-9_]*)=(['\"]?)([^\s'\"]{4,})\2")


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as names go."""
    return bool(SECRET_NAME.search(name)) and not NOT_SECRET.search(name)


class Redactor:
    """Replaces secrets in strings and in anything made of strings, lists and dicts."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        found: dict[str, str] = {}
        for name, value in env.items():
            if not is_secret_name(name):
                continue
            value = value.strip()
            lines = [s.strip() for s in value.splitlines() if len(s.strip()) >= SHORTEST_LINE] if "\n" in value else []
            for form in {value, quote(value, safe=""), *lines}:
                if len(form) >= SHORTEST:
                    found[form] = name
        # the longest first: one value may be a part of another
        self._values = [(v, f"[redacted {found[v]}]") for v in sorted(found, key=lambda v: (-len(v), v))]

    def text(self, s: str) -> str:
        """`s` without its secrets."""
        for value, mark in self._values:
            if value in s:
                s = s.replace(value, mark)
        for kind, shape in SHAPES:
            s = shape.sub(f"[redacted {kind}]", s)
        s = BEARER.sub(r"\1\2[redacted]", s)
        s = USERINFO.sub(r"\1[redacted]@", s)
        s = QUERY.sub(r"\1[redacted]", s)
        return ASSIGNED.sub(lambda m: f"{m[1]}=[redacted]" if is_secret_name(m[1]) else m[0], s)

    def data(self, value: Any) -> Any:
        """The same for a JSON-like value, keys included; words of the schema stay, whatever a password may be."""
        if isinstance(value, str):
            return value if value in VOCABULARY else self.text(value)
        if isinstance(value, Mapping):
            return {self._key(k): self._entry(k, v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(v) for v in value]
        return value

    def _key(self, key: Any) -> Any:
        return self.text(key) if isinstance(key, str) and not FIELD_NAME.fullmatch(key) else key

    def _entry(self, key: Any, value: Any) -> Any:
        """A value under a key that is itself the name of a secret variable is gone whatever it looks like."""
        if isinstance(key, str) and isinstance(value, str) and value and key.isupper() and is_secret_name(key):
            return "[redacted]"
        return self.data(value)

    def file(self, path: Path) -> bool:
        """Scrub a text file in place; whether anything was found. A file that can't be read is left alone."""
        try:
            raw = path.read_bytes()
        except OSError:
            return False
        before = raw.decode("utf-8", errors="surrogateescape")
        after = self.text(before)
        if after == before:
            return False
        tmp = path.with_name(path.name + ".part")
        try:
            tmp.write_bytes(after.encode("utf-8", errors="surrogateescape"))
            tmp.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                tmp.unlink()
            path.write_bytes(b"")  # better no log than one with a secret in it
        return True

    def logs(self, folder: Path) -> int:
        """Scrub every log under `folder`; the number changed."""
        return sum(self.file(p) for p in sorted(folder.rglob("*.log")) if p.is_file() and not p.is_symlink())
