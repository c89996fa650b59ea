"""The one intermediate representation: `Graph`, `Op`, `Value`.

A `Graph` is a traced function of arrays: a straight list of `Op`s over `Value`s in program order.
One `Op` is one jaxpr equation. Call-like equations (jit, custom derivatives, remat) have been
inlined by `alpa_lite.ir.trace`; `scan`, `while` and `cond` keep their bodies as nested graphs.
Graphs are frozen: passes read them and build new values, they never write into one.
"""

from __future__ import annotations

import functools
import hashlib
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alpa_lite import compat

FORWARD = "forward"
BACKWARD = "backward"
UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Value:
    """An array that flows between ops.

    Attributes:
      id: position in `Graph.values`.
      aval: the JAX abstract value (shape, dtype, weak type).
    """

    id: int
    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dims."""
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        """NumPy dtype, or JAX's extended dtype for PRNG keys."""
        return self.aval.dtype

    @property
    def is_key(self) -> bool:
        """Whether the elements are PRNG keys."""
        return not isinstance(self.dtype, np.dtype)

    @property
    def num_elements(self) -> int:
        """Product of the dims."""
        return math.prod(self.aval.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the whole array in bytes (a PRNG key counts 8)."""
        return self.num_elements * (8 if self.is_key else self.dtype.itemsize)

    def __str__(self) -> str:
        return f"%{self.id}:{_short_aval(self.aval)}"


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """A scalar constant written into an operand position."""

    value: Any
    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Always `()`."""
        return tuple(self.aval.shape)

    def __str__(self) -> str:
        # Through NumPy, as JAX's own scalar types print themselves differently in each version.
        return str(np.asarray(self.value)[()])


Operand = int | Literal


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One equation.

    Attributes:
      id: position in `Graph.ops`.
      primitive: the JAX primitive.
      params: its parameters as `compat.equation_params` gives them, without nested jaxprs (those
        are `subgraphs`).
      operands: value ids or literals.
      results: value ids.
      subgraphs: bodies, by parameter name (`scan`: body; `while`: cond, body; `cond`: branches).
      scope: module path kept by JAX in the name stack, e.g. `transpose(jvp(LM))/Block_1/Dense_0`.
      phase: forward, backward or update.
      flops: floating-point operations of the whole op, one execution, nested graphs included.
      source_infos: JAX's source infos of the equation and of the calls and loops around it,
        innermost first; read lazily by `source`.
    """

    id: int
    primitive: Any
    params: Mapping[str, Any]
    operands: tuple[Operand, ...]
    results: tuple[int, ...]
    subgraphs: tuple[Graph, ...] = ()
    scope: str = ""
    phase: str = UPDATE
    flops: float = 0.0
    source_infos: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    @property
    def operand_ids(self) -> tuple[int, ...]:
        """Ids of the operands that are values."""
        return tuple(o for o in self.operands if not isinstance(o, Literal))

    @property
    def source(self) -> str:
        """`file.py:line` of the user's code, or `""` if JAX kept none."""
        return compat.source_line(self.source_infos)


@dataclass(frozen=True, slots=True, eq=False)
class GradRegion:
    """What `value_and_grad` computed, kept as structure.

    Attributes:
      first_op, last_op: the region is `ops[first_op:last_op]`.
      loss: value id of the scalar loss; None in a pipeline stage that does not compute it.
      aux: value ids of the auxiliary outputs; in a pipeline stage also of what it hands on and
        back.
      grads: value ids of the gradients.
      params: value ids of the arrays differentiated, aligned with `grads`.
      forward: the loss function's own closed jaxpr (for passes that cut it into layers).
    """

    first_op: int
    last_op: int
    loss: int | None
    aux: tuple[int, ...]
    grads: tuple[int, ...]
    params: tuple[Operand, ...]
    forward: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A traced function.

    Attributes:
      name: what was traced.
      values: every value; `values[i].id == i`.
      ops: in program order; `ops[i].id == i`.
      inputs: value ids of the arguments, in pytree order.
      outputs: value ids (or literals) returned.
      constants: arrays captured by closure, by value id.
      input_names: readable paths such as `state.params.Dense_0.kernel`.
      output_names: the same for outputs.
      grad_regions: gradient computations, in program order.
      notes: what tracing wants the user to know.
    """

    name: str
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Operand, ...]
    constants: Mapping[int, Any] = field(default_factory=dict)
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    grad_regions: tuple[GradRegion, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Floating-point operations of one execution."""
        return sum(op.flops for op in self.ops)

    def walk(self) -> Iterator[Op]:
        """Every op, nested ones included, bodies after the op that holds them."""
        for op in self.ops:
            yield op
            for body in op.subgraphs:
                yield from body.walk()

    def __str__(self) -> str:
        return format_graph(self)

    def _repr_html_(self) -> str:
        """What notebooks show: how large it is, and its ops when unfolded."""
        title = html.escape(f"graph {self.name}: {len(self.ops)} ops, {self.flops:.3g} FLOPs")
        text = html.escape(format_graph(self))
        return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def op_bytes(graph: Graph, op: Op) -> int:
    """Bytes read and written by one execution of `op` without any fusion."""
    ids = {*op.operand_ids, *op.results}
    return sum(graph.values[i].num_bytes for i in ids)


def verify_graph(graph: Graph) -> None:
    """Check the invariants; raises `AssertionError` naming the op.

    Values are numbered densely, defined exactly once and before use; nested graphs take as many
    inputs as the op that holds them provides.
    """
    for i, value in enumerate(graph.values):
        assert value.id == i, f"value {i} carries id {value.id}"
    defined = set(graph.inputs) | set(graph.constants)
    for i, op in enumerate(graph.ops):
        assert op.id == i, f"op {i} carries id {op.id}"
        for operand in op.operand_ids:
            assert operand in defined, f"{op.name} (op {i}) reads %{operand} before it is defined"
        for result in op.results:
            assert result not in defined, f"{op.name} (op {i}) defines %{result} again"
            defined.add(result)
        for body, num_inputs in zip(op.subgraphs, _body_inputs(op), strict=True):
            found = len(body.inputs)
            assert found == num_inputs, (
                f"{op.name} (op {i}) gives {body.name} {num_inputs} inputs; it takes {found}"
            )
            verify_graph(body)
    for output in graph.outputs:
        assert isinstance(output, Literal) or output in defined, f"output %{output} is undefined"


def _body_inputs(op: Op) -> list[int]:
    """How many of its operands an op hands to each of its bodies."""
    total = len(op.operands)
    if op.name == "while":
        cond, body = op.params["cond_nconsts"], op.params["body_nconsts"]
        return [total - body, total - cond]
    if op.name == "cond":
        return [total - 1] * len(op.subgraphs)  # the first operand is the branch index
    return [total] * len(op.subgraphs)


def aval_bytes(aval: Any) -> int:
    """Bytes of a whole array; a PRNG key counts 8."""
    itemsize = aval.dtype.itemsize if isinstance(aval.dtype, np.dtype) else 8
    return int(math.prod(aval.shape)) * itemsize


def graph_hash(graph: Graph, keys: Sequence[str] = ()) -> str:
    """Hash of structure, shapes, dtypes and parameters; scopes and source lines do not count.

    Args:
      graph: the graph.
      keys: `op_key` of each op where that is at hand, else `""`.
    """
    digest = hashlib.sha256()
    for line in _signature_lines(graph, keys or ("",) * len(graph.ops)):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def param_key(value: Any) -> str:
    """A stable text for an op parameter: no object addresses."""
    if value is None or type(value) in (bool, int):  # most are, and what follows takes its time
        return str(value)
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, np.ndarray):
        return f"array{value.shape}{value.dtype}{hashlib.sha256(value.tobytes()).hexdigest()[:8]}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(param_key(v) for v in value) + ")"
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def op_key(graph: Graph, op: Op) -> str:
    """Text that is equal for two ops which compute the same function on the same shapes."""
    params = ",".join(f"{k}={param_key(v)}" for k, v in sorted(op.params.items()))
    operands = ",".join(
        f"lit{o}" if isinstance(o, Literal) else _short_aval(graph.values[o].aval)
        for o in op.operands
    )
    results = ",".join(_short_aval(graph.values[r].aval) for r in op.results)
    bodies = ",".join(graph_hash(body) for body in op.subgraphs)
    return f"{op.name}[{params}]({operands})->({results}){bodies}"


def format_graph(graph: Graph, *, indent: str = "", scopes: bool = True) -> str:
    """The graph as text, one op per line."""
    args = ", ".join(str(graph.values[i]) for i in graph.inputs)
    lines = [f"{indent}graph {graph.name}({args}) {{"]
    for op in graph.ops:
        lines += _format_op(graph, op, indent + "  ", scopes)
    outputs = ", ".join(str(o) if isinstance(o, Literal) else f"%{o}" for o in graph.outputs)
    lines += [f"{indent}  return {outputs}", f"{indent}}}"]
    return "\n".join(lines)


def _format_op(graph: Graph, op: Op, indent: str, scopes: bool) -> list[str]:
    results = ", ".join(str(graph.values[r]) for r in op.results)
    operands = ", ".join(str(o) if isinstance(o, Literal) else f"%{o}" for o in op.operands)
    shown = {k: v for k, v in op.params.items() if v is not None}
    params = ", ".join(f"{k}={param_key(v)}" for k, v in sorted(shown.items()))
    note = f"  # {op.scope}" if scopes and op.scope else ""
    lines = [f"{indent}{results} = {op.name}[{params}]({operands}){note}"]
    for body in op.subgraphs:
        lines.append(format_graph(body, indent=indent + "  ", scopes=scopes))
    return lines


def _signature_lines(graph: Graph, keys: Sequence[str]) -> Iterator[str]:
    yield "inputs " + ",".join(f"{i}:{_short_aval(graph.values[i].aval)}" for i in graph.inputs)
    for op, key in zip(graph.ops, keys, strict=True):
        operands = ",".join("_" if isinstance(o, Literal) else str(o) for o in op.operands)
        yield f"{op.results}={key or op_key(graph, op)}({operands})"
    yield "outputs " + ",".join(
        f"lit{o}" if isinstance(o, Literal) else str(o) for o in graph.outputs
    )


def _short_aval(aval: Any) -> str:
    return _short_type(aval.dtype, aval.shape)


@functools.lru_cache(maxsize=4096)
def _short_type(dtype: Any, shape: tuple[int, ...]) -> str:
    names = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "pred"}
    text = str(dtype)
    stem = text.rstrip("0123456789")
    short = names[stem] + text[len(stem) :] if stem in names else text
    return f"{short}[{','.join(map(str, shape))}]"
