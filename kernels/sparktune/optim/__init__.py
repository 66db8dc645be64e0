"""Optimisers around the fused ops."""

from sparktune.optim.adamw import AdamW8bit as AdamW8bit
