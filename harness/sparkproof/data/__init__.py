"""Real conversations as rows of tokens: where they come from, how they are masked, cut, ordered and batched."""
