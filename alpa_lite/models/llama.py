"""Llama 2 and 3, and Nemotron-4, in Flax NNX: RoPE, RMSNorm, grouped-query attention.

The train state holds the parameters as an `nnx.State`; the step merges them with the module
structure inside the differentiated loss, the way NNX documents it. Sizes are those of the
released models; Llama 3.1's frequency rescaling for long contexts is left out, since it
changes neither shapes nor costs, and so are Nemotron-4's LayerNorm and its rotation of only half
the head dims.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from alpa_lite.models.attention import AttentionFunction, apply_rope, causal_attention
from alpa_lite.models.checks import require_at_least, require_float_dtype, require_multiple
from alpa_lite.models.losses import mean_cross_entropy
from alpa_lite.models.setup import ModelSetup, random_token_batch, token_batch_shapes

# One object for all layers: NNX compares initialisers by identity when it compares structures.
KERNEL_INIT: Final = nnx.initializers.normal(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes and options of a Llama.

    Attributes:
        vocab_size: Rows of the token embedding and columns of the (untied) head.
        seq_len: Tokens per sequence.
        hidden_size: Width of the residual stream.
        mlp_size: Width of the gated MLP.
        num_layers: Decoder blocks.
        num_heads: Query heads; divides `hidden_size`, head dim `hidden_size / num_heads`.
        num_kv_heads: Key and value heads; divides `num_heads`.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added to the mean square in RMSNorm.
        gated_mlp: SwiGLU; if false, two matrices with a squared ReLU between, as in Nemotron-4.
        scan_layers: Stack the blocks' parameters as `[num_layers, ...]` and scan over them.
        remat: Recompute each block in the backward pass.
        dtype: Compute dtype; parameters stay float32.
    """

    vocab_size: int
    seq_len: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    gated_mlp: bool = True
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require_at_least(self, 1, "vocab_size", "seq_len", "hidden_size", "mlp_size")
        require_at_least(self, 1, "num_layers", "num_heads", "num_kv_heads")
        require_multiple(self, "hidden_size", "num_heads")
        require_multiple(self, "num_heads", "num_kv_heads")
        require_float_dtype(self)
        if self.hidden_size // self.num_heads % 2 != 0:
            raise ValueError(
                f"LlamaConfig has head dim {self.hidden_size // self.num_heads} = hidden_size / "
                f"num_heads; rotary positions need an even one. Change num_heads."
            )


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, kernels `[hidden, heads, head_dim]`."""

    def __init__(
        self, config: LlamaConfig, attention: AttentionFunction, *, rngs: nnx.Rngs
    ) -> None:
        hidden, dim = config.hidden_size, config.hidden_size // config.num_heads
        general = functools.partial(
            nnx.LinearGeneral,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            kernel_init=KERNEL_INIT,
            rngs=rngs,
        )
        self.query = general(hidden, (config.num_heads, dim))
        self.key = general(hidden, (config.num_kv_heads, dim))
        self.value = general(hidden, (config.num_kv_heads, dim))
        self.out = general((config.num_heads, dim), hidden, axis=(-2, -1))
        self.rope_theta = config.rope_theta
        self.attention = attention

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, seq, hidden]` to the same shape."""
        q = apply_rope(self.query(x), theta=self.rope_theta)
        k = apply_rope(self.key(x), theta=self.rope_theta)
        return self.out(self.attention(q, k, self.value(x)))


class SwiGLU(nnx.Module):
    """Gated MLP: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        linear = _linear(config, rngs)
        self.gate = linear(config.hidden_size, config.mlp_size)
        self.up = linear(config.hidden_size, config.mlp_size)
        self.down = linear(config.mlp_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, seq, hidden]` to the same shape."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class SquaredReLU(nnx.Module):
    """MLP without a gate: `down(relu(up(x))^2)`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        linear = _linear(config, rngs)
        self.up = linear(config.hidden_size, config.mlp_size)
        self.down = linear(config.mlp_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, seq, hidden]` to the same shape."""
        return self.down(jnp.square(nnx.relu(self.up(x))))


class Block(nnx.Module):
    """Pre-RMSNorm decoder block."""

    def __init__(
        self, config: LlamaConfig, attention: AttentionFunction, *, rngs: nnx.Rngs
    ) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, attention, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = (SwiGLU if config.gated_mlp else SquaredReLU)(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, seq, hidden]` to the same shape."""
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x))
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Decoder-only language model; `layers` is a stacked `Block` or a list of them."""

    def __init__(
        self,
        config: LlamaConfig,
        attention: AttentionFunction = causal_attention,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            embedding_init=KERNEL_INIT,
            rngs=rngs,
        )
        self.layers = _make_layers(config, attention, rngs.params())
        self.final_norm = _norm(config, rngs)
        self.head = nnx.Linear(
            config.hidden_size,
            config.vocab_size,
            use_bias=False,
            dtype=dtype,
            kernel_init=KERNEL_INIT,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits `[batch, seq, vocab]` of tokens `[batch, seq]`."""
        with jax.named_scope("embed"):
            x = self.embed(tokens)
        if self.config.scan_layers:
            graphdef, stacked = nnx.split(self.layers)
            apply = self._layer_function(graphdef)
            with jax.named_scope("layers"):
                x, _ = jax.lax.scan(lambda x, params: (apply(params, x), None), x, stacked)
        else:
            for i, layer in enumerate(self.layers):
                graphdef, params = nnx.split(layer)
                with jax.named_scope(f"layer_{i}"):
                    x = self._layer_function(graphdef)(params, x)
        with jax.named_scope("head"):
            return self.head(self.final_norm(x))

    def _layer_function(self, graphdef: nnx.GraphDef[Block]) -> Any:
        """`(params, x) -> x` of one block, rematerialised if the config says so."""

        def apply(params: nnx.State, x: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, params)(x)

        if not self.config.remat:
            return apply
        return jax.checkpoint(apply, prevent_cse=not self.config.scan_layers)


@struct.dataclass
class LlamaState:
    """Train state: step counter, parameters, optimiser state."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


def make_setup(
    name: str,
    config: LlamaConfig,
    optimizer: optax.GradientTransformation,
    attention: AttentionFunction = causal_attention,
) -> ModelSetup:
    """The setup of one Llama."""

    @functools.cache
    def graphdef() -> nnx.GraphDef[Llama]:
        """Structure of the model without its parameters, found by abstract evaluation."""
        return nnx.graphdef(
            nnx.eval_shape(lambda: Llama(config, attention, rngs=nnx.Rngs(params=0)))
        )

    def init(key: jax.Array) -> LlamaState:
        params = nnx.state(Llama(config, attention, rngs=nnx.Rngs(params=key)), nnx.Param)
        return LlamaState(
            step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
        )

    def step(
        state: LlamaState, batch: dict[str, jax.Array]
    ) -> tuple[LlamaState, dict[str, jax.Array]]:
        def loss_fn(params: nnx.State) -> jax.Array:
            model = nnx.merge(graphdef(), params)
            return mean_cross_entropy(model(batch["tokens"]), batch["targets"])

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = LlamaState(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {"loss": loss}

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


def _make_layers(config: LlamaConfig, attention: AttentionFunction, key: jax.Array) -> Any:
    """All blocks, a stacked `Block` or an `nnx.List`; equal keys give equal parameters in both.

    One block's initialiser is traced once and mapped or called, so tracing time does not
    grow with the number of layers.
    """

    @jax.jit
    def init_block(key: jax.Array) -> nnx.State:
        return nnx.state(Block(config, attention, rngs=nnx.Rngs(params=key)))

    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: Block(config, attention, rngs=nnx.Rngs(params=0)))
    )
    keys = jax.random.split(key, config.num_layers)
    if config.scan_layers:
        return nnx.merge(graphdef, jax.vmap(init_block)(keys))
    return nnx.List([nnx.merge(graphdef, init_block(key)) for key in keys])


def _linear(config: LlamaConfig, rngs: nnx.Rngs) -> functools.partial[nnx.Linear]:
    return functools.partial(
        nnx.Linear,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=KERNEL_INIT,
        rngs=rngs,
    )


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.norm_eps, dtype=jnp.dtype(config.dtype), rngs=rngs
    )


def _llama2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    """Llama 2, https://arxiv.org/abs/2307.09288."""
    return LlamaConfig(
        vocab_size=32_000,
        seq_len=4096,
        hidden_size=hidden,
        mlp_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
    )


def _llama3(hidden: int, mlp: int, layers: int, heads: int) -> LlamaConfig:
    """Llama 3, https://arxiv.org/abs/2407.21783, table 3."""
    return LlamaConfig(
        vocab_size=128_256,
        seq_len=8192,
        hidden_size=hidden,
        mlp_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        rope_theta=500_000.0,
    )


def _nemotron4(hidden: int, layers: int, heads: int) -> LlamaConfig:
    """Nemotron-4, https://arxiv.org/abs/2402.16819 and https://arxiv.org/abs/2406.11704."""
    return LlamaConfig(
        vocab_size=256_000,
        seq_len=4096,
        hidden_size=hidden,
        mlp_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        gated_mlp=False,
    )


def _test(*, scan_layers: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        seq_len=32,
        hidden_size=64,
        mlp_size=128,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        scan_layers=scan_layers,
        dtype="float32",
    )


PRESETS: Final = MappingProxyType(
    {
        "llama2-7b": _llama2(4096, 11008, 32, 32, 32),
        "llama2-13b": _llama2(5120, 13824, 40, 40, 40),
        "llama2-70b": _llama2(8192, 28672, 80, 64, 8),
        "llama3-8b": _llama3(4096, 14336, 32, 32),
        "llama3-70b": _llama3(8192, 28672, 80, 64),
        "llama3-405b": _llama3(16384, 53248, 126, 128),
        "nemotron4-15b": _nemotron4(6144, 32, 48),
        "nemotron4-340b": _nemotron4(18432, 96, 96),
        "llama-test": _test(scan_layers=False),
        "llama-scan-test": _test(scan_layers=True),
    }
)
