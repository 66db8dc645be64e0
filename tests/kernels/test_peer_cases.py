"""The cases that broke other libraries' kernels: each has a test here, found by its number.

    pytest tests -k case_14

The list is the project's own; what each case is, its tests say.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = {
    1: "int32 offsets past 2**31 elements, and huge strides",
    2: "output gradients with stride 0, and sliced ones",
    3: "a backward that writes into a gradient which a residual branch shares",
    4: "dX written over the saved X: a second backward is silently wrong",
    5: "all labels ignored",
    6: "NaN or Inf logits on ignored rows",
    7: "confident tokens: the target's gradient lost in rounding",
    8: "reduction none with weights a row",
    9: "weight gradients of chunks accumulated in bf16",
    10: "vocabularies over 65536, odd, padded",
    11: "soft-cap or logit scale left out; labels outside the vocabulary",
    12: "num_items_in_batch under gradient accumulation",
    13: "tied embeddings and LoRA on the head, bypassed by a fused loss",
    14: "cuDNN's attention backward with a mask at S % 128 == 64",
    15: "packing: attention across documents, first tokens as targets, positions not reset",
    16: "a sliding window off by one",
    17: "RoPE: one head, partial, every head size, scaled tables, both kinds of positions",
    18: "fp16 overflow: a finite loss and a NaN gradient",
    19: "buffers shared across streams, launches on a cached stream",
    20: "8-bit Adam with v == 0 and m != 0",
    21: "experts without tokens, all tokens to one, LoRA rows in another order",
    22: "out of shared memory on sm_12x",
    23: "no rows, one token, odd widths, NaN in padding rows, a recompute by another backend",
}


@functools.cache
def named_tests() -> dict[int, list[str]]:
    """Case -> the tests that bear its number."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (m := re.match(r"test_case_(\d\d)_", node.name)):
                asserts = any(
                    isinstance(n, ast.Assert)
                    or (isinstance(n, ast.Attribute) and n.attr in ("raises", "assert_close"))
                    or (isinstance(n, ast.Name) and n.id.startswith(("assert", "agree", "close", "check", "same")))
                    for n in ast.walk(node)
                )
                found.setdefault(int(m[1]), []).append(
                    f"{path.name}::{node.name}{'' if asserts else ' (asserts nothing)'}"
                )
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda n: f"{n:02}")
def test_every_case_has_a_test_that_asserts_something(case):
    tests = named_tests().get(case, [])
    assert tests, f"case {case} ({CASES[case]}) has no test named test_case_{case:02}_..."
    assert not [t for t in tests if t.endswith("(asserts nothing)")], tests


def test_no_test_bears_a_number_that_is_no_case():
    assert set(named_tests()) <= set(CASES)
