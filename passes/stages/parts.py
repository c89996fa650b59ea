"""A train step cut at its gradient: what runs once before, per microbatch, and once after.

In: the outer jaxpr of a step, with its `value_and_grad` equation whole (`alpa_lite.ir.grad`). Out:
`StepParts`, flat lists of equations over one set of variables, calls (`jit`) inlined. Pipelines cut
the list `loop` into stages and distribute the others; nothing has been differentiated yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from alpa_lite import compat
from alpa_lite.errors import StepError
from alpa_lite.ir.grad import GradSpec, value_and_grad_p
from alpa_lite.ir.trace import called_body

Atom = Any
"""A jaxpr variable or literal."""


@dataclass(frozen=True, slots=True, eq=False)
class StepParts:
    """The equations of a step by when they run.

    Attributes:
      inputs: variables of the flat arguments.
      batch: those of them that hold rows of the batch, at microbatch size.
      constants: arrays captured by closure, by variable.
      before: equations before the gradient that do not depend on the batch.
      loop: equations of the loss function, and those before it that depend on the batch.
      loss: what the loss function returns, a variable or literal of `loop`.
      results: variables that `after` and `outputs` read (the loss and aux outputs, combined over
        microbatches), each with the atom of `loop` it stands for; the loss is the first.
      grads: variables of gradients that `after` reads, each with the atom it is the gradient of.
      after: equations after the gradient.
      outputs: atoms of the flat results.
    """

    inputs: tuple[Any, ...]
    batch: frozenset[Any]
    constants: Mapping[Any, Any]
    before: tuple[Any, ...]
    loop: tuple[Any, ...]
    loss: Atom
    results: tuple[tuple[Any, Atom], ...]
    grads: tuple[tuple[Any, Atom], ...]
    after: tuple[Any, ...]
    outputs: tuple[Atom, ...]

    @property
    def wrt(self) -> tuple[Atom, ...]:
        """What the loss is differentiated by, each once."""
        return tuple(dict.fromkeys(atom for _, atom in self.grads))


def split_parts(closed: Any, batch_positions: Iterable[int]) -> StepParts:
    """Cut a step at its gradient.

    Args:
      closed: the step's closed jaxpr at microbatch size, dead code removed.
      batch_positions: flat inputs that hold rows of the batch.

    Raises:
      StepError: the step has no captured gradient or several, differentiates by something that
        depends on the batch, or reads the batch after the gradient.
    """
    jaxpr, consts = compat.jaxpr_parts(closed)
    flat = _Flattener()
    inputs = tuple(compat.new_variable(v.aval) for v in jaxpr.invars)
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= flat.add_constants(jaxpr.constvars, consts)
    outputs = flat.inline(jaxpr, env, None)
    equations = flat.equations
    found = [i for i, eqn in enumerate(equations) if eqn.primitive is value_and_grad_p]
    if len(found) != 1:
        raise StepError(
            f"a pipeline needs a step with exactly one gradient computation at its top level; "
            f"found {len(found)}. Call alpa_lite.value_and_grad (or jax.value_and_grad looked up "
            "inside the step) once, or use a method without pipeline stages."
        )
    at = found[0]
    gradient = equations[at]
    spec: GradSpec = gradient.params["spec"]
    batch = frozenset(inputs[i] for i in batch_positions)
    tainted = set(batch)
    before: list[Any] = []
    loop: list[Any] = []
    for eqn in equations[:at]:
        depends = not tainted.isdisjoint(variables(eqn.invars))
        (loop if depends else before).append(eqn)
        if depends:
            tainted.update(eqn.outvars)
    loss_flat = _Flattener()
    inner, inner_consts = compat.jaxpr_parts(spec.forward)
    inner_env = dict(zip(inner.invars, gradient.invars, strict=True))
    inner_env |= loss_flat.add_constants(inner.constvars, inner_consts)
    loss, *aux = loss_flat.inline(inner, inner_env, gradient)
    num_results = 1 + len(aux)
    rest = equations[at + 1 :]
    used = {v for eqn in rest for v in variables(eqn.invars)} | {*variables(outputs)}
    results = [
        (v, atom)
        for i, (v, atom) in enumerate(zip(gradient.outvars, (loss, *aux), strict=False))
        if i == 0 or v in used
    ]
    wrt = [gradient.invars[i] for i in spec.wrt]
    grads = [
        (v, atom) for v, atom in zip(gradient.outvars[num_results:], wrt, strict=True) if v in used
    ]
    # What is per microbatch is returned like an aux output.
    returned = {a: compat.new_variable(a.aval) for a in variables(outputs) if a in tainted}
    results += [(v, atom) for atom, v in returned.items()]
    outputs = [a if compat.is_literal(a) else returned.get(a, a) for a in outputs]
    for _, atom in grads:
        if not compat.is_literal(atom) and atom in tainted:
            raise StepError(
                "a pipeline cannot differentiate by something that depends on the batch. "
                "Differentiate by the parameters alone, or use a method without pipeline stages."
            )
    after = _without_shared_branches(rest, [v for v, _ in grads])
    for eqn in after:
        if not tainted.isdisjoint(variables(eqn.invars)):
            raise StepError(
                f"{eqn.primitive.name} at {where(eqn)} reads the batch after the gradient was "
                "taken, which has no meaning with microbatches. Compute it in the loss function "
                "and return it as aux."
            )
    return StepParts(
        inputs=inputs, batch=batch, constants=flat.constants | loss_flat.constants,
        before=tuple(before), loop=(*loop, *loss_flat.equations), loss=loss,
        results=tuple(results), grads=tuple(grads), after=tuple(after), outputs=tuple(outputs),
    )  # fmt: skip


def variables(atoms: Iterable[Atom]) -> list[Any]:
    """The atoms that are no literals."""
    return [a for a in atoms if not compat.is_literal(a)]


def where(eqn: Any) -> str:
    """The user's source line of an equation, or its scope."""
    infos = (eqn.source_info,)
    return compat.source_line(infos) or compat.scope_name(eqn.source_info) or "an unknown place"


def evaluate(equations: Iterable[Any], env: dict[Any, Any]) -> None:
    """Run equations on values; `env` maps variables to values and receives the results."""
    for eqn in equations:
        operands = [a.val if compat.is_literal(a) else env[a] for a in eqn.invars]
        env.update(zip(eqn.outvars, compat.evaluate_equation(eqn, operands), strict=True))


def read(atom: Atom, env: Mapping[Any, Any]) -> Any:
    """The value of an atom."""
    return atom.val if compat.is_literal(atom) else env[atom]


def _without_shared_branches(equations: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """The update with both branches computed where a `cond` reads several gradients.

    Accumulating optimizers branch on the step with all gradients as operands. Such a branch would
    have to run on one stage; its two sides and a selection can be distributed.
    """
    root = {g: g for g in grads}
    several = object()
    found: list[Any] = []
    for eqn in equations:
        roots = {root[v] for v in variables(eqn.invars) if v in root}
        if roots:
            root |= dict.fromkeys(eqn.outvars, roots.pop() if len(roots) == 1 else several)
        if eqn.primitive.name == "cond" and any(root.get(v) is several for v in eqn.outvars):
            found += _selected(eqn)
        else:
            found.append(eqn)
    return found


def _selected(eqn: Any) -> list[Any]:
    """A `cond` as equations of all branches, and selections among their results."""
    branches = eqn.params["branches"]

    def select(index: Any, *operands: Any) -> list[Any]:
        results = [jaxpr_as_fun(branch)(*operands) for branch in branches]
        chosen = results[0]
        for i, each in enumerate(results[1:], 1):
            last = index >= i if i == len(results) - 1 else index == i
            chosen = [jax.lax.select(last, b, a) for a, b in zip(chosen, each, strict=True)]
        return chosen

    closed = jax.make_jaxpr(select)(*(a.aval for a in eqn.invars))
    flat = _Flattener()
    jaxpr, _ = compat.jaxpr_parts(closed)
    outs = flat.inline(jaxpr, dict(zip(jaxpr.invars, eqn.invars, strict=True)), eqn)
    renamed = dict(zip(outs, eqn.outvars, strict=True))
    assert not closed.consts and len(renamed) == len(outs)
    return [
        compat.moved_equation(e, e.invars, [renamed.get(v, v) for v in e.outvars], None)
        for e in flat.equations
    ]


@dataclass(slots=True, eq=False)
class _Flattener:
    """Collects equations with calls inlined, every result in a variable of its own."""

    equations: list[Any] = field(default_factory=list)
    constants: dict[Any, Any] = field(default_factory=dict)

    def add_constants(self, names: Sequence[Any], arrays: Sequence[Any]) -> dict[Any, Any]:
        env = {}
        for name, array in zip(names, arrays, strict=True):
            env[name] = compat.new_variable(name.aval)
            self.constants[env[name]] = array
        return env

    def inline(self, jaxpr: Any, env: dict[Any, Any], around: Any) -> list[Atom]:
        """Append the equations of a jaxpr; returns its outputs.

        Args:
          jaxpr: open.
          env: atoms in place of its inputs and constants; receives those of its results.
          around: the equation whose body it is, for scopes and source lines.
        """

        def atom(a: Any) -> Any:
            return a if compat.is_literal(a) else env[a]

        for eqn in jaxpr.eqns:
            operands = [atom(a) for a in eqn.invars]
            body = called_body(eqn)
            if body is not None:
                placed = compat.moved_equation(eqn, operands, eqn.outvars, around)
                inner, consts = compat.jaxpr_parts(body)
                inner_env = dict(zip(inner.invars, operands, strict=True))
                inner_env |= self.add_constants(inner.constvars, consts)
                results = self.inline(inner, inner_env, placed)
            else:
                results = [compat.new_variable(v.aval) for v in eqn.outvars]
                self.equations.append(compat.moved_equation(eqn, operands, results, around))
            env.update(zip(eqn.outvars, results, strict=True))
        return [atom(a) for a in jaxpr.outvars]
