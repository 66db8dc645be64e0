"""A package index, read as little as possible: which files a project has, and parts of a file by HTTP range.

PEP 691 JSON, with PEP 503's hash in the address where an index has only HTML. The index is the one that uv and pip are told of.
"""

from __future__ import annotations

import html.parser
import io
import os
import re
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx

from sparkproof.errors import UserError

DEFAULT = "https://pypi.org/simple"
SETTINGS = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
TIMEOUT_S = 60
BLOCK = 32 * 1024  # a library's header, or a small wheel's directory, in one request
LARGEST_BLOCK = 4 * 1024 * 1024  # reading on doubles what is asked for, up to this
RETRIES = 3
OVERLOADED = (429, 502, 503, 504)


@dataclass(frozen=True)
class File:
    """One file of a project; sha256 in hex, empty where the index states none; size in bytes."""

    name: str
    url: str
    sha256: str
    size: int | None = None


class Source(Protocol):
    """Where wheels come from."""

    def files(self, project: str) -> list[File]:
        """Every file of a project, in no order; empty if there is none."""

    def open(self, file: File) -> BinaryIO:
        """The file, seekable, fetched in parts as they are read."""


def patiently(client: httpx.Client, url: str, headers: dict[str, str]) -> httpx.Response:
    """GET, again after 1, 2 and 4 seconds where the connection breaks or the server is overloaded.

    httpx itself tries again only what never connected; of some thousand requests a check makes, one is cut off now and then.
    Errors: the last httpx.TransportError.
    """
    for attempt in range(RETRIES + 1):
        last = attempt == RETRIES
        try:
            answer = client.get(url, headers=headers)
        except httpx.TransportError:
            if last:
                raise
        else:
            if last or answer.status_code not in OVERLOADED:
                return answer
        time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")


class HttpIndex:
    """An index on the net."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        self.url = next((env[k] for k in SETTINGS if env.get(k)), DEFAULT).rstrip("/")
        self.client = httpx.Client(
            timeout=TIMEOUT_S, follow_redirects=True, transport=httpx.HTTPTransport(retries=RETRIES)
        )

    def files(self, project: str) -> list[File]:
        """Every file of a project. Errors: UserError if the index doesn't answer."""
        page = f"{self.url}/{project}/"
        try:
            answer = patiently(self.client, page, {"Accept": ACCEPT})
        except httpx.HTTPError as error:
            raise UserError(
                f"The package index doesn't answer for {project}: {error}.", "Look at the network."
            ) from error
        if answer.status_code == httpx.codes.NOT_FOUND:
            return []
        if answer.is_error:
            raise UserError(f"The package index answers {answer.status_code} for {project}.", "Look at the network.")
        if "json" in answer.headers.get("content-type", ""):
            listed = answer.json()["files"]
            found = [File(f["filename"], f["url"], f["hashes"].get("sha256", ""), f.get("size")) for f in listed]
        else:
            found = _from_html(answer.text)
        return [File(f.name, urllib.parse.urljoin(str(answer.url), f.url), f.sha256, f.size) for f in found]

    def open(self, file: File) -> BinaryIO:
        """A buffered reader over ranges."""
        return io.BufferedReader(_Ranges(self.client, file), BLOCK)


class Folder:
    """Wheels in a folder, for tests and for a site that has fetched them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self, project: str) -> list[File]:
        """Those whose name starts with the project's; the hash is computed."""
        import hashlib

        start = project.replace("-", "_") + "-"
        return [
            File(p.name, str(p), hashlib.sha256(p.read_bytes()).hexdigest())
            for p in sorted(self.path.iterdir())
            if p.name.lower().startswith(start)
        ]

    def open(self, file: File) -> BinaryIO:
        """The file itself."""
        return open(file.url, "rb")


class _Ranges(io.RawIOBase):
    """A remote file, seekable, by range requests that grow while it is read on. Errors: UserError if none is served."""

    def __init__(self, client: httpx.Client, file: File) -> None:
        self.client, self.file, self.at = client, file, 0
        self.size = file.size or self._length()
        self.start, self.window, self.block = 0, b"", BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        want = min(len(buffer), self.size - self.at)
        if want <= 0:
            return 0
        if not self.start <= self.at < self.start + len(self.window):
            on = self.at == self.start + len(self.window)
            self.block = min(2 * self.block, LARGEST_BLOCK) if on else BLOCK
            last = min(self.at + max(want, self.block), self.size) - 1
            self.start, self.window = self.at, self._get(self.at, last).content
        data = self.window[self.at - self.start :][:want]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _length(self) -> int:
        said = self._get(0, 0).headers.get("content-range", "")
        found = re.fullmatch(r"bytes 0-0/(\d+)", said)
        if found is None:
            raise UserError(
                f"{self.file.name}: the index doesn't say how long it is.", "Use an index that serves ranges."
            )
        return int(found.group(1))

    def _get(self, first: int, last: int) -> httpx.Response:
        try:
            answer = patiently(self.client, self.file.url, {"Range": f"bytes={first}-{last}"})
        except httpx.HTTPError as error:
            raise UserError(f"{self.file.name} can't be read: {error}.", "Look at the network.") from error
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            raise UserError(
                f"{self.file.name}: asked for a part, the index answered {answer.status_code}.",
                "Use an index that serves ranges.",
            )
        return answer


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[File] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href")
        if tag == "a" and address:
            url, _, fragment = address.partition("#")
            name = urllib.parse.unquote(url.rpartition("/")[2])
            self.found.append(File(name, url, fragment.removeprefix("sha256=") if "sha256=" in fragment else ""))


def _from_html(text: str) -> list[File]:
    links = _Links()
    links.feed(text)
    return links.found
