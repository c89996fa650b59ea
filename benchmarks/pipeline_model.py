"""The model of the pipeline benchmarks: residual MLP stages with any number of parameters.

As one train step for `alpa_lite.parallelize`, and by hand: the loop of jitted functions that one
would write for the same pipeline without a compiler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alpa_lite

Stage = list[dict[str, jax.Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes.

    Attributes:
      num_stages: stages.
      leaves_per_stage: parameter arrays of a stage, two per layer.
      width: of every layer.
      rows: examples of a microbatch.
      num_microbatches: microbatches.
    """

    num_stages: int
    leaves_per_stage: int
    width: int = 16
    rows: int = 4
    num_microbatches: int = 16

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Momentum: one more array per parameter."""
        return optax.sgd(0.01, momentum=0.9)

    def init(self) -> dict[str, Any]:
        """The state, as numpy arrays: parameters per stage, optimizer state."""
        rng = np.random.default_rng(0)
        size = (self.width, self.width)

        def layer() -> dict[str, np.ndarray]:
            w = rng.standard_normal(size, np.float32) / self.width
            return {"w": w, "b": np.zeros(self.width, np.float32)}

        params = [
            [layer() for _ in range(self.leaves_per_stage // 2)] for _ in range(self.num_stages)
        ]
        return {"params": params, "opt": jax.tree.map(np.asarray, self.optimizer.init(params))}

    def batch(self) -> dict[str, np.ndarray]:
        """All rows of a step."""
        rng = np.random.default_rng(1)
        shape = (self.rows * self.num_microbatches, self.width)
        return {name: rng.standard_normal(shape, np.float32) for name in ("x", "y")}

    def step(self, state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        """A train step; every stage is a layer of the pipeline."""

        def loss(params: list[Stage]) -> jax.Array:
            x = batch["x"]
            for i, stage in enumerate(params):
                x = run_stage(stage, x)
                if i < self.num_stages - 1:
                    x = alpa_lite.mark_layer(x)
            return mean_square(x, batch["y"])

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = self.optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    def method(self, devices_per_stage: int, schedule: str, num_virtual: int = 1) -> Any:
        """One stage per submesh; `num_virtual` of them if the schedule interleaves."""
        meshes = self.num_stages // num_virtual
        return alpa_lite.ManualPipeline(
            layers=[[i] for i in range(self.num_stages)],
            submeshes=[(1, devices_per_stage)] * meshes,
            mesh_shapes=[(devices_per_stage,)] * meshes,
            num_microbatches=self.num_microbatches, schedule=schedule, num_virtual=num_virtual,
        )  # fmt: skip


def run_stage(params: Stage, x: jax.Array) -> jax.Array:
    """One stage; what its layers add does not grow with their number."""
    for layer in params:
        x = x + jnp.tanh(x @ layer["w"] + layer["b"]) / len(params)
    return x


def mean_square(x: jax.Array, y: jax.Array) -> jax.Array:
    """The loss."""
    return jnp.mean((x - y) ** 2)


class HandWrittenPipeline:
    """1F1B over one device per stage, as one writes it by hand.

    A jitted function per kind of work, shared by all stages: forward returns the residuals as the
    pytree that `jax.vjp` gives; the last stage does forward and backward in one; gradients are
    summed in place, and the update takes over the memory of the state.
    """

    def __init__(self, model: Model, devices: Sequence[jax.Device]) -> None:
        self.model = model
        self.devices = list(devices[: model.num_stages])
        self.order = one_f_one_b(model.num_stages, model.num_microbatches)
        scale = 1.0 / model.num_microbatches

        def forward(params: Stage, x: jax.Array) -> Any:
            return jax.vjp(run_stage, params, x)

        def last(params: Stage, sums: Any, x: jax.Array, y: jax.Array) -> Any:
            def loss(params: Stage, x: jax.Array) -> jax.Array:
                return scale * mean_square(run_stage(params, x), y)

            value, (grads, dx) = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
            return jax.tree.map(jnp.add, sums, (value, grads)), dx

        def backward(sums: Any, vjp: Any, dy: jax.Array) -> Any:
            grads, dx = vjp(dy)
            return jax.tree.map(jnp.add, sums, grads), dx

        def first(sums: Any, vjp: Any, dy: jax.Array) -> Any:
            return backward(sums, vjp, dy)[0]

        def update(params: Stage, opt: Any, grads: Any) -> Any:
            updates, opt = model.optimizer.update(grads, opt, params)
            return optax.apply_updates(params, updates), opt

        self.forward = jax.jit(forward)
        self.last = jax.jit(last, donate_argnums=1)
        self.backward = jax.jit(backward, donate_argnums=0)
        self.first = jax.jit(first, donate_argnums=0)
        self.update = jax.jit(update, donate_argnums=(0, 1))
        self.zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params))
        self.no_loss = [jax.device_put(np.float32(0), d) for d in self.devices]

    def place(self, state: dict[str, Any]) -> tuple[list[Stage], list[Any]]:
        """Parameters and optimizer state per stage, on its device."""
        made = zip(state["params"], self.devices, strict=True)
        params = [jax.device_put(p, d) for p, d in made]
        return params, [self.model.optimizer.init(p) for p in params]

    @property
    def num_calls(self) -> int:
        """Calls per step: of jitted functions, and of `jax.device_put` between devices."""
        between = 2 * (self.model.num_stages - 1) * self.model.num_microbatches
        return len(self.order) + between + 2 * self.model.num_stages

    def step(
        self, state: tuple[list[Stage], list[Any]], batch: dict[str, Any]
    ) -> tuple[tuple[list[Stage], list[Any]], jax.Array]:
        """One train step; returns before it is done."""
        params, opt = state
        devices, end = self.devices, self.model.num_stages - 1
        rows = self.model.rows
        cuts = [slice(m * rows, (m + 1) * rows) for m in range(self.model.num_microbatches)]
        xs: dict[tuple[int, int], jax.Array] = {}
        dys: dict[tuple[int, int], jax.Array] = {}
        vjps: dict[tuple[int, int], Any] = {}
        for m, x in enumerate(jax.device_put([batch["x"][c] for c in cuts], devices[0])):
            xs[0, m] = x
        ys = jax.device_put([batch["y"][c] for c in cuts], devices[end])
        sums: list[Any] = [self.zeros(p) for p in params]
        sums[end] = (self.zeros(self.no_loss[end]), sums[end])
        for kind, s, m in self.order:
            if kind == "forward" and s < end:
                y, vjps[s, m] = self.forward(params[s], xs.pop((s, m)))
                xs[s + 1, m] = jax.device_put(y, devices[s + 1])
            elif kind == "forward":
                sums[s], dx = self.last(params[s], sums[s], xs.pop((s, m)), ys[m])
                dys[s - 1, m] = jax.device_put(dx, devices[s - 1])
            elif s:
                sums[s], dx = self.backward(sums[s], vjps.pop((s, m)), dys.pop((s, m)))
                dys[s - 1, m] = jax.device_put(dx, devices[s - 1])
            else:
                sums[s] = self.first(sums[s], vjps.pop((s, m)), dys.pop((s, m)))
        loss, sums[end] = sums[end]
        new = [self.update(*each) for each in zip(params, opt, sums, strict=True)]
        return ([p for p, _ in new], [o for _, o in new]), loss


def one_f_one_b(num_stages: int, num_microbatches: int) -> list[tuple[str, int, int]]:
    """(kind, stage, microbatch) in an order in which all inputs are made before they are read.

    The last stage has no backward of its own: its forward does both.
    """
    end = num_stages - 1
    lists = []
    for s in range(end):
        ahead = min(num_stages - s, num_microbatches)
        tasks = [("forward", s, m) for m in range(ahead)]
        for m in range(num_microbatches):
            tasks.append(("backward", s, m))
            if m + ahead < num_microbatches:
                tasks.append(("forward", s, m + ahead))
        lists.append(tasks)
    lists.append([("forward", end, m) for m in range(num_microbatches)])
    done: set[tuple[str, int, int]] = set()
    at: dict[int, int] = defaultdict(int)
    order = []
    while len(order) < sum(map(len, lists)):
        for s, tasks in enumerate(lists):
            if at[s] == len(tasks):
                continue
            kind, _, m = tasks[at[s]]
            if kind == "forward":
                ready = s == 0 or ("forward", s - 1, m) in done
            else:
                ready = ("forward" if s + 1 == end else "backward", s + 1, m) in done
            if ready:
                order.append(tasks[at[s]])
                at[s] += 1
        done.update(order)
    return order
