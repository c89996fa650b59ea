"""Every public `jax.lax` function has a rule, or stands in an explicit list."""

from __future__ import annotations

from collections import defaultdict

import pytest
from jax import lax

from alpa_lite.passes.rules import FactorKind, RuleTable, ShardingRule
from tests.passes.rules.samples import LAX_SAMPLES, NOT_SAMPLED, equations_of

FALLBACKS = {
    "rng_uniform": "stablehlo.rng has no sharding rule",
    "scaled_dot": "stablehlo.composite has no sharding rule",
}
"""Primitives that are replicated, and why."""

FULLY_BLOCKED = {"rng_bit_generator"}
"""Primitives with a derived rule that allows no cut at all in any of their samples."""


def rules_by_primitive() -> dict[str, list[ShardingRule]]:
    equations = [
        equation
        for calls in LAX_SAMPLES.values()
        for fn, args in calls
        for equation in equations_of(fn, *args)
    ]
    out: dict[str, list[ShardingRule]] = defaultdict(list)
    for equation, rule in zip(equations, RuleTable().lookup_many(equations), strict=True):
        out[equation.primitive.name].append(rule)
    return out


def test_every_public_function_is_listed() -> None:
    public = {n for n in dir(lax) if not n.startswith("_") and callable(getattr(lax, n))}
    assert public - LAX_SAMPLES.keys() - NOT_SAMPLED.keys() == set()
    assert LAX_SAMPLES.keys() & NOT_SAMPLED.keys() == set()


@pytest.mark.smoke
def test_fallbacks_are_those_expected() -> None:
    replicated = {
        name: rule.note
        for name, rules in rules_by_primitive().items()
        for rule in rules
        if rule.origin == "replicated"
    }
    assert replicated == FALLBACKS


def test_all_other_primitives_can_be_cut() -> None:
    def can_be_cut(rule: ShardingRule) -> bool:
        return any(f.kind is not FactorKind.BLOCKED for f in rule.factors)

    uncut = {n for n, rules in rules_by_primitive().items() if not any(map(can_be_cut, rules))}
    assert uncut == FULLY_BLOCKED | FALLBACKS.keys()
