"""From a number of parameters to the nearest Llama-like model: sizes as in the presets."""

from __future__ import annotations

import math
from typing import Any, Final

from alpa_lite.cli.exits import InputError
from alpa_lite.cli.model_shapes import shape_of
from alpa_lite.cost_model.llm import TransformerShape, count_parameters
from alpa_lite.models.llama import PRESETS, LlamaConfig

BASE: Final = "llama3-8b"  # vocabulary and everything that is no size
HEAD_DIM: Final = 128
KV_HEADS: Final = (8, 4)  # as many as divide the heads
MLP_RATIO: Final = 3.5  # 14336 / 4096 and 28672 / 8192
WIDTH_PER_LAYER: Final = 128  # 4096 / 32; Llama-3's other sizes have 102 and 130
_ASPECTS: Final = (80, 160)
_WIDTHS: Final = (*range(512, 4096, 512), *range(4096, 8192, 1024), *range(8192, 65537, 2048))
_LAYER_STEP: Final = 4  # so that pipelines of 2 and 4 stages are even


def nearest_sizes(parameters: float) -> dict[str, int]:
    """Overrides of the preset `BASE` that come closest to a number of parameters.

    Heads have 128 dims, keys have 8 heads (4 where 8 do not divide the heads), the MLP is 3.5
    times as wide as the residual stream, as in Llama 3 (arXiv 2407.21783, table 3). Width over
    layers stays between 80 and 160, near 128.

    Raises:
      InputError: the number is smaller or larger than any such model.
    """
    found = min(_candidates(), key=lambda sizes: _distance(sizes, parameters))
    exact = parameters_of(found)
    if not 0.8 < exact / parameters < 1.25:
        raise InputError(
            f"the best model for this budget has {parameters:.3g} parameters, and the nearest "
            f"Llama-like one {exact:.3g}: give a larger or smaller budget"
        )
    return found


def shape_with(sizes: dict[str, int]) -> TransformerShape:
    """The model with these sizes."""
    settings: dict[str, Any] = {
        name: getattr(PRESETS[BASE], name) for name in LlamaConfig.__dataclass_fields__
    }
    name = f"llama-h{sizes['hidden_size']}-l{sizes['num_layers']}"
    return shape_of(name, LlamaConfig(**{**settings, **sizes}))


def parameters_of(sizes: dict[str, int]) -> int:
    """Of the model with these sizes."""
    return sum(count_parameters(shape_with(sizes)).values())


def _candidates() -> list[dict[str, int]]:
    return [
        {
            "hidden_size": width,
            "mlp_size": int(MLP_RATIO * width),
            "num_layers": layers,
            "num_heads": width // HEAD_DIM,
            "num_kv_heads": next(n for n in KV_HEADS if width // HEAD_DIM % n == 0),
        }
        for width in _WIDTHS
        for layers in range(_LAYER_STEP, 1 + width // _ASPECTS[0], _LAYER_STEP)
        if _ASPECTS[0] <= width / layers <= _ASPECTS[1]
    ]


def _distance(sizes: dict[str, int], parameters: float) -> float:
    """How far off the size is, and a tenth of how far off the proportions are, both as ratios."""
    aspect = sizes["hidden_size"] / sizes["num_layers"] / WIDTH_PER_LAYER
    return abs(math.log(parameters_of(sizes) / parameters)) + 0.1 * abs(math.log(aspect))
