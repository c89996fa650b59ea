"""Bytes of a transformer in closed form: the key-value cache, and activations kept for training."""

from __future__ import annotations

from alpa_lite.cost_model.llm.shape import TransformerShape

KEPT_NOTHING = "full"
KEPT_PRODUCTS = "dots"
KEPT_ALL = "none"


def kv_cache_bytes(
    shape: TransformerShape, *, batch: int, seq: int, bytes_per_element: float = 2.0
) -> float:
    """The cache of a decoder that has seen `seq` tokens of `batch` sequences.

    Per token and layer `2 n d` numbers for multi-head, `2 g d` for grouped-query, `2 d` for
    multi-query and `d_c + d_h^R` for latent attention.
    """
    per_token = sum(b.count * b.attention.cache_elements() for b in shape.blocks)
    return batch * seq * per_token * bytes_per_element


def activation_bytes(
    shape: TransformerShape, *, batch: int, seq: int, remat: str = KEPT_ALL,
    stored_scores: bool = False, dropout: bool = False,
) -> float:  # fmt: skip
    """Activations that the backward pass of all blocks needs, in 16-bit precision.

    What a block keeps are the inputs of its operations, as in Korthikanti et al. (arXiv
    2205.05198, section 4.1), whose `s b h (34 + 5 n s / h)` comes out for their model:

    | kept per token                                  | bytes                  |
    |-------------------------------------------------|------------------------|
    | inputs of the two norms                         | 2 x 2 h                |
    | input of the attention and of the MLP           | 2 x 2 h                |
    | queries, keys, values, heads' output            | 2 x their elements     |
    | inside the MLP                                  | 2 x its elements       |
    | dropout masks after attention and MLP           | 2 x h if there are any |
    | scores, stored: softmax output, dropout and its mask | (2 + 3 if dropout) n s |

    Args:
      shape: the model.
      batch: sequences.
      seq: tokens of each.
      remat: `"none"`; `"dots"`: scores are computed again; `"full"`: only a block's input is kept.
      stored_scores: whether scores reach memory at all; a fused kernel (flash attention) computes
        them again from a normaliser of n numbers per token.
      dropout: whether there are dropout masks, one byte per element.

    Raises:
      ValueError: unknown `remat`.
    """
    if remat not in (KEPT_ALL, KEPT_PRODUCTS, KEPT_NOTHING):
        raise ValueError(f"remat must be none, dots or full, found {remat!r}")
    h, total = shape.hidden_size, 0.0
    for block in shape.all_blocks:
        if remat == KEPT_NOTHING:
            total += block.count * 2 * h
            continue
        heads = block.attention.num_heads
        kept = 8 * h + 2 * block.attention.saved_elements() + 2 * block.mlp.saved_elements(h)
        kept += 2 * h if dropout else 0
        if stored_scores and remat == KEPT_ALL:
            kept += (5 if dropout else 2) * heads * seq
        elif not stored_scores:
            kept += 4 * heads
        total += block.count * kept
    return batch * seq * total
