"""The machine, read once: `collect` fills `model.Facts`; nothing else in the harness touches the host for them."""
