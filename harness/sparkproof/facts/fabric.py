"""The network between two Sparks, as `ip -j`, `ibdev2netdev` and `show_gids` tell it. Plain data, part of `Facts`."""

from __future__ import annotations

from pydantic import Field

from sparkproof.results import Strict


class Link(Strict):
    """A network interface."""

    name: str
    up: bool
    mtu: int | None = None
    addresses: list[str] = Field(default_factory=list)


class RdmaPort(Strict):
    """A port of an RDMA device and the interface it belongs to."""

    device: str
    port: int = 1
    link: str
    up: bool


class Gid(Strict):
    """An entry of a port's GID table."""

    device: str
    port: int
    index: int
    address: str | None = Field(default=None, description="IPv4 address; None for an IPv6 or link-local entry.")
    version: str = Field(description="'v1' or 'v2'.")
    link: str | None = None


class Fabric(Strict):
    """Interfaces and RDMA ports. None: not read."""

    links: list[Link] | None = None
    ports: list[RdmaPort] | None = None
    gids: list[Gid] | None = None
    env: dict[str, str] = Field(default_factory=dict, description="NCCL_*, GLOO_* and UCX_* variables that are set.")
    missing_tools: list[str] = Field(default_factory=list, description="Commands that are not installed.")
