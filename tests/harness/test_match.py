"""Requirements against Facts: each lack gives its own reason class, and what was not read counts as lacking."""

from __future__ import annotations

import pytest
from sparkproof.facts.model import Container, Disk, Facts, Gpu, Memory, Network
from sparkproof.match import unmet
from sparkproof.results import ReasonClass
from sparkproof.scenario import Requires

SPARK = Facts(
    origin="constructed for this test",
    arch="aarch64",
    gpus=[Gpu(name="NVIDIA GB10", compute_capability="12.1", integrated=True, usable_by_torch=True)],
    memory=Memory(total_gib=119.7, available_gib=110, cuda_free_gib=40),
    disk=Disk(free_gib=500),
    network=Network(hub_reachable=True),
    container=Container(engine="docker", usable=True),
    packages={"unsloth-zoo": "1"},
)
LAPTOP = Facts(origin="constructed for this test", arch="x86_64")

FULL = Requires(
    gpu=True,
    min_compute_capability=12.1,
    unified_memory=True,
    arch=["aarch64"],
    memory_gib=64,
    gpu_memory_gib=100,
    disk_gib=100,
    network=True,
    container_engine=True,
    packages=["unsloth_zoo"],
)


def test_a_spark_meets_all_and_its_pool_is_read_from_meminfo_not_cuda() -> None:
    assert unmet(FULL, SPARK) is None, "gpu_memory_gib=100 is met by 110 GiB available, though CUDA calls 40 free"


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        (Requires(gpu=True), ReasonClass.GPU),
        (Requires(min_compute_capability=8.0), ReasonClass.GPU),
        (Requires(unified_memory=True), ReasonClass.GPU),
        (Requires(arch=["aarch64"]), ReasonClass.ARCH),
        (Requires(memory_gib=1), ReasonClass.MEMORY),
        (Requires(disk_gib=1), ReasonClass.DISK),
        (Requires(network=True), ReasonClass.NETWORK),
        (Requires(container_engine=True), ReasonClass.CONTAINER),
        (Requires(packages=["unsloth"]), ReasonClass.SOFTWARE),
    ],
)
def test_each_lack_has_its_class(requires: Requires, reason: ReasonClass) -> None:
    found = unmet(requires, LAPTOP)
    assert found is not None and found[0] is reason
    assert found[1].startswith("needs ")


def test_no_requirement_is_met_by_anything() -> None:
    assert unmet(Requires(), LAPTOP) is None


def test_an_older_or_discrete_gpu() -> None:
    card = Gpu(name="NVIDIA H100", compute_capability="9.0", integrated=False, usable_by_torch=True)
    h100 = SPARK.model_copy(update={"gpus": [card]})
    assert unmet(Requires(min_compute_capability=12.1), h100)[0] is ReasonClass.COMPUTE_CAPABILITY  # type: ignore[index]
    assert unmet(Requires(unified_memory=True), h100)[0] is ReasonClass.UNIFIED_MEMORY  # type: ignore[index]
    assert unmet(Requires(gpu_memory_gib=60), h100)[0] is ReasonClass.MEMORY, "40 GiB are free by CUDA"  # type: ignore[index]


def test_a_gpu_that_torch_cannot_use_is_no_gpu() -> None:
    dead = SPARK.model_copy(update={"gpus": [Gpu(name="NVIDIA GB10", usable_by_torch=False)]})
    reason, sentence = unmet(Requires(gpu=True), dead)  # type: ignore[misc]
    assert reason is ReasonClass.GPU and "torch cannot use the NVIDIA GB10" in sentence
