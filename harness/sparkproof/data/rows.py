"""From conversations to batches: chat template, prompt masking, cutting, order, canary, padding.

Every engine gets the same batches, because they are made here from the tokenizer, the seed and the scenario alone.
Only what the assistant says is learnt: every other label is -100, the value cross entropy ignores.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparkproof.data.conversations import Conversation
from sparkproof.errors import UserError

IGNORE = -100
CANARY_EVERY = 3  # one row in three carries the canary: seen 16 times in 24 steps of 2 rows
HELD_OUT = 8


@dataclass(frozen=True)
class Row:
    """One conversation as tokens; `labels[i]` is `ids[i]` where the assistant speaks, else -100 (not shifted)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learnt(self) -> int:
        """Tokens with a label that survive the shift by one."""
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def prompt(self) -> list[int]:
        """What comes before the first token with a label."""
        return list(self.ids[: next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.ids))])


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest: three lists of equal shape [rows, tokens]."""

    input_ids: list[list[int]]
    attention_mask: list[list[int]]
    labels: list[list[int]]

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(map(sum, self.attention_mask))

    @property
    def learnt(self) -> int:
        """Labels that survive the shift by one."""
        return sum(label != IGNORE for row in self.labels for label in row[1:])

    @property
    def misplaced(self) -> int:
        """Labels that are neither -100 nor the token at their own place."""
        pairs = (
            p for ids, labels in zip(self.input_ids, self.labels, strict=True) for p in zip(ids, labels, strict=True)
        )
        return sum(label not in (IGNORE, token) for token, label in pairs)


@dataclass(frozen=True)
class TrainingData:
    """Everything a run feeds to an engine."""

    batches: list[Batch]  # one an optimiser step
    held_out: Batch  # conversations that training never sees
    canary_rows: int
    conversations: int
    dropped: int  # conversations whose answer lies beyond seq_len

    def digest(self) -> str:
        """sha256 of every token and label in order: two runs with one digest were fed the same."""
        everything = [[b.input_ids, b.labels] for b in [*self.batches, self.held_out]]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def make_row(tokenizer: Any, conversation: Conversation, seq_len: int) -> Row:
    """Render with the chat template and mask all but the assistant's turns; at most `seq_len` tokens.

    The assistant's span of turn i is what the template adds between "all before i, and the prompt to answer" and "all
    up to i". A template may open the answer's prompt with more than it keeps in a finished turn (DeepSeek-R1's <think>): the
    span then begins where the two part. One that rewrites earlier text when a turn is added has no such span and is refused.
    """
    ids: list[int] = []
    labels: list[int] = []
    for end, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, conversation[:end], prompt=True)
        after = _render(tokenizer, conversation[: end + 1], prompt=False)
        earlier = _render(tokenizer, conversation[:end], prompt=False)
        before = before[: _common(before, after)]
        if before[: len(ids)] != ids or len(before) < len(earlier):
            raise UserError(
                "The chat template changes earlier turns when one is added, so answers can't be told apart.",
                "Use conversations of one exchange, or a template that only appends.",
            )
        labels += [IGNORE] * (len(before) - len(ids)) + after[len(before) :]
        ids = after
    return Row(tuple(ids[:seq_len]), tuple(labels[:seq_len]))


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _render(tokenizer: Any, messages: Conversation, prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def training_data(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    canary: Conversation,
    steps: int,
    batch: int,
    seq_len: int,
    seed: int,
) -> TrainingData:
    """The batches of a run: conversations in an order that depends on `seed` alone, every third row the canary.

    Eight conversations are held out. When the conversations run out they come again in another order.
    """
    canary_row = make_row(tokenizer, canary, seq_len + 1)
    if len(canary_row.ids) > seq_len:
        raise UserError(f"The canary conversation is longer than seq_len, {seq_len} tokens.", "Raise seq_len.")
    order = list(conversations)
    random.Random(seed).shuffle(order)
    wanted = steps * batch
    # Ordered first and rendered only as far as needed: the template is slow on thousands of conversations.
    rows: list[Row] = []
    dropped = used = 0
    for conversation in order:
        if len(rows) >= wanted + HELD_OUT:
            break
        used += 1
        row = make_row(tokenizer, conversation, seq_len)
        if row.learnt:
            rows.append(row)
        else:
            dropped += 1
    if len(rows) < 2:
        raise UserError(
            f"Only {len(rows)} of {used} conversations have an answer within {seq_len} tokens.",
            "Raise seq_len, or give more or shorter conversations.",
        )
    kept = min(HELD_OUT, len(rows) // 2)
    held_out, pool = rows[:kept], rows[kept:]
    feed: list[Row] = []
    epoch: list[Row] = []
    rounds = canaries = 0
    for index in range(wanted):
        if index % CANARY_EVERY == CANARY_EVERY - 1:
            feed.append(canary_row)
            canaries += 1
            continue
        if not epoch:
            epoch = list(pool)
            if rounds:
                random.Random(seed + rounds).shuffle(epoch)
            rounds += 1
        feed.append(epoch.pop(0))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = [collate(feed[i : i + batch], pad) for i in range(0, wanted, batch)]
    return TrainingData(batches, collate(held_out, pad), canaries, len(conversations), dropped)


def collate(rows: Sequence[Row], pad: int) -> Batch:
    """Pad on the right; padding has attention 0 and label -100."""
    longest = max(len(row.ids) for row in rows)
    fill = [longest - len(row.ids) for row in rows]
    return Batch(
        [[*row.ids, *[pad] * n] for row, n in zip(rows, fill, strict=True)],
        [[1] * len(row.ids) + [0] * n for row, n in zip(rows, fill, strict=True)],
        [[*row.labels, *[IGNORE] * n] for row, n in zip(rows, fill, strict=True)],
    )
