"""GPT in Flax Linen: pre-LayerNorm decoder with learned positions.

Sizes are those of Alpa's benchmark suite (sequence 1024, vocabulary 51200, a multiple of
1024 as in Megatron-LM). Parameters are float32; matrix products run in `GPTConfig.dtype`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from alpa_lite.models.attention import AttentionFunction, causal_attention
from alpa_lite.models.checks import (
    require_at_least,
    require_float_dtype,
    require_multiple,
    require_rate,
)
from alpa_lite.models.losses import mean_cross_entropy
from alpa_lite.models.setup import ModelSetup, random_token_batch, token_batch_shapes

INIT_STDDEV: Final = 0.02  # GPT-2


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """Sizes and options of a GPT.

    Attributes:
        vocab_size: Rows of the token embedding.
        seq_len: Tokens per sequence, also the number of learned positions.
        hidden_size: Width of the residual stream.
        num_layers: Decoder blocks.
        num_heads: Attention heads; divides `hidden_size`.
        mlp_ratio: MLP width over `hidden_size`.
        dropout_rate: After the embeddings, the attention and the MLP; 0 stores no key.
        tie_embeddings: Use the token embedding as output head.
        scan_layers: Stack the blocks' parameters as `[num_layers, ...]` and scan over them.
        remat: Recompute each block in the backward pass.
        dtype: Compute dtype; parameters stay float32.
    """

    vocab_size: int = 51200
    seq_len: int = 1024
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    dropout_rate: float = 0.0
    tie_embeddings: bool = True
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "vocab_size", "seq_len", "hidden_size", "num_layers", "num_heads", "mlp_ratio"
        )
        require_multiple(self, "hidden_size", "num_heads")
        require_rate(self, "dropout_rate")
        require_float_dtype(self)


class CausalSelfAttention(nn.Module):
    """Multi-head attention with kernels `[hidden, heads, head_dim]`."""

    num_heads: int
    dtype: Any
    attention: AttentionFunction = causal_attention

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, seq, hidden]` to the same shape."""
        hidden = x.shape[-1]
        heads = (self.num_heads, hidden // self.num_heads)
        q, k, v = (
            nn.DenseGeneral(heads, dtype=self.dtype, kernel_init=_normal(), name=name)(x)
            for name in ("query", "key", "value")
        )
        out = self.attention(q, k, v)
        return nn.DenseGeneral(
            hidden, axis=(-2, -1), dtype=self.dtype, kernel_init=_normal(), name="out"
        )(out)


class MLP(nn.Module):
    """Two dense layers with GELU between."""

    mlp_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, seq, hidden]` to the same shape."""
        h = nn.Dense(self.mlp_size, dtype=self.dtype, kernel_init=_normal(), name="up")(x)
        h = nn.gelu(h)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_normal(), name="down")(h)


class Block(nn.Module):
    """Pre-LayerNorm decoder block; returns `(x, None)`, the form `nn.scan` wants."""

    config: GPTConfig
    deterministic: bool
    attention: AttentionFunction = causal_attention

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Maps `[batch, seq, hidden]` to the same shape."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        h = nn.LayerNorm(dtype=dtype, name="attention_norm")(x)
        h = CausalSelfAttention(c.num_heads, dtype, self.attention, name="attention")(h)
        x = x + nn.Dropout(c.dropout_rate, deterministic=self.deterministic)(h)
        h = nn.LayerNorm(dtype=dtype, name="mlp_norm")(x)
        h = MLP(c.mlp_ratio * c.hidden_size, dtype, name="mlp")(h)
        return x + nn.Dropout(c.dropout_rate, deterministic=self.deterministic)(h), None


class GPT(nn.Module):
    """Decoder-only language model."""

    config: GPTConfig
    attention: AttentionFunction = causal_attention

    @nn.compact
    def __call__(self, tokens: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits `[batch, seq, vocab]` of tokens `[batch, seq]`."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        embed = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=dtype, embedding_init=_normal(), name="embed"
        )
        x = embed_with_positions(self, embed, tokens, max_positions=c.seq_len)
        x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=c.num_layers,
            )
            x, _ = scanned(c, deterministic, self.attention, name="layers")(x)
        else:
            for i in range(c.num_layers):
                x, _ = block(c, deterministic, self.attention, name=f"layer_{i}")(x)
        x = nn.LayerNorm(dtype=dtype, name="final_norm")(x)
        if c.tie_embeddings:
            return embed.attend(x)
        return nn.Dense(
            c.vocab_size, use_bias=False, dtype=dtype, kernel_init=_normal(), name="head"
        )(x)


class DropoutTrainState(train_state.TrainState):
    """Flax train state with a typed PRNG key for dropout, `None` without dropout."""

    dropout_key: jax.Array | None = None


def embed_with_positions(
    module: nn.Module, embed: nn.Embed, tokens: jax.Array, *, max_positions: int
) -> jax.Array:
    """Token embedding plus learned positions: `[batch, seq]` to `[batch, seq, hidden]`."""
    positions = module.param("positions", _normal(), (max_positions, embed.features))
    x = embed(tokens)
    return x + positions[: tokens.shape[1]].astype(x.dtype)


def create_dropout_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    seq_len: int,
    dropout_rate: float,
) -> DropoutTrainState:
    """Initial state of a token model; pure, so it can be jitted or shape-evaluated."""
    params_key, dropout_key = jax.random.split(key)
    params = model.init(params_key, jnp.zeros((1, seq_len), jnp.int32))["params"]
    state = DropoutTrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=optimizer,
        dropout_key=dropout_key if dropout_rate > 0 else None,
    )
    return state.replace(step=jnp.zeros((), jnp.int32))


def dropout_rngs(state: DropoutTrainState) -> dict[str, jax.Array]:
    """The step's dropout stream: the state's key folded with the step number."""
    if state.dropout_key is None:
        return {}
    return {"dropout": jax.random.fold_in(state.dropout_key, state.step)}


def make_setup(
    name: str,
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    attention: AttentionFunction = causal_attention,
) -> ModelSetup:
    """The setup of one GPT."""
    model = GPT(config, attention)

    def init(key: jax.Array) -> DropoutTrainState:
        return create_dropout_state(
            model, optimizer, key, seq_len=config.seq_len, dropout_rate=config.dropout_rate
        )

    def step(
        state: DropoutTrainState, batch: dict[str, jax.Array]
    ) -> tuple[DropoutTrainState, dict[str, jax.Array]]:
        def loss_fn(params: Any) -> jax.Array:
            logits = state.apply_fn(
                {"params": params},
                batch["tokens"],
                deterministic=state.dropout_key is None,
                rngs=dropout_rngs(state),
            )
            return mean_cross_entropy(logits, batch["targets"])

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    return ModelSetup(
        name=name,
        config=config,
        init=init,
        step=step,
        batch_shapes=lambda batch_size: token_batch_shapes(batch_size, config.seq_len),
        make_batch=lambda seed, batch_size: random_token_batch(
            seed, batch_size, seq_len=config.seq_len, vocab_size=config.vocab_size
        ),
    )


def _normal() -> Any:
    return nn.initializers.normal(INIT_STDDEV)


# Alpa's suite, benchmark/alpa/suite_manual_gpt.py; 175B from GPT-3, arXiv 2005.14165, table 2.1.
PRESETS: Final = MappingProxyType(
    {
        "gpt-125m": GPTConfig(hidden_size=768, num_layers=12, num_heads=12),
        "gpt-350m": GPTConfig(hidden_size=1024, num_layers=24, num_heads=16),
        "gpt-760m": GPTConfig(hidden_size=1536, num_layers=24, num_heads=16),
        "gpt-1.3b": GPTConfig(hidden_size=2048, num_layers=24, num_heads=32),
        "gpt-2.6b": GPTConfig(hidden_size=2560, num_layers=32, num_heads=32),
        "gpt-6.7b": GPTConfig(hidden_size=4096, num_layers=32, num_heads=32),
        "gpt-15b": GPTConfig(hidden_size=5120, num_layers=48, num_heads=40),
        "gpt-39b": GPTConfig(hidden_size=8192, num_layers=48, num_heads=64),
        "gpt-175b": GPTConfig(hidden_size=12288, num_layers=96, num_heads=96, seq_len=2048),
        "gpt-test": GPTConfig(
            vocab_size=256, seq_len=32, hidden_size=64, num_layers=2, num_heads=8, dtype="float32"
        ),
    }
)
