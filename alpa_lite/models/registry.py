"""Presets by name, and the one function that turns a name into a `ModelSetup`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from alpa_lite.models import deepseek, deepseek_config, gpt, llama, mlp, moe, wide_resnet
from alpa_lite.models.attention import AttentionFunction
from alpa_lite.models.optimizers import make_optimizer
from alpa_lite.models.setup import ModelSetup

MakeSetup = Callable[..., ModelSetup]


def presets() -> tuple[str, ...]:
    """Every name that `build` accepts, family by family, small to large."""
    return tuple(name for configs, _ in _families() for name in configs)


def build(
    name: str,
    *,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    clip_norm: float | None = None,
    attention: AttentionFunction | None = None,
    **overrides: Any,
) -> ModelSetup:
    """Builds the setup of a preset; allocates nothing.

    Args:
        name: One of `presets()`.
        optimizer: `"sgd"`, `"adamw"`, `"adafactor"` or `"lion"`.
        learning_rate: Constant step size.
        clip_norm: Largest global gradient norm, `None` for no clipping.
        attention: Of GPT and Llama models, instead of `causal_attention`; for example
            `functools.partial(alpa_lite.flash_attention, causal=True)`.
        **overrides: Fields of the preset's configuration, such as `num_layers=4`,
            `seq_len=512`, `dtype="bfloat16"` or `dropout_rate=0.1`.

    Returns:
        The model with its initialiser, train step and batches.

    Raises:
        ValueError: For an unknown preset, optimiser or field, or a value the configuration
            rejects.

    Example:
        >>> build("llama3-405b", scan_layers=True).num_parameters
        405853388800
    """
    for option, number in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if not (number is None and option == "clip_norm"):
            _check_type(option, 1.0, number)
    if not (attention is None or callable(attention)):
        raise ValueError(f"attention must be a function, found {attention!r}")
    for configs, make_setup in _families():
        if name in configs:
            config = _override(name, configs[name], overrides)
            tx = make_optimizer(optimizer, learning_rate=learning_rate, clip_norm=clip_norm)
            if attention is None:
                return make_setup(name, config, tx)
            if make_setup not in (gpt.make_setup, llama.make_setup):
                raise ValueError(
                    f"Preset {name!r} has an attention of its own; leave attention out"
                )
            return make_setup(name, config, tx, attention)
    raise ValueError(f"Unknown preset {name!r}. {_known(name, presets())}")


def _families() -> tuple[tuple[Mapping[str, Any], MakeSetup], ...]:
    return (
        (gpt.PRESETS, gpt.make_setup),
        (llama.PRESETS, llama.make_setup),
        (moe.PRESETS, moe.make_setup),
        (deepseek_config.PRESETS, deepseek.make_setup),
        (wide_resnet.PRESETS, wide_resnet.make_setup),
        (mlp.PRESETS, mlp.make_setup),
    )


def _override(name: str, config: Any, overrides: Mapping[str, Any]) -> Any:
    fields = [field.name for field in dataclasses.fields(config)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"Preset {name!r} has no field {field!r}. {_known(field, fields)}")
    plain = {field: _plain(field, value) for field, value in overrides.items()}
    for field, value in plain.items():
        _check_type(field, getattr(config, field), value)
    return dataclasses.replace(config, **plain)


def _check_type(field: str, default: Any, value: Any) -> None:
    """A value of the kind of the default; sizes fit 32 bits, as array dims and token ids must."""
    if isinstance(default, bool):
        fine, wanted = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        whole = isinstance(value, int) and not isinstance(value, bool)
        fine, wanted = whole and abs(value) < 2**31, "a whole number below 2**31"
    elif isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fine, wanted = number and math.isfinite(value), "a finite number"
    else:
        return
    if not fine:
        raise ValueError(f"{field} must be {wanted}, found {value!r}")


def _plain(field: str, value: Any) -> Any:
    """Dtypes by name and lists as tuples, so that every configuration stays hashable."""
    if field == "dtype" and value is not None and not isinstance(value, str):
        try:
            return jnp.dtype(value).name
        except TypeError:
            return value  # the configuration rejects it with its own message
    return tuple(value) if isinstance(value, list) else value


def _known(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
