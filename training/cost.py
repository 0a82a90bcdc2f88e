"""Cost: what one training step takes, by hand, and the chips it may run on.

    flops(sizes)   -> products of one clip, part by part, each line beside the layer it counts
    CHIPS          -> peak FLOP/s, memory and links of accelerators
    PUBLISHED      -> sizes of the presets' models, without their files

1 product = 1 multiply-add = 2 FLOPs. Peaks are those of dense bfloat16.

Axes: F mel frames, T encoder positions, Q queries, D width of Whisper, E width of the LLM.
Reads: whisper.py, llama.py, weights.py.   Read next: hlo.py.
"""

import dataclasses
from typing import Any

import llama
import weights
import whisper

# ---------------------------------------------------------------------------------------- the chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, by its maker's figures."""

    flops: float  # dense bfloat16, a second
    memory: float  # bytes of HBM
    bandwidth: float  # bytes of HBM a second
    links: float  # bytes a second that all its links to other chips bring in together


GIB, TERA = 2.0**30, 1e12
CHIPS = {  # by jax.Device.device_kind
    "TPU v4": Chip(275 * TERA, 32 * GIB, 1.2 * TERA, 0.3 * TERA),
    "TPU v5 lite": Chip(197 * TERA, 16 * GIB, 0.82 * TERA, 0.2 * TERA),
    "TPU v5": Chip(459 * TERA, 95 * GIB, 2.77 * TERA, 0.6 * TERA),
    "TPU v6 lite": Chip(918 * TERA, 32 * GIB, 1.64 * TERA, 0.4 * TERA),
    "NVIDIA A100-SXM4-40GB": Chip(312 * TERA, 40 * GIB, 1.56 * TERA, 0.3 * TERA),
    "NVIDIA A100-SXM4-80GB": Chip(312 * TERA, 80 * GIB, 2.04 * TERA, 0.3 * TERA),
    "NVIDIA H100 80GB HBM3": Chip(989 * TERA, 80 * GIB, 3.35 * TERA, 0.45 * TERA),
    "NVIDIA H200": Chip(989 * TERA, 141e9, 4.8 * TERA, 0.45 * TERA),
}
SHARE = 0.4  # of peak: what a well-fed transformer of this size reaches in practice


def gib(size: float | int) -> str:
    """Bytes, for people."""
    return f"{round(size / GIB, 2) + 0.0:.2f} GiB"  # + 0: without a sign before zero


# Sizes of the presets' models, under the names of their config.json: enough to compile for a slice.
_LLAMA_3 = dict(
    vocab_size=128_256,
    rms_norm_eps=1e-5,
    max_position_embeddings=131_072,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
)


def whisper_sizes(
    width: int, layers: int, num_mel_bins: int = 80, vocab_size: int = 51_865
) -> whisper.WhisperConfig:
    """A published multilingual Whisper: encoder and decoder alike, heads of 64; the defaults are
    those before large-v3."""
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": width // 64}
        sides[f"{side}_ffn_dim"] = 4 * width
    return whisper.WhisperConfig(
        d_model=width,
        num_mel_bins=num_mel_bins,
        max_source_positions=1500,
        max_target_positions=448,
        vocab_size=vocab_size,
        decoder_start_token_id=50_258,
        eos_token_id=50_257,
        **sides,
    )


PUBLISHED = {
    "openai/whisper-large-v3": whisper_sizes(1280, 32, num_mel_bins=128, vocab_size=51_866),
    "openai/whisper-small": whisper_sizes(768, 12),
    "HuggingFaceTB/SmolLM2-360M-Instruct": llama.LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        vocab_size=49_152,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": llama.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
        **_LLAMA_3 | dict(head_dim=64),
    ),
    "meta-llama/Llama-3.2-3B-Instruct": llama.LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
        **_LLAMA_3,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": llama.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        **_LLAMA_3,
    ),
}


def sizes_of(cls: type, path_or_repo: str) -> Any:
    """The sizes of a preset's model, or those in the config.json of a folder or another repo."""
    if path_or_repo in PUBLISHED:
        return PUBLISHED[path_or_repo]
    return weights.read_config(cls, weights.resolve(path_or_repo))


# A user's turn of Llama 3.1 and 3.2 with its dated system header; Common Voice's longest English
# transcripts. Used where there is no tokenizer and no corpus to ask.
PREFIX, SUFFIX, TEXT = 31, 5, 64
MEAN_TEXT = 14  # tokens of its average transcript

# ------------------------------------------------------------------------------- products, by hand


def flops(
    asr: whisper.WhisperConfig,
    llm: llama.LlamaConfig,
    queries: int,
    turn: int,
    text: int,
    answer: int = 0,
    before: int = 0,
) -> dict[str, float]:
    """FLOPs of one clip in one training step: nothing computed twice, gradients where needed; what
    is read once for all clips is not counted.

    Positions: `queries` Q; `turn` what each clip reads of the template, R or P + R; `text` what
    transcripts are padded to, L; `answer` A; `before` what is read once of the template, P or none.
    """
    d, t, q, turn = asr.d_model, asr.max_source_positions, queries, turn + answer
    mel = whisper.FRAMES_PER_POSITION * asr.num_mel_bins
    conv = 3 * d * t * (mel + d)  # kernel 3; the second has stride 2
    heard = 4 * t * d * d + 2 * t * t * d + 2 * t * d * asr.encoder_ffn_dim
    encoder = conv + asr.encoder_layers * heard  # q k v out; scores and sums; fc1 and fc2

    # Behind y = x W the backward pass takes a product for x and, if W is trained, one for W.
    by_queries = 4 * q * d * d + 2 * q * d * d + 2 * q * d * asr.decoder_ffn_dim
    by_states = 2 * t * d * d  # keys and values of the cross-attention: no gradient to the states
    attention = 2 * q * q * d + 2 * q * t * d
    project = q * d * llm.hidden_size
    layers = asr.decoder_layers
    forward = layers * (by_queries + by_states + attention) + project
    backward = layers * (2 * by_queries + by_states + 2 * attention) + 2 * project

    wide, narrow = (h * llm.head_width for h in (llm.num_attention_heads, llm.key_value_heads))
    one = 2 * llm.hidden_size * (wide + narrow) + 3 * llm.hidden_size * llm.intermediate_size

    def scores(positions: int) -> int:  # or sums: attention.py asks for a square of them
        return llm.num_hidden_layers * (before + positions) ** 2 * wide

    def through(positions: int) -> int:  # the LLM, forward
        return llm.num_hidden_layers * positions * one + 2 * scores(positions)

    student = through(queries + turn)
    products = {
        "encoder": encoder,
        "connector forward": forward,
        "connector backward": backward,
        "student forward": student,
        # frozen: for x alone; of attention two products for each of its two
        "student backward": student + 2 * scores(queries + turn),
        "teacher": through(turn + text),
    }
    return {name: 2.0 * count for name, count in products.items()}
