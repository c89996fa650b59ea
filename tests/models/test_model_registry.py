"""`build` and `presets`: names, overrides and errors."""

import jax
import jax.numpy as jnp
import pytest

from alpa_lite.models import build, presets
from alpa_lite.models.attention import causal_attention


def test_presets_are_unique_and_cover_every_family():
    names = presets()
    assert len(names) == len(set(names))
    for name in (
        "gpt-175b",
        "llama3-405b",
        "moe-70b",
        "deepseek-v3",
        "wide-resnet-13b",
        "mlp-large",
        "gpt-test",
        "llama-test",
        "llama-scan-test",
        "moe-test",
        "deepseek-test",
        "wide-resnet-test",
        "mlp-test",
    ):
        assert name in names


@pytest.mark.parametrize("name", presets())
def test_every_preset_builds(name):
    setup = build(name)
    assert setup.name == name
    assert setup.batch_shapes(8)


def test_overrides_reach_the_config():
    config = build("gpt-1.3b", num_layers=2, seq_len=512, dtype=jnp.float16).config
    assert (config.num_layers, config.seq_len, config.dtype) == (2, 512, "float16")
    assert build("moe-1.3b", seq_len=256).config.tokens_per_group == 256


def test_unknown_preset_names_near_matches():
    with pytest.raises(
        ValueError, match=r"'llama3-7b'.*Did you mean .*'llama2-7b'.*Known: gpt-125m"
    ):
        build("llama3-7b")


def test_unknown_field_names_near_matches():
    with pytest.raises(ValueError, match=r"'gpt-test' has no field 'n_layers'.*'num_layers'"):
        build("gpt-test", n_layers=2)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"Unknown optimizer 'adam'.*'adamw'"):
        build("mlp-test", optimizer="adam")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers is 0; it must be an int of at least 1"),
        ("num_heads", 7, "num_heads = 7 does not divide"),
        ("dropout_rate", 1.5, r"dropout_rate is 1.5; it must lie in \[0, 1\)"),
        ("dtype", "int32", "must name a floating-point dtype"),
        ("dtype", "nonsense", "must name a floating-point dtype"),
        ("dtype", None, "must name a floating-point dtype"),
        ("vocab_size", 10**12, r"vocab_size must be a whole number below 2\*\*31, found 10000"),
        ("num_layers", "two", "num_layers must be a whole number .*, found 'two'"),
        ("remat", "yes", "remat must be True or False, found 'yes'"),
        ("dropout_rate", "x", "dropout_rate must be a finite number, found 'x'"),
        ("learning_rate", "abc", "learning_rate must be a finite number, found 'abc'"),
        ("clip_norm", "1", "clip_norm must be a finite number, found '1'"),
    ],
)
def test_bad_values_are_explained(field, value, message):
    with pytest.raises(ValueError, match=message):
        build("gpt-test", **{field: value})


@pytest.mark.parametrize("name", ["gpt-test", "llama-test", "llama-scan-test"])
def test_attention_can_be_replaced(name):
    called = []

    def own(q, k, v):
        called.append(q.shape)
        return causal_attention(q, k, v)

    setup = build(name, attention=own)
    state = setup.state_shapes()
    called.clear()  # shapes of the state come from a pass over one sequence
    jax.eval_shape(setup.step, state, setup.batch_shapes(2))
    assert set(called) == {(2, 32, 8, 8)}


def test_only_models_with_plain_attention_take_another():
    with pytest.raises(ValueError, match="'deepseek-test' has an attention of its own"):
        build("deepseek-test", attention=causal_attention)
    with pytest.raises(ValueError, match="attention must be a function, found 'flash'"):
        build("gpt-test", attention="flash")
