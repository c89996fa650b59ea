"""Trace a function of pytrees into a `Graph`, with abstract values only.

In: a function and arguments (arrays or `jax.ShapeDtypeStruct`). Out: a `TracedStep`, the graph plus
the pytree structures. Nothing is allocated, so a model of any size traces on a laptop.

Call-like equations (jit, custom_jvp, custom_vjp, closed_call, remat) are inlined. A remat region
becomes `optimization_barrier` on its inputs followed by its equations, which is how JAX itself
lowers it; so recomputation survives. `value_and_grad` equations are expanded to forward and
backward ops and recorded as a `GradRegion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives as jax_primitives

from alpa_lite import compat
from alpa_lite.ir.flops import equation_flops
from alpa_lite.ir.grad import GradSpec, capture_gradients, value_and_grad_p
from alpa_lite.ir.graph import (
    BACKWARD,
    FORWARD,
    UPDATE,
    GradRegion,
    Graph,
    Literal,
    Op,
    Operand,
    Value,
    verify_graph,
)
from alpa_lite.ir.marks import layer_mark_p


@dataclass(frozen=True, slots=True, eq=False)
class TracedStep:
    """A graph and how its flat inputs and outputs make up pytrees.

    Attributes:
      graph: the traced function.
      in_tree: structure of the tuple of positional arguments.
      out_tree: structure of the result.
      argument_leaves: number of leaves of each positional argument.
    """

    graph: Graph
    in_tree: Any
    out_tree: Any
    argument_leaves: tuple[int, ...]

    def argument_range(self, argnum: int) -> range:
        """Positions in `graph.inputs` of one argument's leaves."""
        start = sum(self.argument_leaves[:argnum])
        return range(start, start + self.argument_leaves[argnum])


def trace(
    fun: Callable[..., Any], *args: Any, arg_names: Sequence[str] = (), name: str = ""
) -> TracedStep:
    """Trace `fun(*args)`.

    Args:
      fun: a function of pytrees of arrays.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      arg_names: names used in value paths; `arg0`, `arg1`, ... by default.
      name: the graph's name; the function's own by default.

    Raises:
      jax.errors.JAXTypeError: `fun` uses Python control flow on traced values.
    """
    return _trace(fun, args, arg_names, name, differentiate=True)[0]


def trace_whole_gradient(
    fun: Callable[..., Any], *args: Any, arg_names: Sequence[str] = (), name: str = ""
) -> tuple[TracedStep, Any]:
    """Like `trace`, but gradients are results of one op `value_and_grad`, after the forward pass.

    That takes a third of the time, and is all that is needed to cut a step into stages.

    Returns:
      The step, and the closed jaxpr it was read from.
    """
    return _trace(fun, args, arg_names, name, differentiate=False)


def _trace(
    fun: Callable[..., Any], args: tuple[Any, ...], arg_names: Sequence[str], name: str,
    differentiate: bool,
) -> tuple[TracedStep, Any]:  # fmt: skip
    names = tuple(arg_names) or tuple(f"arg{i}" for i in range(len(args)))
    args = tuple(jax.tree.map(_shape_struct, a) for a in args)
    with capture_gradients():
        closed, out_shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    closed = compat.remove_dead_code(closed)
    builder = _Builder(differentiate=differentiate)
    graph = builder.build_graph(
        closed,
        name=name or getattr(fun, "__name__", "step"),
        input_names=_path_names(dict(zip(names, args, strict=True)), names),
        output_names=_path_names({"": out_shape}, ("",)),
    )
    graph = replace(graph, notes=tuple(dict.fromkeys(builder.notes)))
    verify_graph(graph)
    leaves = tuple(len(jax.tree.leaves(a)) for a in args)
    step = TracedStep(graph, jax.tree.structure(args), jax.tree.structure(out_shape), leaves)
    return step, closed


def _shape_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _path_names(trees: Mapping[str, Any], order: Sequence[str]) -> tuple[str, ...]:
    """Readable names of all leaves: `state.params.Dense_0.kernel`."""
    names = []
    for prefix in order:
        for path, _ in jax.tree_util.tree_flatten_with_path(trees[prefix])[0]:
            text = jax.tree_util.keystr(path, simple=True, separator=".")
            names.append(".".join(part for part in (prefix, text) if part) or "value")
    return tuple(names)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an equation comes from.

    Attributes:
      scope: name stacks of the calls around it and its own, joined.
      source_infos: JAX's source infos of the equation and the calls around it, innermost first.
    """

    scope: str = ""
    source_infos: tuple[Any, ...] = ()

    def of(self, eqn: Any) -> _Place:
        """The place of an equation in the body of what stands here."""
        inner = compat.scope_name(eqn.source_info)
        scope = "/".join(part for part in (self.scope, inner) if part)
        return _Place(scope, (eqn.source_info, *self.source_infos))

    def body(self) -> _Place:
        """Where the nested graph of a loop or branch begins: its scopes are its own."""
        return replace(self, scope="")


class _Builder:
    """Turns one jaxpr into one graph; nested control flow gets a builder of its own.

    Args:
      notes: where to put what the user should know; shared with the builders of nested graphs.
      differentiate: whether captured gradients become the ops of their backward passes.
    """

    def __init__(self, notes: list[str] | None = None, differentiate: bool = True) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.constants: dict[int, Any] = {}
        self.regions: list[GradRegion] = []
        self.notes: list[str] = [] if notes is None else notes
        self.differentiate = differentiate

    def build_graph(
        self,
        closed: Any,
        *,
        name: str,
        input_names: Sequence[str] = (),
        output_names: Sequence[str] = (),
        place: _Place = _Place(),
        phase: str = "",
    ) -> Graph:
        jaxpr, consts = compat.jaxpr_parts(closed)
        inputs = tuple(self.new_value(v.aval) for v in jaxpr.invars)
        const_operands = self.constant_operands(jaxpr, consts)
        outputs = self.inline(jaxpr, const_operands, inputs, place=place, phase=phase)
        return Graph(
            name=name,
            values=tuple(self.values),
            ops=tuple(self.ops),
            inputs=inputs,
            outputs=tuple(outputs),
            constants=self.constants,
            input_names=tuple(input_names),
            output_names=tuple(output_names),
            grad_regions=tuple(self.regions),
        )

    def new_value(self, aval: Any) -> int:
        self.values.append(Value(len(self.values), aval))
        return self.values[-1].id

    def constant_operands(self, jaxpr: Any, consts: Sequence[Any]) -> list[Operand]:
        return [self.constant(v.aval, c) for v, c in zip(jaxpr.constvars, consts, strict=True)]

    def constant(self, aval: Any, array: Any) -> Operand:
        if np.ndim(array) == 0 and isinstance(getattr(aval, "dtype", None), np.dtype):
            return Literal(np.asarray(array), aval)
        new = self.new_value(aval)
        self.constants[new] = array
        return new

    def inline(
        self,
        jaxpr: Any,
        consts: Sequence[Operand],
        args: Sequence[Operand],
        *,
        place: _Place,
        phase: str,
    ) -> list[Operand]:
        """Append the equations of `jaxpr`; returns its outputs."""
        env: dict[Any, Operand] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Operand:
            return Literal(atom.val, atom.aval) if compat.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            results = self.equation(eqn, operands, place.of(eqn), phase)
            for var, out in zip(eqn.outvars, results, strict=True):
                if not compat.is_drop_var(var):
                    env[var] = out
        return [read(atom) for atom in jaxpr.outvars]

    def equation(
        self, eqn: Any, operands: list[Operand], place: _Place, phase: str
    ) -> Sequence[Operand]:
        """Append one equation, or what it stands for; returns its results."""
        if eqn.primitive is value_and_grad_p:
            if not self.differentiate:
                return self.forward_only(eqn, operands, place)
            return self.expand_grad(eqn.params["spec"], operands, place)
        if eqn.primitive is layer_mark_p:
            return operands
        if eqn.primitive is jax_primitives.remat_p:
            if eqn.params["prevent_cse"]:
                operands = self.barrier(operands, place, phase)
            return self.inline(eqn.params["jaxpr"], (), operands, place=place, phase=phase)
        body = _inlined_body(eqn)
        if body is not None:
            jaxpr, consts = compat.jaxpr_parts(body)
            const_operands = self.constant_operands(jaxpr, consts)
            return self.inline(jaxpr, const_operands, operands, place=place, phase=phase)
        phase_here = _phase(place.scope, phase)
        subgraphs, params = self.split_params(eqn, place, phase_here if phase else "")
        if compat.has_side_effect(eqn) and not subgraphs:
            where = compat.source_line(place.source_infos) or place.scope or "an unknown place"
            self.notes.append(
                f"{eqn.primitive.name} at {where} has a side effect: every device runs it, on "
                "whole arrays, once per microbatch if it is in the loss function"
            )
        results = tuple(self.new_value(v.aval) for v in eqn.outvars)
        flops = _op_flops(eqn, params, subgraphs)
        self.ops.append(
            Op(
                len(self.ops), eqn.primitive, params, tuple(operands), results, subgraphs,
                place.scope, phase_here, flops, place.source_infos,
            )
        )  # fmt: skip
        return results

    def split_params(
        self, eqn: Any, place: _Place, phase: str
    ) -> tuple[tuple[Graph, ...], dict[str, Any]]:
        """Nested graphs of a control-flow equation, and its other parameters."""
        params = compat.equation_params(eqn)
        bodies: list[Any] = []
        for key in _BODIES.get(eqn.primitive.name, ()):
            body = params.pop(key)
            bodies += body if isinstance(body, tuple | list) else [body]
        graphs = tuple(
            _Builder(self.notes).build_graph(
                body, name=f"{eqn.primitive.name}_body{i}", place=place.body(), phase=phase
            )
            for i, body in enumerate(bodies)
        )
        return graphs, params

    def barrier(self, operands: list[Operand], place: _Place, phase: str) -> list[Operand]:
        """`optimization_barrier` over the operands that are values."""
        values = [o for o in operands if not isinstance(o, Literal)]
        if not values:
            return operands
        results = tuple(self.new_value(self.values[v].aval) for v in values)
        self.ops.append(
            Op(
                len(self.ops), compat.optimization_barrier_primitive(), {}, tuple(values), results,
                (), place.scope, _phase(place.scope, phase), 0.0, place.source_infos,
            )
        )  # fmt: skip
        renamed = dict(zip(values, results, strict=True))
        return [o if isinstance(o, Literal) else renamed[o] for o in operands]

    def expand_grad(self, spec: GradSpec, operands: list[Operand], place: _Place) -> list[Operand]:
        """Inline forward and backward of a captured gradient and record the region."""
        differentiated = jax.make_jaxpr(spec.differentiate())(*spec.operand_avals)
        jaxpr, consts = compat.jaxpr_parts(compat.remove_dead_code(differentiated))
        const_operands = self.constant_operands(jaxpr, consts)
        first = len(self.ops)
        outs = self.inline(jaxpr, const_operands, operands, place=place, phase=FORWARD)
        num_outs = len(spec.forward.out_avals)
        grads = [g for g in outs[num_outs:][: spec.num_accumulated] if not isinstance(g, Literal)]
        num_grads = len(outs[num_outs:][: spec.num_accumulated])
        loss, others = (outs[0], outs[1:num_outs]) if spec.has_loss else (None, outs[:num_outs])
        if isinstance(loss, Literal) or len(grads) < num_grads:
            return outs  # a constant loss or gradient: nothing to accumulate
        others += outs[num_outs + len(grads) :]
        self.regions.append(
            GradRegion(
                first, len(self.ops), loss, tuple(a for a in others if not isinstance(a, Literal)),
                tuple(grads), tuple(operands[i] for i in spec.wrt[: len(grads)]), spec.forward,
            )
        )  # fmt: skip
        return outs

    def forward_only(self, eqn: Any, operands: list[Operand], place: _Place) -> list[Operand]:
        """Inline the forward pass of a captured gradient; one op stands for its backward pass."""
        spec: GradSpec = eqn.params["spec"]
        jaxpr, consts = compat.jaxpr_parts(spec.forward)
        first = len(self.ops)
        outs = self.inline(
            jaxpr, self.constant_operands(jaxpr, consts), operands, place=place, phase=FORWARD
        )
        wrt = [operands[i] for i in spec.wrt]
        grads = tuple(self.new_value(v.aval) for v in eqn.outvars[len(outs) :])
        self.ops.append(
            Op(
                len(self.ops), eqn.primitive, {}, (outs[0], *wrt), grads, (), place.scope,
                BACKWARD, 0.0, place.source_infos,
            )
        )  # fmt: skip
        if not isinstance(outs[0], Literal):
            aux = tuple(o for o in outs[1:] if not isinstance(o, Literal))
            self.regions.append(
                GradRegion(first, len(self.ops), outs[0], aux, grads, tuple(wrt), spec.forward)
            )
        return [*outs, *grads]


def called_body(eqn: Any) -> Any | None:
    """The closed jaxpr of an equation that is a plain call, or None."""
    if eqn.primitive.name in ("jit", "pjit", "closed_call", "core_closed_call", "custom_lin"):
        return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return None


def _inlined_body(eqn: Any) -> Any | None:
    """The closed jaxpr of a call-like equation, or None."""
    if eqn.primitive.name in (
        "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "core_call"
    ):  # fmt: skip
        return eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
    return called_body(eqn)


_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def _op_flops(eqn: Any, params: Mapping[str, Any], subgraphs: Sequence[Graph]) -> float:
    if subgraphs:
        each = [g.flops for g in subgraphs]
        return params["length"] * each[0] if "length" in params else max(each)
    ins = [atom.aval for atom in eqn.invars]
    return equation_flops(eqn.primitive.name, params, ins, [v.aval for v in eqn.outvars])


def _phase(scope: str, around: str) -> str:
    """Phase of an equation in a body that runs in phase `around`; `""` outside of gradients."""
    if around in ("", BACKWARD):
        return around or UPDATE
    # JAX marks transposed equations in the name stack; recomputation under remat happens there too.
    return BACKWARD if "transpose(" in scope else FORWARD
