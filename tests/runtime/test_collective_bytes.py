"""The bytes that plans predict are those of the compiled programs, merges by XLA foretold.

`python -m benchmarks.collectives` compares every model with every method; this takes each once.
"""

import jax
import jax.numpy as jnp
import pytest

from alpa_lite.passes.compiler_merges import merged_collectives
from alpa_lite.passes.decisions import collectives, layout_change
from alpa_lite.runtime.hlo import collective_bytes
from benchmarks.collectives import SAME, compare, methods, sharding_pays
from tests.runtime.random_plans import compile_decisions, mesh_of, prepare_step, random_decisions

CASES = (
    ("mlp-test", "AutoParallel 2x2x2"),
    ("gpt-test", "AutoParallel 8"),
    ("gpt-test", "AutoParallel 2x2x2"),  # gathers again behind an activation that is kept gathered
    ("llama-test", "Zero3Parallel"),
    ("llama-scan-test", "AutoParallel 2x4, 2 microbatches"),
    ("moe-test", "AutoParallel 2x4"),
    ("deepseek-test", "DataParallel"),
    ("wide-resnet-test", "Zero1Parallel"),
)


@pytest.mark.parametrize(
    ("model", "method"),
    [pytest.param(*c, marks=() if c[0] == "mlp-test" else pytest.mark.slow) for c in CASES],
)
def test_predicted_bytes_are_compiled_bytes(model: str, method: str) -> None:
    found = compare(model, method, dict(methods())[method], sharding_pays())
    assert found.predicted
    assert found.unexplained <= SAME, found.pairs()


def test_gathering_again_starts_at_the_value_behind_all_copies() -> None:
    """What a copy in between has gathered is gathered once more, and the plan says so."""

    def loss(params, x):
        hidden = jnp.sin(x @ params["a"])  # read twice in forward and in backward
        return jnp.mean((hidden @ params["b"]) * jnp.tanh(hidden @ params["c"]))

    def step(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(jnp.subtract, params, grads), value

    square = jax.ShapeDtypeStruct((8, 8), "float32")
    prepared = prepare_step(step, (dict.fromkeys("abc", square), square))
    mesh = mesh_of((2, 2, 2))
    decisions = random_decisions(prepared, mesh, seed=6)
    uses = decisions.contraction.uses
    changes = [layout_change(decisions, op, position) for op, position in uses]
    own = {key for change in changes for _, key in change.results()}
    assert any(key not in own for change in changes for _, key in change.repeated())
    predicted: dict[tuple[str, ...], float] = {}
    for sign, found in ((1, collectives(decisions)), (-1, merged_collectives(decisions))):
        for use in found:
            if use.kind == "all_gather":
                size = sign * use.times * use.payload_bytes
                predicted[use.axes] = predicted.get(use.axes, 0.0) + size
    text = compile_decisions(prepared, decisions).as_text()
    compiled = collective_bytes(text, mesh)
    assert predicted == {axes: n for (kind, axes), n in compiled.items() if kind == "all_gather"}
