"""From a model preset to its `TransformerShape`."""

from __future__ import annotations

from typing import Any

from alpa_lite.cli.exits import InputError
from alpa_lite.cost_model.llm import (
    Block,
    DenseMLP,
    ExpertMLP,
    HeadAttention,
    LatentAttention,
    TransformerShape,
)
from alpa_lite.models.deepseek_config import DeepSeekConfig
from alpa_lite.models.gpt import GPTConfig
from alpa_lite.models.llama import LlamaConfig
from alpa_lite.models.moe import CHOICES, MoEConfig
from alpa_lite.models.routing import expert_capacity


def shape_of(name: str, config: Any) -> TransformerShape:
    """The shape of a model of the registry.

    Args:
      name: of the preset.
      config: its configuration.

    Raises:
      InputError: it is no transformer.
    """
    match config:
        case GPTConfig():
            return _gpt(name, config)
        case LlamaConfig():
            return _llama(name, config)
        case MoEConfig():
            return _moe(name, config)
        case DeepSeekConfig():
            return _deepseek(name, config)
    raise InputError(
        f"{name} is no transformer, and the arithmetic of transformers is all that is known here; "
        "`alpa-lite plan` prices any model"
    )


def _gpt(name: str, c: GPTConfig) -> TransformerShape:
    mlp = DenseMLP(size=c.mlp_ratio * c.hidden_size, gated=False, bias=True, activation="gelu")
    attention = _biased_attention(c.hidden_size, c.num_heads)
    return TransformerShape(
        name=name, vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        blocks=(Block(count=c.num_layers, attention=attention, mlp=mlp),),
        tied_embeddings=c.tie_embeddings, learned_positions=c.seq_len, norm_bias=True,
    )  # fmt: skip


def _llama(name: str, c: LlamaConfig) -> TransformerShape:
    attention = HeadAttention(
        num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.hidden_size // c.num_heads
    )
    mlp = DenseMLP(
        size=c.mlp_size, gated=c.gated_mlp, activation="silu" if c.gated_mlp else "relu2"
    )
    return TransformerShape(
        name=name, vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        blocks=(Block(count=c.num_layers, attention=attention, mlp=mlp),),
    )  # fmt: skip


def _moe(name: str, c: MoEConfig) -> TransformerShape:
    size, with_experts = c.mlp_ratio * c.hidden_size, (c.num_layers + 1) // 2
    attention = _biased_attention(c.hidden_size, c.num_heads)
    slots = c.num_experts * expert_capacity(
        group_size=c.tokens_per_group, choices=CHOICES, num_experts=c.num_experts,
        capacity_factor=c.capacity_factor,
    )  # fmt: skip
    experts = ExpertMLP(
        expert=DenseMLP(size=size, gated=False, activation="relu"), num_experts=c.num_experts,
        experts_per_token=CHOICES, slots_per_token=slots / c.tokens_per_group,
        dispatch_slots=slots,
    )  # fmt: skip
    dense = DenseMLP(size=size, gated=False, bias=True, activation="gelu")
    kinds = ((c.num_layers - with_experts, dense), (with_experts, experts))
    return TransformerShape(
        name=name, vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        blocks=tuple(Block(count=n, attention=attention, mlp=mlp) for n, mlp in kinds if n),
        tied_embeddings=True, learned_positions=c.seq_len, norm_bias=True,
    )  # fmt: skip


def _deepseek(name: str, c: DeepSeekConfig) -> TransformerShape:
    attention = LatentAttention(
        num_heads=c.num_heads, q_rank=c.q_lora_rank, kv_rank=c.kv_lora_rank,
        nope_dim=c.qk_nope_head_dim, rope_dim=c.qk_rope_head_dim, value_dim=c.v_head_dim,
    )  # fmt: skip
    slots = 0
    if c.expert_compute == "dense":
        slots = c.num_experts * expert_capacity(
            group_size=c.tokens_per_group, choices=c.experts_per_token, num_experts=c.num_experts,
            capacity_factor=c.capacity_factor,
        )  # fmt: skip
    experts = ExpertMLP(
        expert=DenseMLP(size=c.expert_size), num_experts=c.num_experts,
        experts_per_token=c.experts_per_token,
        shared=DenseMLP(size=c.num_shared_experts * c.expert_size)
        if c.num_shared_experts
        else None,
        slots_per_token=slots / c.tokens_per_group if slots else None, dispatch_slots=slots,
    )  # fmt: skip
    kinds = (
        (c.num_dense_layers, DenseMLP(size=c.mlp_size)),
        (c.num_layers - c.num_dense_layers, experts),
    )
    return TransformerShape(
        name=name, vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        blocks=tuple(Block(count=n, attention=attention, mlp=mlp) for n, mlp in kinds if n),
        prediction_modules=c.num_mtp_modules,
    )  # fmt: skip


def _biased_attention(hidden: int, heads: int) -> HeadAttention:
    return HeadAttention(
        num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, qkv_bias=True,
        out_bias=True, rotary=False,
    )  # fmt: skip
