"""Two Sparks over ConnectX-7: links, MTU, GID index and the interfaces that the variables name (row 59).

A Spark by itself has the ports too, with no cable in them: then nothing is asked for, and nothing applies.
"""

from __future__ import annotations

from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.fabric import Link, RdmaPort
from sparkproof.facts.model import Facts

JUMBO = 9000
ALONE = NotApplicable("no RDMA port has a link and no NCCL variable is set: one machine by itself")
# Variables that name interfaces of `ip`, and the one that names RDMA devices.
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")
DEVICES = "NCCL_IB_HCA"


@check("cluster.link")
def link(facts: Facts) -> Answer:
    """A cable, and an address on at least one of the twins that a port shows itself as."""
    ports = _ports(facts)
    if not isinstance(ports, list):
        return ports
    up = [p for p in ports if p.up]
    listed = ", ".join(f"{p.device} ({p.link}) {'up' if p.up else 'down'}" for p in ports)
    if not up:
        return Found(
            f"{listed or 'no RDMA port at all'}; set: {_set(facts)}",
            cause="NCCL is told to use a network whose links are all down.",
            fix="ibdev2netdev  # then see to the cable; `ip -j link` must say UP",
        )
    links = _links(facts)
    if links is None:
        return NotRead("the interfaces' addresses (`ip -j addr`)")
    if not any(links[p.link].addresses for p in up if p.link in links):
        return Found(f"{listed}; no port that is up has an IPv4 address")
    return Ok(listed)


@check("cluster.mtu")
def mtu(facts: Facts) -> Answer:
    """Both ends want the same, and large."""
    ports = _ports(facts)
    if not isinstance(ports, list):
        return ports
    links = _links(facts)
    if links is None:
        return NotRead("the interfaces' MTU (`ip -j link`)")
    sizes = {p.link: links[p.link].mtu for p in ports if p.up and p.link in links}
    if not sizes:
        return NotApplicable("no RDMA port is up")
    small = [name for name, size in sizes.items() if size is not None and size < JUMBO]
    seen = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if small:
        return Found(f"{seen}; {JUMBO} is wanted, at both ends", fix=" && ".join(_set_mtu(n) for n in small))
    return Ok(f"{seen}; the other end must have the same")


@check("cluster.gid_index")
def gid_index(facts: Facts) -> Answer:
    """A fixed index is wrong as soon as the table moves, and an empty one is read as 0."""
    ports = _ports(facts)
    if not isinstance(ports, list):
        return ports
    value = facts.fabric.env.get("NCCL_IB_GID_INDEX")
    good = [g for g in facts.fabric.gids or [] if g.version == "v2" and g.address]
    listed = ", ".join(f"{g.device} {g.index} ({g.address})" for g in good) or "none"
    seen = f"RoCE v2 entries with an IPv4 address: {listed}"
    if value is None:
        return Ok(f"NCCL_IB_GID_INDEX is not set; {seen}")
    index = int(value) if value.strip().isdigit() else 0
    up = {p.device for p in ports if p.up}
    hit = {g.device for g in good if g.index == index}
    if facts.fabric.gids is not None and not up <= hit:
        return Found(f"NCCL_IB_GID_INDEX='{value}' is read as {index}; {seen}")
    return Found(
        f"NCCL_IB_GID_INDEX='{value}' is right at this moment; {seen}",
        cause="The table was seen to move from index 3 to 4 within half an hour.",
    )


@check("cluster.interface")
def interface(facts: Facts) -> Answer:
    """Names that the variables give must exist, be up and have an address."""
    ports = _ports(facts)
    if not isinstance(ports, list):
        return ports
    env = facts.fabric.env
    named = [(v, name) for v in INTERFACES for name in _names(env.get(v, ""))]
    devices = _names(env.get(DEVICES, ""))
    if not named and not devices:
        return Ok("no variable names an interface")
    links = _links(facts)
    if links is None:
        return NotRead("the interfaces (`ip -j addr`)")
    wrong = []
    for variable, name in named:
        # NCCL takes a name as a prefix unless it begins with '='
        exact = name.startswith("=")
        name = name.removeprefix("=")
        meant = [x for x in links.values() if x.name == name or (not exact and x.name.startswith(name))]
        if not meant:
            wrong.append(f"{variable}={name}: there is no such interface")
        elif not any(x.up and x.addresses for x in meant):
            wrong.append(f"{variable}={name}: it is down or has no IPv4 address")
    there = {p.device for p in ports}
    for name in devices:
        plain = name.removeprefix("=").partition(":")[0]
        if not any(d.startswith(plain) for d in there):
            wrong.append(f"{DEVICES}={plain}: there is no such device, only {', '.join(sorted(there)) or 'none'}")
        elif not any(p.up for p in ports if p.device.startswith(plain)):
            wrong.append(f"{DEVICES}={plain}: its link is down")
    if wrong:
        used = next((p.link for p in ports if p.up), "enp1s0f1np1")
        return Found("; ".join(wrong), fix=f"export NCCL_SOCKET_IFNAME={used} GLOO_SOCKET_IFNAME={used}")
    return Ok(f"{_set(facts)}: all there, up and with an address")


def _ports(facts: Facts) -> list[RdmaPort] | NotApplicable | NotRead:
    fabric = facts.fabric
    if fabric.ports is None:
        return NotRead("the RDMA ports")
    return fabric.ports if any(p.up for p in fabric.ports) or _asked(facts) else ALONE


def _asked(facts: Facts) -> bool:
    """Whether a variable asks for a network: NCCL_DEBUG and its like do not."""
    return any(v in facts.fabric.env for v in (*INTERFACES, DEVICES, "NCCL_IB_GID_INDEX"))


def _links(facts: Facts) -> dict[str, Link] | None:
    return None if facts.fabric.links is None else {x.name: x for x in facts.fabric.links}


def _names(value: str) -> list[str]:
    """Names of a list; one that begins with '^' leaves interfaces out and names none."""
    return [] if value.startswith("^") else [n.strip() for n in value.split(",") if n.strip()]


def _set(facts: Facts) -> str:
    return ", ".join(f"{k}={v}" for k, v in facts.fabric.env.items()) or "no variable"


def _set_mtu(name: str) -> str:
    return f"sudo ip link set {name} mtu {JUMBO}"
