"""Floating-point operations of a transformer in closed form, by part.

The formulas are those of UCSD's lectures on machine learning systems (CSE 234, winter 2025); with
b sequences of s tokens, hidden h, n heads of d, MLP width i, vocabulary v and N layers, a
Llama-2-style forward pass takes

    N (6 b s h^2 + 4 b s^2 h + 3 b s^2 n + 2 b s h^2) + N 6 b s h i + 2 b s h v

plus RMSNorm `4 b s h + 2 b s`, RoPE `3 b s n d`, SwiGLU `4 b s i + b s i`, residual `b s h`. A
backward pass takes twice the forward pass, except that the nonlinearity of the MLP is counted
once. RoPE is shown with the residuals. Both are the only reading of the lecture's terms that
gives its seven figures for Llama-2-7B (192.17 TFLOP and six shares).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from alpa_lite.cost_model.llm.shape import (
    ATTENTION,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    NORM,
    RESIDUAL,
    Block,
    TransformerShape,
)


@dataclass(frozen=True, slots=True)
class PartFlops:
    """Operations of one part of a model.

    Attributes:
      matmul: of matrix products in a forward pass.
      matmul_backward: of those in a backward pass.
      other: of everything else in a forward pass.
      other_backward: and in a backward pass.
    """

    matmul: float = 0.0
    matmul_backward: float = 0.0
    other: float = 0.0
    other_backward: float = 0.0

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.matmul + self.other

    @property
    def training(self) -> float:
        """A forward and a backward pass."""
        return self.forward + self.matmul_backward + self.other_backward

    @property
    def training_matmul(self) -> float:
        """Matrix products of a forward and a backward pass."""
        return self.matmul + self.matmul_backward


def count_flops(
    shape: TransformerShape, *, batch: int, seq: int, causal: bool = False,
    embedding_as_matmul: bool = False,
) -> Mapping[str, PartFlops]:  # fmt: skip
    """Operations of one batch, by part.

    Args:
      shape: the model.
      batch: sequences.
      seq: tokens of each.
      causal: count only the scores a token may see, `s (s + 1) / 2` pairs instead of `s^2`.
      embedding_as_matmul: count the token embedding like a product with a one-hot matrix, `2 b s h
        v` forward, as the lecture's training figure does; a lookup takes no operation.
    """
    tokens = float(batch * seq)
    h = shape.hidden_size
    pairs = tokens * ((seq + 1) / 2 if causal else seq)
    blocks = shape.all_blocks
    lookup = 2 * tokens * h * shape.vocab_size if embedding_as_matmul else 0.0
    attention = sum(_attention_matmul(b, h, tokens, pairs) for b in blocks)
    softmax = sum(b.count * 3 * pairs * b.attention.num_heads for b in blocks)
    mlp = sum(b.count * tokens * b.mlp.matmul_flops(h) for b in blocks)
    mlp += shape.prediction_modules * tokens * 4 * h * h
    dispatch = sum(b.count * tokens * b.mlp.dispatch_flops(h) for b in blocks)
    activation = sum(b.count * tokens * b.mlp.activation_flops() for b in blocks)
    rotary = sum(b.count * 3 * tokens * b.attention.rotary_size for b in blocks)
    residual = sum(b.count for b in blocks) * tokens * h
    head = (1 + shape.prediction_modules) * 2 * tokens * h * shape.vocab_size
    norm = _norms(shape, tokens)
    return MappingProxyType(
        {
            EMBEDDING: PartFlops(lookup, 2 * lookup),
            ATTENTION: PartFlops(attention, 2 * attention, softmax, 2 * softmax),
            # The one-hot matrix of the dispatch has no gradient, that of the combination has.
            FEED_FORWARD: PartFlops(mlp + 2 * dispatch, 2 * mlp + 3 * dispatch, activation, 0.0),
            NORM: PartFlops(other=norm, other_backward=2 * norm),
            RESIDUAL: PartFlops(other=residual + rotary, other_backward=2 * (residual + rotary)),
            HEAD: PartFlops(head, 2 * head),
        }
    )


def recomputed_flops(
    shape: TransformerShape, *, batch: int, seq: int, remat: str, causal: bool = False
) -> float:
    """Operations that a backward pass repeats.

    Args:
      shape: the model.
      batch: sequences.
      seq: tokens of each.
      remat: `"none"`; `"dots"`: all but products with kernels, which are the scores, the weighted
        values and everything elementwise; `"full"`: all blocks.
      causal: as in `count_flops`.

    Raises:
      ValueError: unknown `remat`.
    """
    parts = count_flops(shape, batch=batch, seq=seq, causal=causal)
    blocks = [parts[name] for name in (ATTENTION, FEED_FORWARD, NORM, RESIDUAL)]
    if remat == "none":
        return 0.0
    if remat == "full":
        return sum(part.forward for part in blocks)
    if remat == "dots":
        pairs = batch * seq * ((seq + 1) / 2 if causal else seq)
        scores = sum(b.count * pairs * b.attention.score_flops() for b in shape.all_blocks)
        return scores + sum(part.other for part in blocks)
    raise ValueError(f"remat must be none, dots or full, found {remat!r}")


def _attention_matmul(block: Block, hidden: int, tokens: float, pairs: float) -> float:
    attention = block.attention
    each = tokens * attention.projection_flops(hidden) + pairs * attention.score_flops()
    return block.count * each


def _norms(shape: TransformerShape, tokens: float) -> float:
    """RMSNorm `4 h + 2` per token; LayerNorm `7 h + 4`: mean, centre, add the bias."""
    per_element, fixed = (7, 4) if shape.norm_bias else (4, 2)
    wide = shape.wide_norms * (per_element * shape.hidden_size + fixed)
    inner = sum(
        b.count * sum(4 * size + 2 for size in b.attention.norm_sizes) for b in shape.all_blocks
    )
    return tokens * (wide + inner)
