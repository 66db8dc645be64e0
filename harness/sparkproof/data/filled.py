"""Rows without padding: conversations one after another, until a row has all its tokens.

Every token of such a batch is a real one, so that tokens a second mean what they say. A row is read as one text: each
conversation sees those before it. Random tokens stand in where a model of random weights has no tokenizer to speak of.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from sparkproof.data.conversations import Conversation
from sparkproof.data.rows import IGNORE, Batch, make_row
from sparkproof.errors import UserError


def filled(
    tokenizer: Any, conversations: Sequence[Conversation], *, count: int, batch: int, seq_len: int, seed: int
) -> list[Batch]:
    """`count` batches of `batch` rows of exactly `seq_len` tokens; only what the assistant says is learnt.

    Errors: UserError where no conversation has an answer to learn.
    """
    source = _tokens(tokenizer, conversations, seq_len, seed)
    return [_batch([_take(source, seq_len) for _ in range(batch)]) for _ in range(count)]


def random_tokens(vocabulary: int, *, count: int, batch: int, seq_len: int, seed: int) -> list[Batch]:
    """The same shapes out of random tokens; the first sixteenth of a row is a prompt without labels."""
    draw = random.Random(seed)
    prompt = max(1, seq_len // 16)

    def row() -> list[tuple[int, int]]:
        ids = [draw.randrange(3, vocabulary) for _ in range(seq_len)]
        return [(t, IGNORE if i < prompt else t) for i, t in enumerate(ids)]

    return [_batch([row() for _ in range(batch)]) for _ in range(count)]


def _tokens(
    tokenizer: Any, conversations: Sequence[Conversation], seq_len: int, seed: int
) -> Iterator[tuple[int, int]]:
    """(token, label) of conversation after conversation, in another order each time they have all been read."""
    epoch = 0
    while True:
        order = list(conversations)
        random.Random(seed + epoch).shuffle(order)
        learnt = 0
        for conversation in order:
            row = make_row(tokenizer, conversation, seq_len)
            if row.learnt:
                learnt += row.learnt
                yield from zip(row.ids, row.labels, strict=True)
        if not learnt:
            raise UserError(f"No conversation has an answer within {seq_len} tokens.", "Raise seq_len.")
        epoch += 1


def _take(source: Iterator[tuple[int, int]], n: int) -> list[tuple[int, int]]:
    return [next(source) for _ in range(n)]


def _batch(rows: list[list[tuple[int, int]]]) -> Batch:
    return Batch(
        [[t for t, _ in row] for row in rows],
        [[1] * len(row) for row in rows],
        [[label for _, label in row] for row in rows],
    )
