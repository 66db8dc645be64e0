"""Exports side by side: what each format costs to write, and how fast its consumer then reads it, on which backend."""
