"""Tables for rotary embeddings against transformers' own, for every kind it has, in fp32."""

import pytest
import torch
from sparktune.ops.rope_tables import KINDS, RopeParameters, inverse_frequencies, rope_tables

SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all given": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2,
        "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
    },
    "longrope": {
        "long_factor": [1.0 + i / 2 for i in range(12)], "short_factor": [1.0 + i / 10 for i in range(12)],
        "original_max_position_embeddings": 64,
    },
    "longrope, factor given": {
        "rope_type": "longrope", "factor": 3.0, "long_factor": [2.0 + i for i in range(12)],
        "short_factor": [1.0] * 12, "original_max_position_embeddings": 64, "attention_factor": 1.25,
    },
    "proportional": {"factor": 2.0},
}  # fmt: skip


def config_of(name, share):
    from transformers import LlamaConfig

    scaling = {"rope_type": name, "rope_theta": 5000.0, "partial_rotary_factor": share} | SCALED[name]
    return LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=256, rope_parameters=scaling
    )  # fmt: skip


def theirs(config, positions, module=None):
    """transformers' cos and sin, whose second half repeats the first."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    module = module or Phi3RotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("length", [40, 64, 65, 300])
@pytest.mark.parametrize("name", SCALED)
def test_tables_are_transformers(name, length):
    share = 1.0 if "yarn" in name else 0.75  # the ramp needs no share; 24 of 32 elements otherwise
    config = config_of(name, share)
    p = RopeParameters.from_config(config)
    want = theirs(config, torch.arange(length))
    for ours, w in zip(rope_tables(p, length), want, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, w)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "default"])
def test_frequencies_are_transformers(kind):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config_of(kind, 0.75)
    p = RopeParameters.from_config(config)
    for length in (None, 50, 2000):
        want, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        f, ours = inverse_frequencies(p, length or 1)
        assert torch.equal(f, want) and ours == scaling
    assert set(KINDS) == set(ROPE_INIT_FUNCTIONS) | {"default"}, "transformers has a kind that is not known here"


def test_real_models_have_the_tables_that_transformers_gives_them():
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    llama31 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    sizes = dict(hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072)
    positions = torch.tensor([0, 1, 4095, 8192, 99999])
    for config in (
        LlamaConfig(**sizes, rope_parameters=llama31),
        Qwen3Config(**sizes, head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    ):
        cos, sin = rope_tables(RopeParameters.from_config(config), 100000)
        want = theirs(config, positions, LlamaRotaryEmbedding(config))
        assert torch.equal(cos[positions], want[0]) and torch.equal(sin[positions], want[1])

    config = Gemma3TextConfig(hidden_size=2560, num_attention_heads=8, head_dim=256, num_hidden_layers=6)
    module = Gemma3RotaryEmbedding(config)
    for layer_type in ("sliding_attention", "full_attention"):
        cos, sin = rope_tables(RopeParameters.from_config(config, layer_type), 3000)
        want = module(torch.zeros(1), torch.arange(3000)[None], layer_type)
        assert torch.equal(cos, want[0][0, :, :128]) and torch.equal(sin, want[1][0, :, :128])
    with pytest.raises(ValueError, match="sliding_attention"):
        RopeParameters.from_config(config)


def test_longer_tables_can_serve_short_sequences():
    p = RopeParameters.from_config(config_of("longrope", 0.75))
    assert p.depends_on_length and not RopeParameters(64).depends_on_length
    short, long = rope_tables(p, 300, served=64), rope_tables(p, 300)
    assert torch.equal(short[0][:64], rope_tables(p, 64)[0])
    assert not torch.equal(short[0], long[0])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RopeParameters(64, kind="su"), "default, linear, dynamic"),
        (lambda: RopeParameters(64, partial=0.01), "turns 0 elements"),
        (lambda: RopeParameters(10, partial=0.5), "turns 5 elements"),
        (lambda: rope_tables(RopeParameters(64), 0), "at least 1"),
    ],
)
def test_wrong_parameters_get_a_sentence(make, match):
    with pytest.raises(ValueError, match=match):
        make()
