"""Everything that differs between the JAX versions of the window (0.10.2 to 0.12).

No other module reads a private or moved JAX name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import array as jax_array
from jax._src import distributed, xla_bridge
from jax._src.lib import xla_client
from jax.extend import core as jex_core
from jax.extend import source_info_util
from jax.interpreters import mlir, partial_eval
from jax.sharding import Sharding, SingleDeviceSharding

_MAX_FRAMES = 1000
_OWN_CODE = re.escape(str(Path(__file__).resolve().parent)) + r"[/\\](ir[/\\]|api\.py|compat\.py)"
_LIBRARY_FRAME = re.compile(
    rf"{_OWN_CODE}|.*[/\\](site|dist)-packages[/\\](jax|jaxlib|flax|optax|chex)[/\\]"
)


def backend_has_started() -> bool:
    """Whether a JAX backend runs; everything public that would tell starts one."""
    return xla_bridge.backends_are_initialized()


def source_line(source_infos: Sequence[Any]) -> str:
    """`file.py:line (function)` of the user's frame that made an equation, or `""`.

    That is the innermost frame outside of JAX, Flax, Optax and this package (its models count as
    user code); where there is none, the innermost frame.

    Args:
      source_infos: of the equation and of the calls around it, innermost first. JAX cuts the frames
        of a jitted function's equations at its border, so the caller's are those of the call.
    """
    frames: list[str] = []  # innermost last
    for info in source_infos:
        outer = source_info_util.summarize(info, num_frames=_MAX_FRAMES).splitlines()
        frames = outer + frames
    theirs = [frame for frame in frames if not _LIBRARY_FRAME.match(frame)]
    return (theirs or frames or [""])[-1]


def has_side_effect(eqn: Any) -> bool:
    """Whether an equation prints, calls back or otherwise does more than compute its results."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def equation_params(eqn: Any) -> dict[str, Any]:
    """The parameters of an equation, in the form that holds in the whole window.

    A `scan` says how many of its operands are constants and carries (`num_consts`, `num_carry`),
    where jax 0.12 has the pytrees of its operands and results (`ft_in`, `ft_out`).
    """
    params = dict(eqn.params)
    if eqn.primitive.name == "scan" and "ft_in" in params:
        consts, carry, _ = params.pop("ft_in").unpack()
        del params["ft_out"]
        params |= {"num_consts": len(consts), "num_carry": len(carry)}
    return params


def scope_name(source_info: Any) -> str:
    """The name stack of an equation, `transpose(jvp(LM))/Block_1/Dense_0`."""
    return str(source_info.name_stack)


def remove_dead_code(closed: Any) -> Any:
    """The closed jaxpr without equations that no output or effect needs (nested ones too)."""
    jaxpr, used = partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True
    )
    assert all(used)
    return jex_core.ClosedJaxpr(jaxpr, closed.consts)


def jaxpr_parts(closed: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, consts) of a closed jaxpr, or of an open one without constants."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def constants_as_operands(closed: Any) -> Any:
    """The closed jaxpr with its constants turned into leading operands."""
    jaxpr = closed.jaxpr
    operands = [*jaxpr.constvars, *jaxpr.invars]
    names = None  # argument names would no longer line up with the operands
    info = jaxpr.debug_info._replace(arg_names=names, result_paths=None)
    return jex_core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=operands, debug_info=info), ())


def is_literal(atom: Any) -> bool:
    """Whether a jaxpr operand is a literal rather than a variable."""
    return isinstance(atom, jex_core.Literal)


def is_drop_var(var: Any) -> bool:
    """Whether a jaxpr result is thrown away."""
    return type(var).__name__ == "DropVar"


def evaluate_equation(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Bind one equation on new operands, under its own name stack and source line.

    Args:
      eqn: of some jaxpr.
      operands: values in place of `eqn.invars`, literals included.
    """
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    params = eqn.primitive.get_bind_params(eqn.params)
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def new_variable(aval: Any) -> Any:
    """A jaxpr variable that is no other's."""
    return jex_core.Var(aval)


def moved_equation(eqn: Any, operands: Sequence[Any], results: Sequence[Any], around: Any) -> Any:
    """An equation with other operands and results, as if it stood in the call of `around`.

    Args:
      eqn: of a nested jaxpr, or of the same one.
      operands: variables and literals in place of its own.
      results: variables in place of its own.
      around: the equation whose body `eqn` was taken from, None if it was not.
    """
    info = eqn.source_info
    if around is not None:
        info = info.replace(name_stack=around.source_info.name_stack + info.name_stack)
    return eqn.replace(invars=list(operands), outvars=list(results), source_info=info)


@contextlib.contextmanager
def at_equation(eqn: Any, source_infos: Sequence[Any]) -> Iterator[None]:
    """Within the block, primitives are bound as if in the place of an equation.

    Args:
      eqn: of some jaxpr.
      source_infos: of the equation and of the calls around it that dissolve, innermost first. The
        source line is that of the innermost one with a frame of the user.
    """
    stack = source_info_util.new_name_stack()
    for info in reversed(source_infos):
        stack += info.name_stack
    chosen = source_infos[0]
    if len(source_infos) > 1:
        chosen = next(filter(_has_user_frame, source_infos), chosen)
    with source_info_util.user_context(chosen.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def _has_user_frame(info: Any) -> bool:
    frames = source_info_util.summarize(info, num_frames=_MAX_FRAMES).splitlines()
    return not all(map(_LIBRARY_FRAME.match, frames))


@contextlib.contextmanager
def numbered_scope(number: int) -> Iterator[None]:
    """Within the block, the innermost name scope has a number: `layers[0]`."""
    stack = source_info_util.current_name_stack()
    name = str(stack[-1:])
    if not name or name.endswith("()"):  # no scope, or that of a transformation
        numbered = stack.extend(f"piece[{number}]")
    else:
        numbered = stack[:-1].extend(f"{name}[{number}]")
    with source_info_util.set_name_stack(numbered):
        yield


def bind_equation(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Results of an equation's primitive for other operands, where the caller stands."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def part_of_jaxpr(jaxpr: Any, equations: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """An open jaxpr with some of the equations of another; its inputs are what these read."""
    made = {v for eqn in equations for v in eqn.outvars}
    read = dict.fromkeys(a for eqn in equations for a in eqn.invars if not is_literal(a))
    inputs = [v for v in read if v not in made]
    effects = set().union(*(eqn.effects for eqn in equations))
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr.replace(
        constvars=[], invars=inputs, outvars=list(outputs), eqns=list(equations), effects=effects,
        debug_info=info,
    )  # fmt: skip


def optimization_barrier_primitive() -> Any:
    """The primitive of `jax.lax.optimization_barrier`."""
    return jax.lax.optimization_barrier_p


def abstract_shapes(
    primitive: jex_core.Primitive,
    operands: Sequence[tuple[tuple[int, ...], Any]],
    params: Mapping[str, Any],
) -> list[tuple[int, ...]]:
    """Result shapes of a primitive for operands of given (shape, dtype), without tracing.

    A tenth of the time of `jax.eval_shape`. Raises whatever the primitive raises.
    """
    avals = [jax.core.ShapedArray(shape, dtype) for shape, dtype in operands]
    results, _ = primitive.abstract_eval(*avals, **params)
    return [tuple(a.shape) for a in (results if primitive.multiple_results else [results])]


def lower_for_cpu(closed: Any) -> Any:
    """The StableHLO module of a closed jaxpr, without starting a backend as `jax.jit` does."""
    lower = mlir.lower_jaxpr_to_module
    options: dict[str, Any] = {}
    if "out_avals" in inspect.signature(lower).parameters:  # required in jax 0.12
        options["out_avals"] = list(closed.out_avals)
    lowered = lower(
        "main", closed, num_const_args=0, in_avals=list(closed.in_avals), ordered_effects=[],
        platforms=("cpu",), backend=None, axis_context=mlir.ShardingContext(1),
        donated_args=[False] * len(closed.in_avals),
        lowering_parameters=mlir.LoweringParameters(hoist_constants_as_args=False), **options,
    )  # fmt: skip
    return lowered.module


def make_copier(
    shardings: Sequence[Sharding],
) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """A function that copies arrays, each to one of these shardings, without changing tiles.

    `jax.device_put` of arrays whose tiles are equal to those wanted, and nothing else: the caller
    makes sure that they are, and that no array is deleted. It ends in the call that is made here
    directly, in a third of the time or less (jax 0.10.2, CPU).
    """
    if not _can_copy_directly():
        return lambda arrays: jax.device_put(list(arrays), list(shardings))
    copy = xla_client.batched_copy_array_to_devices_with_sharding
    devices = [s._internal_device_list for s in shardings]
    targets = list(shardings)
    semantics = [xla_client.ArrayCopySemantics.REUSE_INPUT] * len(targets)
    return lambda arrays: copy(list(arrays), devices, targets, semantics)


@functools.cache
def _can_copy_directly() -> bool:
    """Whether the private call exists and does what it should, tried on devices of this process."""
    ends = [SingleDeviceSharding(d) for d in (jax.local_devices()[0], jax.local_devices()[-1])]
    value = np.arange(6, dtype=np.int32).reshape(2, 3)
    try:
        array = jax.device_put(value, ends[0])
        results = xla_client.batched_copy_array_to_devices_with_sharding(
            [array, array], [s._internal_device_list for s in ends], ends,
            [xla_client.ArrayCopySemantics.REUSE_INPUT] * 2,
        )  # fmt: skip
        return all(
            result.sharding == end and result.committed and np.array_equal(result, value)
            for result, end in zip(results, ends, strict=True)
        )
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False


def make_absent(shape: Sequence[int], dtype: Any, weak_type: bool, sharding: Sharding) -> jax.Array:
    """An array of which this process has no part; only JAX's own class makes a weak one."""
    if not weak_type:
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, [], dtype=dtype)
    aval = jax.core.ShapedArray(tuple(shape), dtype, weak_type=True)
    return jax_array.ArrayImpl(aval, sharding, [], committed=True, _skip_checks=True)


class KeyValueStore:
    """The strings that the processes of `jax.distributed` share.

    Raises:
      RuntimeError: `jax.distributed` is not initialised.
    """

    def __init__(self) -> None:
        client = distributed.global_state.client
        if client is None:
            raise RuntimeError("jax.distributed is not initialised in this process")
        self._client: Any = client

    def set(self, key: str, value: str) -> None:
        """Store a value, over an older one if there is one."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def set_bytes(self, key: str, value: bytes) -> None:
        """The same for bytes."""
        self._client.key_value_set_bytes(key, value, allow_overwrite=True)

    def get(self, key: str, timeout_s: float) -> str:
        """A value, waited for if it is not there.

        Raises:
          TimeoutError: it did not come in time.
        """
        return self._wait(self._client.blocking_key_value_get, key, timeout_s)

    def get_bytes(self, key: str, timeout_s: float) -> bytes:
        """The same for bytes."""
        return self._wait(self._client.blocking_key_value_get_bytes, key, timeout_s)

    def _wait(self, get: Callable[[str, int], Any], key: str, timeout_s: float) -> Any:
        try:
            return get(key, int(1000 * timeout_s))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(f"no process has set {key!r} within {timeout_s:g} s") from None

    def folder(self, prefix: str) -> dict[str, str]:
        """All values whose keys begin with `prefix/`, under the rest of the key."""
        found = self._client.key_value_dir_get(prefix)
        return {key.removeprefix(prefix).lstrip("/"): value for key, value in found}

    def delete(self, key: str) -> None:
        """Remove a value, or all values below a key."""
        self._client.key_value_delete(key)

    def barrier(self, name: str, timeout_s: float) -> None:
        """Wait until every process waits under this name, which serves once."""
        self._client.wait_at_barrier(name, int(1000 * timeout_s))


def distributed_process() -> tuple[int, int, str] | None:
    """(process, number of processes, `host:port` of process 0) of `jax.distributed`.

    None if it is not initialised. Other than `jax.process_index`, it starts no backend.
    """
    state = distributed.global_state
    if state.client is None:
        return None
    return state.process_id, state.num_processes, state.coordinator_address or ""


def like(aval: Any, shape: Sequence[int], dtype: Any, dims: Sequence[int | None]) -> Any:
    """The abstract value of a result whose dims are split as those of an operand.

    Args:
      aval: of the operand.
      shape: of the result.
      dtype: of the result.
      dims: the dim of the operand that each dim of the result takes after; None for an unsplit one.
    """
    spec = aval.sharding.spec
    parts = [None if dim is None else spec[dim] for dim in dims]
    sharding = aval.sharding.update(spec=spec.update(partitions=parts))
    return aval.update(shape=tuple(shape), dtype=jax.numpy.dtype(dtype), sharding=sharding)


def vary_alike(*operands: Any) -> list[Any]:
    """The operands, each varying over every manual mesh axis that one of them varies over.

    What primitives of JAX do to their operands within `jax.shard_map`.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(union - axes), to="varying") if union - axes else x
        for x, axes in zip(operands, varying, strict=True)
    ]


def lower_unmapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering rule that traces `function` as if outside of any mesh.

    For a primitive that is local: its function need not say over which axes its values vary.
    """
    rule = mlir.lower_fun(function, multiple_results=True)

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        bare = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
        return rule(ctx.replace(avals_in=bare), *operands, **params)

    return lower


class LazyModule:
    """A module that is imported when one of its names is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


mosaic_gpu: Any = LazyModule("jax.experimental.pallas.mosaic_gpu")
"""Importing it takes time and sets an environment variable: for programs that use it."""


def load_with_layout(ref: Any, layout: Any, optimized: bool = True) -> Any:
    """`mosaic_gpu.load` of a whole reference; jax 0.10 wants to be told which part."""
    index: tuple[Any, ...] = ((),) if "idx" in inspect.signature(mosaic_gpu.load).parameters else ()
    return mosaic_gpu.load(ref, *index, layout=layout, optimized=optimized)


def transposed_ref(ref: Any) -> Any:
    """A reference to shared memory with its two dims exchanged."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return mosaic_gpu.transpose_ref(ref, (1, 0))


def gpu_interpreter(detect_races: bool) -> Any:
    """What `plgpu.kernel(interpret=...)` takes to run a kernel on CPU, threads and barriers too."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=detect_races)


def gpu_interpreter_found_races() -> bool:
    """Whether the last interpreted kernel had a data race; needs `detect_races`."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.get_races().races_found)


def triton_or_interpreted(interpret: bool) -> dict[str, Any]:
    """Arguments of `pl.pallas_call` for a kernel of Triton's kind; without them JAX uses Mosaic."""
    if interpret:
        return {"interpret": True}
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams()}


def lowering_semantics(name: str) -> Any:
    """`Lane` or `Warpgroup`: how a Mosaic kernel is lowered; JAX's default changed in 0.11."""
    return mosaic_gpu.LoweringSemantics[name]
