"""Hugging Face configurations against the sizes of released checkpoints, and bad files."""

import json

import pytest

from alpa_lite.cli.exits import InputError
from alpa_lite.cli.hub_config import load_hub_config
from alpa_lite.cost_model.llm import count_parameters, kv_cache_bytes

QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
    "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27,
    "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400,
}  # fmt: skip


def dense(kind, h, layers, n, g, i, v, **more):
    return {
        "model_type": kind, "hidden_size": h, "num_hidden_layers": layers,
        "num_attention_heads": n, "num_key_value_heads": g, "intermediate_size": i,
        "vocab_size": v, **more,
    }  # fmt: skip


# Sums over the tensors of the released checkpoints.
RELEASED = {
    "llama3-8b": (dense("llama", 4096, 32, 32, 8, 14336, 128256), 8_030_261_248),
    "mistral-7b": (dense("mistral", 4096, 32, 32, 8, 14336, 32000), 7_241_732_096),
    "qwen2.5-7b": (dense("qwen2", 3584, 28, 28, 4, 18944, 152064), 7_615_616_512),
    "qwen3-8b": (dense("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128), 8_190_735_360),
    "gemma-7b": (
        dense("gemma", 3072, 28, 16, 16, 24576, 256000, head_dim=256, hidden_act="gelu"),
        8_537_680_896,
    ),
    "mixtral-8x7b": (
        dense(
            "mixtral", 4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2
        ),
        46_702_792_704,
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
         "vocab_size": 50257},
        124_439_808,
    ),
    "pythia-6.9b": (dense("gpt_neox", 4096, 32, 32, 32, 16384, 50432), 6_857_302_016),
    "qwen3-30b-a3b": (QWEN3_MOE, 30_532_122_624),
    "deepseek-v2-lite": (DEEPSEEK_LITE, 15_706_484_224),
}  # fmt: skip


@pytest.fixture
def load(tmp_path):
    def load(config):
        file = tmp_path / "config.json"
        file.write_text(config if isinstance(config, str) else json.dumps(config))
        return load_hub_config(file)

    return load


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_released_models(name, load):
    config, expected = RELEASED[name]
    assert sum(count_parameters(load(config)).values()) == expected


def test_latent_cache(load):
    cache = kv_cache_bytes(load(DEEPSEEK_LITE), batch=1, seq=1, bytes_per_element=1)
    assert cache == 27 * (512 + 64)


LLAMA = RELEASED["llama3-8b"][0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "model_type": "mamba"}, "model_type: found 'mamba', an unknown architecture"),
        ({}, "model_type: found 'None', an unknown architecture; known are gpt2"),
        ({**LLAMA, "hidden_size": "4096"}, "hidden_size: found '4096', allowed a whole number"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers: found 0, allowed a whole number"),
        ({**LLAMA, "vocab_size": None}, "vocab_size: found None, allowed a whole number from 1"),
        ({**LLAMA, "num_key_value_heads": 5}, "allowed a divisor of num_attention_heads"),
        ({**LLAMA, "num_attention_heads": 33, "num_key_value_heads": 33}, "a multiple of num_att"),
        ({**LLAMA, "hidden_act": "snake"}, "hidden_act: found 'snake', allowed one of silu"),
        ({**LLAMA, "tie_word_embeddings": 1}, "found 1, allowed true or false"),
        ({**QWEN3_MOE, "num_experts_per_tok": 129}, "allowed at most num_experts, which is 128"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step: found 2, allowed 1"),
        ({**DEEPSEEK_LITE, "first_k_dense_replace": 27}, "a whole number from 0 to 26"),
        ("[]", "found list, allowed an object"),
        ("{", "found no valid JSON"),
        ("[" * 100_000, "found no valid JSON"),
        (" " * 2**20 + "{}", "which is the limit"),
    ],
)
def test_bad_file(load, config, message):
    with pytest.raises(InputError, match=message):
        load(config)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_hub_config(tmp_path / "config.json")
