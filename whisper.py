"""Whisper: audio to text. Log-mel spectrogram, encoder, decoder.

    audio [B, S] -> log_mel [B, F, M] -> Encoder [B, T, D] -> Decoder [B, L, D] -> logits [B, L, V]

Axes: B batch, S audio samples (16 kHz), F mel frames (100 per second), M mel bins, T encoder
positions (F / 2), L text tokens, D width (d_model), H heads, K head width, V vocabulary, N layers.

The encoder turns audio into states; the decoder predicts the transcript from them. DiVA keeps the
encoder frozen and initialises its connector from the decoder. Attribute names are the published
tensor names.

Support code: `attention.attend` computes softmax attention, `sharding.run_layers` scans over a
stack of layers, `model_config` refuses config values that are not implemented here.
Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision".
Reads: weights.py.   Read next: llama.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import weights
from formats import model_config
from runtime import attention, cli, sharding
from weights import Embedding, Linear

# ---------------------------------------------------------------------------------------------
# Log-mel spectrogram

SAMPLE_RATE = 16_000
N_FFT = 400  # samples per analysis window: 25 ms
HOP_LENGTH = 160  # samples from one mel frame to the next: 10 ms
FRAMES_PER_POSITION = 2  # the second convolution has stride 2


def log_mel(audio: Float[Array, "B S"], num_mel_bins: int) -> Float[Array, "B F M"]:
    """Log-mel spectrogram of audio that is already padded to the window; F = S / 160.

    Same as the published feature extractor: reflected edges, power spectrum, log10 limited to 8
    decades below each clip's loudest bin, then (x + 4) / 4.
    """
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    window = hann.astype(np.float32)

    def log_mel_of_clip(clip: Float[Array, "S"]) -> Float[Array, "F M"]:
        padded = jnp.pad(clip.astype(jnp.float32), N_FFT // 2, mode="reflect")

        # A window is two and a half hops long: build the frames from three shifted views, because
        # a gather is slow on TPUs.
        num_frames = len(clip) // HOP_LENGTH
        hops = padded[: (num_frames + 2) * HOP_LENGTH].reshape(num_frames + 2, HOP_LENGTH)
        frames = jnp.concatenate(
            [hops[:-2], hops[1:-1], hops[2:, : N_FFT - 2 * HOP_LENGTH]], axis=-1
        )
        spectrum = jnp.fft.rfft(frames * window)
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)

        # Highest precision: by default TPUs multiply in bfloat16 and lose the quiet bins.
        mel = jnp.matmul(power, mel_filters(num_mel_bins), precision=jax.lax.Precision.HIGHEST)
        log = jnp.log10(jnp.maximum(mel, 1e-10))
        return (jnp.maximum(log, log.max() - 8.0) + 4.0) / 4.0

    # One clip at a time: the spectra of the whole batch would take seven times the memory of the
    # audio, and twice the time on a CPU.
    return jax.lax.map(log_mel_of_clip, audio)


@functools.cache
def mel_filters(num_mel_bins: int) -> np.ndarray:
    """Triangular filters [201, M] on Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    # Filter edges: 15 mels up to 1 kHz, then 27 mels from 1 kHz to 6.4 kHz.
    log_step = math.log(6.4) / 27
    max_mel = 15 + math.log(SAMPLE_RATE / 2 / 1000) / log_step
    mels = np.linspace(0, max_mel, num_mel_bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(log_step * (mels - 15)))

    # Triangles that rise to the next edge and fall to the one after it.
    frequencies = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rising, falling))

    # Normalise all triangles to equal area.
    return (triangles * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


# ---------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Sizes and token ids of a Whisper, with the field names of the published config.json."""

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
        """Audio samples per encoder window: 480,000 (30 s) in the published models."""
        return self.max_source_positions * FRAMES_PER_POSITION * HOP_LENGTH


# ---------------------------------------------------------------------------------------------
# Modules


class LayerNorm(eqx.Module):
    """Normalise to mean 0 and variance 1 over the last axis, in f32, then scale and shift."""

    weight: Float[Array, "*N D"]
    bias: Float[Array, "*N D"]

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x_f32 = x.astype(jnp.float32)
        centred = x_f32 - x_f32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        return (normed * self.weight + self.bias).astype(x.dtype)


class Conv(eqx.Module):
    """Convolution over time, kernel 3, padding 1."""

    weight: Float[Array, "out in 3"]
    bias: Float[Array, "out"]
    stride: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "B F in"]) -> Float[Array, "B T out"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.weight.astype(x.dtype),
            window_strides=(self.stride,),
            padding=[(1, 1)],
            dimension_numbers=("NWC", "OIW", "NWC"),
        )
        return y + self.bias.astype(x.dtype)


class Attention(eqx.Module):
    """Multi-head attention; k_proj has no bias in any Whisper."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    heads: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "B L D"], causal: bool = False) -> Float[Array, "B L D"]:
        """Self-attention."""
        keys, values = self.keys_values(x)
        return self.attend(x, keys=keys, values=values, causal=causal)

    def attend(
        self,
        x: Float[Array, "B L D"],
        *,
        keys: Float[Array, "B T H K"],
        values: Float[Array, "B T H K"],
        causal: bool = False,
    ) -> Float[Array, "B L D"]:
        """Attend from x to the keys and values; scores and softmax are in f32."""
        queries = self.split_heads(self.q_proj(x))
        output = attention.attend(queries, keys, values, causal=causal)
        return self.out_proj(output.reshape(x.shape))

    def attend_one(
        self,
        x: Float[Array, "B 1 D"],
        *,
        keys: Float[Array, "B H T K"],
        values: Float[Array, "B H T K"],
        mask: Bool[Array, "1 T"] | None = None,
    ) -> Float[Array, "B 1 D"]:
        """Attend from one position to a KV cache, or to the cache positions in `mask`."""
        queries = sharding.gather_to_batch(self.split_heads(self.q_proj(x))[:, 0])
        output = attention.attend_one(queries, keys, values, mask=mask).reshape(x.shape)
        return self.out_proj(sharding.broadcast_to_param_shards(output))

    def keys_values(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
        return self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))

    def split_heads(self, x: Float[Array, "B L D"]) -> Float[Array, "B L H K"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class EncoderLayer(eqx.Module):
    """Self-attention over the whole window, then feed-forward; pre-norm, with residuals."""

    self_attn: Attention
    self_attn_layer_norm: LayerNorm
    fc1: Linear
    fc2: Linear
    final_layer_norm: LayerNorm

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


KeysValues = tuple[Array, Array]  # keys and values, of the same shape


class DecoderLayer(eqx.Module):
    """Causal self-attention, cross-attention to the encoder states, feed-forward; pre-norm."""

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

        keys, values = self.encoder_attn.keys_values(states)
        queries = self.encoder_attn_layer_norm(x)
        x = x + self.encoder_attn.attend(queries, keys=keys, values=values)

        return self.feed_forward(x)

    def decode_step(
        self,
        x: Float[Array, "B 1 D"],
        *,
        layer_index: Int[Array, ""],
        self_kv: KeysValues,
        cross_kv: KeysValues,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B 1 D"], KeysValues]:
        """One token at `position`; also returns `self_kv` with its keys and values.

        Args:
            self_kv: self-attention cache of all layers, [N, B, H, L, K], updated in place at
                `layer_index`.
            cross_kv: cross-attention cache of this layer, [B, H, T, K].
        """
        # Write the new keys and values into the cache.
        normed = self.self_attn_layer_norm(x)
        new_kv = sharding.gather_to_batch(heads_first(self.self_attn.keys_values(normed)))
        self_kv = tuple(
            jax.lax.dynamic_update_slice(old, new[None], (layer_index, 0, 0, position, 0))
            for old, new in zip(self_kv, new_kv, strict=True)
        )

        # Self-attention over the positions so far.
        mask = jnp.arange(self_kv[0].shape[3])[None] <= position
        keys, values = (kv[layer_index] for kv in self_kv)
        x = x + self.self_attn.attend_one(normed, keys=keys, values=values, mask=mask)

        # Cross-attention, feed-forward.
        keys, values = cross_kv
        queries = self.encoder_attn_layer_norm(x)
        x = x + self.encoder_attn.attend_one(queries, keys=keys, values=values)
        return sharding.broadcast_to_param_shards(self.feed_forward(x)), self_kv

    def feed_forward(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


def heads_first(keys_values: KeysValues) -> KeysValues:
    """Transpose keys and values from [..., T, H, K] to [..., H, T, K], the layout of the cache."""
    return jax.tree.map(lambda x: x.swapaxes(-3, -2), keys_values)


def gelu(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The exact (erf) form: the tanh approximation does not match the published weights."""
    return jax.nn.gelu(x, approximate=False)


# ---------------------------------------------------------------------------------------------
# Encoder


class Encoder(eqx.Module):
    """Mel frames to one state per 20 ms."""

    conv1: Conv
    conv2: Conv
    embed_positions: Embedding
    layers: EncoderLayer  # arrays stacked on a leading axis [N, ...]
    layer_norm: LayerNorm

    def __call__(self, mel: Float[Array, "B F M"]) -> Float[Array, "B T D"]:
        """Raises ValueError unless F is the model's window."""
        positions = self.embed_positions.weight
        expected = len(positions) * FRAMES_PER_POSITION
        if mel.shape[1] != expected:
            raise ValueError(
                f"the encoder got {mel.shape[1]} mel frames; expected {expected} "
                f"({expected / 100:g} s). Pad or cut the audio to the model's window first."
            )

        # Two convolutions, the second with stride 2, then positions.
        conv1, conv2, positions = sharding.all_gather_params(
            (self.conv1, self.conv2, positions), mel.dtype
        )
        x = gelu(conv1(mel))
        x = gelu(conv2(x)) + positions.astype(mel.dtype)

        # Transformer layers.
        x = sharding.run_layers(self.layers, x, lambda layer, x: layer(x))
        return self.layer_norm(x)


# ---------------------------------------------------------------------------------------------
# Decoder


class DecoderCache(NamedTuple):
    """Keys and values of all decoder layers."""

    self_kv: KeysValues  # [N, B, H, L, K]: one position for each token of the transcript
    cross_kv: KeysValues  # [N, B, H, T, K]: one position for each encoder state


class Decoder(eqx.Module):
    """Causal transformer with cross-attention to the encoder states."""

    embed_tokens: Embedding
    embed_positions: Embedding
    layers: DecoderLayer  # arrays stacked on a leading axis [N, ...]
    layer_norm: LayerNorm

    def __call__(
        self,
        inputs: Float[Array, "B L D"],
        states: Float[Array, "B T D"],
        remat: sharding.Remat = "layers",
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last norm.

        Args:
            inputs: token embeddings or query tokens, without positions.
            states: encoder states.
            remat: what the backward pass recomputes.
        """
        positions = sharding.all_gather_params(self.embed_positions.weight, inputs.dtype)
        x = inputs + positions[: inputs.shape[1]].astype(inputs.dtype)
        x = sharding.run_layers(
            self.layers,
            x,
            lambda layer, x: layer(x, states),
            remat,
        )
        return self.layer_norm(x)

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Token embeddings, without positions, never scaled (see model_config.WHISPER)."""
        return sharding.lookup(self.embed_tokens.weight, ids)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits; the output matrix is the embedding table."""
        return weights.logits(hidden, self.embed_tokens.weight)

    # Decoding with a cache

    def empty_cache(self, states: Float[Array, "B T D"], cache_length: int) -> DecoderCache:
        """Compute the cross-attention cache, and allocate `cache_length` token positions."""

        def cross_kv_of_layer(_, layer):
            module = sharding.all_gather_params(layer.encoder_attn, states.dtype)
            return None, sharding.shard_batch(heads_first(module.keys_values(states)))

        cross_kv = jax.lax.scan(cross_kv_of_layer, None, self.layers)[1]

        layers, batch, heads, _, head_width = cross_kv[0].shape
        zeros = jnp.zeros((layers, batch, heads, cache_length, head_width), cross_kv[0].dtype)
        return DecoderCache(self_kv=(zeros, zeros), cross_kv=cross_kv)

    def decode_step(
        self, ids: Int[Array, "B"], cache: DecoderCache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Feed one token per row at `position`; returns the next-token logits and the new cache."""
        x = sharding.broadcast_to_param_shards(self.embed(ids[:, None]))
        x = x + self.embed_positions.weight[position].astype(x.dtype)

        def run_layer(carry, layer_inputs):
            x, self_kv = carry
            layer_index, layer, cross_kv = layer_inputs
            carry = layer.decode_step(
                x,
                layer_index=layer_index,
                self_kv=self_kv,
                cross_kv=cross_kv,
                position=position,
            )
            return carry, None

        layer_indices = jnp.arange(len(cache.cross_kv[0]))
        (x, self_kv), _ = jax.lax.scan(
            run_layer, (x, cache.self_kv), (layer_indices, self.layers, cache.cross_kv)
        )
        return self.logits(self.layer_norm(x[:, 0])), cache._replace(self_kv=self_kv)


# ---------------------------------------------------------------------------------------------
# The whole model


class Whisper(eqx.Module):
    """Encoder and decoder. In published files, the tensor names start with `model.`."""

    encoder: Encoder
    decoder: Decoder
    config: WhisperConfig = eqx.field(static=True)

    @staticmethod
    def init(config: WhisperConfig, key: PRNGKeyArray) -> "Whisper":
        """Random weights (normal, 0.02) with Whisper's sinusoidal encoder positions."""
        keys = iter(jax.random.split(key, 64))
        encoder = init_encoder(config, keys)
        decoder = init_decoder(config, keys)
        return Whisper(encoder=encoder, decoder=decoder, config=config)

    @staticmethod
    def published(folder: Path, dtype=None) -> weights.Published:
        """Tree and tensor names of a published folder, from its config; floats in `dtype`."""
        config = weights.read_config(WhisperConfig, folder)
        model_config.listening(folder, config.num_mel_bins)
        template = weights.abstract(Whisper.init, config, jax.random.key(0), dtype=dtype)
        tied = {"proj_out.weight": "tied to model.decoder.embed_tokens"}
        return weights.Published(template, prefix="model.", unused=tied)

    @staticmethod
    def load(
        path: str | Path, dtype=jnp.float32, place: Callable = lambda template: template
    ) -> "Whisper":
        """Load a published checkpoint; `place` adds shardings to the template's arrays."""
        folder = weights.resolve(path)
        template, prefix, unused = Whisper.published(folder, dtype)
        weights.check_tied(folder, "proj_out.weight", "model.decoder.embed_tokens.weight")
        return weights.load(place(template), folder, prefix, unused)


# ---------------------------------------------------------------------------------------------
# Random initialisation


def init_encoder(config: WhisperConfig, keys: Iterator[PRNGKeyArray]) -> Encoder:
    """An encoder of these sizes with random weights and sinusoidal positions."""
    layers = config.encoder_layers
    width = config.d_model
    return Encoder(
        conv1=_conv(keys, config.num_mel_bins, width, stride=1),
        conv2=_conv(keys, width, width, stride=2),
        embed_positions=Embedding(jnp.asarray(sinusoids(config.max_source_positions, width))),
        layers=EncoderLayer(
            self_attn=_attention(keys, layers, width, heads=config.encoder_attention_heads),
            self_attn_layer_norm=_norm(layers, width),
            fc1=_linear(keys, layers, n_in=width, n_out=config.encoder_ffn_dim),
            fc2=_linear(keys, layers, n_in=config.encoder_ffn_dim, n_out=width),
            final_layer_norm=_norm(layers, width),
        ),
        layer_norm=_norm(width),
    )


def init_decoder(config: WhisperConfig, keys: Iterator[PRNGKeyArray]) -> Decoder:
    """A decoder of these sizes with random weights."""
    layers = config.decoder_layers
    width = config.d_model
    return Decoder(
        embed_tokens=Embedding(_normal(keys, config.vocab_size, width)),
        embed_positions=Embedding(_normal(keys, config.max_target_positions, width)),
        layers=DecoderLayer(
            self_attn=_attention(keys, layers, width, heads=config.decoder_attention_heads),
            self_attn_layer_norm=_norm(layers, width),
            encoder_attn=_attention(keys, layers, width, heads=config.decoder_attention_heads),
            encoder_attn_layer_norm=_norm(layers, width),
            fc1=_linear(keys, layers, n_in=width, n_out=config.decoder_ffn_dim),
            fc2=_linear(keys, layers, n_in=config.decoder_ffn_dim, n_out=width),
            final_layer_norm=_norm(layers, width),
        ),
        layer_norm=_norm(width),
    )


def sinusoids(length: int, width: int) -> np.ndarray:
    """Encoder positions [T, D]: sines in the first half of the width, cosines in the second."""
    scale = np.exp(-math.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * scale
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def _normal(keys: Iterator[PRNGKeyArray], *shape: int) -> Array:
    return 0.02 * jax.random.normal(next(keys), shape)


def _norm(*shape: int) -> LayerNorm:
    return LayerNorm(weight=jnp.ones(shape), bias=jnp.zeros(shape))


def _conv(keys: Iterator[PRNGKeyArray], n_in: int, n_out: int, *, stride: int) -> Conv:
    return Conv(weight=_normal(keys, n_out, n_in, 3), bias=jnp.zeros(n_out), stride=stride)


def _linear(
    keys: Iterator[PRNGKeyArray], layers: int, *, n_in: int, n_out: int, bias: bool = True
) -> Linear:
    weight = _normal(keys, layers, n_out, n_in)
    return Linear(weight=weight, bias=jnp.zeros((layers, n_out)) if bias else None)


def _attention(keys: Iterator[PRNGKeyArray], layers: int, width: int, *, heads: int) -> Attention:
    return Attention(
        q_proj=_linear(keys, layers, n_in=width, n_out=width),
        k_proj=_linear(keys, layers, n_in=width, n_out=width, bias=False),
        v_proj=_linear(keys, layers, n_in=width, n_out=width),
        out_proj=_linear(keys, layers, n_in=width, n_out=width),
        heads=heads,
    )


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
        language: language code, for multilingual models.
        long: split a longer clip at its quietest moments; prints one line per part.
    """
    import generate  # imported here: generate.py itself imports this module

    for text in generate.transcripts(clip, model, language, long):
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
