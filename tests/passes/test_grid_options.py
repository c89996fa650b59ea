"""What a fixed grid prescribes besides its sizes: ZeRO stages, and how tensor parallelism splits."""

import pytest

from alpa_lite.api import parallelize
from alpa_lite.models import build
from alpa_lite.passes.pipeline_methods import ThreeDParallel

PARAMETER = "state.params.layers.mlp.{}.kernel"
MOMENT = "state.opt_state.0.mu.layers.mlp.{}.kernel"


def layouts(**options):
    """Mesh axes on the kernels of the MLP and on their moments, and collectives per step."""
    setup = build("gpt-test", scan_layers=True)
    method = ThreeDParallel(dp=2, tp=4, pp=1, num_microbatches=2, **options)
    step = parallelize(setup.step, method=method, cluster="h100:8")
    stage = step.plan(setup.state_shapes(), setup.batch_shapes(16)).stages[0].plan
    return stage.inputs


def axes(spec):
    return {axis for dim in spec.dims for axis in dim}


@pytest.mark.parametrize(("zero", "parameters", "moments"), [(0, 0, 0), (1, 0, 1), (3, 1, 1)])
def test_zero_stages_split_the_state_over_dp(zero, parameters, moments):
    inputs = layouts(zero=zero)
    for name in ("up", "down"):
        assert ("dp" in axes(inputs[PARAMETER.format(name)])) == bool(parameters)
        assert ("dp" in axes(inputs[MOMENT.format(name)])) == bool(moments)


def test_tensor_parallelism_by_weights_is_megatrons():
    """Columns of the first matrix, rows of the second; dims of the scan come first."""
    inputs = layouts(zero=0, split_weights=True)
    assert inputs[PARAMETER.format("up")].dims == ((), (), ("tp",))
    assert inputs[PARAMETER.format("down")].dims == ((), ("tp",), ())


@pytest.mark.parametrize("zero", [-1, 4, True, "3"])
def test_bad_stage(zero):
    with pytest.raises(ValueError, match="zero must be 0, 1, 2, 3 or None"):
        ThreeDParallel(dp=1, tp=1, pp=1, zero=zero)
