"""A tiny universe of random models in the published layouts, and clips: what tests answer with.

Everything is drawn from fixed seeds, at scales at which every weight changes what is said, so that
answers differ between clips and between systems.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import checks
import equinox as eqx
import jax
import numpy as np
import soundfile
from tokenizers import Tokenizer, models, pre_tokenizers

import connector
import llama
import weights
import whisper

WINDOW = 8000  # samples of the encoder's window: half a second
SPECIAL = ["<unk>", "<|bos|>", "<|start|>", "<|end|>", "<|eot|>"]
WORDS = (
    "one two three four five six red green blue dog cat sun moon say what is the colour of it good"
)
VOCABULARY = [*SPECIAL, "user", "assistant", "system", *WORDS.split()]
TEMPLATE = (
    "<|bos|>{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
WHISPER = whisper.WhisperConfig(
    d_model=16,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=20,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=20,
    num_mel_bins=8,
    max_source_positions=25,
    max_target_positions=7,
    vocab_size=len(VOCABULARY),
    decoder_start_token_id=1,
    eos_token_id=4,
)
LLAMA = llama.LlamaConfig(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=len(VOCABULARY),
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    eos_token_id=[4, 2],
)


@contextlib.contextmanager
def compiled_fast() -> Iterator[None]:
    """XLA compiles fast and the programs run slowly, which is the better bargain at this size."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def write_model(folder: Path, model: whisper.Whisper | llama.Llama, prefix: str) -> None:
    """A checkpoint with config, a tokenizer of whole words and a chat template."""
    weights.save(model, folder, prefix=prefix)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = {"chat_template": TEMPLATE, "bos_token": "<|bos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(chat))


def build(root: Path) -> None:
    """Write root/whisper, root/llama and root/diva, which refers to the two."""
    template = weights.abstract(whisper.Whisper.init, WHISPER, jax.random.key(0))
    asr = checks.random_weights(template, 11, 1.0)
    template = weights.abstract(llama.Llama.init, LLAMA, jax.random.key(0))
    llm = checks.random_weights(template, 1, 0.7)
    write_model(root / "whisper", asr, "model.")
    write_model(root / "llama", llm, "")
    diva = connector.create(asr, llm, None, jax.random.key(1))
    trained = checks.random_weights(diva.connector, 2, 0.4)
    diva = eqx.tree_at(lambda d: d.connector, diva, trained)
    connector.save(diva, root / "diva", str(root / "whisper"), str(root / "llama"))


def write_clips(folder: Path, count: int) -> list[str]:
    """0.wav, 1.wav, ...: tones of different pitch, volume and length; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(4)
    clips = [str(folder / f"{n}.wav") for n in range(count)]
    for clip in clips:
        length = int(rng.integers(WINDOW // 2, WINDOW))
        tone = np.sin(np.arange(length) * rng.uniform(0.05, 1.5)) * rng.uniform(0.1, 0.5)
        soundfile.write(clip, tone, whisper.SAMPLE_RATE)
    return clips
