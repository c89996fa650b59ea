"""Attention in closed form: heads with keys of their own, shared keys, and latent keys.

Letters: b batch, s sequence, h hidden, n query heads, g key-value heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Attention(Protocol):
    """What the counts need to know of an attention layer."""

    def parameters(self, hidden: int) -> int:
        """Trained scalars of one layer."""

    def projection_flops(self, hidden: int) -> int:
        """Of all projections of one token."""

    def score_flops(self) -> int:
        """Of scores and weighted values, per pair of a query and a key it sees."""

    @property
    def num_heads(self) -> int:
        """Query heads: softmaxes per token."""

    @property
    def rotary_size(self) -> int:
        """Numbers per token that are rotated, counted as RoPE's formula counts them."""

    @property
    def norm_sizes(self) -> tuple[int, ...]:
        """Widths of normalisations inside the layer."""

    def cache_elements(self) -> int:
        """Numbers per token that decoding keeps."""

    def saved_elements(self) -> int:
        """Numbers per token between the projections that a backward pass needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAttention:
    """Multi-head attention; grouped-query if `num_kv_heads` is smaller, multi-query if it is 1.

    Attributes:
      num_heads: n.
      num_kv_heads: g.
      head_dim: d.
      qkv_bias: whether the projections to queries, keys and values add a bias.
      out_bias: whether the projection back does.
      rotary: whether positions are rotated into queries and keys.
      qk_norm: whether queries and keys are normalised per head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    rotary: bool = True
    qk_norm: bool = False

    @property
    def _qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def parameters(self, hidden: int) -> int:
        """`h (n + 2 g) d + n d h`, and what biases and norms add."""
        kernels = hidden * self._qkv_size + self.num_heads * self.head_dim * hidden
        biases = self.qkv_bias * self._qkv_size + self.out_bias * hidden
        return kernels + biases + sum(self.norm_sizes)

    def projection_flops(self, hidden: int) -> int:
        """`2 h (n + 2 g) d + 2 n d h`; `6 h^2 + 2 h^2` for multi-head attention with n d = h."""
        return 2 * hidden * self._qkv_size + 2 * self.num_heads * self.head_dim * hidden

    def score_flops(self) -> int:
        """`4 n d`: `q k` and `p v`, each a multiply and an add."""
        return 4 * self.num_heads * self.head_dim

    @property
    def rotary_size(self) -> int:
        """`n d`, or 0."""
        return self.num_heads * self.head_dim if self.rotary else 0

    @property
    def norm_sizes(self) -> tuple[int, ...]:
        """One gain per head dim for queries, one for keys."""
        return (self.head_dim, self.head_dim) if self.qk_norm else ()

    def cache_elements(self) -> int:
        """`2 g d`."""
        return 2 * self.num_kv_heads * self.head_dim

    def saved_elements(self) -> int:
        """Queries, keys, values, and the heads' output, which the last projection reads."""
        return self._qkv_size + self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (MLA) of DeepSeek-V2 and V3, arXiv 2412.19437, section 2.1.1.

    Attributes:
      num_heads: n.
      q_rank: width of the query latent; None projects queries directly.
      kv_rank: d_c, width of the key-value latent.
      nope_dim: per-head query and key width without positions.
      rope_dim: d_h^R, per-head query width, and shared key width, with positions.
      value_dim: per-head value width.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def _kernels(self, hidden: int) -> int:
        query = self.num_heads * (self.nope_dim + self.rope_dim)
        queries = hidden * query if self.q_rank is None else self.q_rank * (hidden + query)
        latents = hidden * (self.kv_rank + self.rope_dim)
        expanded = self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)
        return queries + latents + expanded + self.num_heads * self.value_dim * hidden

    def parameters(self, hidden: int) -> int:
        """All projections down and up, and the gains of the latents' norms."""
        return self._kernels(hidden) + sum(self.norm_sizes)

    def projection_flops(self, hidden: int) -> int:
        """Two per kernel element."""
        return 2 * self._kernels(hidden)

    def score_flops(self) -> int:
        """`2 n (d_nope + d_rope) + 2 n d_v`."""
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def rotary_size(self) -> int:
        """The rotary part of the queries."""
        return self.num_heads * self.rope_dim

    @property
    def norm_sizes(self) -> tuple[int, ...]:
        """Those of the latents."""
        return (self.kv_rank,) if self.q_rank is None else (self.q_rank, self.kv_rank)

    def cache_elements(self) -> int:
        """`d_c + d_h^R`: the latent and the shared rotary key."""
        return self.kv_rank + self.rope_dim

    def saved_elements(self) -> int:
        """Both latents, expanded queries, keys and values, and the heads' output."""
        heads = 2 * (self.nope_dim + self.rope_dim) + 2 * self.value_dim
        return (self.q_rank or 0) + self.cache_elements() + self.num_heads * heads
