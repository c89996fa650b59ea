"""`TransformerShape`: everything about a decoder that its costs depend on, and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from alpa_lite.cost_model.llm.attention import Attention
from alpa_lite.cost_model.llm.feed_forward import MLP

# The parts that every count is broken into, in the order shown.
EMBEDDING: Final = "embedding"
ATTENTION: Final = "attention"
FEED_FORWARD: Final = "mlp"
NORM: Final = "norm"
RESIDUAL: Final = "residual"
HEAD: Final = "head"
PARTS: Final = (EMBEDDING, ATTENTION, FEED_FORWARD, NORM, RESIDUAL, HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Equal decoder blocks.

    Attributes:
      count: how many.
      attention: of each.
      mlp: of each.
    """

    count: int
    attention: Attention
    mlp: MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """A decoder-only language model.

    Attributes:
      name: what to call it.
      vocab_size: v.
      hidden_size: h.
      blocks: kinds of block; their order does not matter.
      tied_embeddings: whether the embedding is also the output head.
      learned_positions: rows of a learned position embedding; 0 for none.
      norm_bias: whether norms subtract the mean and add a bias (LayerNorm, not RMSNorm).
      norms_per_block: of width h.
      prediction_modules: multi-token prediction modules, each a block like the last kind with two
        more norms, a `2 h` x `h` projection, a final norm, and another use of the head.
    """

    name: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[Block, ...]
    tied_embeddings: bool = False
    learned_positions: int = 0
    norm_bias: bool = False
    norms_per_block: int = 2
    prediction_modules: int = 0

    @property
    def num_layers(self) -> int:
        """Blocks, prediction modules not counted."""
        return sum(block.count for block in self.blocks)

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """Those of the prediction modules too."""
        if not self.prediction_modules:
            return self.blocks
        last = self.blocks[-1]
        extra = Block(count=self.prediction_modules, attention=last.attention, mlp=last.mlp)
        return (*self.blocks, extra)

    @property
    def wide_norms(self) -> int:
        """Norms of width h, over the whole model."""
        count = self.norms_per_block * sum(block.count for block in self.all_blocks)
        return count + 1 + 3 * self.prediction_modules


def count_parameters(shape: TransformerShape) -> Mapping[str, int]:
    """Trained scalars by part.

    Example:
      >>> from alpa_lite.cost_model.llm import DenseMLP, HeadAttention
      >>> attention = HeadAttention(num_heads=32, num_kv_heads=32, head_dim=128)
      >>> block = Block(count=32, attention=attention, mlp=DenseMLP(size=11008))
      >>> llama = TransformerShape(
      ...     name="llama2-7b", vocab_size=32000, hidden_size=4096, blocks=(block,))
      >>> sum(count_parameters(llama).values())
      6738415616
    """
    h, v = shape.hidden_size, shape.vocab_size
    blocks = shape.all_blocks
    inner_norms = sum(b.count * sum(b.attention.norm_sizes) for b in blocks)
    attention = sum(b.count * b.attention.parameters(h) for b in blocks) - inner_norms
    mlp = sum(b.count * b.mlp.parameters(h) for b in blocks)
    return MappingProxyType(
        {
            EMBEDDING: (v + shape.learned_positions) * h,
            ATTENTION: attention,
            FEED_FORWARD: mlp + shape.prediction_modules * 2 * h * h,
            NORM: shape.wide_norms * h * (1 + shape.norm_bias) + inner_norms,
            RESIDUAL: 0,
            HEAD: 0 if shape.tied_embeddings else v * h,
        }
    )


def active_parameters(shape: TransformerShape) -> int:
    """Parameters that one token is multiplied with, without prediction modules.

    All but the experts that the token does not use; the embedding counts.
    """
    h = shape.hidden_size
    unused = sum(
        b.count * (b.mlp.parameters(h) - b.mlp.active_parameters(h)) for b in shape.all_blocks
    )
    return sum(count_parameters(shape).values()) - unused
