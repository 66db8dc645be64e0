"""A container engine's API over a unix socket, as Docker speaks it: enough of it to list, run, and remove, and to fail in
every way that an engine fails. It runs nothing: a container's output and exit code are what the test says.
"""

from __future__ import annotations

import json
import re
import socketserver
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

OURS = {"io.sparkproof.project": "sparkproof"}


@dataclass
class Program:
    """What a started container does: print, then end with `code`, or (`hangs`) only when a signal comes."""

    out: bytes = b""
    err: bytes = b""
    code: int = 0
    hangs: bool = False
    oom: bool = False
    on_signal: dict[str, int] = field(default_factory=lambda: {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": 137})


@dataclass
class FakeEngine:
    """The state behind the socket. `refuse`: (method and path pattern) -> (status, message)."""

    socket: Path
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)
    volumes: dict[str, dict[str, Any]] = field(default_factory=dict)
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    components: list[str] = field(default_factory=lambda: ["Engine"])
    programs: list[Program] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    signals: list[str] = field(default_factory=list)
    build_cache: int = 0

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    def image(self, key: str, *tags: str, labels: dict[str, str] | None = None, **more: Any) -> None:
        document = {"Id": key, "RepoTags": list(tags), "RepoDigests": [], "Size": 5_000_000, "Architecture": "amd64",
                    "Os": "linux", "Config": {"Labels": labels or {}, "User": "1000:1000"}}  # fmt: skip
        self.images[key] = {**document, **more}

    def container(self, key: str, image: str, labels: dict[str, str] | None = None, running: bool = False) -> None:
        self.containers[key] = {"Id": key, "Name": f"/{key}", "Config": {"Image": image, "Labels": labels or {}, "Tty": False},
                                "State": {"Running": running, "ExitCode": 0}, "ended": threading.Event()}  # fmt: skip

    def find_image(self, name: str) -> dict[str, Any] | None:
        bare = name.removeprefix("sha256:")
        return next((i for k, i in self.images.items() if name in (k, *i["RepoTags"]) or bare == k), None)


class Handler(BaseHTTPRequestHandler):
    """One request. `self.server.engine` is the state."""

    protocol_version = "HTTP/1.1"
    engine: FakeEngine

    def log_message(self, *arguments: Any) -> None:
        pass

    def address_string(self) -> str:
        return "unix"

    def answer(self, document: Any = None, status: int = 200) -> None:
        body = b"" if status == 204 else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(re.sub(r"^/v\d+\.\d+", "", url.path))
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        e = self.engine
        asked = f"{self.command} {path}"
        e.requests.append(asked)
        for pattern, (status, message) in e.refuse.items():
            if re.fullmatch(pattern, asked):
                return self.answer({"message": message}, status)
        for pattern, method in ROUTES:
            if m := re.fullmatch(pattern, asked):
                return method(self, e, m.groups(), query, body)
        self.answer({"message": f"no such endpoint: {asked}"}, 404)

    do_GET = do_POST = do_DELETE = do_HEAD = handle_any

    # -- what there is -------------------------------------------------------------------------------------------------
    def version(self, e: FakeEngine, *_: Any) -> None:
        self.answer({"ApiVersion": "1.43", "MinAPIVersion": "1.24", "Components": [{"Name": n} for n in e.components]})

    def info(self, e: FakeEngine, *_: Any) -> None:
        base = {"Architecture": "x86_64", "SecurityOptions": ["name=seccomp"], "DockerRootDir": "/", "Runtimes": {}}
        self.answer({**base, **e.info})

    def list_images(self, e: FakeEngine, *_: Any) -> None:
        self.answer([{**i, "Labels": i["Config"]["Labels"]} for i in e.images.values()])

    def list_containers(self, e: FakeEngine, *_: Any) -> None:
        rows = e.containers.values()
        self.answer([
            {"Id": c["Id"], "Names": [c["Name"]], "Image": c["Config"]["Image"], "Labels": c["Config"]["Labels"],
             "State": "running" if c["State"]["Running"] else "exited"} for c in rows
        ])  # fmt: skip

    def list_volumes(self, e: FakeEngine, *_: Any) -> None:
        self.answer({"Volumes": list(e.volumes.values())})

    def list_networks(self, e: FakeEngine, *_: Any) -> None:
        self.answer([{"Id": "0" * 64, "Name": "bridge", "Labels": {}}, *e.networks.values()])

    def df(self, e: FakeEngine, *_: Any) -> None:
        images = [{"Id": i["Id"], "Size": i["Size"], "SharedSize": 1_000_000} for i in e.images.values()]
        volumes = [{"Name": n, "UsageData": {"Size": 2_000_000}} for n in e.volumes]
        cache = [{"Size": e.build_cache, "Shared": False}]
        self.answer({"Images": images, "Containers": [], "Volumes": volumes, "BuildCache": cache})

    def inspect(self, e: FakeEngine, groups: tuple[str, ...], *_: Any) -> None:
        kind, name = groups
        found = e.find_image(name) if kind == "images" else getattr(e, kind).get(name)
        if found is None:
            return self.answer({"message": f"No such {kind.rstrip('s')}: {name}"}, 404)
        self.answer({k: v for k, v in found.items() if k not in ("ended", "program")})

    # -- what goes -----------------------------------------------------------------------------------------------------
    def delete_image(self, e: FakeEngine, groups: tuple[str, ...], *_: Any) -> None:
        found = e.find_image(groups[0])
        if found is None:
            return self.answer({"message": f"No such image: {groups[0]}"}, 404)
        if any(c["Config"]["Image"] in (found["Id"], *found["RepoTags"]) for c in e.containers.values()):
            return self.answer(
                {"message": f"conflict: unable to delete {groups[0]} (must be forced) - container is using it"}, 409
            )
        if groups[0] in found["RepoTags"]:
            found["RepoTags"].remove(groups[0])
        if not found["RepoTags"]:
            del e.images[found["Id"]]
        self.answer([{"Untagged": groups[0]}])

    def delete(self, e: FakeEngine, groups: tuple[str, ...], query: dict[str, str], *_: Any) -> None:
        kind, name = groups
        held: dict[str, Any] = getattr(e, kind)
        if name not in held:
            return self.answer({"message": f"No such {kind[:-1]}: {name}"}, 404)
        if kind == "containers" and held[name]["State"]["Running"] and query.get("force") not in ("1", "True"):
            return self.answer({"message": f"You cannot remove a running container {name}"}, 409)
        del held[name]
        self.answer(status=204)

    # -- what runs -----------------------------------------------------------------------------------------------------
    def create(self, e: FakeEngine, groups: Any, query: dict[str, str], body: dict[str, Any]) -> None:
        if e.find_image(body["Image"]) is None:
            return self.answer({"message": f"No such image: {body['Image']}"}, 404)
        name = query.get("name") or f"c{len(e.created)}"
        if name in e.containers:
            return self.answer(
                {"message": f'Conflict. The container name "/{name}" is already in use by container "1"'}, 409
            )
        e.created.append({"name": name, **body})
        e.container(name, body["Image"], body.get("Labels"))
        e.containers[name]["program"] = e.programs.pop(0) if e.programs else Program()
        self.answer({"Id": name, "Warnings": []}, 201)

    def create_volume(self, e: FakeEngine, groups: Any, query: Any, body: dict[str, Any]) -> None:
        e.volumes.setdefault(body["Name"], {"Name": body["Name"], "Labels": body.get("Labels") or {}})
        self.answer(e.volumes[body["Name"]], 201)

    def start(self, e: FakeEngine, groups: tuple[str, ...], *_: Any) -> None:
        e.containers[groups[0]]["State"]["Running"] = True
        self.answer(status=204)

    def attach(self, e: FakeEngine, groups: tuple[str, ...], *_: Any) -> None:
        c = e.containers[groups[0]]
        program: Program = c["program"]
        self.wfile.write(b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n"
                         b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n")  # fmt: skip
        self.wfile.flush()
        while not c["State"]["Running"] and not c["ended"].wait(0.005):
            pass
        for stream, data in ((1, program.out), (2, program.err)):
            if data:
                self.wfile.write(struct.pack(">BxxxL", stream, len(data)) + data)
                self.wfile.flush()
        if program.hangs:
            c["ended"].wait(20)
        else:
            c["State"]["OOMKilled"] = program.oom
            self.end(c, program.code)
        self.close_connection = True

    def end(self, c: dict[str, Any], code: int) -> None:
        c["State"].update(Running=False, ExitCode=code)
        c["ended"].set()

    def kill(self, e: FakeEngine, groups: tuple[str, ...], query: dict[str, str], body: Any) -> None:
        c = e.containers[groups[0]]
        signal = query.get("signal", "SIGKILL")
        e.signals.append(signal)
        if (code := c["program"].on_signal.get(signal)) is not None:
            self.end(c, code)
        self.answer(status=204)

    def stop(self, e: FakeEngine, groups: tuple[str, ...], *_: Any) -> None:
        self.end(e.containers[groups[0]], 143)
        self.answer(status=204)

    def wait(self, e: FakeEngine, groups: tuple[str, ...], *_: Any) -> None:
        c = e.containers[groups[0]]
        c["ended"].wait(20)
        self.answer({"StatusCode": c["State"]["ExitCode"]})


ROUTES: list[tuple[str, Any]] = [
    (r"GET /version", Handler.version), (r"GET /info", Handler.info), (r"GET /images/json", Handler.list_images),
    (r"GET /containers/json", Handler.list_containers), (r"GET /volumes", Handler.list_volumes),
    (r"GET /networks", Handler.list_networks), (r"GET /system/df", Handler.df),
    (r"GET /(images|containers)/(.+)/json", Handler.inspect), (r"GET /(volumes|networks)/(.+)", Handler.inspect),
    (r"DELETE /images/(.+)", Handler.delete_image), (r"DELETE /(containers|volumes|networks)/(.+)", Handler.delete),
    (r"POST /containers/create", Handler.create), (r"POST /volumes/create", Handler.create_volume),
    (r"POST /containers/(.+)/start", Handler.start), (r"POST /containers/(.+)/attach", Handler.attach),
    (r"POST /containers/(.+)/kill", Handler.kill), (r"POST /containers/(.+)/stop", Handler.stop),
    (r"POST /containers/(.+)/wait", Handler.wait),
]  # fmt: skip


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def serving(folder: Path) -> Iterator[FakeEngine]:
    """Serve a fresh engine at `folder`/engine.sock; a test may bind it as Docker's or as Podman's."""
    engine = FakeEngine(folder / "engine.sock")
    handler = type("Bound", (Handler,), {"engine": engine})
    server = Server(str(engine.socket), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        for c in engine.containers.values():
            c["ended"].set()
        server.shutdown()
        server.server_close()
        thread.join()
