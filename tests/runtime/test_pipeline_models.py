"""Models as pipelines are the models: schedules, shapes of stages and rematerialisation.

The judge is one device. The optimizer is linear in the gradients, so the step of a batch is the mean
of the steps of its microbatches: three steps, the loss and every leaf of state and results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import alpa_lite
from alpa_lite.models import build
from tests.runtime.pipeline_cases import RTOL, STEPS
from tests.runtime.random_plans import QUICK_COMPILE, assert_close, quick_compilation
from tests.runtime.test_equivalence import fast_links

BATCH, COUNT = 16, 4
# Batch norm divides by deviations of few numbers.
RTOL_NORM = 1e-3


def grid(dp: int, tp: int, pp: int, **options: Any) -> alpa_lite.ThreeDParallel:
    return alpa_lite.ThreeDParallel(dp, tp, pp, num_microbatches=COUNT, **options)


def uneven(**options: Any) -> alpa_lite.ManualPipeline:
    """A small stage on two devices and a large one on four; two devices are idle."""
    return alpa_lite.ManualPipeline(
        [[0], [1, 2]], [(1, 2), (1, 4)], num_microbatches=COUNT, layer_num=3, **options
    )


def check(
    step: Callable[..., Any], state: Any, make_batch: Callable[[int], Any], method: Any,
    rtol: float = RTOL,
) -> alpa_lite.PipelinePlan:  # fmt: skip
    parallel = alpa_lite.parallelize(step, method=method, cluster=fast_links())
    one = jax.jit(step, compiler_options=QUICK_COMPILE)
    expected, found = state, jax.tree.map(jnp.copy, state)
    with quick_compilation():
        plan = parallel.compile(found, make_batch(0)).plan
    count = plan.num_microbatches
    for number in range(STEPS):
        batch = make_batch(number)
        rows = [
            jax.tree.map(lambda x, m=m: np.split(np.asarray(x), count)[m], batch)
            for m in range(count)
        ]
        expected, wanted = mean([one(expected, each) for each in rows])
        found, results = parallel(found, batch)
        assert_close(
            (expected, wanted), (found, results), tolerance=rtol, floor=1e-3,
            what=f"step {number}, {method}",
        )  # fmt: skip
    return plan


def mean(results: list[Any]) -> Any:
    """Numbers averaged; counters and keys are those of any."""

    def one(*xs: Any) -> Any:
        return sum(xs) / len(xs) if jnp.issubdtype(xs[0].dtype, jnp.inexact) else xs[0]

    return jax.tree.map(one, *results)


MODELS = [
    ("gpt-test", {}, grid(2, 2, 2), RTOL),
    ("gpt-test", {}, uneven(schedule="gpipe", remat="full"), RTOL),
    ("gpt-test", {}, grid(1, 2, 4, schedule="zb-h1", remat="dots", layer_num=4), RTOL),
    ("gpt-test", {"num_layers": 4},
     grid(2, 2, 2, schedule="interleaved_1f1b", num_virtual=2, layer_num=4), RTOL),
    ("llama-test", {}, grid(2, 1, 4, schedule="eager_1f1b", layer_num=4), RTOL),
    ("llama-test", {}, grid(2, 1, 4, schedule="chimera", layer_num=4), RTOL),
    ("llama-scan-test", {"num_layers": 4}, grid(2, 2, 2, remat="full"), RTOL),
    ("llama-scan-test", {"num_layers": 4}, grid(1, 2, 4, schedule="zb-h1"), RTOL),
    ("moe-test", {}, grid(1, 4, 2), RTOL),
    ("moe-test", {}, grid(2, 2, 2, schedule="zbv", num_virtual=2, layer_num=4), RTOL),
    ("wide-resnet-test", {}, grid(2, 2, 2), RTOL_NORM),
    ("wide-resnet-test", {}, uneven(schedule="zb-h1", remat="full"), RTOL_NORM),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "method", "rtol"), MODELS,
    ids=[f"{model}-{method.label}" for model, _, method, _ in MODELS],
)  # fmt: skip
def test_models(model: str, options: dict[str, Any], method: Any, rtol: float) -> None:
    setup = build(model, optimizer="sgd", **options)
    state = jax.jit(setup.init, compiler_options=QUICK_COMPILE)(jax.random.key(0))
    check(setup.step, state, lambda seed: setup.make_batch(seed, BATCH), method, rtol)


@pytest.mark.slow
def test_deepseek() -> None:
    """Its router bias moves by the sign of the mean load, which is not linear in microbatches."""
    setup = build("deepseek-test", optimizer="sgd")
    state = jax.jit(setup.init, compiler_options=QUICK_COMPILE)(jax.random.key(0))
    one = alpa_lite.AutoParallel(num_microbatches=COUNT)
    methods = {"cpu:1": one, "cpu:8": grid(2, 2, 2, remat="dots")}
    steps = {
        name: alpa_lite.parallelize(setup.step, method=method, cluster=name)
        for name, method in methods.items()
    }
    states = {name: jax.tree.map(jnp.copy, state) for name in steps}
    for seed in range(STEPS):
        results = {}
        for name, step in steps.items():
            with quick_compilation():
                step.compile(states[name], setup.make_batch(seed, BATCH))
            states[name], results[name] = step(states[name], setup.make_batch(seed, BATCH))
        expected, found = ((states[n], results[n]) for n in ("cpu:1", "cpu:8"))
        assert_close(expected, found, tolerance=RTOL, floor=1e-3, what=f"step {seed}")


@pytest.mark.slow
def test_a_searched_gpt() -> None:
    setup = build("gpt-test", optimizer="sgd")
    state = jax.jit(setup.init, compiler_options=QUICK_COMPILE)(jax.random.key(0))
    method = alpa_lite.PipeshardParallel(num_stages=3, num_microbatches=COUNT)
    plan = check(setup.step, state, lambda seed: setup.make_batch(seed, BATCH), method)
    assert len({m.submesh for m in plan.meshes}) == 2, "three stages on eight devices are unequal"


class Block(nn.Module):
    """Attention to oneself, to the encoder if there is one, and a perceptron."""

    @nn.compact
    def __call__(self, x: jax.Array, encoded: jax.Array | None) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(2, name="own")(nn.LayerNorm()(x))
        if encoded is not None:
            x = x + nn.MultiHeadDotProductAttention(2, name="cross")(nn.LayerNorm()(x), encoded)
        return x + nn.Dense(16)(jnp.tanh(nn.Dense(32)(nn.LayerNorm()(x))))


class EncoderDecoder(nn.Module):
    """Every layer of the decoder reads the encoder's result; both share the embedding."""

    layers: int = 2

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        embed = nn.Embed(32, 16)
        encoded = embed(source)
        for i in range(self.layers):
            encoded = Block(name=f"encoder_{i}")(encoded, None)
        x = embed(target)
        for i in range(self.layers):
            x = Block(name=f"decoder_{i}")(x, encoded)
        return embed.attend(x)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(grid(2, 2, 2), marks=pytest.mark.slow),
        pytest.param(grid(2, 1, 4, schedule="zb-h1", remat="full"), marks=pytest.mark.slow),
        pytest.param(
            alpa_lite.ThreeDParallel(1, 2, 4, schedule="dualpipe", num_microbatches=8),
            marks=pytest.mark.slow,
        ),
        pytest.param(uneven(remat="dots"), marks=pytest.mark.slow),
    ],
    ids=lambda method: method.label,
)
def test_encoder_and_decoder(method: Any) -> None:
    model = EncoderDecoder()

    def make_batch(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {name: rng.integers(0, 32, (BATCH, 6)) for name in ("source", "target")}

    def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = state.apply_fn(params, batch["source"], batch["target"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"])
            return losses.mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    def init(key: jax.Array) -> TrainState:
        batch = make_batch(0)
        params = model.init(key, batch["source"], batch["target"])
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))

    state = jax.jit(init, compiler_options=QUICK_COMPILE)(jax.random.key(0))
    check(step, state, make_batch, method)
