"""Seeded random models of every served family, small enough for tests, with the bundled tokenizer (4,096 tokens)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "packaging" / "demo-model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VOCAB = 4096

_BASE = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
_LLAMA_LIKE = {
    **_BASE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}

_OWN_WIDTHS = {**_BASE, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", {**_BASE, "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                          "max_position_embeddings": 1024, "word_embed_proj_dim": 128, "do_layer_norm_before": True}),
    "llama": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 48}),
    "gemma": ("GemmaConfig", {**_LLAMA_LIKE, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**_LLAMA_LIKE, "num_hidden_layers": 4, "head_dim": 32, "sliding_window": 48,
                                "query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA_LIKE, "num_hidden_layers": 6, "head_dim": 32, "sliding_window": 48,
                                    "query_pre_attn_scalar": 32}),
    "qwen2": ("Qwen2Config", {**_LLAMA_LIKE}),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 32}),
    "phi": ("PhiConfig", {**_LLAMA_LIKE, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("GPTNeoXConfig", {**_BASE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
                                   "num_attention_heads": 4, "max_position_embeddings": 1024, "rotary_pct": 0.25}),
    "falcon": ("FalconConfig", {**_OWN_WIDTHS, "num_kv_heads": 1, "multi_query": True, "alibi": False,
                                "new_decoder_architecture": False, "max_position_embeddings": 1024}),
    "falcon_alibi": ("FalconConfig", {**_OWN_WIDTHS, "num_kv_heads": 4, "multi_query": False, "alibi": True,
                                      "bias": True, "new_decoder_architecture": False,
                                      "max_position_embeddings": 1024}),
    "mpt": ("MptConfig", {**_BASE, "d_model": 128, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2,
                          "max_seq_len": 1024}),
    "bloom": ("BloomConfig", {**_BASE, "hidden_size": 128, "n_layer": 3, "n_head": 4, "seq_length": 1024}),
    "gptj": ("GPTJConfig", {**_BASE, "n_embd": 128, "n_layer": 3, "n_head": 4, "rotary_dim": 16, "n_positions": 1024,
                            "tie_word_embeddings": False}),
}  # fmt: skip


def make(family: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a seeded random model of `family` with a tokenizer to `directory` and returns it.

    Weights are drawn ten times wider than usual, so that greedy choices are far from ties and K/V matter.
    """
    import torch
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    for file in TOKENIZER_FILES:
        shutil.copy(DEMO / file, directory / file)
    return directory
