"""Optimisers around the fused ops.

adamw.py    AdamW with 8-bit moments in two launches a step
trainer.py  the same under transformers' Trainer and TRL: `optim="adamw_8bit"`
"""

from sparktune.optim.adamw import AdamW8bit as AdamW8bit
from sparktune.optim.trainer import adamw8bit as adamw8bit
