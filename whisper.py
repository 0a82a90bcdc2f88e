"""Whisper: sound to text. Log-mel spectrogram, encoder, decoder.

    audio [B, S] -> log_mel [B, F, M] -> Encoder [B, T, D] -> Decoder [B, L, D] -> logits [B, L, V]

Axes: B batch, S audio samples (16 kHz), F mel frames (100 a second), M mel bins, T encoder
positions (F / 2), L text tokens, D width (d_model), H heads, K head width, V vocabulary, N layers.

The encoder hears, the decoder writes. DiVA keeps the encoder frozen and turns the decoder into its
connector. Attribute names are the published tensor names.

Annex: `attention.attend` is softmax attention, `sharding.run_layers` scans over a stack of layers,
`settings` refuses what a file asks for and nothing computes.
Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision".
Reads: weights.py.   Read next: llama.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray

import weights
from formats import model_config
from runtime import attention, cli, sharding
from weights import Embedding, Linear

SAMPLE_RATE = 16_000
N_FFT = 400  # samples of one analysis window: 25 ms
HOP_LENGTH = 160  # samples from one mel frame to the next: 10 ms
FRAMES_PER_POSITION = 2  # the second convolution has stride 2


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """The sizes of a Whisper, under the names of the published config.json."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    num_mel_bins: int
    max_source_positions: int
    max_target_positions: int
    vocab_size: int
    decoder_start_token_id: int
    eos_token_id: int
    computed: ClassVar = model_config.WHISPER

    def __post_init__(self):
        if self.d_model % math.lcm(self.encoder_attention_heads, self.decoder_attention_heads):
            raise ValueError(f"d_model is {self.d_model}; expected a multiple of attention_heads.")

    @property
    def window_samples(self) -> int:
        """Samples that the encoder takes: 480,000 (30 s) in the published models."""
        return self.max_source_positions * FRAMES_PER_POSITION * HOP_LENGTH


# ---------------------------------------------------------------------------------------------
# Log-mel spectrogram


@functools.cache
def mel_filters(num_mel_bins: int) -> np.ndarray:
    """Triangular filters [201, M] on Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    step = math.log(6.4) / 27  # 27 mels from 1 kHz to 6.4 kHz; 15 mels to 1 kHz
    top = 15 + math.log(SAMPLE_RATE / 2 / 1000) / step
    mels = np.linspace(0, top, num_mel_bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    frequencies = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (edges[2:] - edges[:-2])).astype(np.float32)  # equal area


def log_mel(audio: Float[Array, "B S"], num_mel_bins: int) -> Float[Array, "B F M"]:
    """Log-mel spectrogram of audio that is already padded to the window; F = S / 160.

    As the published feature extractor: reflected edges, power spectrum, log10 with 8 decades of
    range below each clip's loudest bin, then (x + 4) / 4.
    """
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)

    def one(clip: Float[Array, "S"]) -> Float[Array, "F M"]:
        padded = jnp.pad(clip.astype(jnp.float32), N_FFT // 2, mode="reflect")
        # A window is two and a half hops long: three shifted views, not a gather, at which TPUs
        # crawl.
        count = len(clip) // HOP_LENGTH
        hops = padded[: (count + 2) * HOP_LENGTH].reshape(count + 2, HOP_LENGTH)
        frames = jnp.concatenate(
            [hops[:-2], hops[1:-1], hops[2:, : N_FFT - 2 * HOP_LENGTH]], axis=-1
        )
        spectrum = jnp.fft.rfft(frames * hann.astype(np.float32))
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        # Highest precision: TPUs would otherwise multiply in bfloat16 and lose the quiet bins.
        mel = jnp.matmul(power, mel_filters(num_mel_bins), precision=jax.lax.Precision.HIGHEST)
        log = jnp.log10(jnp.maximum(mel, 1e-10))
        return (jnp.maximum(log, log.max() - 8.0) + 4.0) / 4.0

    # Clip by clip: all spectra at once would be seven times the audio, and on a CPU half as fast.
    return jax.lax.map(one, audio)


# ---------------------------------------------------------------------------------------------
# Modules


class LayerNorm(eqx.Module):
    """Normalise to mean 0 and variance 1 over the last axis, in f32, then scale and shift."""

    weight: Float[Array, "*N D"]
    bias: Float[Array, "*N D"]

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        return (normal * self.weight + self.bias).astype(x.dtype)


class Conv(eqx.Module):
    """Convolution over time, kernel 3, padding 1."""

    weight: Float[Array, "out in 3"]
    bias: Float[Array, "out"]
    stride: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "B F in"]) -> Float[Array, "B T out"]:
        kernel = self.weight.astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,), [(1, 1)], dimension_numbers=("NWC", "OIW", "NWC")
        )
        return y + self.bias.astype(x.dtype)


class Attention(eqx.Module):
    """Multi-head attention; k_proj has no bias in any Whisper."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    heads: int = eqx.field(static=True)

    def split(self, x: Float[Array, "B L D"]) -> Float[Array, "B L H K"]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def keys_values(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def attend(
        self,
        x: Float[Array, "B L D"],
        keys: Float[Array, "B T H K"],
        values: Float[Array, "B T H K"],
        causal: bool = False,
    ) -> Float[Array, "B L D"]:
        """The queries of x over given keys and values; scores and softmax in f32."""
        queries = self.split(self.q_proj(x))
        heard = attention.attend(queries, keys, values, causal)
        return self.out_proj(heard.reshape(x.shape))

    def attend_one(self, x, keys, values, seen=None):
        """The same for one position, x [B, 1, D], over a cache [B, H, T, K] that is kept head by
        head, or over what of it is `seen` [1, T]."""
        queries = sharding.gather_to_batch(self.split(self.q_proj(x))[:, 0])
        heard = attention.attend_one(queries, keys, values, seen).reshape(x.shape)
        return self.out_proj(sharding.broadcast_to_param_shards(heard))

    def __call__(self, x: Float[Array, "B L D"], causal: bool = False) -> Float[Array, "B L D"]:
        return self.attend(x, *self.keys_values(x), causal=causal)


class EncoderLayer(eqx.Module):
    """Self-attention over the whole window, then an MLP; each behind a norm, each added back."""

    self_attn: Attention
    self_attn_layer_norm: LayerNorm
    fc1: Linear
    fc2: Linear
    final_layer_norm: LayerNorm

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


class DecoderLayer(eqx.Module):
    """Causal self-attention, cross-attention to the encoder's states, MLP."""

    self_attn: Attention
    self_attn_layer_norm: LayerNorm
    encoder_attn: Attention
    encoder_attn_layer_norm: LayerNorm
    fc1: Linear
    fc2: Linear
    final_layer_norm: LayerNorm

    def __call__(
        self, x: Float[Array, "B L D"], states: Float[Array, "B T D"]
    ) -> Float[Array, "B L D"]:
        x = x + self.self_attn(self.self_attn_layer_norm(x), causal=True)
        heard = self.encoder_attn.keys_values(states)
        return self.think(x + self.encoder_attn.attend(self.encoder_attn_layer_norm(x), *heard))

    def step(self, x, n, said, cross, position):
        """One token [B, 1, D] at `position` of layer n, with all layers' keys and values of what
        was `said`, where those of the token are written in place, and its own `cross`."""
        normal = self.self_attn_layer_norm(x)
        new = sharding.gather_to_batch(heads_first(self.self_attn.keys_values(normal)))
        said = tuple(
            jax.lax.dynamic_update_slice(old, one[None], (n, 0, 0, position, 0))
            for old, one in zip(said, new, strict=True)
        )
        seen = jnp.arange(said[0].shape[3])[None] <= position
        x = x + self.self_attn.attend_one(normal, *(kv[n] for kv in said), seen)
        x = x + self.encoder_attn.attend_one(self.encoder_attn_layer_norm(x), *cross)
        return sharding.broadcast_to_param_shards(self.think(x)), said

    def think(self, x):
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


def heads_first(keys_values):
    """[..., T, H, K] -> [..., H, T, K], of keys and of values."""
    return jax.tree.map(lambda x: x.swapaxes(-3, -2), keys_values)


def gelu(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The exact (erf) form: with the tanh form the published weights drift."""
    return jax.nn.gelu(x, approximate=False)


class Encoder(eqx.Module):
    """Mel frames -> one state for every 20 ms."""

    conv1: Conv
    conv2: Conv
    embed_positions: Embedding
    layers: EncoderLayer  # arrays stacked on a leading axis [N, ...]
    layer_norm: LayerNorm

    def __call__(self, mel: Float[Array, "B F M"]) -> Float[Array, "B T D"]:
        """Raises ValueError if F is not the window that the positions were made for."""
        positions = self.embed_positions.weight
        expected = len(positions) * FRAMES_PER_POSITION
        if mel.shape[1] != expected:
            raise ValueError(
                f"the encoder got {mel.shape[1]} mel frames; expected {expected} "
                f"({expected / 100:g} s). Pad or cut the audio to the model's window first."
            )
        conv1, conv2, positions = sharding.all_gather_params(
            (self.conv1, self.conv2, positions), mel.dtype
        )
        x = gelu(conv1(mel))
        x = gelu(conv2(x)) + positions.astype(mel.dtype)
        return self.layer_norm(sharding.run_layers(self.layers, x, lambda layer, x: layer(x)))

    @staticmethod
    def init(c: WhisperConfig, keys: Iterator[PRNGKeyArray]) -> "Encoder":
        """Random weights."""
        n, width = c.encoder_layers, c.d_model
        return Encoder(
            conv1=Conv(_normal(keys, width, c.num_mel_bins, 3), jnp.zeros(width), stride=1),
            conv2=Conv(_normal(keys, width, width, 3), jnp.zeros(width), stride=2),
            embed_positions=Embedding(jnp.asarray(sinusoids(c.max_source_positions, width))),
            layers=EncoderLayer(
                self_attn=_attention(keys, n, width, c.encoder_attention_heads),
                self_attn_layer_norm=_norm(n, width),
                **_mlp(keys, n, width, c.encoder_ffn_dim),
                final_layer_norm=_norm(n, width),
            ),
            layer_norm=_norm(width),
        )


class Decoder(eqx.Module):
    """Causal transformer over its inputs that cross-attends to the encoder's states."""

    embed_tokens: Embedding
    embed_positions: Embedding
    layers: DecoderLayer  # arrays stacked on a leading axis [N, ...]
    layer_norm: LayerNorm

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Token embeddings, without positions, and never scaled: see model_config.WHISPER."""
        return sharding.lookup(self.embed_tokens.weight, ids)

    def __call__(
        self,
        inputs: Float[Array, "B L D"],
        states: Float[Array, "B T D"],
        remat: sharding.Remat = "layers",
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last norm, for inputs (tokens or queries) without positions."""
        positions = sharding.all_gather_params(self.embed_positions.weight, inputs.dtype)
        x = inputs + positions[: inputs.shape[1]].astype(inputs.dtype)
        x = sharding.run_layers(self.layers, x, lambda layer, x: layer(x, states), remat)
        return self.layer_norm(x)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The output matrix is the embedding table."""
        return weights.logits(hidden, self.embed_tokens.weight)

    def empty_cache(self, states: Float[Array, "B T D"], length: int):
        """Cross-attention keys and values of every layer, and room for `length` tokens."""

        def cross_of(_, layer):
            module = sharding.all_gather_params(layer.encoder_attn, states.dtype)
            return None, sharding.shard_batch(heads_first(module.keys_values(states)))

        cross = jax.lax.scan(cross_of, None, self.layers)[1]
        keys = cross[0]  # [N, B, H, T, K]
        room = jnp.zeros((*keys.shape[:3], length, keys.shape[4]), keys.dtype)
        return {"self": (room, room), "cross": cross}

    def step(self, ids: Int[Array, "B"], cache, position: Int[Array, ""]):
        """Logits [B, V] after one more token at `position`, and the cache with it."""
        x = sharding.broadcast_to_param_shards(self.embed(ids[:, None]))
        x = x + self.embed_positions.weight[position].astype(x.dtype)

        def layer(state, numbered):
            (x, said), (n, module, cross) = state, numbered
            return module.step(x, n, said, cross, position), None

        layers = jnp.arange(len(cache["cross"][0])), self.layers, cache["cross"]
        x, said = jax.lax.scan(layer, (x, cache["self"]), layers)[0]
        return self.logits(self.layer_norm(x[:, 0])), cache | {"self": said}

    @staticmethod
    def init(c: WhisperConfig, keys: Iterator[PRNGKeyArray]) -> "Decoder":
        """Random weights."""
        n, width = c.decoder_layers, c.d_model
        return Decoder(
            embed_tokens=Embedding(_normal(keys, c.vocab_size, width)),
            embed_positions=Embedding(_normal(keys, c.max_target_positions, width)),
            layers=DecoderLayer(
                self_attn=_attention(keys, n, width, c.decoder_attention_heads),
                self_attn_layer_norm=_norm(n, width),
                encoder_attn=_attention(keys, n, width, c.decoder_attention_heads),
                encoder_attn_layer_norm=_norm(n, width),
                **_mlp(keys, n, width, c.decoder_ffn_dim),
                final_layer_norm=_norm(n, width),
            ),
            layer_norm=_norm(width),
        )


class Whisper(eqx.Module):
    """The whole recogniser; `model.` stands before its tensors' names in a published file."""

    encoder: Encoder
    decoder: Decoder
    config: WhisperConfig = eqx.field(static=True)

    @staticmethod
    def init(config: WhisperConfig, key: PRNGKeyArray) -> "Whisper":
        """Random weights (normal, 0.02) with Whisper's sinusoidal encoder positions."""
        keys = iter(jax.random.split(key, 64))
        return Whisper(Encoder.init(config, keys), Decoder.init(config, keys), config)

    @staticmethod
    def published(folder: Path, dtype=None) -> weights.Published:
        """What a published folder holds; floats in `dtype`."""
        config = weights.read_config(WhisperConfig, folder)
        model_config.listening(folder, config.num_mel_bins)
        template = weights.abstract(Whisper.init, config, jax.random.key(0), dtype=dtype)
        tied = {"proj_out.weight": "tied to model.decoder.embed_tokens"}
        return weights.Published(template, "model.", tied)

    @staticmethod
    def load(
        path: str | Path, dtype=jnp.float32, place: Callable = lambda template: template
    ) -> "Whisper":
        """Load a published checkpoint; `place` gives the template's arrays their shardings."""
        folder = weights.resolve(path)
        template, prefix, unused = Whisper.published(folder, dtype)
        weights.check_tied(folder, "proj_out.weight", "model.decoder.embed_tokens.weight")
        return weights.load(place(template), folder, prefix, unused)


# ---------------------------------------------------------------------------------------------
# Random weights, in the shapes of the published ones


def _normal(keys: Iterator[PRNGKeyArray], *shape: int) -> Array:
    return 0.02 * jax.random.normal(next(keys), shape)


def _linear(keys, layers: int, n_in: int, n_out: int, bias: bool = True) -> Linear:
    zeros = jnp.zeros((layers, n_out)) if bias else None
    return Linear(_normal(keys, layers, n_out, n_in), zeros)


def _norm(*shape: int) -> LayerNorm:
    return LayerNorm(jnp.ones(shape), jnp.zeros(shape))


def _attention(keys, layers: int, width: int, heads: int) -> Attention:
    parts = (_linear(keys, layers, width, width, bias=name != "k") for name in "qkvo")
    return Attention(*parts, heads)


def _mlp(keys, layers: int, width: int, inner: int) -> dict[str, Linear]:
    return {"fc1": _linear(keys, layers, width, inner), "fc2": _linear(keys, layers, inner, width)}


def sinusoids(length: int, width: int) -> np.ndarray:
    """Encoder positions [T, D]: sines in the first half of the width, cosines in the second."""
    scale = np.exp(-math.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * scale
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


def main(
    clip: Annotated[Path, tyro.conf.Positional] = cli.EXAMPLE,
    model: str = "toy/whisper",
    language: str = "en",
    long: bool = False,
) -> None:
    """Transcribe a clip.

    Args:
        clip: audio file, at most as long as the model's window (30 s for published models).
        model: folder or Hugging Face repo id.
        language: code of the spoken language, for multilingual models.
        long: split a longer one at its quietest moments; a line for each part.
    """
    import generate  # what writes word after word is a later chapter

    for text in generate.transcripts(clip, model, language, long):
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
