import json

import pytest

from alpa_lite.cli.model_shapes import shape_of
from alpa_lite.cli.traced_flops import traced_flops
from alpa_lite.cost_model.llm import count_flops, count_parameters
from alpa_lite.models import build, presets

LLAMA = ("model", "llama2-7b", "--seq", 4096, "--batch", 1)
TRANSFORMERS = tuple(name for name in presets() if not name.startswith(("wide-resnet", "mlp")))


@pytest.mark.smoke
def test_figures_of_llama2_7b(invoke):
    result = invoke(*LLAMA, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["parameters"]["total"] == 6_738_415_616
    assert round(found["flops"]["training_total"] / 1e12, 2) == 192.17
    assert round(found["flops"]["forward_total"] / 1e12) == 63
    assert round(100 * found["flops"]["training_share"]["attention"], 3) == 41.276
    assert found["memory_bytes"]["state"]["bfloat16_adam"]["total"] == 16 * 6_738_415_616
    assert found["memory_bytes"]["kv_cache"] == 4096 * 32 * 2 * 32 * 128 * 2
    assert "utilisation" not in found and "traced" not in found


def test_text_shows_the_figures(invoke):
    result = invoke(*LLAMA)
    assert result.exit_code == 0, result.stderr
    for text in ("192.17", "41.276%", "55.361%", "1.676%", "0.007%", "0.003%", "6,738,415,616"):
        assert text in result.stdout
    assert "terms add to 11" in result.stdout


def test_utilisation_of_a_measured_step(invoke):
    """MFU = model FLOPs / (step x devices x peak); HFU adds what is computed again."""
    result = invoke(
        *LLAMA[:-1], 8, "--step-seconds", 0.5, "--cluster", "h100:8", "--remat", "full", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    parts = count_flops(shape_of("llama2-7b", build("llama2-7b").config), batch=8, seq=4096)
    model = sum(part.training for part in parts.values())
    blocks = sum(parts[n].forward for n in ("attention", "mlp", "norm", "residual"))
    used = found["utilisation"]
    assert used["mfu"] == pytest.approx(model / (0.5 * 8 * 989e12))
    assert used["hfu"] == pytest.approx((model + blocks) / (0.5 * 8 * 989e12))
    assert used["mfu_causal"] < used["mfu"] < used["hfu"]
    assert used["tokens_per_s_per_device"] == 4096 / 0.5


def test_config_file(invoke, tmp_path):
    file = tmp_path / "config.json"
    sizes = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000,
    }  # fmt: skip
    file.write_text(json.dumps({"model_type": "llama", **sizes}))
    result = invoke("model", file, "--seq", 4096, "--json")
    assert result.exit_code == 0, result.stderr
    assert round(json.loads(result.stdout)["flops"]["training_total"] / 1e12, 2) == 192.17


def test_traced_step_beside_it(invoke):
    result = invoke("model", "llama-test", "--traced", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["traced"]
    assert found["matmul_difference"] == pytest.approx(0, abs=1e-12)
    assert found["update"] > 0 and found["other"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama2-8b",), "Unknown preset"),
        (("mlp-test",), "no transformer"),
        (("llama2-7b", "--step-seconds", 1), "both --step-seconds and --cluster"),
        (("llama2-7b", "--step-seconds", 0, "--cluster", "h100:8"), "not a positive number"),
        (("llama2-7b", "--remat", "half"), "none of none, dots, full"),
        (
            ("llama2-7b", "--step-seconds", 1, "--cluster", "v100:8", "--dtype", "int4"),
            "has figures for",
        ),
        (("llama2-7b", "--seq", 5, "--set", "seq_len=6"), "contradict"),
        (("none.json",), "cannot be read"),
        (("none.json", "--traced"), "for model presets"),
    ],
)
def test_bad_input(invoke, arguments, message):
    result = invoke("model", *arguments)
    assert result.exit_code == 3
    assert message in result.stderr


def assert_closed_form_agrees(name, batch=2):
    """Within 1 % of the traced step: exactly in matrix products of dense models.

    What differs by name: the router's own one-hot products (at most 0.2 % in the tiny test model)
    and everything elementwise, which the graph counts one per element and operation.
    """
    setup = build(name)
    if hasattr(setup.config, "scan_layers"):
        setup = build(name, scan_layers=True)
    shape = shape_of(name, setup.config)
    traced = traced_flops(setup, batch)
    parts = count_flops(shape, batch=batch, seq=setup.config.seq_len).values()
    matmul = sum(part.training_matmul for part in parts)
    exact = not name.startswith(("moe", "deepseek"))
    assert matmul == pytest.approx(traced.matmul, rel=1e-12 if exact else 2e-3)
    if not name.endswith("-test"):
        total = sum(part.training for part in parts)
        assert total == pytest.approx(traced.matmul + traced.other, rel=0.01)
    assert sum(count_parameters(shape).values()) == setup.num_parameters


@pytest.mark.parametrize("name", ["gpt-125m", "llama2-7b", "moe-test", "deepseek-test"])
def test_closed_form_against_the_traced_graph(name):
    assert_closed_form_agrees(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_closed_forms_against_the_traced_graph(name):
    assert_closed_form_agrees(name)
