"""Measuring: memory, time, canaries, statistics."""
