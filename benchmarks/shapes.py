"""Shapes of language models that benchmarks share; where only speed counts, weights are random."""

from __future__ import annotations

from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from slimvlm.demo.scenes import DATA

SHAPES = {
    "tiny": LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    ),
    "135m": LlamaConfig(**DATA["text_config"], **DATA["token_ids"]),
    "1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
    ),
}
"""135m is SmolLM2-135M; 1b has 953 M parameters."""

GEMMA = Gemma3TextConfig(
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    vocab_size=262144,
    sliding_window=512,
)
"""Gemma-3-270M: two thirds of its parameters are embeddings."""

QWEN = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)
"""Qwen2.5-0.5B."""
