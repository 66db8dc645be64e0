"""The image's locks: how they are made, and what must be true of every wheel that they name."""
