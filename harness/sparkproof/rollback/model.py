"""What a snapshot holds: plain data, saved as JSON, compared later on the same machine.

Sizes are bytes. A part that could not be read says why in `not_read`; nothing is concluded from such a part, neither
"equal" nor "new".
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from sparkproof.results import Strict

SCHEMA = "sparkproof-snapshot/2"
Area = Literal["python", "caches", "containers", "dpkg", "profiles", "variables", "processes", "gpu"]
AREAS: tuple[Area, ...] = ("python", "caches", "containers", "dpkg", "profiles", "variables", "processes", "gpu")

Stamps = dict[str, str]
"""Relative path -> what is there: 'f:size:mtime_ns', 'l:target' (a link, never followed), 'd' (an empty folder), 'm'
(another file system, not entered) or 'o' (socket, pipe, device).
"""


class Machine(Strict):
    """Which machine, and for whom: a snapshot of another one proves nothing here."""

    id: str = Field(
        default="", description="First 16 hex digits of SHA-256 of /etc/machine-id; empty if there is none."
    )
    hostname: str = ""
    uid: int = 0


class Distribution(Strict):
    """One installed Python distribution, as its metadata folder tells it."""

    name: str = Field(description="Normalised name.")
    version: str
    folder: str = Field(description="Its .dist-info or .egg-info, relative to the environment.")
    installer: str = Field(default="", description="Content of INSTALLER: pip, uv, conda, debian; empty if unsaid.")
    requested: bool | None = Field(
        default=None, description="Asked for by name, or (False) only as a dependency; None: unsaid."
    )
    requires: list[str] = Field(default_factory=list, description="Names it needs; those of extras are left out.")
    direct_url: str = Field(default="", description="Where it came from if not from an index (PEP 610).")
    scripts: list[str] = Field(default_factory=list, description="Commands it put on the PATH.")
    bytes: int = Field(default=0, description="Sum of the sizes in RECORD.")
    digest: str = Field(default="", description="Digest of RECORD less what differs between two installs of one wheel.")
    paths: list[str] | None = Field(
        default=None, description="Its files, relative to the environment; None: it has no RECORD."
    )
    outside: list[str] = Field(default_factory=list, description="Entries of RECORD that lie outside the environment.")


class Environment(Strict):
    """One Python installation prefix: a virtual environment, ~/.local, or /usr."""

    root: str = Field(description="As given, absolute.")
    real: str = Field(default="", description="With links resolved.")
    present: bool = False
    virtual: bool = Field(default=False, description="It has a pyvenv.cfg: all of it belongs to the environment.")
    identity: str = Field(
        default="", description="Digest of pyvenv.cfg: another one at the same place is another environment."
    )
    sites: list[str] = Field(default_factory=list, description="site-packages and dist-packages, relative to the root.")
    distributions: list[Distribution] = Field(default_factory=list)
    unowned: Stamps = Field(default_factory=dict, description="What no distribution owns.")
    not_read: str = ""


class Cache(Strict):
    """One cache folder."""

    name: str = Field(description="Whose: huggingface, triton, inductor, pip, ...")
    root: str
    real: str = Field(default="", description="With links resolved; a cache that points elsewhere later is left alone.")
    present: bool = False
    above: str = Field(default="", description="If it is not there: the nearest folder above it that is.")
    own: bool = Field(default=False, description="sparkproof's own.")
    bytes: int = 0
    files: int = 0
    digest: str = Field(default="", description="SHA-256 of the listing.")
    listing: Stamps = Field(default_factory=dict)
    not_read: str = ""


class Thing(Strict):
    """One object of a container engine."""

    label: str = Field(description="For people: tags of an image, name and image of a container.")
    bytes: int = Field(
        default=0, description="Of an image, what only it holds; layers shared with others do not count."
    )
    ours: bool = Field(default=False, description="It carries the label io.sparkproof.project=sparkproof.")
    running: bool = Field(default=False, description="A container that runs.")
    tags: list[str] = Field(default_factory=list, description="Of an image.")


class Engine(Strict):
    """What a container engine holds, by identifier."""

    name: Literal["docker", "podman"]
    installed: bool = False
    address: str = Field(default="", description="Of its API; empty if none was found.")
    images: dict[str, Thing] = Field(default_factory=dict)
    containers: dict[str, Thing] = Field(default_factory=dict)
    volumes: dict[str, Thing] = Field(default_factory=dict)
    networks: dict[str, Thing] = Field(default_factory=dict)
    build_cache_bytes: int = Field(default=0, description="Of all builds on this machine; it carries no labels.")
    not_read: str = ""


class Dpkg(Strict):
    """Debian packages: 'name:arch' -> version."""

    installed: bool = False
    digest: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    not_read: str = ""


class Profiles(Strict):
    """Digest of each file that sets variables for a shell, a session or the loader; never its content, which may hold
    secrets. Empty: no such file.
    """

    files: dict[str, str] = Field(default_factory=dict)
    not_read: dict[str, str] = Field(default_factory=dict)


class Variables(Strict):
    """Variables of the process that looked, of those that move CUDA, Python and the fine-tuning libraries.

    Digests of values, for a value may hold a password; search paths, which hold none, are kept as they are.
    """

    values: dict[str, str] = Field(default_factory=dict)


class Process(Strict):
    """One process of this user that a fine-tuning stack may have left running."""

    name: str
    why: str = Field(description="What makes it count: it holds a GPU, or its program lies in an environment.")


class Processes(Strict):
    """By 'pid@start', so that a number used again is another process. The one that looks and its parents are left out."""

    found: dict[str, Process] = Field(default_factory=dict)
    not_read: str = ""


class GpuMemory(Strict):
    """What GPUs hold, by NVML: bytes in use by device (None: this driver does not tell, as GB10's does not), and by process."""

    installed: bool = False
    devices: dict[str, int | None] = Field(default_factory=dict)
    processes: dict[str, int] = Field(default_factory=dict, description="'pid name' -> bytes, 0 if not told.")
    not_read: str = ""


class Snapshot(Strict):
    """The whole."""

    schema_: Literal["sparkproof-snapshot/2"] = Field(default="sparkproof-snapshot/2", alias="schema")
    taken: str = Field(description="When, UTC, ISO 8601.")
    took_s: float = 0.0
    sparkproof: str = ""
    machine: Machine
    home: str
    cwd: str = Field(description="Where it was taken: some libraries cache in the current folder.")
    areas: list[Area] = Field(description="What was looked at; the rest is unknown.")
    environments: list[Environment] = Field(default_factory=list)
    caches: list[Cache] = Field(default_factory=list)
    engines: list[Engine] = Field(default_factory=list)
    dpkg: Dpkg = Field(default_factory=Dpkg)
    profiles: Profiles = Field(default_factory=Profiles)
    variables: Variables = Field(default_factory=Variables)
    processes: Processes = Field(default_factory=Processes)
    gpu: GpuMemory = Field(default_factory=GpuMemory)

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
