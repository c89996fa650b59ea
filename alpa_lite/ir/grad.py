"""`value_and_grad` and `grad` that keep their structure while a step is traced.

Outside of tracing by alpa-lite, both behave exactly like JAX's. While a step is traced
(`capture_gradients`), a call at the top level of the trace yields one equation of the primitive
`value_and_grad`, holding the loss function's own forward jaxpr; `alpa_lite.ir.trace` then knows
what is forward, backward and update. Calls of plain `jax.value_and_grad` and `jax.grad` (Flax
NNX's and Equinox's use them) are captured too, by a substitution scoped to the tracing thread.

Whatever cannot be described this way (non-scalar losses, holomorphic or integer derivatives,
a gradient under `vmap` or another gradient) falls through to JAX's own implementation.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from alpa_lite import compat
from alpa_lite.ir.stretches import as_function_of_stretches

_jax_value_and_grad = jax.value_and_grad
_jax_grad = jax.grad

_capturing: contextvars.ContextVar[bool] = contextvars.ContextVar("capturing", default=False)
# The same for JAX, which caches the traces of jitted functions: part of the key of those caches.
_capture_context = jax.make_user_context(False)
_patch_lock = threading.Lock()
_patch_users = 0


@dataclass(frozen=True, slots=True, eq=False)
class GradSpec:
    """What one captured call computes: parameters of the primitive.

    A stage of a pipeline is described likewise: it has cotangents of what it hands on in place of,
    or beside, a loss, and besides gradients that accumulate over microbatches those that are handed
    back for each microbatch.

    Attributes:
      forward: closed jaxpr of the loss function; outputs are (loss, *aux).
      num_consts: leading operands that the loss function closed over.
      wrt: positions of the operands that are differentiated.
      has_loss: whether the first output of `forward` is a loss.
      seeded: outputs of `forward` whose cotangents are operands, after those of `forward`.
      num_accumulated: of the gradients, how many lead that accumulate; all by default.
    """

    forward: Any
    num_consts: int
    wrt: tuple[int, ...]
    has_loss: bool = True
    seeded: tuple[int, ...] = ()
    num_accumulated: int | None = None

    @property
    def operand_avals(self) -> list[Any]:
        """Types of all operands, cotangents included."""
        return [*self.forward.in_avals, *(self.forward.out_avals[i] for i in self.seeded)]

    def differentiate(self) -> Callable[..., list[jax.Array]]:
        """A flat function `(*operands, *cotangents) -> [*outputs of forward, *grads]`."""
        forward = as_function_of_stretches(self.forward)
        num_operands = len(self.forward.in_avals)
        differentiated = (*((0,) if self.has_loss else ()), *self.seeded)
        others = [i for i in range(len(self.forward.out_avals)) if i not in differentiated]

        def flat(*operands: Any) -> list[Any]:
            values, cotangents = list(operands[:num_operands]), operands[num_operands:]

            def outputs(*chosen: Any) -> tuple[list[Any], list[Any]]:
                for position, x in zip(self.wrt, chosen, strict=True):
                    values[position] = x
                outs = forward(*values)
                return [outs[i] for i in differentiated], [outs[i] for i in others]

            chosen = [values[i] for i in self.wrt]
            with_derivative, pull_back, rest = jax.vjp(outputs, *chosen, has_aux=True)
            ones = [jnp.ones_like(with_derivative[0])] if self.has_loss else []
            grads = pull_back([*ones, *cotangents])
            found = dict(zip((*differentiated, *others), (*with_derivative, *rest), strict=True))
            return [*(found[i] for i in range(len(found))), *grads]

        return flat


value_and_grad_p = Primitive("value_and_grad")
value_and_grad_p.multiple_results = True


@value_and_grad_p.def_impl
def _run(*operands: Any, spec: GradSpec) -> list[Any]:
    return spec.differentiate()(*operands)


@value_and_grad_p.def_abstract_eval
def _abstract(*operands: Any, spec: GradSpec) -> list[Any]:
    outs = list(spec.forward.out_avals)
    return outs + [operands[i].update(weak_type=False) for i in spec.wrt]


def _batch(args: Sequence[Any], dims: Sequence[Any], *, spec: GradSpec) -> tuple[Any, Any]:
    outs = jax.vmap(spec.differentiate(), in_axes=tuple(dims))(*args)
    return outs, [0] * len(outs)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spec: GradSpec) -> tuple[Any, Any]:
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(spec.differentiate(), tuple(primals), tuple(tangents))


batching.primitive_batchers[value_and_grad_p] = _batch
ad.primitive_jvps[value_and_grad_p] = _jvp
mlir.register_lowering(
    value_and_grad_p,
    mlir.lower_fun(lambda *args, spec: spec.differentiate()(*args), multiple_results=True),
)


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """Like `jax.value_and_grad`; inside a `@parallelize` step its structure is kept.

    Keeping the structure lets the planner split the batch into microbatches and accumulate
    gradients with one collective per step.

    Args:
      fun: function whose first output is a scalar loss, the mean over the batch.
      argnums: positional arguments to differentiate.
      has_aux: whether `fun` returns `(loss, aux)`.
      **options: further options of `jax.value_and_grad`.
    """
    plain = _jax_value_and_grad(fun, argnums, has_aux, **options)
    if any(options.values()):
        return plain

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _capturing.get():
            return plain(*args, **kwargs)
        captured = _bind(fun, argnums, has_aux, args, kwargs)
        return plain(*args, **kwargs) if captured is None else captured

    return wrapped


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """Like `jax.grad`; see `value_and_grad`."""
    plain = _jax_grad(fun, argnums, has_aux, **options)
    both = value_and_grad(fun, argnums, has_aux, **options)

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _capturing.get():
            return plain(*args, **kwargs)
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


@contextlib.contextmanager
def capture_gradients() -> Iterator[None]:
    """Within the block, and in this thread only, gradient calls are captured.

    `jax.value_and_grad` and `jax.grad` are replaced for the duration; other threads that call
    them meanwhile get JAX's behaviour, and the last block to end puts JAX's functions back.
    """
    global _patch_users
    with _patch_lock:
        _patch_users += 1
        _substitute(value_and_grad, grad)
    try:
        with _capture(True):
            yield
    finally:
        with _patch_lock:
            _patch_users -= 1
            if _patch_users == 0:
                _substitute(_jax_value_and_grad, _jax_grad)


@contextlib.contextmanager
def _capture(on: bool) -> Iterator[None]:
    token = _capturing.set(on)
    try:
        with _capture_context(on):
            yield
    finally:
        _capturing.reset(token)


def _substitute(new_value_and_grad: Any, new_grad: Any) -> None:
    setattr(jax, "value_and_grad", new_value_and_grad)  # noqa: B010  (typed as one function)
    setattr(jax, "grad", new_grad)  # noqa: B010


class _NotDescribableError(Exception):
    """JAX's own implementation must have the word."""


def _bind(
    fun: Callable[..., Any],
    argnums: Any,
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any | None:
    """The captured call's outputs, or None if it cannot be described."""
    single = hasattr(argnums, "__index__")
    numbers = tuple(map(operator.index, [argnums] if single else argnums))
    numbers = tuple(n + len(args) if n < 0 else n for n in numbers)
    if any(not 0 <= n < len(args) for n in numbers):
        return None  # JAX's own error says it best
    leaves, tree = jax.tree.flatten((args, kwargs))
    owners = _leaf_owners(args, len(leaves))
    is_array = [_is_array(leaf) for leaf in leaves]
    dynamic = [leaf for leaf, keep in zip(leaves, is_array, strict=True) if keep]
    wrt = [owner in numbers for owner, keep in zip(owners, is_array, strict=True) if keep]
    if not any(wrt) or any(
        not keep for owner, keep in zip(owners, is_array, strict=True) if owner in numbers
    ):
        return None
    chosen = [x for x, w in zip(dynamic, wrt, strict=True) if w]
    if any(not jnp.issubdtype(x.dtype, jnp.floating) for x in chosen):
        return None

    aux_template: tuple[list[Any], Any] | None = None

    # Errors under tracing name the function and arguments of the user: hence `wraps`, the pytrees.
    @functools.wraps(fun, updated=())
    def forward(*args: Any, **kwargs: Any) -> list[Any]:
        nonlocal aux_template
        supply = iter(jax.tree.leaves((args, kwargs)))
        filled = [
            next(supply) if keep else leaf for leaf, keep in zip(leaves, is_array, strict=True)
        ]
        inner_args, inner_kwargs = jax.tree.unflatten(tree, filled)
        result = fun(*inner_args, **inner_kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise _NotDescribableError
        loss, aux = result if has_aux else (result, ())
        if not isinstance(loss, jax.Array):
            raise _NotDescribableError
        outs, out_tree = jax.tree.flatten(aux)
        # Python numbers and strings stay what they are, as in JAX.
        aux_template = [None if isinstance(x, jax.Array) else x for x in outs], out_tree
        return [loss, *(x for x in outs if isinstance(x, jax.Array))]

    shown = [leaf if keep else None for leaf, keep in zip(leaves, is_array, strict=True)]
    shown_args, shown_kwargs = jax.tree.unflatten(tree, shown)
    try:
        with _capture(False):  # gradients inside a loss function are part of the forward
            closed = jax.make_jaxpr(forward)(*shown_args, **shown_kwargs)
    except _NotDescribableError:
        return None
    loss_aval = closed.out_avals[0]
    if loss_aval.shape or not jnp.issubdtype(loss_aval.dtype, jnp.floating):
        return None  # JAX's own error says it best
    spec = _close(closed, wrt)
    outs = value_and_grad_p.bind(*closed.consts, *dynamic, spec=spec)
    num_aux = len(closed.out_avals) - 1
    loss, aux_arrays, grad_leaves = outs[0], iter(outs[1 : 1 + num_aux]), outs[1 + num_aux :]
    assert aux_template is not None
    aux_leaves = [next(aux_arrays) if x is None else x for x in aux_template[0]]
    aux = jax.tree.unflatten(aux_template[1], aux_leaves)
    grads = _grads_like(args, numbers, single, grad_leaves)
    return ((loss, aux) if has_aux else loss), grads


def _close(closed: Any, wrt: Sequence[bool]) -> GradSpec:
    """Turn captured constants into leading operands."""
    num_consts = len(closed.consts)
    positions = tuple(num_consts + i for i, w in enumerate(wrt) if w)
    return GradSpec(compat.constants_as_operands(closed), num_consts, positions)


def _grads_like(
    args: tuple[Any, ...], numbers: tuple[int, ...], single: bool, leaves: Sequence[Any]
) -> Any:
    # Leaves come in argument order, whatever order argnums has.
    supply = iter(leaves)
    per_argument = {}
    for n in sorted(set(numbers)):
        structure: Any = jax.tree.structure(args[n])
        per_argument[n] = jax.tree.unflatten(
            structure, [next(supply) for _ in range(structure.num_leaves)]
        )
    grads = tuple(per_argument[n] for n in numbers)
    return grads[0] if single else grads


def _leaf_owners(args: tuple[Any, ...], num_leaves: int) -> list[int]:
    """For each flattened leaf, the positional argument it belongs to (-1: keyword)."""
    owners = [n for n, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    return owners + [-1] * (num_leaves - len(owners))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
