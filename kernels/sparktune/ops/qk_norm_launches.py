"""How `qk_norm_rope` is launched: tiles of heads, programs, and the launches for the compile gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from sparktune.ops.device import DeviceProperties
from sparktune.ops.launching import cdiv
from sparktune.ops.rope import Config as RopeConfig
from sparktune.ops.spec import TRITON_TYPES, Launch

Way = Literal["forward", "backward", "sums"]  # backward: the weights are frozen; sums: they are trained


@dataclass(frozen=True)
class Config:
    """How one pass is launched."""

    heads: RopeConfig
    whole: bool  # forward: all heads of a token in one program
    programs: int
    tokens_each: int

    # Elements of a tile, and warps. At 1024, 4096 and 16384 tokens (one H200), with a copy of the bytes at 8.1, 25.8 and 86.0 us:
    # forward of 32+8 heads of 128 7.3, 26.8 and 94.8; with 1 warp 7.6, 27.3 and 97.6; a loop over a token's tiles 7.9, 26.7
    # and 90.1. Of 8+4 of 256, copy 6.2, 16.1 and 54.7: a whole token 5.6, 17.5 and 58.0, groups 5.3, 17.4 and 60.9, the loop
    # 6.2, 19.7 and 68.0.
    WHOLE, GROUPS = (2048, 2), (1024, 2)
    SUMS = 1024, 4  # such a loop still: a program keeps the sums of dw in registers
    PROGRAMS_PER_SM = 8  # where every program leaves partial sums behind

    @classmethod
    def choose(
        cls, tokens: int, q_heads: int, k_heads: int, head_dim: int, rotary: int, p: DeviceProperties, way: Way
    ) -> Config:  # fmt: skip
        """Every tile a program, or every token; with sums over tokens, as few programs as keep the memory busy."""
        of = q_heads, k_heads, head_dim, rotary
        if way == "sums":
            heads = RopeConfig.choose(*of, *cls.SUMS)
            resident = p.sm_count * max(1, min(cls.PROGRAMS_PER_SM, p.threads_per_sm // (32 * heads.num_warps)))
            each = cdiv(tokens, min(tokens, resident))
            return cls(heads, False, cdiv(tokens, each), each)
        heads = RopeConfig.choose(*of, *cls.WHOLE)
        if way == "forward" and heads.q_tile >= q_heads and heads.k_tile >= k_heads:
            return cls(heads, True, tokens, 1)
        heads = RopeConfig.choose(*of, *cls.GROUPS)
        return cls(heads, False, tokens * heads.groups(q_heads, k_heads), 1)

    def constants(self, rotary: int, head_dim: int) -> dict[str, Any]:
        """The kernels' compile-time sizes."""
        h = self.heads
        return dict(
            HALF=rotary // 2, REST=head_dim - rotary, HALF_BLOCK=h.half_block, REST_BLOCK=h.rest_block,
            Q_TILE=h.q_tile, K_TILE=h.k_tile,
        )  # fmt: skip


def launches(p: DeviceProperties) -> list[Launch]:
    """Real heads in bf16 and Llama's order, partial ones, and Gemma's order and the other dtypes at heads of 128."""
    heads = [(32, 8, 64, 64), (32, 8, 80, 32), (32, 32, 96, 96), (32, 8, 128, 128), (8, 4, 256, 256)]
    heads.append((32, 4, 128, 128))  # q and k in tiles of different heights, as Qwen3-30B-A3B has it
    cases = [(h, torch.bfloat16, "llama") for h in heads]
    cases += [((32, 8, 128, 128), torch.float32, "gemma"), ((32, 8, 128, 128), torch.float16, "llama")]
    found = []
    for (h, kv, d, r), dtype, variant in cases:
        ptr = f"*{TRITON_TYPES[dtype]}"
        for way in get_args(Way):
            c = Config.choose(2**20, h, kv, d, r, p, way)
            args = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr", "wq_ptr", "wk_ptr"), ptr)
            args |= dict(cos_ptr="*fp32", sin_ptr="*fp32", position_ptr="*i64", eps="fp32")
            sizes = ["sequence", "length", "q_heads", "k_heads", "position_batch", "position_token"]
            named = ["q", "k", "q_out", "k_out"]
            flags = dict(POSITIONS=True, GEMMA=variant == "gemma") | c.constants(r, d)
            name = "forward_kernel" if way == "forward" else "backward_kernel"
            if way == "forward":
                flags["WHOLE"] = c.whole
            else:
                args |= dict(dq_ptr=ptr, dk_ptr=ptr, dw_ptr="*fp32")
                sizes += ["tokens", "tokens_each"]
                named += ["dq", "dk"]
                flags["NEED_DW"] = way == "sums"
            args |= dict.fromkeys(sizes + [f"{t}_{s}" for t in named for s in ("batch", "token", "head")], "i32")
            args |= dict.fromkeys(flags, "constexpr")
            when = f"{'backward, weights trained' if way == 'sums' else way}, {h}+{kv} heads of {d}, {r} rotary"
            found.append(Launch(when, name, args, flags, c.heads.num_warps, 3, TRITON_TYPES[dtype], variant))
    return found
