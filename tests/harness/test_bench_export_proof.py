"""What llama.cpp's log and torch's own account prove, and what is done with what they don't."""

from __future__ import annotations

import pytest
from sparkproof.bench.export import proof
from sparkproof.bench.export.document import Proof
from sparkproof.runners import export_placement

CPU = {"name": "CPU", "description": "AMD EPYC", "type": "GGML_BACKEND_DEVICE_TYPE_CPU"}
CUDA = {"name": "CUDA0", "description": "NVIDIA GB10", "type": "GGML_BACKEND_DEVICE_TYPE_IGPU"}
# Lines as llama.cpp prints them, of an 8B with all layers on a GPU, of a CPU build, and of 12 layers of 33.
ON_GPU = """\
0.00.100.000 I llama_model_load_from_file_impl: using device CUDA0 (NVIDIA GB10) - 110592 MiB free
0.00.632.601 I load_tensors: offloading 32 repeating layers to GPU
0.00.632.601 I load_tensors: offloading output layer to GPU
0.00.632.601 I load_tensors: offloaded 33/33 layers to GPU
0.00.632.601 I load_tensors:   CPU_Mapped model buffer size =   281.81 MiB
0.00.632.601 I load_tensors:        CUDA0 model buffer size =  4403.49 MiB
0.00.633.651 I llama_context:  CUDA_Host  output buffer size =     0.49 MiB
0.00.633.651 I llama_kv_cache:      CUDA0 KV buffer size =   128.00 MiB
0.00.638.181 I sched_reserve:      CUDA0 compute buffer size =   258.50 MiB
0.00.638.181 I sched_reserve:  CUDA_Host compute buffer size =    10.01 MiB""".splitlines()
ON_CPU = """\
0.00.032.601 I load_tensors:   CPU_Mapped model buffer size =     0.66 MiB
0.00.032.636 I load_tensors:   CPU_REPACK model buffer size =     0.37 MiB
0.00.033.651 I llama_kv_cache:        CPU KV buffer size =     1.00 MiB
0.00.038.181 I sched_reserve:        CPU compute buffer size =     4.02 MiB""".splitlines()
IN_PART = [line.replace("33/33", "12/33") for line in ON_GPU] + ["I llama_kv_cache:  CPU KV buffer size =  80.00 MiB"]


def of(log: list[str], *devices: dict[str, str]) -> Proof:
    return proof.of_llama_cpp(export_placement.read(log, devices))


def test_a_log_with_all_layers_on_a_gpu_proves_it() -> None:
    found = of(ON_GPU, CUDA, CPU)
    assert (found.backend, found.layers_offloaded, found.layers) == ("gpu", 33, 33)
    assert found.weights_mib == {"CPU_Mapped": 281.81, "CUDA0": 4403.49} and found.cache_mib == {"CUDA0": 128.0}
    assert found.compute_mib == {"CUDA0": 258.5, "CUDA_Host": 10.01}
    assert found.devices == ["CUDA0 (NVIDIA GB10)", "CPU (AMD EPYC)"]
    assert found.lines[:2] == [
        "llama_model_load_from_file_impl: using device CUDA0 (NVIDIA GB10) - 110592 MiB free",
        "load_tensors: offloaded 33/33 layers to GPU",
    ]
    assert proof.judge("llama.cpp", found, "cuda", True) is None and proof.ran_on(found) == "CUDA0"
    placed = export_placement.read(ON_GPU, [CUDA, CPU])
    assert placed.gpu_mib() == pytest.approx(4403.49 + 128 + 258.5)  # memory of the host for a GPU's sake is no GPU's


def test_an_adapter_over_a_model_is_in_the_log_and_in_the_proof() -> None:
    log = [*ON_CPU, "0.1 I llama_adapter_lora_init_impl: CPU_Mapped LoRA buffer size =  0.10 MiB"]
    log.append("0.00.077.159 I llama_adapter_lora_init_impl: loaded 28 tensors from lora file")
    placed = export_placement.read(log, [CPU])
    assert placed.lora_tensors == 28 and placed.weights["CPU_Mapped"] == pytest.approx(0.76)
    assert placed.lines[-1] == "llama_adapter_lora_init_impl: loaded 28 tensors from lora file"
    assert export_placement.read(ON_CPU, [CPU]).lora_tensors == 0


def test_a_cpu_build_on_a_machine_with_a_gpu_is_row_55_and_names_its_fix() -> None:
    refused = proof.judge("llama.cpp", of(ON_CPU, CPU), "cuda", True)
    assert refused is not None and refused.row == 55
    assert refused.reason.startswith(
        "llama.cpp ran on the CPU though this machine has a GPU: log: says nothing of layers"
    )
    assert "its build has CPU (AMD EPYC)" in refused.reason and refused.reason.endswith("(row 55 of docs/failures.md)")
    assert "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=121" in refused.fix and "pip install xllamacpp" in refused.fix


def test_a_gpu_that_the_build_has_and_does_not_use_is_no_gpu() -> None:
    log = ["I load_tensors: offloaded 0/33 layers to GPU", *ON_CPU]
    refused = proof.judge("llama.cpp", of(log, CUDA, CPU), "cuda", True)
    assert refused is not None and "0 of 33 layers offloaded" in refused.reason


def test_a_model_partly_on_the_gpu_is_refused() -> None:
    found = of(IN_PART, CUDA, CPU)
    refused = proof.judge("llama.cpp", found, "cuda", True)
    assert found.backend == "mixed" and refused is not None
    assert "only in part: log: 12 of 33 layers offloaded" in refused.reason and "CPU 80.0 MiB" in refused.reason


@pytest.mark.parametrize("lost", ["33/33 layers", "CUDA0 model", "CUDA0 KV", "CUDA0 compute"])
def test_each_line_of_the_log_is_needed(lost: str) -> None:
    # without the KV line nothing says that the cache is elsewhere, but a cache in the host's memory is a line of its own
    log = [line.replace("CUDA0 KV", "CPU KV") if lost == "CUDA0 KV" else line for line in ON_GPU]
    log = [line for line in log if lost == "CUDA0 KV" or lost not in line]
    refused = proof.judge("llama.cpp", of(log, CUDA, CPU), "cuda", True)
    assert refused is not None and refused.row == 55


@pytest.mark.parametrize("expected", ["cuda", "cpu"])
@pytest.mark.parametrize("log", [[], ON_CPU[:-1], ON_CPU[2:], ["something else altogether"]])
def test_a_log_that_says_too_little_proves_nothing_on_any_machine(log: list[str], expected: str) -> None:
    refused = proof.judge("llama.cpp", of(log, CPU), expected, expected == "cuda")  # type: ignore[arg-type]
    assert refused is not None and refused.row == 55
    assert refused.reason.startswith("nothing that llama.cpp says proves where it ran: its log names no buffer of ")
    assert bool(refused.fix) == (expected == "cuda")


def test_the_cpu_is_right_where_it_was_asked_for_and_a_gpu_is_not() -> None:
    assert proof.judge("llama.cpp", of(ON_CPU, CPU), "cpu", False) is None
    assert proof.ran_on(of(ON_CPU, CPU)) == "cpu"
    refused = proof.judge("llama.cpp", of(ON_GPU, CUDA, CPU), "cpu", True)
    assert refused is not None and "ran on a GPU though the CPU was asked for" in refused.reason


def test_torch_proves_by_parameters_and_by_what_it_launched() -> None:
    names = ["aten::addmm", "aten::view", "ampere_bf16_s16816gemm_bf16"]
    found = proof.of_torch(
        {"cuda:0": 1 << 21}, 40, names, {"peft.tuners.lora.layer.Linear": 14}, ["NVIDIA GB10", "CPU"]
    )
    assert (found.backend, found.gpu_kernels, found.weights_mib) == ("gpu", 40, {"cuda:0": 2.0})
    assert found.kernels == [names[0], names[2]] and proof.ran_on(found) == "cuda:0"
    assert proof.judge("peft", found, "cuda", True) is None


@pytest.mark.parametrize(
    ("placed", "launched", "backend", "said"),
    [
        (
            {"cpu": 1 << 20},
            0,
            "cpu",
            "transformers ran on the CPU though this machine has a GPU: parameters on cpu 1.0 MiB",
        ),
        ({"cuda:0": 1 << 20, "cpu": 1 << 20}, 9, "mixed", "only in part: parameters on cuda:0 1.0 MiB, cpu 1.0 MiB"),
        ({"cuda:0": 1 << 20, "meta": 1 << 20}, 9, "mixed", "only in part"),
        ({"cuda:0": 1 << 20}, 0, "unproven", "lie on a GPU, and a forward launched no kernel there"),
        ({"cpu": 1 << 20}, 3, "mixed", "3 kernels on a GPU in one forward"),
        ({}, 0, "unproven", "no parameters"),
    ],
)
def test_torch_elsewhere_is_refused(placed: dict[str, int], launched: int, backend: str, said: str) -> None:
    found = proof.of_torch(placed, launched, [], {}, ["CPU"])
    refused = proof.judge("transformers", found, "cuda", True)
    assert found.backend == backend and refused is not None and said in refused.reason
    assert refused.row == 55 and "whl/cu130" in refused.fix
