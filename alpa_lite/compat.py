"""Everything that differs between the JAX versions of the window (0.10.2 to 0.12).

No other module reads a private or moved JAX name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import xla_bridge
from jax.extend import core as jex_core
from jax.extend import source_info_util
from jax.interpreters import mlir, partial_eval

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
