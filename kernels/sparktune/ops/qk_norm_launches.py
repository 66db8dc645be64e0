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
    q_tiles: int  # a program's, on their way at once
    k_tiles: int
    shared: bool  # forward: one row of tables and weights for all heads of a tile
    q_heads: int
    k_heads: int
    rest: int  # elements of a head that do not turn
    half: int  # of those that do, half
    programs: int  # with sums; else a token has `groups`
    tokens_each: int

    # Elements of a tile, and warps. On one H200, in shares of a copy's speed at 1024, 4096 and 16384 tokens, backward of 32+8
    # heads of 128 had 86, 89 and 96% with tiles of 1024 and 97, 99 and 101% with these; of 8+4 of 256, 79, 85 and 92% and 94,
    # 95 and 96%. Forward of the former had 89, 93 and 96% as NARROW and 86, 92 and 95% as WIDE, of the latter 81% at 1024
    # tokens as NARROW and 87, 88 and 90% as WIDE.
    BACKWARD = 512, 2
    NARROW, WIDE = (
        (1024, 2, 1, True),
        (512, 2, 2, False),
    )  # forward, of heads up to 128 and over: and tiles a program, shared
    SUMS = 1024, 4  # a program keeps the sums of dw in registers
    PROGRAMS_PER_SM = 8  # where every program leaves partial sums behind

    @classmethod
    def choose(
        cls, tokens: int, q_heads: int, k_heads: int, head_dim: int, rotary: int, p: DeviceProperties, way: Way
    ) -> Config:  # fmt: skip
        """A few tiles a program, or many tokens: with sums over them, as few programs as keep the memory busy."""
        forward = cls.NARROW if head_dim <= 128 else cls.WIDE
        elements, warps = {"forward": forward[:2], "backward": cls.BACKWARD, "sums": cls.SUMS}[way]
        heads = RopeConfig.choose(q_heads, k_heads, head_dim, rotary, elements, warps)
        tiles, shared = forward[2:] if way == "forward" else (1, False)
        q_tiles, k_tiles = min(tiles, cdiv(q_heads, heads.q_tile)), min(tiles, cdiv(k_heads, heads.k_tile))
        each = 1
        if way == "sums":
            resident = p.sm_count * max(1, min(cls.PROGRAMS_PER_SM, p.threads_per_sm // (32 * warps)))
            each = cdiv(tokens, min(tokens, resident))
        return cls(
            heads, q_tiles, k_tiles, shared, q_heads, k_heads, head_dim - rotary, rotary // 2, cdiv(tokens, each), each
        )  # fmt: skip

    @property
    def groups(self) -> int:
        """Programs a token."""
        h = self.heads
        return cdiv(self.q_heads, h.q_tile * self.q_tiles) + cdiv(self.k_heads, h.k_tile * self.k_tiles)

    def constants(self, way: Way) -> dict[str, Any]:
        """The kernels' compile-time sizes."""
        h = self.heads
        forward = dict(SHARED=self.shared, Q_TILES=self.q_tiles, K_TILES=self.k_tiles) if way == "forward" else {}
        return forward | dict(
            HALF=self.half, REST=self.rest, HALF_BLOCK=h.half_block, REST_BLOCK=h.rest_block, Q_HEADS=self.q_heads,
            K_HEADS=self.k_heads, Q_TILE=h.q_tile, K_TILE=h.k_tile,
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
            sizes = ["length", "position_batch", "position_token"]
            named = ["q", "k", "q_out", "k_out"]
            flags = dict(POSITIONS=True, GEMMA=variant == "gemma") | c.constants(way)
            name = "forward_kernel" if way == "forward" else "backward_kernel"
            if way != "forward":
                args |= dict(dq_ptr=ptr, dk_ptr=ptr, dw_ptr="*fp32")
                sizes += ["tokens", "tokens_each", "sequence"]
                named += ["dq", "dk"]
                flags["NEED_DW"] = way == "sums"
            args |= dict.fromkeys(sizes + [f"{t}_{s}" for t in named for s in ("batch", "token", "head")], "i32")
            args |= dict.fromkeys(flags, "constexpr")
            when = f"{'backward, weights trained' if way == 'sums' else way}, {h}+{kv} heads of {d}, {r} rotary"
            fused = way != "forward"
            found.append(Launch(when, name, args, flags, c.heads.num_warps, 3, TRITON_TYPES[dtype], variant, fused))
    return found
