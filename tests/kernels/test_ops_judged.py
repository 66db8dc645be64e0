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


@pytest.mark.parametrize("op", op_names())
@pytest.mark.parametrize(
    "dtype", ["bf16", pytest.param("fp32", marks=SLOW_HERE), pytest.param("fp16", marks=SLOW_HERE)]
)
def test_op_is_right(op, dtype):
    from sparkproof.judge.correctness import judge
    from sparktune.ops import load_op

    j = judge(load_op(op), dtypes=[DTYPES[dtype]])
    assert not j.failures, "\n".join(c.sentence() for c in j.failures[:20])
    kinds = {c.what for c in j.checks}
    assert {"error", "NaN and Inf", "rounding order", "inputs unchanged", "the kernel ran", "law"} <= kinds
    assert len(j.checks) > 100
    if torch.cuda.is_available():
        assert not [n for n in j.not_run if "needs a GPU" in n]
