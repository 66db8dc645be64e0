"""The link between two Sparks, from the output of the tools and from sysfs; and the checks' finer points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sparkproof.checks.registry import evaluate
from sparkproof.facts import links
from sparkproof.facts.host import Ran
from test_checks_logic import change
from test_facts_probes import FakeHost, put

# `ip -j addr show`, cut to what is read; ibdev2netdev as eugr/spark-vllm-docker's NETWORKING.md shows it.
IP = json.dumps(
    [
        {"ifname": "lo", "operstate": "UNKNOWN", "mtu": 65536, "addr_info": [{"family": "inet", "local": "127.0.0.1"}]},
        {
            "ifname": "enp1s0f1np1",
            "operstate": "UP",
            "mtu": 9000,
            "addr_info": [{"family": "inet", "local": "192.168.177.11"}, {"family": "inet6", "local": "fe80::1"}],
        },
    ]
)
IBDEV2NETDEV = """rocep1s0f0 port 1 ==> enp1s0f0np0 (Down)
rocep1s0f1 port 1 ==> enp1s0f1np1 (Up)
roceP2p1s0f0 port 1 ==> enP2p1s0f0np0 (Down)
roceP2p1s0f1 port 1 ==> enP2p1s0f1np1 (Up)
"""
SHOW_GIDS = """DEV\tPORT\tINDEX\tGID\t\t\t\t\tIPv4  \t\tVER\tDEV
---\t----\t-----\t---\t\t\t\t\t------------  \t---\t---
rocep1s0f1\t1\t0\tfe80:0000:0000:0000:4ebb:47ff:fe2d:0001\t\t\tv1\tenp1s0f1np1
rocep1s0f1\t1\t1\tfe80:0000:0000:0000:4ebb:47ff:fe2d:0001\t\t\tv2\tenp1s0f1np1
rocep1s0f1\t1\t2\t0000:0000:0000:0000:0000:ffff:c0a8:b10b\t192.168.177.11  \tv1\tenp1s0f1np1
rocep1s0f1\t1\t3\t0000:0000:0000:0000:0000:ffff:c0a8:b10b\t192.168.177.11  \tv2\tenp1s0f1np1
n_gids_found=4
"""


def test_by_the_tools(tmp_path: Path) -> None:
    host = FakeHost(
        tmp_path,
        {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "enp1s0f1np1", "PATH": "/usr/bin"},
        {"-j addr": Ran(0, IP), "ibdev2netdev": Ran(0, IBDEV2NETDEV), "show_gids": Ran(0, SHOW_GIDS)},
        {"ip": "ip", "ibdev2netdev": "ibdev2netdev", "show_gids": "show_gids"},
    )
    found = links.read_fabric(host)
    assert found.links is not None and found.ports is not None and found.gids is not None
    assert [(x.name, x.up, x.mtu, x.addresses) for x in found.links] == [
        ("lo", False, 65536, ["127.0.0.1"]),
        ("enp1s0f1np1", True, 9000, ["192.168.177.11"]),
    ]
    assert [(p.device, p.up) for p in found.ports] == [
        ("rocep1s0f0", False),
        ("rocep1s0f1", True),
        ("roceP2p1s0f0", False),
        ("roceP2p1s0f1", True),
    ]
    assert [(g.index, g.version, g.address) for g in found.gids] == [
        (0, "v1", None),
        (1, "v2", None),
        (2, "v1", "192.168.177.11"),
        (3, "v2", "192.168.177.11"),
    ]
    assert {g.link for g in found.gids} == {"enp1s0f1np1"}
    assert found.env == {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "enp1s0f1np1"} and not found.missing_tools


def test_by_sysfs_where_the_tools_are_missing(tmp_path: Path) -> None:
    port = "/sys/class/infiniband/rocep1s0f1/ports/1"
    put(tmp_path, f"{port}/state", "4: ACTIVE\n")
    put(tmp_path, "/sys/class/infiniband/rocep1s0f1/device/net/enp1s0f1np1/mtu", "9000\n")
    for index, (gid, kind) in enumerate(
        [
            ("fe80:0000:0000:0000:4ebb:47ff:fe2d:0001", "RoCE v2"),
            ("0000:0000:0000:0000:0000:ffff:c0a8:b10b", "RoCE v2"),
            ("0000:0000:0000:0000:0000:0000:0000:0000", ""),
        ]
    ):
        put(tmp_path, f"{port}/gids/{index}", f"{gid}\n")
        put(tmp_path, f"{port}/gid_attrs/types/{index}", f"{kind}\n")
        put(tmp_path, f"{port}/gid_attrs/ndevs/{index}", "enp1s0f1np1\n")
    found = links.read_fabric(FakeHost(tmp_path))
    assert found.missing_tools == ["ip", "ibdev2netdev", "show_gids"] and found.links is None
    assert [(p.device, p.link, p.up) for p in found.ports or []] == [("rocep1s0f1", "enp1s0f1np1", True)]
    assert [(g.index, g.address) for g in found.gids or []] == [(0, None), (1, "192.168.177.11")]


def test_no_ports_at_all_is_an_answer(tmp_path: Path) -> None:
    found = links.read_fabric(FakeHost(tmp_path))
    assert found.ports == [] and found.gids == []


def test_nonsense_of_ip_is_not_read() -> None:
    assert links.parse_links("not json") is None
    assert links.parse_gids("garbage\nDEV PORT\n") == [] and links.parse_ports("x\n") == []


# --- checks


def two(**changes: Any) -> Any:
    return change("gb10_two_sparks", **changes)


@pytest.mark.parametrize(("value", "read_as"), [("", "0"), ("0", "0"), ("2", "2")])
def test_an_empty_index_is_read_as_0(value: str, read_as: str) -> None:
    found = evaluate("cluster.gid_index", two(fabric__env={"NCCL_IB_GID_INDEX": value})).findings
    assert f"is read as {read_as}" in found[0].evidence, "index 2 is RoCE v1"


def test_a_right_index_is_a_warning_all_the_same() -> None:
    facts = two(fabric__env={"NCCL_IB_GID_INDEX": "3"}, fabric__ports=[
        {"device": "rocep1s0f1", "port": 1, "link": "enp1s0f1np1", "up": True}
    ])  # fmt: skip
    assert "right at this moment" in evaluate("cluster.gid_index", facts).findings[0].evidence


@pytest.mark.parametrize(
    ("env", "state"),
    [
        ({"NCCL_SOCKET_IFNAME": "enp1s0f1np1"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "enp1s0f1"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "=enp1s0f1"}, "found"),
        ({"NCCL_SOCKET_IFNAME": "^docker0,lo"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "enp1s0f0np0"}, "found"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "found"),
        ({"NCCL_IB_HCA": "rocep1s0f1:1,roceP2p1s0f1:1"}, "ok"),
        ({"NCCL_IB_HCA": "=rocep1s0f0"}, "found"),
        ({}, "ok"),
    ],
)
def test_names_as_nccl_reads_them(env: dict[str, str], state: str) -> None:
    assert evaluate("cluster.interface", two(fabric__env=env)).state == state


def test_up_without_an_address() -> None:
    links_ = [{"name": "enp1s0f1np1", "up": True, "mtu": 9000, "addresses": []}]
    found = evaluate("cluster.link", two(fabric__links=links_)).findings
    assert "no port that is up has an IPv4 address" in found[0].evidence


def test_debug_alone_asks_for_no_network() -> None:
    facts = change("gb10_healthy", fabric__env={"NCCL_DEBUG": "INFO"})
    assert evaluate("cluster.link", facts).state == "not applicable"


def test_unread_links_are_not_judged() -> None:
    for check in ("cluster.link", "cluster.mtu", "cluster.interface"):
        assert evaluate(check, two(fabric__links=None)).state == "not read"
    assert evaluate("cluster.link", two(fabric__ports=None)).state == "not read"
