"""Starting a kernel again: the kernel that the first call compiled, for exactly the calls that it was compiled for."""

import pytest
import torch
from sparktune.ops import launching


class Kernel:
    """What `triton.jit` makes, as far as starting one goes."""

    arg_names = ("x_ptr", "n", "scale", "BLOCK", "FLAG")

    def __init__(self):
        self.looked_up, self.again = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.looked_up.append((grid, args, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.again.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching, "_kept", {})
    return Kernel()


BUFFER = torch.zeros(64)
OPTIONS = {"BLOCK": 128, "FLAG": True, "num_warps": 4}


def start(kernel, x=BUFFER, n=32, scale=0.5, grid=(3,), device=0, **options):
    launching.start(kernel, grid, device, (x, n, scale), OPTIONS | options)


def test_the_same_call_again_goes_to_the_compiled_kernel_with_its_constants_in_place(kernel):
    start(kernel)
    other = torch.ones(64)
    start(kernel, other, scale=0.25, grid=(7, 2))
    assert kernel.looked_up == [((3,), (BUFFER, 32, 0.5), OPTIONS)]
    [(grid, args)] = kernel.again
    assert grid == (7, 2, 1)
    assert args[0] is other
    assert args[1:] == (32, 0.25, 128, True)


@pytest.mark.parametrize(
    "change",
    [
        {"x": BUFFER.half()}, {"x": BUFFER[1:]}, {"x": BUFFER.to(torch.bfloat16)[3:]}, {"n": 1}, {"n": 33}, {"n": 2**40},
        {"n": True}, {"n": 32.0}, {"scale": 1}, {"device": 1}, {"BLOCK": 64}, {"FLAG": False}, {"FLAG": 1}, {"num_warps": 8},
        {"num_stages": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_compiles_to_another_kernel_is_looked_up(kernel, change):
    start(kernel)
    start(kernel, **change)
    assert len(kernel.looked_up) == 2
    assert not kernel.again


def test_another_kernel_is_another_though_the_first_is_gone(kernel):
    start(kernel)
    second = Kernel()
    start(second)
    assert len(kernel.looked_up) == len(second.looked_up) == 1
    assert not kernel.again + second.again


def test_arguments_that_triton_has_to_place_are_left_to_it(kernel):
    for _ in range(2):
        launching.start(kernel, (1,), 0, (BUFFER,), {"scale": 0.5, "n": 4, "BLOCK": 1, "num_warps": 4})
    assert len(kernel.looked_up) == 2


def test_it_forgets_before_it_grows_without_end(kernel, monkeypatch):
    monkeypatch.setattr(launching, "MOST", 3)
    for n in (2, 3, 4, 5, 6):
        start(kernel, n=n)
        assert len(launching._kept) <= 3
    start(kernel, n=6)
    assert len(kernel.again) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="addresses mean something to a compiled kernel only")
def test_misaligned_and_strided_views_are_right_after_an_aligned_one():
    """What a wrong key would break: code that loads 16 bytes at once, or leaves out a stride of 1."""
    from sparktune.ops import rms_norm

    weight = torch.randn(64, device="cuda")
    wide = torch.randn(9, 67, device="cuda")
    for x in (
        wide[:8, :64].contiguous(),
        wide[:8, :64],
        wide[1:, 1:65],
        wide[:8, 3:],
        wide[:, 1:65],
        wide[:8, :64].clone(),
    ):
        y = rms_norm.rms_norm(x, weight, 1e-6)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,), weight, 1e-6))
