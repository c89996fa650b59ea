"""Operations and parameters of transformers against the lecture's figures and formulas."""

import pytest

from alpa_lite.cost_model.llm import (
    Block,
    DenseMLP,
    ExpertMLP,
    HeadAttention,
    TransformerShape,
    count_flops,
    count_parameters,
    recomputed_flops,
)


def llama(*, h=4096, n=32, g=32, d=128, i=11008, v=32000, layers=32, **more):
    attention = HeadAttention(num_heads=n, num_kv_heads=g, head_dim=d)
    block = Block(count=layers, attention=attention, mlp=DenseMLP(size=i))
    return TransformerShape(name="llama", vocab_size=v, hidden_size=h, blocks=(block,), **more)


def test_llama2_7b_training_is_the_lectures():
    """UCSD CSE 234: 192.17 TFLOP and its shares, embedding counted as a matrix product."""
    parts = count_flops(llama(), batch=1, seq=4096, embedding_as_matmul=True)
    training = sum(part.training for part in parts.values())
    assert round(training / 1e12, 2) == 192.17
    shares = {name: round(100 * part.training / training, 3) for name, part in parts.items()}
    assert shares == {
        "attention": 41.276, "mlp": 55.361, "embedding": 1.676, "head": 1.676, "norm": 0.007,
        "residual": 0.003,
    }  # fmt: skip


def test_llama2_7b_forward_is_63_tflop():
    parts = count_flops(llama(), batch=1, seq=4096)
    assert round(sum(part.forward for part in parts.values()) / 1e12) == 63


def test_forward_is_the_lectures_formula():
    """N (6 b s h^2 + 4 b s^2 h + 3 b s^2 n + 2 b s h^2) + N 6 b s h i + 2 b s h v, term by term."""
    b, s, h, n, d, i, v, layers = 2, 96, 64, 4, 16, 160, 100, 3
    parts = count_flops(llama(h=h, n=n, g=n, d=d, i=i, v=v, layers=layers), batch=b, seq=s)
    attention = layers * (6 * b * s * h**2 + 4 * b * s**2 * h + 2 * b * s * h**2)
    assert parts["attention"].matmul == attention
    assert parts["attention"].forward == attention + layers * 3 * b * s**2 * n
    assert parts["mlp"].matmul == layers * 6 * b * s * h * i
    assert parts["mlp"].other == layers * (4 * b * s * i + b * s * i)
    assert parts["head"].forward == 2 * b * s * h * v
    assert parts["norm"].forward == (2 * layers + 1) * (4 * b * s * h + 2 * b * s)
    assert parts["residual"].forward == layers * (b * s * h + 3 * b * s * n * d)
    assert parts["embedding"].training == 0


def test_grouped_queries_shrink_keys_and_values_only():
    many, few = (count_flops(llama(g=g), batch=1, seq=128)["attention"] for g in (32, 8))
    assert many.matmul - few.matmul == 32 * 128 * 2 * 2 * 24 * 128 * 4096  # N s 2 (2 dg d) h


def test_causal_counts_the_pairs_a_token_may_see():
    """s (s + 1) / 2 of s^2 pairs: the projections stay."""
    full = count_flops(llama(), batch=1, seq=8)["attention"].matmul
    causal = count_flops(llama(), batch=1, seq=8, causal=True)["attention"].matmul
    assert full - causal == 32 * 4 * 4096 * (64 - 36)


def test_linear_in_the_batch():
    one, five = (count_flops(llama(), batch=b, seq=64) for b in (1, 5))
    assert all(five[name].training == 5 * one[name].training for name in one)


def test_experts_cost_what_a_token_uses():
    expert = DenseMLP(size=1000, gated=True)
    mlp = ExpertMLP(expert=expert, num_experts=8, experts_per_token=2)
    assert mlp.parameters(64) == 8 * 3 * 64 * 1000 + 64 * 8
    assert mlp.active_parameters(64) == 2 * 3 * 64 * 1000 + 64 * 8
    assert mlp.matmul_flops(64) == 2 * 64 * 8 + 2 * 6 * 64 * 1000


def test_tied_embeddings_are_counted_once():
    tied, untied = (count_parameters(llama(tied_embeddings=tied)) for tied in (True, False))
    assert sum(untied.values()) - sum(tied.values()) == 32000 * 4096
    assert sum(untied.values()) == 6_738_415_616  # released checkpoint


def test_full_recomputation_is_a_forward_pass_of_the_blocks():
    shape = llama()
    parts = count_flops(shape, batch=1, seq=4096)
    expected = sum(parts[n].forward for n in ("attention", "mlp", "norm", "residual"))
    assert recomputed_flops(shape, batch=1, seq=4096, remat="full") == expected
    assert recomputed_flops(shape, batch=1, seq=4096, remat="none") == 0
    scores = 32 * 4 * 4096**2 * 4096
    some = recomputed_flops(shape, batch=1, seq=4096, remat="dots")
    assert scores < some < 1.02 * scores
    with pytest.raises(ValueError, match="remat must be none, dots or full, found 'half'"):
        recomputed_flops(shape, batch=1, seq=1, remat="half")
