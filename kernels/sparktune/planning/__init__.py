"""What a training step will take, before it runs: `plan(model, device)` predicts peak memory and time.

shapes.py     a model's widths, out of its configuration
ceilings.py   what a device can do, measured or as its maker says
predict.py    bytes and milliseconds of one step, part by part
"""

from sparktune.planning.ceilings import GB10, H100, Ceilings
from sparktune.planning.predict import Plan, plan
from sparktune.planning.shapes import ModelShape

__all__ = ["GB10", "H100", "Ceilings", "ModelShape", "Plan", "plan"]
