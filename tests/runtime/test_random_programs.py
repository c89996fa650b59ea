"""Random programs under random plans give the undecorated step's results.

129 programs in the quick run, 215 in the slow one, a share of them for every op.
"""

import zlib

import jax
import pytest
from hypothesis import Phase, given, note, seed, settings
from hypothesis import strategies as st

from tests.runtime.random_plans import (
    MESH_SHAPES,
    QUICK_COMPILE,
    assert_close,
    mesh_of,
    prepare_step,
    random_planned_step,
)
from tests.runtime.random_programs import OPS, RandomProgram, programs

# Values are of order one, so a leaf far below that is what is left of a cancellation: its error
# is measured against the size of what cancelled.
CANCELLED = 1e-2

SMOKE = {"scan", "while_loop", "cond", "checkpoint", "dot", "gather"}

PLANS = st.tuples(st.sampled_from(MESH_SHAPES), st.integers(0, 2**31 - 1))


def check(program: RandomProgram, plans: list[tuple[tuple[int, ...], int]]) -> None:
    """Compare the program with itself under plans, given as (mesh shape, seed of the layouts)."""
    note(program.text)
    step = program.step
    arguments = program.arguments(seed=len(program.source))
    reference = jax.jit(step, compiler_options=QUICK_COMPILE)(*arguments)
    prepared = prepare_step(step, arguments)
    for shape, number in plans:
        found = random_planned_step(prepared, mesh_of(shape), number)(*arguments)
        assert_close(reference, found, floor=CANCELLED, what=f"mesh {shape}, seed {number}:")


def check_many(op_name: str, examples: int, plans_each: int, salt: str) -> None:
    """Other programs for every op, and the same ones every time.

    To shrink takes minutes of compiling: add `Phase.shrink` when a failing program is too large.
    """

    @seed(zlib.crc32(f"{op_name} {salt}".encode()))
    @settings(max_examples=examples, phases=[Phase.generate])
    @given(programs(op_name), st.lists(PLANS, min_size=plans_each, max_size=plans_each))
    def run(program, plans):
        check(program, plans)

    run()


@pytest.mark.parametrize(
    "op_name", [pytest.param(o, marks=[pytest.mark.smoke] * (o in SMOKE)) for o in OPS]
)
def test_random_programs(op_name):
    check_many(op_name, examples=3, plans_each=1, salt="quick")


@pytest.mark.slow
@pytest.mark.parametrize("op_name", OPS)
def test_more_random_programs(op_name):
    check_many(op_name, examples=5, plans_each=2, salt="slow")
