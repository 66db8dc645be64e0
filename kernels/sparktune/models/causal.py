"""The model around its layers: documents found once a forward, and a loss that never makes the logits whole.

`Backbone` goes over the family's model (LlamaModel ...), `CausalLM` over its head (LlamaForCausalLM ...). Training with
labels gives the loss and no logits, since a chunk of rows is all of them that ever exists; evaluation, and anything else
without gradients, gives both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparktune.models import checkpointing
from sparktune.models.attention import without_masks
from sparktune.models.documents import Documents
from sparktune.models.graphs import GRAPHS, Batch, rounded
from sparktune.models.projection import Unfit, active_lora, note_fallback, unhooked
from sparktune.models.valid_rows import ValidRows
from sparktune.ops.linear_cross_entropy import linear_cross_entropy, shift_labels


class Backbone:
    """The decoder without its head. With no cache, attention goes by documents and no mask is made."""

    def forward(
        self: Any, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As transformers' own; besides, `documents` or what `Documents.KWARGS` names. Training makes no cache."""
        given = input_ids if input_ids is not None else inputs_embeds
        if use_cache is None and self.training:
            use_cache = False
        arguments = {
            "input_ids": input_ids, "position_ids": position_ids, "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs,
        }  # fmt: skip
        prepared = attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2)
        if past_key_values is not None or use_cache is not False or prepared or given is None:
            return super().forward(attention_mask=attention_mask, **arguments)  # type: ignore[misc]
        batch, length = given.shape[:2]
        if "documents" not in kwargs:
            arguments["documents"] = Documents.of(batch, length, given.device, attention_mask, position_ids, arguments)
        documents = arguments["documents"]
        if position_ids is None and documents is not None and documents.packed:
            arguments["position_ids"] = documents.positions(batch, length)
        # A mask of ones keeps transformers from looking for packed documents itself, which would wait for the device.
        ones = torch.ones((batch, length), dtype=torch.bool, device=given.device)
        checkpointing.assign(self, batch, length)
        with without_masks():
            return super().forward(attention_mask=ones, **arguments)  # type: ignore[misc]


class CausalLM:
    """The decoder with its head; the loss comes from hidden states and the head's weight."""

    def forward(
        self: Any, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As transformers' own. With labels in training `logits` is None; `num_items_in_batch` divides the sum."""
        shifted = kwargs.pop("shift_labels", None)
        everything = dict(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        why = self._not_fused(labels, shifted, kwargs)
        if why is not None:
            if why:
                note_fallback("the loss", why)
            extra = {} if shifted is None else {"shift_labels": shifted}
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **everything, **extra)  # type: ignore[misc]
        from transformers.modeling_outputs import CausalLMOutputWithPast

        count = everything.pop("num_items_in_batch", None)
        if past_key_values is None and use_cache is None:
            everything["use_cache"] = False
        given = input_ids if input_ids is not None else inputs_embeds
        documents = kwargs.get("documents")
        if everything["use_cache"] is False and "documents" not in kwargs and _two_dimensional(attention_mask):
            assert given is not None
            documents = Documents.of(
                given.shape[0], given.shape[1], given.device, attention_mask, position_ids, everything
            )
            everything["documents"] = documents
        counted = None
        graphs = self.__dict__.get(GRAPHS)
        if graphs is not None and self.training and torch.is_grad_enabled() and _plain(everything):
            own = labels if shifted is None else shifted
            assert input_ids is not None and own is not None
            tokens = rounded(documents, own.numel())
            batch = Batch(input_ids, own, shifted is not None, position_ids, tokens, count)
            replayed = graphs.loss(self, batch)
            counted = batch.valid
            if replayed is not None:
                return CausalLMOutputWithPast(loss=replayed)
        targets = self._targets(labels, shifted, documents)
        coming = ValidRows(targets) if counted is None else None
        outputs = self._decoder(**everything)
        hidden = outputs.last_hidden_state
        loss = self._loss(hidden, targets, counted if coming is None else coming.read(), count)
        logits = None if self.training and torch.is_grad_enabled() else self._logits(hidden, logits_to_keep)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip

    def graphed_loss(
        self: Any, ids: Tensor, positions: Tensor | None, documents: Documents | None, targets: Tensor,
        items: Tensor | None, valid: int | None,
    ) -> Tensor:  # fmt: skip
        """What `models.graphs` records: the loss of ids and their targets [B, S]; `valid` of them count, None: any number."""
        found = self._decoder(input_ids=ids, position_ids=positions, documents=documents, use_cache=False)
        loss: Tensor = self._loss(found.last_hidden_state, targets, valid, items)
        return loss

    def _not_fused(self: Any, labels: Tensor | None, shift_labels: Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """Why the family's own forward runs: "" without labels, a reason, or None when it does not."""
        if labels is None and shift_labels is None:
            return ""
        if kwargs.get("return_dict") is False:
            return "a tuple was asked for"
        if kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False)):
            return "the router's loss was asked for"
        try:
            head(self.lm_head)
        except Unfit as unfit:
            return str(unfit)
        return None

    @property
    def _decoder(self: Any) -> Any:
        return self.model

    def _targets(self: Any, labels: Tensor | None, shifted: Tensor | None, documents: Documents | None) -> Tensor:
        """Each position's next token [B, S]."""
        if shifted is not None:
            return shifted
        assert labels is not None
        if documents is not None and documents.packed:
            labels = documents.without_first(labels.to(documents.cu_seqlens.device))
        return shift_labels(labels)

    def _loss(
        self: Any, hidden: Tensor, targets: Tensor, valid: int | None, count: Tensor | float | None
    ) -> Tensor:  # fmt: skip
        targets = targets.to(hidden.device)
        weight, bias, a, b, scale = head(self.lm_head)
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)
        loss, _ = linear_cross_entropy(
            hidden, weight, targets, bias=bias, num_items_in_batch=count, softcap=self._softcap, logit_scale=self._scale,
            lora_a=a, lora_b=b, lora_scale=scale, valid_rows=valid,
        )  # fmt: skip
        return loss

    def _logits(self: Any, hidden: Tensor, keep: int | Tensor) -> Tensor:
        rows = slice(-keep, None) if isinstance(keep, int) else keep
        logits: Tensor = self.lm_head(hidden[:, rows, :]) * self._scale
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    @property
    def _softcap(self: Any) -> float:
        return float(getattr(self.config, "final_logit_softcapping", None) or 0.0)

    @property
    def _scale(self: Any) -> float:
        return float(getattr(self.config, "logit_scale", None) or 1.0)


def _plain(everything: dict[str, Any]) -> bool:
    """Whether a decoder is asked for nothing that a CUDA graph of its loss leaves out."""
    if everything["input_ids"] is None or everything["use_cache"] is not False or torch.compiler.is_compiling():
        return False
    known = {"input_ids", "position_ids", "documents", "attention_mask", "use_cache", "return_dict"}
    return "documents" in everything and all(v is None or v is False for k, v in everything.items() if k not in known)


def _two_dimensional(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


def head(module: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """(weight [V, K], bias, LoRA's A and B, scale) of a language model's head. Errors: Unfit with the reason."""
    saved = getattr(module, "modules_to_save", None)
    if saved is not None:  # PEFT's copy that is trained whole
        unhooked(module)
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in saved]
        module = saved[active[0]] if active else module.original_module
    unhooked(module)
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise Unfit(f"its head is a {type(base).__name__} of {getattr(weight, 'dtype', 'no weight')}")
    lora = None if base is module else active_lora(module)
    if lora is None:
        return weight, base.bias, None, None, 1.0
    a, b, scale, dropout = lora
    if dropout:
        raise Unfit("its head has LoRA with dropout")
    return weight, base.bias, a, b, scale
