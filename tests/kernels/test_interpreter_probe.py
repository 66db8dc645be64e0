"""The probe that keeps a broken interpreter from being taken for a broken kernel."""

import pytest
import torch

pytestmark = pytest.mark.kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is switched on where there is no GPU")
def test_a_working_interpreter_is_believed_and_a_failing_one_is_named(monkeypatch):
    from sparkproof.judge import interpreter

    assert interpreter.unable() == ""

    class Broken:
        def __getitem__(self, grid):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(interpreter, "_sum_below", Broken())
    assert "can't run a loop under numpy" in interpreter.unable()

    class Wrong:
        def __getitem__(self, grid):
            return lambda out, n: out.fill_(3)

    monkeypatch.setattr(interpreter, "_sum_below", Wrong())
    assert "computes a loop wrongly" in interpreter.unable()
