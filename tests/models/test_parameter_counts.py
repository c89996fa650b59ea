"""Parameter counts against published numbers, found without allocating anything."""

import jax
import pytest

from alpa_lite.models import build

# Sums over the released checkpoints' tensors.
LLAMA = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}


@pytest.mark.parametrize("name", LLAMA)
def test_llama_counts_are_exact(name):
    assert build(name, scan_layers=True).num_parameters == LLAMA[name]


def test_unrolled_llama_has_as_many_parameters_as_the_scanned():
    assert build("llama3-8b", scan_layers=False).num_parameters == LLAMA["llama3-8b"]


def test_llama_count_from_its_sizes():
    """N (2 h^2 + 2 h h_kv + 3 h i + 2 h) + 2 v h + h with h 64, h_kv 32, i 128, N 2, v 256."""
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert build("llama-test").num_parameters == 2 * layer + 2 * 256 * 64 + 64


@pytest.mark.parametrize(
    ("name", "nominal", "tolerance"),
    [
        ("gpt-125m", 125e6, 0.03),
        ("gpt-350m", 350e6, 0.03),
        ("gpt-760m", 760e6, 0.03),
        ("gpt-1.3b", 1.3e9, 0.03),
        ("gpt-2.6b", 2.6e9, 0.03),
        ("gpt-6.7b", 6.7e9, 0.03),
        ("gpt-15b", 15e9, 0.03),
        ("gpt-39b", 39e9, 0.03),
        ("gpt-175b", 175e9, 0.01),
        ("nemotron4-15b", 15.6e9, 0.01),
        ("nemotron4-340b", 341e9, 0.01),
        ("moe-380m", 380e6, 0.03),
        ("moe-690m", 690e6, 0.03),
        ("moe-1.3b", 1.3e9, 0.04),
        ("moe-2.4b", 2.4e9, 0.03),
        ("moe-10b", 10e9, 0.03),
        ("moe-27b", 27e9, 0.03),
        ("moe-70b", 70e9, 0.03),
        ("wide-resnet-250m", 250e6, 0.03),
        ("wide-resnet-500m", 500e6, 0.03),
        ("wide-resnet-1b", 1e9, 0.03),
        ("wide-resnet-2b", 2e9, 0.03),
        ("wide-resnet-4b", 4e9, 0.03),
        ("wide-resnet-6.8b", 6.8e9, 0.03),
        ("wide-resnet-13b", 13e9, 0.03),
    ],
)
def test_alpa_suite_is_near_its_nominal_sizes(name, nominal, tolerance):
    options = {"scan_layers": True} if name.startswith("gpt") else {}
    assert build(name, **options).num_parameters == pytest.approx(nominal, rel=tolerance)


def test_gpt_scanned_and_unrolled_have_equal_counts():
    counts = {build("gpt-125m", scan_layers=scan).num_parameters for scan in (True, False)}
    assert len(counts) == 1


def test_deepseek_v3_without_the_prediction_module():
    """671B: 61 MLA layers, 3 dense MLPs, 58 x (256 + 1) experts and routers, embedding, head."""
    d, heads = 7168, 128
    attention = d * 1536 + 1536 + 1536 * heads * (128 + 64)
    attention += d * (512 + 64) + 512 + 512 * heads * (128 + 128) + heads * 128 * d
    experts = 257 * 3 * d * 2048 + 256 * d
    expected = 61 * (attention + 2 * d) + 3 * 3 * d * 18432 + 58 * experts + 2 * 129280 * d + d
    count = build("deepseek-v3", num_mtp_modules=0, scan_layers=True).num_parameters
    assert count == expected
    assert count == pytest.approx(671e9, rel=0.001)


def test_deepseek_v3_prediction_module_adds_a_layer_and_a_projection():
    counts = [
        build("deepseek-v3", num_mtp_modules=n, scan_layers=True).num_parameters for n in (0, 1)
    ]
    assert counts[1] - counts[0] == pytest.approx(11.6e9, rel=0.01)


def test_llama3_405b_is_traced():
    setup = build("llama3-405b", scan_layers=True)
    state, metrics = jax.eval_shape(setup.step, setup.state_shapes(), setup.batch_shapes(16))
    assert metrics["loss"].shape == ()
    assert jax.tree.leaves(state.params["layers"])[0].shape[0] == 126
