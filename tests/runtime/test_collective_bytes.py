"""The bytes that plans predict are those of the compiled programs, merges by XLA foretold.

`python -m benchmarks.collectives` compares every model with every method; this takes each once.
"""

import pytest

from benchmarks.collectives import SAME, compare, methods, sharding_pays

CASES = {
    "mlp-test": "AutoParallel 2x2x2",
    "gpt-test": "AutoParallel 8",
    "llama-test": "Zero3Parallel",
    "llama-scan-test": "AutoParallel 2x4, 2 microbatches",
    "moe-test": "AutoParallel 2x4",
    "deepseek-test": "DataParallel",
    "wide-resnet-test": "Zero1Parallel",
}


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=() if m == "mlp-test" else pytest.mark.slow) for m in CASES]
)
def test_predicted_bytes_are_compiled_bytes(model: str) -> None:
    found = compare(model, CASES[model], dict(methods())[CASES[model]], sharding_pays())
    assert found.predicted
    assert found.unexplained <= SAME, found.pairs()
