"""Sizes of the models that are measured with random weights, and the folders that hold them."""

import dataclasses
import json
from pathlib import Path

import jax

import connector
import llama
import weights
import whisper
from training import cost

WHISPER_TINY = cost.whisper_sizes(384, 4)
LLAMA_60M = llama.LlamaConfig(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=48_000,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    tie_word_embeddings=True,
)


def write(folder: Path, asr_sizes: whisper.WhisperConfig, llm_sizes: llama.LlamaConfig) -> None:
    """Random weights: folder/whisper, folder/llama, and folder/diva, which is made of the two."""
    asr = whisper.Whisper.init(asr_sizes, jax.random.key(0))
    llm = llama.Llama.init(llm_sizes, jax.random.key(1))
    for kind, model, prefix in (("whisper", asr, "model."), ("llama", llm, "")):
        weights.save(model, folder / kind, prefix)
        config = {"model_type": kind} | dataclasses.asdict(model.config)
        (folder / kind / "config.json").write_text(json.dumps(config))
    diva = connector.create(asr, llm, None, jax.random.key(2))
    connector.save(diva, folder / "diva", str(folder / "whisper"), str(folder / "llama"))
