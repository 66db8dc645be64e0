"""Which tokens of a batch may see each other, found once a forward instead of in every layer.

A batch [B, S] is one of:

- plain: each row one sequence, so attention is causal and nothing else (None);
- several documents: rows packed from several, or padded. Flattened to [1, B S], every run of tokens that belong together,
  padding included, is a document of its own: cu_seqlens int32 [N + 1]. No mask is made, and what is padding may contain
  anything, since nothing else sees it.

Packing is read from `position_ids` that start again, from lengths (`packed_seq_lengths`), or from cumulative ones
(`cu_seq_lens_q`, `max_length_q`, as transformers' flattening collator gives them); padding from a 2-D attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """cu_seqlens int32 [N + 1] over B S tokens, the longest document's length or more, and whether rows are packed."""

    cu_seqlens: Tensor
    longest: int
    packed: bool

    KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "packed_seq_lengths")

    @classmethod
    def of(
        cls, batch: int, length: int, device: torch.device, mask: Tensor | None, position_ids: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Documents | None:  # fmt: skip
        """From what a model's forward was given; takes the keys it reads out of `kwargs`.

        A 2-D mask (true or 1: a token) goes first, unless it hides nothing; then lengths; then positions. Asking a mask
        or positions for their values waits for the device, once. Errors: ValueError for lengths that don't add up.
        """
        given = {k: kwargs.pop(k) for k in cls.KWARGS if k in kwargs}
        if mask is not None and not bool(mask.all()):
            return cls._padded(mask)
        lengths, cu = given.get("packed_seq_lengths"), given.get("cu_seq_lens_q")
        if lengths is not None:
            return cls.from_lengths(lengths, batch * length, device)
        if cu is not None:
            longest = given.get("max_length_q")
            return cls(cu.to(device, torch.int32), length * batch if longest is None else int(longest), True)
        return None if position_ids is None else cls._restarting(batch, length, position_ids)

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int], tokens: int, device: torch.device) -> Documents:
        """From the documents' lengths; on the host they cost no wait."""
        on_host = torch.as_tensor(lengths).to("cpu", torch.int64).flatten()
        if (on_host < 0).any():
            raise ValueError(f"packed_seq_lengths must not be negative, got {int(on_host.min())}")
        if int(on_host.sum()) != tokens:
            raise ValueError(f"packed_seq_lengths add up to {int(on_host.sum())}, but the batch has {tokens} tokens")
        cu = torch.nn.functional.pad(on_host.cumsum(0), (1, 0)).to(torch.int32)
        return cls(cu.to(device, non_blocking=True), int(on_host.max()), True)

    @classmethod
    def _padded(cls, mask: Tensor) -> Documents:
        """Three documents a row: padding on the left, the tokens, padding on the right; some empty."""
        batch, length = mask.shape
        m = mask.bool()
        columns = torch.arange(length, device=m.device)
        first = torch.where(m, columns, length).amin(1)
        last = torch.where(m, columns + 1, 0).amax(1)
        first = torch.minimum(first, last)
        if bool((m.sum(1) == last - first).all()):
            rows = torch.arange(batch, device=m.device) * length
            edges = torch.stack((rows, rows + first, rows + last), 1).flatten()
            end = torch.full((1,), batch * length, device=m.device)
            return cls(torch.cat((edges, end)).to(torch.int32), length, False)
        raise ValueError("attention_mask has gaps between the tokens of a row; give a 4-D mask, or pack the documents")

    @classmethod
    def _restarting(cls, batch: int, length: int, position_ids: Tensor) -> Documents | None:
        at = position_ids.expand(batch, length)
        start = torch.ones_like(at, dtype=torch.bool)
        start[:, 1:] = at[:, 1:] != at[:, :-1] + 1
        begins = start.flatten().nonzero().flatten()
        if begins.numel() == batch:
            return None
        end = torch.full((1,), batch * length, device=begins.device)
        cu = torch.cat((begins, end)).to(torch.int32)
        return cls(cu, int((cu[1:] - cu[:-1]).max()), True)

    def positions(self, batch: int, length: int) -> Tensor:
        """Each token's place in its document, int64 [B, S]."""
        token = torch.arange(batch * length, device=self.cu_seqlens.device)
        document = torch.searchsorted(self.cu_seqlens, token, right=True) - 1
        return (token - self.cu_seqlens[document]).view(batch, length)

    def without_first(self, labels: Tensor) -> Tensor:
        """A copy of labels [B, S] with -100 at the first token of every document: nothing before it may predict it."""
        flat = torch.nn.functional.pad(labels.flatten(), (0, 1))  # an empty document at the end begins past the rest
        return flat.index_fill_(0, self.cu_seqlens[:-1].long(), -100)[:-1].view(labels.shape)
