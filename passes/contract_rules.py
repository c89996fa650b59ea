"""Sharding rules for every op and link of a program."""

from __future__ import annotations

from dataclasses import replace

from alpa_lite.errors import StepError
from alpa_lite.ir.graph import Literal
from alpa_lite.passes.contract import rule_of_link
from alpa_lite.passes.program import FlatOp, Program
from alpa_lite.passes.rules import Equation, RuleTable, ShardingRule
from alpa_lite.passes.rules.builtin import OWN_MESH


def program_rules(program: Program, table: RuleTable) -> list[ShardingRule]:
    """One rule per op, over its operands that are values (literals left out).

    Raises:
      StepError: an op cannot be run on the parts of a device; it is named.
    """
    ops = [op for op in program.ops if op.kind == "op"]
    for op in ops:
        _check_runs(op)
    found = dict(
        zip((o.id for o in ops), table.lookup_many([_equation(o) for o in ops]), strict=True)
    )
    read: dict[tuple[int, tuple[int, ...]], ShardingRule] = {}  # equal ones are one object
    rules = []
    for op in program.ops:
        if op.kind == "op":
            rule = found[op.id]
            key = (id(rule), op.positions)
            if key not in read:
                read[key] = replace(rule, operands=tuple(rule.operands[p] for p in op.positions))
            rules.append(read[key])
        else:
            rules.append(rule_of_link(op, program.values))
    return rules


def replicated_notes(program: Program, rules: list[ShardingRule]) -> tuple[str, ...]:
    """A note for each op without a sharding rule, and for each layout that the plan overrules."""
    notes = []
    for op, rule in zip(program.ops, rules, strict=True):
        if op.op is None:
            continue
        if rule.origin == "replicated":
            reason = f"is replicated: {rule.note or 'no sharding rule'}"
        elif op.name == "sharding_constraint":
            reason = "is ignored: the plan decides how arrays lie. Pin inputs with ManualParallel"
        else:
            continue
        notes.append(f"{op.name} at {_where(op)} {reason}")
    return tuple(dict.fromkeys(notes))


def _check_runs(op: FlatOp) -> None:
    if op.name in OWN_MESH:
        raise StepError(
            f"{op.name} at {_where(op)} runs a program of its own on the parts of a mesh, but "
            "inside of a step alpa-lite decides how arrays lie. Call it outside of the step, or "
            "write the same for whole arrays, without its collectives."
        )


def _where(op: FlatOp) -> str:
    assert op.op is not None
    return op.op.source or op.op.scope or "an unknown place"


def _equation(op: FlatOp) -> Equation:
    assert op.op is not None and op.graph is not None
    values = op.graph.values
    ins = tuple(o.aval if isinstance(o, Literal) else values[o].aval for o in op.op.operands)
    return Equation(
        op.op.primitive, op.op.params, ins, tuple(values[r].aval for r in op.op.results)
    )
