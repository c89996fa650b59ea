"""Alpa's acceptance cases: small models as train steps of shapes only, and the cluster for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

from alpa_lite.cost_model import Cluster, DeviceSpec, Link

FLOAT_BYTES = 4

Shapes = dict[str, jax.ShapeDtypeStruct]


def four_devices(*, slow_first_axis: bool = False, prefer_reduce_scatter: bool = False) -> Cluster:
    """Four devices whose plans differ in communication only; see `acceptance`."""
    device = DeviceSpec(
        name="communication-only", flops_per_s={"float32": 1e9}, matmul_efficiency=1.0,
        hbm_bytes=2**40, hbm_bytes_per_s=1e17, hbm_efficiency=1.0, op_overhead_s=0.0,
        vector_flops_per_s=1e17,
    )  # fmt: skip
    hosts = 2 if slow_first_axis else 1
    return Cluster(
        name="acceptance", num_hosts=hosts, devices_per_host=4 // hosts, device=device,
        intra_host=Link(name="fast", alpha_s=0.0, bytes_per_s=1e9),
        inter_host=Link(name="slow", alpha_s=0.0, bytes_per_s=1e8),
        collective_overhead_s=0.0 if prefer_reduce_scatter else 1e-9,
    )  # fmt: skip


class TrainState(train_state.TrainState):
    """With the running statistics of batch normalization."""

    batch_stats: Any = None


@dataclass(frozen=True, slots=True)
class Case:
    """A step and the shapes it is planned for.

    Attributes:
      step: `step(state, batch) -> (state, loss)`.
      state, batch: pytrees of `jax.ShapeDtypeStruct`.
    """

    step: Callable[..., Any]
    state: TrainState
    batch: Shapes

    def leaves(self) -> dict[str, tuple[int, ...]]:
        """Shape of every state leaf, by the path it has in a plan."""
        found = jax.tree_util.tree_flatten_with_path({"state": self.state})[0]
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in found
        }

    def param_bytes(self, pattern: str = "") -> int:
        """Bytes of the parameters whose path contains the pattern."""
        shapes = [s for n, s in self.leaves().items() if ".params." in n and pattern in n]
        return FLOAT_BYTES * sum(int(np.prod(s)) for s in shapes)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def regression(
    model: nn.Module, batch: Shapes, tx: optax.GradientTransformation | None = None
) -> Case:
    """Mean square error of `model(batch["x"])` against `batch["y"]`; adam as in Alpa's tests."""

    def loss_of(out: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean((out - batch["y"]) ** 2)

    return train_case(model, batch, loss_of, tx)


def token_classification(model: nn.Module, batch: Shapes) -> Case:
    """Mean cross entropy of the logits `model(batch["x"])` against the tokens `batch["y"]`."""

    def loss_of(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        one_hot = jax.nn.one_hot(batch["y"], logits.shape[-1])
        return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=-1))

    return train_case(model, batch, loss_of)


def train_case(
    model: nn.Module,
    batch: Shapes,
    loss_of: Callable[[jax.Array, dict[str, jax.Array]], jax.Array],
    tx: optax.GradientTransformation | None = None,
) -> Case:
    """A train step of a Flax model with or without batch statistics."""

    def init(key: jax.Array, x: jax.Array) -> TrainState:
        variables = model.init(key, x)
        return TrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=tx or optax.adam(1e-2),
            batch_stats=variables.get("batch_stats"),
        )

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            if state.batch_stats is None:
                return loss_of(model.apply({"params": params}, batch["x"]), batch), None
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, new = model.apply(variables, batch["x"], mutable=["batch_stats"])
            return loss_of(out, batch), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats), value

    return Case(step, jax.eval_shape(init, jax.random.key(0), batch["x"]), batch)


class MLP(nn.Module):
    """Dense layers of one width, without activations, as in Alpa's tests."""

    num_layers: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.num_layers):
            x = nn.Dense(self.hidden)(x)
        return x


def mlp(num_layers: int, batch_size: int, hidden: int, **options: Any) -> Case:
    shapes = {name: floats(batch_size, hidden) for name in "xy"}
    return regression(MLP(num_layers, hidden), shapes, **options)


class Attention(nn.Module):
    """Multi-head self-attention; the fused kernel is `[hidden, 3, heads, head_dim]`."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x.shape[-1]
        dim = hidden // self.heads
        qkv = nn.DenseGeneral((3, self.heads, dim), name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / dim**0.5)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(hidden, axis=(-2, -1), name="out")(mixed)


class BertLayer(nn.Module):
    """Post-LayerNorm encoder layer."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="ln1")(x + Attention(self.heads, name="attention")(x))
        h = nn.gelu(nn.Dense(4 * x.shape[-1], name="fc1")(x))
        return nn.LayerNorm(name="ln2")(x + nn.Dense(x.shape[-1], name="fc2")(h))


class Bert(nn.Module):
    """Encoder layers on given hidden states."""

    num_layers: int
    heads: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.remat(BertLayer) if self.remat else BertLayer
        for i in range(self.num_layers):
            x = layer(self.heads, name=f"layer_{i}")(x)
        return x


def bert(
    batch_size: int, seq_len: int, hidden: int, *, heads: int = 8, layers: int = 2,
    remat: bool = False,
) -> Case:  # fmt: skip
    shapes = {name: floats(batch_size, seq_len, hidden) for name in "xy"}
    return regression(Bert(layers, heads, remat), shapes)


class TiedEmbedding(nn.Module):
    """Look tokens up and multiply by the same table again."""

    vocab: int
    hidden: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocab, self.hidden)
        return embed.attend(embed(tokens))


def tied_embedding(batch_size: int, seq_len: int, *, vocab: int, hidden: int) -> Case:
    shapes = {name: integers(batch_size, seq_len) for name in "xy"}
    return token_classification(TiedEmbedding(vocab, hidden), shapes)


class BertMLM(nn.Module):
    """Tied embeddings around encoder layers, with a dense layer and a norm before the head."""

    vocab: int
    hidden: int
    num_layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocab, self.hidden, name="embed")
        positions = self.param(
            "positions", nn.initializers.normal(), (tokens.shape[1], self.hidden)
        )
        x = nn.LayerNorm(name="ln_embed")(embed(tokens) + positions)
        x = Bert(self.num_layers, self.heads, name="encoder")(x)
        x = nn.LayerNorm(name="ln_head")(nn.gelu(nn.Dense(self.hidden, name="transform")(x)))
        return embed.attend(x)


def bert_mlm(
    batch_size: int, seq_len: int, hidden: int, *, vocab: int, heads: int = 8, layers: int = 2
) -> Case:
    shapes = {name: integers(batch_size, seq_len) for name in "xy"}
    return token_classification(BertMLM(vocab, hidden, layers, heads), shapes)


class Experts(nn.Module):
    """Top-2 gating over groups of tokens with dense dispatch, as in GShard and in Alpa."""

    num_experts: int
    group: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, inner = x.shape[-1], 4 * x.shape[-1]
        groups = x.reshape(-1, self.group, hidden)
        capacity = 2 * self.group // self.num_experts
        gates = jax.nn.softmax(nn.Dense(self.num_experts, use_bias=False, name="router")(groups))
        combine = jnp.zeros((*gates.shape, capacity))
        used = jnp.zeros((gates.shape[0], 1, self.num_experts))
        rest = gates
        for _ in range(2):
            chosen = jax.nn.one_hot(jnp.argmax(rest, axis=-1), self.num_experts)
            rest = rest * (1 - chosen)
            slot = jnp.cumsum(chosen, axis=1) - 1 + used
            used = used + chosen.sum(axis=1, keepdims=True)
            slots = jax.nn.one_hot((slot * chosen).sum(axis=-1).astype(jnp.int32), capacity)
            combine = combine + (gates * chosen)[..., None] * slots[:, :, None, :]
        dispatch = (combine > 0).astype(x.dtype)
        wi = self.param("wi", nn.initializers.normal(), (self.num_experts, hidden, inner))
        wo = self.param("wo", nn.initializers.normal(), (self.num_experts, inner, hidden))
        sent = jnp.einsum("gsec,gsm->egcm", dispatch, groups)
        h = nn.relu(jnp.einsum("egcm,emh->egch", sent, wi))
        back = jnp.einsum("egch,ehm->egcm", h, wo)
        return jnp.einsum("gsec,egcm->gsm", combine, back).reshape(x.shape)


class MoELayer(nn.Module):
    """Attention, then experts, each with a residual and a norm."""

    heads: int
    num_experts: int
    group: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="ln1")(x + Attention(self.heads, name="attention")(x))
        experts = Experts(self.num_experts, self.group, name="experts")
        return nn.LayerNorm(name="ln2")(x + experts(x))


def moe_layer(
    batch_size: int, seq_len: int, hidden: int, *, heads: int, num_experts: int, group: int
) -> Case:
    shapes = {name: floats(batch_size, seq_len, hidden) for name in "xy"}
    return regression(MoELayer(heads, num_experts, group), shapes)


class MoELM(nn.Module):
    """Tied embeddings around blocks, every second of them with experts, as in Alpa."""

    vocab: int
    hidden: int
    num_layers: int
    heads: int
    num_experts: int
    group: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocab, self.hidden, name="embed")
        x = embed(tokens)
        for i in range(self.num_layers):
            if i % 2 == 0:
                x = MoELayer(self.heads, self.num_experts, self.group, name=f"layer_{i}")(x)
            else:
                x = BertLayer(self.heads, name=f"layer_{i}")(x)
        return embed.attend(x)


def moe_lm(
    batch_size: int, seq_len: int, hidden: int, *, vocab: int, heads: int, num_experts: int,
    group: int, layers: int = 2,
) -> Case:  # fmt: skip
    shapes = {name: integers(batch_size, seq_len) for name in "xy"}
    return token_classification(MoELM(vocab, hidden, layers, heads, num_experts, group), shapes)


class ConvNet(nn.Module):
    """3x3 convolutions, optionally each followed by batch normalization and ReLU."""

    num_layers: int
    channels: int
    batch_norm: bool
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.num_layers):
            groups = self.channels if self.depthwise else 1
            x = nn.Conv(self.channels, (3, 3), feature_group_count=groups)(x)
            if self.batch_norm:
                x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return x


def conv_net(
    num_layers: int, batch_size: int, size: int, channels: int, *, batch_norm: bool = False,
    depthwise: bool = False,
) -> Case:  # fmt: skip
    shapes = {name: floats(batch_size, size, size, channels) for name in "xy"}
    return regression(ConvNet(num_layers, channels, batch_norm, depthwise), shapes)
