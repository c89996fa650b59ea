"""Random plans, and how a sharded result is compared with the undecorated step's.

Every assignment of mesh axes to the factors of the decision nodes is a valid program: whatever
layouts are drawn, the results must be those of `jax.jit(step)` on one device. So a random
assignment per node tests rules, contraction, layout changes and local ops at once, far from the few
layouts a solver would ever choose.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import numpy as np

from alpa_lite.cost_model import Cluster
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.decision_graph import Contraction
from alpa_lite.passes.decisions import Decisions, collectives, decide
from alpa_lite.passes.methods import AutoParallel
from alpa_lite.passes.microbatch import check_outputs
from alpa_lite.passes.pipeline import PlannedStep, StepArgs, prepare, trace_call
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.strategies import Assignment, enumerate_strategies
from alpa_lite.runtime import lower
from alpa_lite.runtime.lower import Executable, lower_step

MESH_SHAPES = ((8,), (2, 4), (4, 2), (2, 2, 2))

# Float32 keeps 24 bits: one rounding is off by at most 6e-8 of the value. Sharding reassociates
# sums, so a result of n roundings differs by about sqrt(n) of them, relative to the largest
# summand: 1e-5 of the leaf's largest element allows for some ten thousand. Chains of ops amplify
# what their operands differ by; 1e-4 allows for ten times more.
TOLERANCE = 1e-4

QUICK_COMPILE = {"xla_backend_optimization_level": 0}

_CLUSTER = Cluster.parse("cpu:8")
_RULES = RuleTable()  # rules depend on the op and its shapes alone, so all tests share them


def mesh_of(shape: Sequence[int]) -> Mesh:
    """A mesh with axes `x0`, `x1`, ..."""
    return Mesh(tuple((f"x{i}", n) for i, n in enumerate(shape)))


@dataclass(frozen=True, slots=True, eq=False)
class PreparedStep:
    """A step up to its decision graph: what all random plans of it share.

    Attributes:
      call: the step and how it is called.
      contraction: its decision graph.
      classes: share class per node.
      output_kinds: how outputs of microbatches combine.
    """

    call: StepArgs
    contraction: Contraction
    classes: tuple[int, ...]
    output_kinds: tuple[str, ...]

    @property
    def avals(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of every input leaf."""
        return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(self.call.args)]


def prepare_step(
    step: Callable[..., Any], args: Sequence[Any], *, batch_argnums: Sequence[int] = (1,),
    donate_argnums: Sequence[int] = (0,), num_microbatches: int = 1,
) -> PreparedStep:  # fmt: skip
    """Trace and contract `step(*args)`; `args` may be arrays or shapes."""
    names = tuple(f"arg{i}" for i in range(len(args)))
    call = StepArgs(
        fun=step, args=tuple(args), arg_names=names, batch_argnums=tuple(batch_argnums),
        donate_argnums=tuple(donate_argnums), name=getattr(step, "__name__", "step"),
    )  # fmt: skip
    traced = trace_call(call, num_microbatches)
    full = trace_call(call, 1) if num_microbatches > 1 else traced
    kinds = check_outputs(full, traced, num_microbatches)
    contraction, inputs = prepare(traced, call, num_microbatches, AutoParallel(), _CLUSTER, _RULES)
    return PreparedStep(call, contraction, inputs.classes, kinds)


def random_decisions(
    prepared: PreparedStep, mesh: Mesh, seed: int, *, share: bool = False
) -> Decisions:
    """A random strategy for every node, or with `share` one for each class of identical layers."""
    rng = np.random.default_rng(seed)
    contraction = prepared.contraction
    keys = prepared.classes if share else range(len(contraction.nodes))
    chosen: dict[int, Assignment] = {}
    for node, key in zip(contraction.nodes, keys, strict=True):
        if key not in chosen:
            options = enumerate_strategies(node, mesh, max_strategies=10**6).assignments
            chosen[key] = options[rng.integers(len(options))]
    return decide(contraction, mesh, [chosen[key] for key in keys])


def random_planned_step(
    prepared: PreparedStep, mesh: Mesh, seed: int, *, share: bool = False, quick: bool = True
) -> Executable:
    """Compile a random plan; nothing is donated, so that inputs can be used again.

    Args:
      prepared: the step.
      mesh: logical mesh over the attached devices.
      seed: of the layouts.
      share: whether identical layers get one layout.
      quick: compile without XLA's optimizations, which takes half the time.
    """
    decisions = random_decisions(prepared, mesh, seed, share=share)
    return compile_decisions(prepared, decisions, quick=quick)


def compile_decisions(
    prepared: PreparedStep, decisions: Decisions, *, quick: bool = True
) -> Executable:
    """Compile given layouts."""
    planned = PlannedStep(None, decisions, prepared.output_kinds)  # type: ignore[arg-type]
    with quick_compilation(quick):
        return lower_step(planned, prepared.avals, ())


@contextlib.contextmanager
def quick_compilation(enabled: bool = True) -> Iterator[None]:
    """While it lasts, `runtime.lower` compiles without XLA's optimizations: in half the time."""
    with mock.patch.object(lower, "jax", _QuickJax() if enabled else jax):
        yield


class _QuickJax:
    """JAX as `runtime.lower` sees it; only that module's own `jax.jit` is another one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    @staticmethod
    def jit(*args: Any, compiler_options: Mapping[str, Any], **options: Any) -> Any:
        return jax.jit(*args, **options, compiler_options={**compiler_options, **QUICK_COMPILE})


def predicted_bytes(decisions: Decisions) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes per step that the plan says it communicates, by kind and mesh axes."""
    totals: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for use in collectives(decisions):
        totals[use.kind, use.axes] += use.times * use.payload_bytes
    return dict(totals)


def byte_differences(
    predicted: Mapping[Any, float], compiled: Mapping[Any, float], rtol: float = 0.01
) -> dict[Any, tuple[float, float]]:
    """Kinds and axes whose (predicted, compiled) bytes differ by more than `rtol`."""
    pairs = {k: (predicted.get(k, 0.0), compiled.get(k, 0.0)) for k in {*predicted, *compiled}}
    return {k: (a, b) for k, (a, b) in pairs.items() if abs(a - b) > rtol * max(a, b)}


def relative_errors(reference: Any, found: Any, *, floor: float = 1e-6) -> dict[str, float]:
    """Largest difference per leaf, relative to the leaf's largest element, by path.

    NaNs and infinities must be in the same places; PRNG keys, integers and booleans must be equal
    (their error is 0 or infinite).

    Args:
      reference, found: pytrees of one structure.
      floor: magnitude below which a leaf counts as zero: differences are relative to it at least.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(reference)
    assert jax.tree.structure(found) == tree, (jax.tree.structure(found), tree)
    return {
        jax.tree_util.keystr(path) or "value": _leaf_error(a, b, floor)
        for (path, a), b in zip(leaves, jax.tree.leaves(found), strict=True)
    }


def assert_close(
    reference: Any, found: Any, *, tolerance: float = TOLERANCE, floor: float = 1e-6,
    what: str = "",
) -> None:  # fmt: skip
    """Fail with the path and error of every leaf that differs."""
    errors = relative_errors(reference, found, floor=floor)
    wrong = {path: error for path, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{what} differs from the undecorated step: {wrong}"


def _leaf_error(a: Any, b: Any, floor: float) -> float:
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype), (a.shape, a.dtype, b.shape, b.dtype)
    floating = jax.numpy.issubdtype(a.dtype, np.floating)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(a)
    if not floating or not np.array_equal(finite, np.isfinite(b)):
        return 0.0 if np.array_equal(a, b) else np.inf
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return np.inf
    scale = max(floor, np.abs(a[finite]).max(initial=0.0))
    return float(np.abs(a - b)[finite].max(initial=0.0) / scale)
