"""A pipeline is the step: every schedule, shape of stages, rematerialisation and optimizer.

The judge is one device that takes the same microbatches one by one and combines them by hand: three
steps, the loss and every leaf of state and results. Models are in `test_pipeline_models`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import alpa_lite
from tests.runtime.pipeline_cases import RTOL, RTOL_ADAM, by_hand, grid, net, run_steps

SHAPES = {
    "2x4": (2, 2, 2),
    "4x2": (2, 1, 4),
    "4x2-tp": (1, 2, 4),
    "8x1": (1, 1, 8),
}
UNEVEN = {
    "uneven": by_hand([[0], [1, 2, 3]], [(1, 2), (1, 4)]),
    "three": by_hand([[0], [1, 2], [3]], [(1, 4), (1, 2), (1, 1)], schedule="gpipe"),
    "idle": by_hand([[0, 1], [2, 3]], [(1, 1), (1, 4)], mesh_shapes=[None, (2, 2)]),
}
TWO_PER_MESH = ("interleaved_1f1b", "zbv", "dualpipev")
ONE_PER_MESH = ("gpipe", "1f1b", "eager_1f1b", "zb-h1", "chimera", "dualpipe")
# The network with everything that crosses stages.
FULL = {"optimizer": "clip", "tied": True, "skip": True, "sizes": True, "dropout": True}


# Each schedule once, each shape once, each rematerialisation once.


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(grid(*SHAPES["2x4"]), {**FULL}, id="1f1b-2x4"),
        pytest.param(grid(*SHAPES["4x2"], schedule="zb-h1", remat="dots"), {"skip": True}, id="zb-h1-4x2"),
        pytest.param(
            by_hand([[0], [1, 2, 3]], [(1, 2), (1, 4)], remat="full", schedule="gpipe"),
            {"optimizer": "multi", "tied": True}, id="gpipe-uneven",
        ),
        pytest.param(
            grid(2, 2, 2, schedule="interleaved_1f1b", num_virtual=2), {"tied": True},
            id="interleaved-2x4",
        ),
        pytest.param(
            grid(1, 4, 2, schedule="chimera", num_microbatches=2), {"dropout": True},
            id="chimera-2x4-one-microbatch-each",
        ),
        pytest.param(grid(2, 2, 2, schedule="dualpipev", num_virtual=2), {}, id="dualpipev-2x4"),
    ],
)  # fmt: skip
def test_some_pipelines(method: Any, options: dict[str, Any]) -> None:
    run_steps(net(**options), method, rtol=RTOL_ADAM if "optimizer" in options else RTOL)


@pytest.mark.parametrize(
    "options",
    [
        {"num_stages": 3},
        pytest.param({"num_stages": 2, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"schedule": "interleaved_1f1b"}, marks=pytest.mark.slow),
        pytest.param({"schedule": "chimera", "num_stages": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_searched_pipelines(options: dict[str, Any]) -> None:
    method = alpa_lite.PipeshardParallel(num_microbatches=4, **options)
    executable = run_steps(net(**FULL), method, rtol=RTOL_ADAM)
    assert executable.plan.num_microbatches == 4
    assert len(executable.plan.meshes) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("schedule", ONE_PER_MESH)
def test_schedules(schedule: str, remat: str) -> None:
    count = 8 if schedule == "dualpipe" else 4
    shape = SHAPES["4x2" if remat == "none" else "4x2-tp"]
    method = grid(*shape, schedule=schedule, remat=remat, num_microbatches=count)
    run_steps(net(**FULL), method, rtol=RTOL_ADAM)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("schedule", TWO_PER_MESH)
def test_schedules_with_two_stages_per_mesh(schedule: str, remat: str) -> None:
    method = grid(2, 2, 2, schedule=schedule, num_virtual=2, remat=remat)
    run_steps(net(**FULL), method, rtol=RTOL_ADAM)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_eight_stages(schedule: str) -> None:
    method = grid(1, 1, 8, schedule=schedule, layer_num=8, num_microbatches=8)
    run_steps(net(**{**FULL, "dropout": False}, layers=8), method, rtol=RTOL_ADAM)


@pytest.mark.slow
def test_eight_stages_on_four_meshes() -> None:
    method = grid(2, 1, 4, schedule="interleaved_1f1b", num_virtual=2, layer_num=8)
    run_steps(net(tied=True, skip=True, layers=8), method)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_stages(name: str) -> None:
    executable = run_steps(net(**FULL), UNEVEN[name], rtol=RTOL_ADAM)
    sizes = [mesh.devices.size for mesh in executable.meshes]
    assert sizes == [h * d for h, d in UNEVEN[name].submeshes]
    assert executable.plan.idle_devices == 8 - sum(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_numbers_of_microbatches(count: int) -> None:
    run_steps(net(**FULL), grid(1, 4, 2, num_microbatches=count), rtol=RTOL_ADAM)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "multi", "finite", "flat", "adafactor", "lion"])
def test_optimizers(optimizer: str) -> None:
    # Lion's update is a sign: elements near zero flip, each by twice the learning rate.
    run_steps(net(optimizer, tied=True), grid(2, 2, 2), rtol=1e-2)


@pytest.mark.slow
def test_bfloat16_compute_with_float32_state() -> None:
    # bfloat16 keeps 8 bits; gradients, sums of many products with cancellation, lose some more.
    run_steps(net(dtype=jnp.bfloat16, tied=True), grid(2, 2, 2, remat="dots"), rtol=5e-2)


@pytest.mark.slow
def test_without_quick_compilation() -> None:
    """With XLA's optimizations, as users have it."""
    run_steps(
        net(**FULL), grid(2, 1, 4, schedule="zb-h1", remat="full"), rtol=RTOL_ADAM, quick=False
    )
