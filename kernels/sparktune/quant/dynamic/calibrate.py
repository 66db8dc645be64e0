"""What passes through each weight on calibration text: its inputs, and the gradients of sampled predictions at its outputs.

Let KL(W + D) be the divergence of the model's predictions when the weight W [out, in] becomes W + D. To second order it is
half the variance of the score, and the Fisher information needs only labels drawn from the model itself:

    KL a token  ~  1 / (2 T)  sum over sequences s of  <G_s, D>^2,     G_s = sum over tokens t of s of  g_t x_t^T

x_t [in] is the layer's input, g_t [out] the gradient at its output of the summed log-likelihood of one drawn label a position,
T the number of tokens. The sum over a sequence comes before the square: an error in an early token's layer is felt by later ones.
One forward and backward therefore tells every D of every weight, where measuring takes a forward for each. The relative
standard error is about sqrt(2 / sequences / draws): enough to rank layers, whose sensitivities lie orders of magnitude apart.

Fisher information as quantisation's metric: LeCun et al., "Optimal Brain Damage", 1989; Li et al., "BRECQ", 2021. That drawn and
not given labels make it so: Kunstner et al., "Limitations of the empirical Fisher", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

_ROWS_BYTES = 256 << 20  # of the gradients G_s that are held at a time
BATCH_TOKENS = 512  # of one forward


@dataclass
class Traffic:
    """What passed through one use of a weight: for each sequence its inputs [T, in], or token ids [T], and for each draw and
    sequence the gradients [T, out]."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass
class Weight:
    """One stored matrix [out, in] and every module that reads it: a tied embedding has two."""

    name: str  # module and parameter, as in the checkpoint
    parameter: nn.Parameter
    modules: list[nn.Module]
    uses: list[Traffic] = field(default_factory=list)


@dataclass
class Samples:
    """The weights of a model with what passed through each."""

    weights: list[Weight]
    sequences: int
    tokens: int
    draws: int


def weights_of(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> list[Weight]:
    """The matrices of linear layers and embeddings that `wanted(name, module)` takes, tied ones once.

    Errors: ValueError where experts are held as stacks, which no linear layer reads.
    """
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3]
    if stacks:
        raise ValueError(f"{stacks[0]} is a stack of experts, which can't be measured yet: give a dense model.")
    found: dict[int, Weight] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and wanted(name, module):
            parameter = cast(nn.Parameter, module.weight)
            if not parameter.is_floating_point():
                raise ValueError(f"{name} is quantised already: give the 16-bit model.")
            entry = found.setdefault(id(parameter), Weight(f"{name}.weight", parameter, []))
            entry.modules.append(module)
    return list(found.values())


def collect(
    model: Any, weights: list[Weight], sequences: Tensor, draws: int = 1, seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Samples:  # fmt: skip
    """Run `sequences` [S, T] of token ids through the model and keep what passed through `weights`, in bf16, on their device.

    Memory: 2 bytes x tokens x (inputs + draws x outputs) of every layer. `draws` labels a position are drawn from a generator
    of its own, seeded with `seed`. The model is left as it was.
    """
    hooks = []
    state: dict[str, int] = {}
    training, needing = model.training, [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.uses = [Traffic() for _ in weight.modules]
        for module, traffic in zip(weight.modules, weight.uses, strict=True):
            hooks.append(module.register_forward_hook(_watch(traffic, state)))
    model.eval()
    for p in needing:
        p.requires_grad_(False)
    embedding = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True)))
    device = embedding.weight.device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    try:
        done = 0
        for ids in batches(sequences):
            with torch.enable_grad():
                logits = model(input_ids=ids.to(device), use_cache=False).logits.float()
            logp = logits.log_softmax(-1)
            chances = logp.detach().exp().cpu().flatten(0, 1)
            for draw in range(draws):
                state["draw"] = draw
                labels = torch.multinomial(chances, 1, generator=generator).view(*ids.shape, 1).to(device)
                logp.gather(-1, labels).sum().backward(retain_graph=draw + 1 < draws)
            done += len(ids)
            progress(f"calibration text: {done} of {len(sequences)} sequences")
    finally:
        for hook in hooks:
            hook.remove()
        for p in needing:
            p.requires_grad_(True)
        model.train(training)
    for weight in weights:
        for traffic in weight.uses:
            if {len(traffic.inputs), *map(len, traffic.gradients.values())} != {len(sequences)}:
                raise ValueError(
                    f"{weight.name} was not read once a sequence ({len(traffic.inputs)} times in {len(sequences)}), so its "
                    "gradients can't be told apart: this model can't be measured."
                )
    return Samples(weights, len(sequences), sequences.numel(), draws)


def batches(sequences: Tensor) -> tuple[Tensor, ...]:
    """Sequences [S, T] in groups of about 512 tokens, at least one each."""
    return sequences.split(max(1, BATCH_TOKENS // sequences.shape[1]))


def _watch(traffic: Traffic, state: dict[str, int]) -> Callable[..., None]:
    def forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        traffic.inputs.extend((x.to(torch.bfloat16) if x.is_floating_point() else x).unbind(0))
        if not output.requires_grad:
            output.requires_grad_(True)
        output.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        traffic.gradients.setdefault(state["draw"], []).extend(gradient.detach().to(torch.bfloat16).unbind(0))

    return forward


def second_moment(weight: Weight) -> Tensor | None:
    """Mean square of each input column, [in] fp32, over the linear uses: llama.cpp's importance. None for an embedding alone."""
    total, count = None, 0
    for traffic in weight.uses:
        for x in traffic.inputs:
            if x.dim() == 2:
                square = x.float().square().sum(0)
                total = square if total is None else total + square
                count += len(x)
    return None if total is None else total / count


def output_error(weight: Weight, delta: Tensor, tokens: int = 256) -> float:
    """|D x|^2 / |W x|^2 over the first `tokens` inputs of a linear layer; of an embedding |D|^2 / |W|^2 of the rows read."""
    for traffic in weight.uses:
        if traffic.inputs[0].dim() == 2:
            x = torch.cat(traffic.inputs[: 1 + tokens // len(traffic.inputs[0])])[:tokens].float()
            wrong, right = x @ delta.T, x @ weight.parameter.detach().float().T
            return float(wrong.square().sum() / right.square().sum())
    ids = torch.cat(weight.uses[0].inputs)
    return float(delta[ids].square().sum() / weight.parameter.detach()[ids].float().square().sum())


def sensitivity(weight: Weight, deltas: list[Tensor], samples: Samples) -> list[float]:
    """Predicted KL a token, in nats, of each of `deltas` [out, in] fp32 on its own."""
    count = samples.sequences * samples.draws
    products = torch.zeros(count, len(deltas), dtype=torch.float64)
    for start, gradients in _gradients(weight, samples):  # [sequences x draws, rows, in]
        rows = gradients.shape[1]
        stack = torch.stack([d[start : start + rows].flatten() for d in deltas], 1)
        products += (gradients.flatten(1) @ stack).double().cpu()
    return [float(v) for v in products.square().sum(0) / (2 * samples.tokens * samples.draws)]


def _gradients(weight: Weight, samples: Samples) -> Iterator[tuple[int, Tensor]]:
    """G_s [sequences x draws, some rows, in] fp32 with the first row's index, rows in turn."""
    outs, ins = weight.parameter.shape
    count = samples.sequences * samples.draws
    step = max(1, _ROWS_BYTES // (4 * count * ins))
    device = weight.parameter.device
    for start in range(0, outs, step):
        rows = min(step, outs - start)
        total = torch.zeros(count, rows, ins, device=device)
        for traffic in weight.uses:
            for i in range(count):
                draw, sequence = divmod(i, samples.sequences)
                x, g = traffic.inputs[sequence], traffic.gradients[draw][sequence]
                if x.dim() == 2:
                    total[i].addmm_(g[:, start : start + rows].float().T, x.float())
                else:
                    inside = (x >= start) & (x < start + rows)
                    if inside.any():
                        total[i].index_add_(0, x[inside] - start, g[inside].float())
        yield start, total
