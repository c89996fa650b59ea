"""Attentions to be timed side by side: problems, implementations, and a timer.

FLOPs are counted as in the papers: `4 * batch * heads * queries * keys * head_dim` forward, half of
it under a causal mask, by the pairs that are seen under a window, and 2.5 times as many backward.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = Any
Attention = Callable[[Array, Array, Array], Array]

FORWARD, BACKWARD = "forward", "backward"
PASSES = (FORWARD, BACKWARD)
BACKWARD_FACTOR = 2.5
WIDTH = 2048  # heads times head dim
TOKENS = 16384  # batch times sequence
XLA_MAX_SEQ = 2048  # above it the score matrix would not fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One attention, queries and keys of one length."""

    seq: int
    head_dim: int
    causal: bool = True
    group: int = 1
    window: int | None = None
    tokens: int = TOKENS
    width: int = WIDTH
    dtype: str = "bfloat16"

    @property
    def batch(self) -> int:
        """Examples."""
        return max(1, self.tokens // self.seq)

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.width // self.head_dim

    @property
    def mask(self) -> str:
        """For people."""
        return f"window {self.window}" if self.window else "causal" if self.causal else "full"

    @property
    def name(self) -> str:
        """`128-causal-4096`, with the group if it is not 1."""
        group = f"-group{self.group}" if self.group > 1 else ""
        return f"{self.head_dim}-{self.mask.replace(' ', '')}-{self.seq}{group}"

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5

    def flops(self, which: str) -> float:
        """Of one pass, by the convention of this module."""
        pairs = self.seq * self.seq / (2 if self.causal else 1)
        if self.window:
            seen = min(self.window, self.seq)
            pairs = seen * self.seq - seen * (seen - 1) / 2
        forward = 4.0 * self.batch * self.heads * self.head_dim * pairs
        return forward * (1.0 if which == FORWARD else BACKWARD_FACTOR)

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """Random q, k, v and gradient of the output."""
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (self.heads, self.heads // self.group, self.heads // self.group, self.heads)
        shapes = [(self.batch, self.seq, n, self.head_dim) for n in heads]
        return tuple(  # type: ignore[return-value]
            jax.random.normal(key, shape, self.dtype)
            for key, shape in zip(keys, shapes, strict=True)
        )


def ours(problem: Problem) -> Attention:
    from alpa_lite import flash_attention

    return functools.partial(
        flash_attention, causal=problem.causal, window=problem.window, scale=problem.scale
    )


def reference(problem: Problem) -> Attention:
    """Dense, in float32 throughout."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        k, v = (jnp.repeat(x, problem.group, axis=2) for x in (k, v))
        position = jnp.arange(problem.seq)
        distance = position[:, None] - position
        seen = jnp.full(distance.shape, True)
        if problem.causal:
            seen &= distance >= 0
        if problem.window:
            seen &= distance < problem.window
        scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * problem.scale
        p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", p, v, precision="highest")

    return attend


def of_jax(problem: Problem, implementation: str) -> Attention:
    """`jax.nn.dot_product_attention`."""
    if implementation == "xla" and problem.seq > XLA_MAX_SEQ:
        raise ValueError(f"the scores of {problem.seq} queries are too large")
    window = (problem.window - 1, 0) if problem.window else None
    return functools.partial(
        jax.nn.dot_product_attention, scale=problem.scale, is_causal=problem.causal,
        local_window_size=window, implementation=implementation,
    )  # fmt: skip


def pallas_of_jax(problem: Problem) -> Attention:
    """The Triton kernel shipped with JAX; wrong for groups of heads, so keys are repeated first.

    Its other kernel, `attention_mgpu`, takes float16 alone, knows no scale and has no causal
    backward pass; it is left out.
    """
    if problem.window:
        raise ValueError("no window")
    from jax.experimental.pallas.ops.gpu.attention import mha

    def attend(q: Array, k: Array, v: Array) -> Array:
        k, v = (jnp.repeat(x, problem.group, axis=2) for x in (k, v))
        return mha(q, k, v, None, sm_scale=problem.scale, causal=problem.causal)

    return attend


def tokamax(problem: Problem) -> Attention:
    """Google's kernel library, if it is installed."""
    import tokamax as library

    window = (problem.window - 1, 0) if problem.window else None
    return functools.partial(
        library.dot_product_attention, scale=problem.scale, is_causal=problem.causal,
        local_window_size=window, implementation="mosaic",
    )  # fmt: skip


VARIANTS: Mapping[str, Callable[[Problem], Attention]] = {
    "ours": ours,
    "cudnn": functools.partial(of_jax, implementation="cudnn"),
    "xla": functools.partial(of_jax, implementation="xla"),
    "pallas": pallas_of_jax,
    "tokamax": tokamax,
}


@dataclass(frozen=True, slots=True)
class Timed:
    """A compiled program and what to call it with."""

    program: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.program(*self.arguments)


def prepare(attention: Attention, problem: Problem, which: str) -> Timed:
    """Compile one pass; of the backward pass, with the residuals of the forward pass as arguments.

    Raises:
      Exception: whatever the implementation raises where it cannot do this.
    """
    q, k, v, dout = problem.arrays()
    if which == FORWARD:
        return Timed(jax.jit(attention).lower(q, k, v).compile(), (q, k, v))
    pull = jax.jit(lambda q, k, v: jax.vjp(attention, q, k, v)[1])(q, k, v)
    program = jax.jit(lambda pull, dout: pull(dout)).lower(pull, dout).compile()
    return Timed(program, (pull, dout))


def errors(attention: Attention, problem: Problem) -> tuple[float, float]:
    """Largest relative L2 errors of the output and of the three gradients, against `reference`."""

    def both(attention: Attention, *arrays: Array) -> list[Array]:
        *operands, dout = arrays
        out, pull = jax.vjp(attention, *operands)
        return [out, *pull(dout.astype(out.dtype))]

    arrays = problem.arrays()
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    found = jax.jit(functools.partial(both, attention))(*arrays)
    expected = jax.jit(functools.partial(both, reference(problem)))(*exact)

    def distance(one: Array, other: Array) -> float:
        difference = jnp.linalg.norm((one.astype(jnp.float32) - other).ravel())
        return float(difference / jnp.linalg.norm(other.ravel()))

    of_output, *of_gradients = map(distance, found, expected)
    return of_output, max(of_gradients)


def interleaved_s(programs: Mapping[str, Timed], rounds: int, round_s: float) -> dict[str, float]:
    """Median seconds of a call of each program.

    In every round each program runs for about `round_s` in turn, so that a change of clocks meets
    all. Calls of a turn are issued at once and waited for together.
    """
    calls = {}
    for name, program in programs.items():
        jax.block_until_ready(program())  # the first call is slower
        started = time.perf_counter()
        jax.block_until_ready([program() for _ in range(3)])
        calls[name] = max(1, round(round_s / ((time.perf_counter() - started) / 3)))
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            started = time.perf_counter()
            result = None
            for _ in range(calls[name]):
                result = program()
            jax.block_until_ready(result)
            samples[name].append((time.perf_counter() - started) / calls[name])
    return {name: statistics.median(times) for name, times in samples.items()}
