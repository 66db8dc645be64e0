"""Every op before the same judge as `sparkproof validate`, on the GPU or in the interpreter."""

import pytest
import torch
from sparktune.ops import op_names
from sparktune.ops.spec import DTYPES

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),  # planted NaN and Inf
]
SLOW_HERE = () if torch.cuda.is_available() else (pytest.mark.slow,)
# The others take twenty seconds and more each in the interpreter; their own tests and peers' cases run all the same.
SHORT = {"rms_norm", "quantize_4bit", "quantize_scales", "grad_norm"}
OPS = [pytest.param(op, marks=() if op in SHORT else SLOW_HERE) for op in op_names()]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype", ["bf16", pytest.param("fp32", marks=SLOW_HERE), pytest.param("fp16", marks=SLOW_HERE)]
)
def test_op_is_right(op, dtype):
    from sparkproof.judge.correctness import judge
    from sparktune.ops import load_op

    spec = load_op(op)
    j = judge(spec, dtypes=[DTYPES[dtype]])
    assert not j.failures, "\n".join(c.sentence() for c in j.failures[:20])
    kinds = {c.what for c in j.checks}
    wanted = {"NaN and Inf", "inputs unchanged", "the kernel ran", "same bits twice", "outputs are new memory"}
    wanted |= {"rounding order"} if spec.exact else {"error"}
    wanted |= {"law"} if spec.laws else set()
    wanted |= {"gradients are new memory", "second derivative refused by name"} if spec.has_backward else set()
    assert wanted <= kinds, wanted - kinds
    assert len(j.checks) > 100
    if torch.cuda.is_available():
        assert not [n for n in j.not_run if "needs a GPU" in n]
