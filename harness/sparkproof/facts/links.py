"""Interfaces, RDMA ports and GIDs: by `ip -j`, `ibdev2netdev` and `show_gids`, else from /sys/class/infiniband."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path

from sparkproof.facts.fabric import Fabric, Gid, Link, RdmaPort
from sparkproof.facts.host import Host

TIMEOUT_S = 4
VARIABLES = re.compile(r"^(NCCL|GLOO|UCX|TP|OMPI_MCA_btl_tcp)_\w+$")
# 'rocep1s0f1 port 1 ==> enp1s0f1np1 (Up)'
PORT = re.compile(r"^(\S+) port (\d+) ==> (\S+) \((\w+)\)")
TYPE = {"IB/RoCE v1": "v1", "RoCE v2": "v2"}


def read_fabric(host: Host) -> Fabric:
    """What the tools say; a missing one is named, and sysfs is read in its place."""
    found = Fabric(env={k: v for k, v in sorted(host.environ.items()) if VARIABLES.match(k)})
    said = {}
    for tool, argv in {"ip": ["-j", "addr", "show"], "ibdev2netdev": [], "show_gids": []}.items():
        path = host.which(tool)
        if path is None:
            found.missing_tools.append(tool)
            continue
        ran = host.run([path, *argv], TIMEOUT_S)
        if not ran.error:
            said[tool] = ran.out
    if "ip" in said:
        found.links = parse_links(said["ip"])
    found.ports = parse_ports(said["ibdev2netdev"]) if "ibdev2netdev" in said else sysfs_ports(host)
    found.gids = parse_gids(said["show_gids"]) if "show_gids" in said else sysfs_gids(host)
    return found


def parse_links(text: str) -> list[Link] | None:
    """`ip -j addr show`; addresses without their prefix length."""
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return [
        Link(
            name=d["ifname"],
            up=d.get("operstate") == "UP",
            mtu=d.get("mtu"),
            addresses=[a["local"] for a in d.get("addr_info", []) if a.get("family") == "inet" and "local" in a],
        )
        for d in data
        if isinstance(d, dict) and d.get("ifname")
    ]


def parse_ports(text: str) -> list[RdmaPort]:
    """`ibdev2netdev`."""
    rows = (PORT.match(line) for line in text.splitlines())
    return [RdmaPort(device=m[1], port=int(m[2]), link=m[3], up=m[4] == "Up") for m in rows if m]


def parse_gids(text: str) -> list[Gid]:
    """`show_gids`: DEV PORT INDEX GID [IPv4] VER DEV."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 5 or not words[1].isdigit() or not words[2].isdigit():
            continue
        version = next((w for w in words[4:] if w in ("v1", "v2")), None)
        if version is None:
            continue
        address = words[4] if words[4] != version else None
        link = words[-1] if words[-1] != version else None
        found.append(
            Gid(device=words[0], port=int(words[1]), index=int(words[2]), address=address, version=version, link=link)
        )
    return found


def sysfs_ports(host: Host) -> list[RdmaPort]:
    """Ports and their interfaces from sysfs."""
    return [
        RdmaPort(device=d.name, port=int(p.name), link=link.name, up="ACTIVE" in _line(p / "state"))
        for d in host.glob("/sys/class/infiniband", "*")
        for p in sorted((d / "ports").glob("*"))
        for link in sorted((d / "device" / "net").glob("*"))
    ]


def sysfs_gids(host: Host) -> list[Gid]:
    """The GID table from sysfs; empty entries are left out."""
    found = []
    for port in (p for d in host.glob("/sys/class/infiniband", "*") for p in sorted((d / "ports").glob("*"))):
        for entry in sorted((port / "gids").glob("*"), key=lambda p: int(p.name)):
            gid, kind = _line(entry), _line(port / "gid_attrs" / "types" / entry.name)
            if not gid or int(gid.replace(":", "") or "0", 16) == 0 or kind not in TYPE:
                continue
            mapped = ipaddress.IPv6Address(gid).ipv4_mapped
            found.append(
                Gid(
                    device=port.parent.parent.name,
                    port=int(port.name),
                    index=int(entry.name),
                    address=str(mapped) if mapped else None,
                    version=TYPE[kind],
                    link=_line(port / "gid_attrs" / "ndevs" / entry.name) or None,
                )
            )
    return found


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
