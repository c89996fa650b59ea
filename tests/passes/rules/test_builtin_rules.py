"""Rules that are not derived: random numbers, identities, opaque calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.random import threefry_2x32

from alpa_lite.passes.rules import POSITION_DEPENDENT, derive_rules
from tests.passes.rules.samples import equations_of

KEY = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
KEYS = jax.ShapeDtypeStruct((4,), KEY.dtype)


def rules_of(fn: object, *args: object) -> dict[str, tuple[str, str]]:
    """Primitive -> (rule, origin)."""
    equations = equations_of(fn, *args)  # type: ignore[arg-type]
    rules = derive_rules(equations)
    return {e.primitive.name: (str(r), r.origin) for e, r in zip(equations, rules, strict=True)}


@pytest.mark.smoke
def test_bits_of_one_threefry_key_can_be_drawn_in_parts() -> None:
    rules = rules_of(lambda k: jax.random.bits(k, (8, 4)), KEY)
    assert rules["random_bits"] == ("([])->([i, j]) {i=8, j=4}", "registered")
    assert "random_bits" in POSITION_DEPENDENT


def test_bits_of_many_keys_are_replicated() -> None:
    rules = rules_of(jax.vmap(lambda k: jax.random.bits(k, (2,))), KEYS)
    assert rules["random_bits"][1] == "replicated"


def test_bits_of_other_generators_are_replicated() -> None:
    key = jax.ShapeDtypeStruct((), jax.random.key(0, impl="rbg").dtype)
    assert rules_of(lambda k: jax.random.bits(k, (8,)), key)["random_bits"][1] == "replicated"


@pytest.mark.parametrize(
    ("name", "fn", "args"),
    [
        ("random_split", lambda k: jax.random.split(k, 4), (KEY,)),
        ("random_fold_in", lambda k: jax.random.fold_in(k, 1), (KEY,)),
        ("random_unwrap", jax.random.key_data, (KEYS,)),
        ("random_wrap", jax.random.wrap_key_data, (jax.ShapeDtypeStruct((4, 2), jnp.uint32),)),
        ("random_seed", jax.random.key, (jax.ShapeDtypeStruct((), jnp.int32),)),
        ("broadcast_in_dim", lambda k: jnp.broadcast_to(k, (2, 4)), (KEYS,)),
    ],
)
def test_keys_are_replicated(name: str, fn: object, args: tuple[object, ...]) -> None:
    assert rules_of(fn, *args)[name][1] == "replicated"


def test_threefry_is_elementwise() -> None:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    rules = rules_of(threefry_2x32, key, jax.ShapeDtypeStruct((8,), jnp.uint32))
    assert rules["threefry2x32"] == ("([], [], [i], [i])->([i], [i]) {i=4}", "registered")


def test_sharding_constraint_is_the_identity() -> None:
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    rules = rules_of(lambda v: lax.with_sharding_constraint(v, sharding), jnp.ones((8, 4)))
    assert rules["sharding_constraint"] == ("([i, j])->([i, j]) {i=8, j=4}", "registered")


def test_opaque_calls_are_replicated_and_say_what_to_do() -> None:
    def double(x_ref: object, y_ref: object) -> None:
        y_ref[...] = x_ref[...] * 2  # type: ignore[index]

    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    (equation,) = equations_of(lambda x: pl.pallas_call(double, out_shape=shape)(x), shape)
    (rule,) = derive_rules([equation])
    assert rule.origin == "replicated"
    assert "register a sharding rule" in rule.note


def test_empty_arrays_are_replicated() -> None:
    rules = rules_of(lax.tanh, jax.ShapeDtypeStruct((0, 4), jnp.float32))
    assert rules["tanh"] == (
        "([k, l])->([i, j]) {i=0, j=4, k=0, l=4} blocked={i, j, k, l}",
        "replicated",
    )
