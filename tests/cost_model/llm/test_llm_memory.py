"""Key-value caches and activations against published formulas."""

import pytest

from alpa_lite.cost_model.llm import (
    Block,
    DenseMLP,
    HeadAttention,
    LatentAttention,
    TransformerShape,
    activation_bytes,
    kv_cache_bytes,
)


def model(attention, *, h=4096, layers=32, mlp=None):
    block = Block(count=layers, attention=attention, mlp=mlp or DenseMLP(size=11008))
    return TransformerShape(name="m", vocab_size=32000, hidden_size=h, blocks=(block,))


def heads(n=32, g=32, d=128):
    return HeadAttention(num_heads=n, num_kv_heads=g, head_dim=d)


@pytest.mark.parametrize(
    ("attention", "elements"),
    [
        (heads(), 2 * 32 * 128),  # multi-head: 2 n d
        (heads(g=8), 2 * 8 * 128),  # grouped-query: 2 g d
        (heads(g=1), 2 * 128),  # multi-query: 2 d
    ],
)
def test_cache_per_token_and_layer(attention, elements):
    assert kv_cache_bytes(model(attention), batch=3, seq=5) == 15 * 32 * elements * 2


def test_latent_cache_is_about_4_5_head_dims():
    """DeepSeek-V3: (d_c + d_h^R) l with d_c = 4 d_h and d_h^R = d_h / 2."""
    latent = LatentAttention(
        num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    )
    per_layer = kv_cache_bytes(model(latent, layers=1), batch=1, seq=1, bytes_per_element=1)
    assert per_layer == 512 + 64 == 4.5 * 128


@pytest.mark.parametrize(("s", "h", "n"), [(2048, 6144, 64), (1024, 4096, 32)])
def test_activations_are_those_of_korthikanti(s, h, n):
    """arXiv 2205.05198, section 4.1: s b h (34 + 5 n s / h) bytes per layer of a GPT with dropout.

    11 s b h attention without scores (input 2, q k v 6, output 2, mask 1), 19 MLP (input 2, 8
    before and 8 after GELU, mask 1), 4 norms, and softmax 2, its dropout mask 1 and output 2 per
    score. Computing scores again (equation 6) leaves 34; full recomputation (section 5) 2.
    """
    shape = model(
        heads(n, n, h // n), h=h, layers=1,
        mlp=DenseMLP(size=4 * h, gated=False, bias=True, activation="gelu"),
    )  # fmt: skip
    options = {"batch": 2, "seq": s, "stored_scores": True, "dropout": True}
    assert activation_bytes(shape, **options) == 2 * s * (34 * h + 5 * n * s)
    assert activation_bytes(shape, remat="dots", **options) == 2 * s * h * 34
    assert activation_bytes(shape, remat="full", **options) == 2 * s * h * 2


def test_fused_attention_keeps_a_normaliser_per_token_and_head():
    shape = model(heads(), layers=1)
    fused = activation_bytes(shape, batch=1, seq=64)
    without = activation_bytes(shape, batch=1, seq=64, stored_scores=True) - 2 * 32 * 64**2
    assert fused - without == 4 * 32 * 64


def test_unknown_remat():
    with pytest.raises(ValueError, match="found 'some'"):
        activation_bytes(model(heads()), batch=1, seq=1, remat="some")
