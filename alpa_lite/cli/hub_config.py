"""A Hugging Face `config.json` to a `TransformerShape`; the file is trusted in nothing.

Fields and their defaults are those of the configuration classes in `transformers`. Other fields
are ignored, as they are many and change no cost counted here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from alpa_lite.cli.exits import InputError
from alpa_lite.cost_model.llm import (
    Block,
    DenseMLP,
    ExpertMLP,
    HeadAttention,
    LatentAttention,
    TransformerShape,
)

MAX_FILE_BYTES: Final = 2**20
_REQUIRED: Final = object()
_ACTIVATIONS: Final = MappingProxyType(
    {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu",
        "gelu_pytorch_tanh": "gelu", "relu": "relu", "relu2": "relu2",
    }
)  # fmt: skip


class Fields:
    """The fields of one file, each checked when it is read."""

    def __init__(self, data: Mapping[str, Any], file: str) -> None:
        self._data = data
        self._file = file

    def whole(self, name: str, default: Any = _REQUIRED, low: int = 1, high: int = 2**31) -> int:
        """A whole number; the default also stands for null."""
        found = self._data.get(name)
        if found is None and default is not _REQUIRED:
            return int(default)
        if not isinstance(found, int) or isinstance(found, bool) or not low <= found <= high:
            raise self.error(name, f"a whole number from {low} to {high}")
        return found

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        found = self._data.get(name, default)
        if not isinstance(found, bool):
            raise self.error(name, "true or false")
        return found

    def activation(self, name: str, default: str) -> str:
        """The nonlinearity of the MLP."""
        found = self._data.get(name, default)
        if not isinstance(found, str) or found not in _ACTIVATIONS:
            raise self.error(name, "one of " + ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[found]

    def absent(self, name: str) -> bool:
        """Whether the field is missing or null."""
        return self._data.get(name) is None

    def multiple(self, name: str, divisor: str) -> int:
        """Quotient of two whole numbers."""
        found, by = self.whole(name), self.whole(divisor)
        if found % by:
            raise self.error(name, f"a multiple of {divisor}, which is {by}")
        return found // by

    def error(self, name: str, allowed: str) -> InputError:
        """What is wrong with a field."""
        shown = repr(self._data[name])[:60] if name in self._data else "nothing"
        return InputError(f"{self._file}: {name}: found {shown}, allowed {allowed}")


def load_hub_config(path: Path) -> TransformerShape:
    """Read the `config.json` of a model.

    Raises:
      InputError: the file cannot be read, is malformed, or of an unknown architecture.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise InputError(f"{path}: found more than {MAX_FILE_BYTES} bytes, which is the limit")
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: found {type(data).__name__}, allowed an object")
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        known = ", ".join(_READERS)
        raise InputError(
            f"{path}: model_type: found {str(kind)[:60]!r}, an unknown architecture; known are "
            f"{known}. For another, write the sizes into the config of the nearest one."
        )
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return _READERS[kind](name, Fields(data, str(path)))


def _heads(
    f: Fields, *, qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False
) -> HeadAttention:
    heads = f.whole("num_attention_heads")
    kv_heads = f.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise f.error("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
    if f.absent("head_dim"):
        head_dim = f.multiple("hidden_size", "num_attention_heads")
    else:
        head_dim = f.whole("head_dim")
    return HeadAttention(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, qkv_bias=qkv_bias,
        out_bias=out_bias, qk_norm=qk_norm,
    )  # fmt: skip


def _gated(f: Fields, size: str = "intermediate_size", default: str = "silu") -> DenseMLP:
    return DenseMLP(size=f.whole(size), activation=f.activation("hidden_act", default))


def _decoder(
    name: str, f: Fields, attention: HeadAttention | LatentAttention,
    kinds: tuple[tuple[int, DenseMLP | ExpertMLP], ...], *, tied: bool = False,
    modules: int = 0,
) -> TransformerShape:  # fmt: skip
    return TransformerShape(
        name=name, vocab_size=f.whole("vocab_size"), hidden_size=f.whole("hidden_size"),
        blocks=tuple(Block(count=n, attention=attention, mlp=mlp) for n, mlp in kinds if n),
        tied_embeddings=f.flag("tie_word_embeddings", tied), prediction_modules=modules,
    )  # fmt: skip


def _llama(name: str, f: Fields) -> TransformerShape:
    bias = f.flag("attention_bias", False)
    mlp = DenseMLP(
        size=f.whole("intermediate_size"), bias=f.flag("mlp_bias", False),
        activation=f.activation("hidden_act", "silu"),
    )  # fmt: skip
    attention = _heads(f, qkv_bias=bias, out_bias=bias)
    return _decoder(name, f, attention, ((f.whole("num_hidden_layers"), mlp),))


def _mistral(name: str, f: Fields) -> TransformerShape:
    return _decoder(name, f, _heads(f), ((f.whole("num_hidden_layers"), _gated(f)),))


def _gemma(name: str, f: Fields) -> TransformerShape:
    mlp = _gated(f, default="gelu_pytorch_tanh")
    return _decoder(name, f, _heads(f), ((f.whole("num_hidden_layers"), mlp),), tied=True)


def _qwen2(name: str, f: Fields) -> TransformerShape:
    attention = _heads(f, qkv_bias=True)
    return _decoder(name, f, attention, ((f.whole("num_hidden_layers"), _gated(f)),))


def _qwen3(name: str, f: Fields) -> TransformerShape:
    bias = f.flag("attention_bias", False)
    attention = _heads(f, qkv_bias=bias, out_bias=bias, qk_norm=True)
    return _decoder(name, f, attention, ((f.whole("num_hidden_layers"), _gated(f)),))


def _experts(f: Fields, count: str, size: str, shared: int = 0) -> ExpertMLP:
    experts, used = f.whole(count), f.whole("num_experts_per_tok")
    if used > experts:
        raise f.error("num_experts_per_tok", f"at most {count}, which is {experts}")
    one = _gated(f, size)
    return ExpertMLP(
        expert=one, num_experts=experts, experts_per_token=used,
        shared=DenseMLP(size=shared * one.size, activation=one.activation) if shared else None,
    )  # fmt: skip


def _mixtral(name: str, f: Fields) -> TransformerShape:
    experts = _experts(f, "num_local_experts", "intermediate_size")
    return _decoder(name, f, _heads(f), ((f.whole("num_hidden_layers"), experts),))


def _qwen3_moe(name: str, f: Fields) -> TransformerShape:
    if f.whole("decoder_sparse_step", 1) != 1:
        raise f.error("decoder_sparse_step", "1: experts in every layer")
    bias = f.flag("attention_bias", False)
    attention = _heads(f, qkv_bias=bias, out_bias=bias, qk_norm=True)
    experts = _experts(f, "num_experts", "moe_intermediate_size")
    return _decoder(name, f, attention, ((f.whole("num_hidden_layers"), experts),))


def _deepseek(name: str, f: Fields) -> TransformerShape:
    attention = LatentAttention(
        num_heads=f.whole("num_attention_heads"),
        q_rank=None if f.absent("q_lora_rank") else f.whole("q_lora_rank"),
        kv_rank=f.whole("kv_lora_rank"), nope_dim=f.whole("qk_nope_head_dim"),
        rope_dim=f.whole("qk_rope_head_dim"), value_dim=f.whole("v_head_dim"),
    )  # fmt: skip
    if f.whole("moe_layer_freq", 1) != 1:
        raise f.error("moe_layer_freq", "1: experts in every layer after the dense ones")
    layers = f.whole("num_hidden_layers")
    dense = f.whole("first_k_dense_replace", 0, low=0, high=layers - 1)
    experts = _experts(
        f, "n_routed_experts", "moe_intermediate_size", f.whole("n_shared_experts", 0, low=0)
    )
    return _decoder(
        name, f, attention, ((dense, _gated(f)), (layers - dense, experts)),
        modules=f.whole("num_nextn_predict_layers", 0, low=0),
    )  # fmt: skip


def _gpt2(name: str, f: Fields) -> TransformerShape:
    hidden, heads = f.whole("n_embd"), f.whole("n_head")
    attention = HeadAttention(
        num_heads=heads, num_kv_heads=heads, head_dim=f.multiple("n_embd", "n_head"),
        qkv_bias=True, out_bias=True, rotary=False,
    )  # fmt: skip
    mlp = DenseMLP(
        size=f.whole("n_inner", 4 * hidden), gated=False, bias=True,
        activation=f.activation("activation_function", "gelu_new"),
    )  # fmt: skip
    return TransformerShape(
        name=name, vocab_size=f.whole("vocab_size"), hidden_size=hidden,
        blocks=(Block(count=f.whole("n_layer"), attention=attention, mlp=mlp),),
        tied_embeddings=f.flag("tie_word_embeddings", True),
        learned_positions=f.whole("n_positions"), norm_bias=True,
    )  # fmt: skip


def _gpt_neox(name: str, f: Fields) -> TransformerShape:
    heads, bias = f.whole("num_attention_heads"), f.flag("attention_bias", True)
    attention = HeadAttention(
        num_heads=heads, num_kv_heads=heads,
        head_dim=f.multiple("hidden_size", "num_attention_heads"), qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    mlp = DenseMLP(
        size=f.whole("intermediate_size"), gated=False, bias=True,
        activation=f.activation("hidden_act", "gelu"),
    )  # fmt: skip
    return TransformerShape(
        name=name, vocab_size=f.whole("vocab_size"), hidden_size=f.whole("hidden_size"),
        blocks=(Block(count=f.whole("num_hidden_layers"), attention=attention, mlp=mlp),),
        tied_embeddings=f.flag("tie_word_embeddings", False), norm_bias=True,
    )  # fmt: skip


_READERS: Final[Mapping[str, Callable[[str, Fields], TransformerShape]]] = MappingProxyType(
    {
        "gpt2": _gpt2, "gpt_neox": _gpt_neox, "llama": _llama, "mistral": _mistral,
        "gemma": _gemma, "qwen2": _qwen2, "qwen3": _qwen3, "mixtral": _mixtral,
        "qwen3_moe": _qwen3_moe, "deepseek_v2": _deepseek, "deepseek_v3": _deepseek,
    }
)  # fmt: skip
