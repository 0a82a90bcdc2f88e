"""Connector: Whisper encoder states become input embeddings of a Llama. The only trained part.

    audio [B, S] -> log-mel -> Whisper encoder (FROZEN)            encoder states [B, T, D]
    query tokens [Q, D] + positions -> Whisper decoder (TRAINED)   hidden         [B, Q, D]
    projection (TRAINED)                                           virtual tokens [B, Q, E]
    [prefix | virtual tokens | suffix] -> Llama (FROZEN)           hidden states  [B, P + Q + R, E]

A Whisper decoder generates text token by token while it attends to the audio. Here its inputs are
learned queries instead of the tokens so far, so one pass yields all positions at once, as vectors:
no sampling, differentiable end to end.

Axes: B batch, S audio samples, T encoder positions, Q query tokens, D width of Whisper, E width of
the LLM, P and R tokens of the chat template before and after the user's words, L transcript tokens,
A response tokens that are fed, K = A + 1 hidden states that predict the response, V vocabulary.

Source: Held et al. 2024, section 3.
Reads: weights.py, whisper.py, llama.py.   Read next: distill_loss.py.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray

import llama
import weights
import whisper
from formats import audio_files, model_config
from runtime import cli, files, sharding

POSITIONS_PER_SECOND = (
    whisper.SAMPLE_RATE // whisper.HOP_LENGTH // whisper.FRAMES_PER_POSITION
)  # 50 encoder positions


class Projection(eqx.Module):
    """y = x W + b. Published DiVA checkpoints store W as [in, out], unlike every other tensor."""

    weight: Float[Array, "D E"]
    bias: Float[Array, "E"]

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        return x @ self.weight.astype(x.dtype) + self.bias.astype(x.dtype)


class Connector(eqx.Module):
    """Q queries through a causal Whisper decoder that cross-attends to the audio, then projected
    to the width of the LLM."""

    query_tokens: Float[Array, "Q D"]
    decoder: whisper.Decoder
    projection: Projection

    def __call__(
        self, encoder_states: Float[Array, "B T D"], remat: sharding.Remat = "layers"
    ) -> Float[Array, "B Q E"]:
        """The virtual tokens of each clip."""
        dtype = encoder_states.dtype
        queries, projection = sharding.all_gather_params(
            (self.query_tokens, self.projection), dtype
        )
        queries = jnp.broadcast_to(queries, (len(encoder_states), *queries.shape)).astype(dtype)
        return sharding.shard_batch(projection(self.decoder(queries, encoder_states, remat)))


class DiVAOutput(NamedTuple):
    """Activations of one forward pass of student and teacher."""

    encoder_states: Float[Array, "B T D"]
    virtual_tokens: Float[Array, "B Q E"]
    transcript_embeds: Float[Array, "B L E"]  # alignment targets of the last virtual tokens
    student_states: Float[Array, "B K E"]  # predict the response to the speech
    teacher_states: Float[Array, "B K E"]  # predict the response to the transcript; no gradient


class DiVA(eqx.Module):
    """Encoder, connector and LLM: speech in, hidden states of the response out."""

    encoder: whisper.Encoder
    connector: Connector
    llm: llama.Llama
    num_mel_bins: int = eqx.field(static=True)

    @property
    def window_samples(self) -> int:
        """Length of the encoder's audio window in samples."""
        positions = len(self.encoder.embed_positions.weight)
        return positions * whisper.FRAMES_PER_POSITION * whisper.HOP_LENGTH

    def __call__(
        self,
        *,
        transcript: Int[Array, "B L"],
        lengths: Int[Array, "B"],
        prefix: Int[Array, "P"],
        suffix: Int[Array, "R"],
        response: Int[Array, "B A"],
        audio: Float[Array, "B S"] | None = None,
        encoder_states: Float[Array, "B T D"] | None = None,
        teacher_states: Float[Array, "B K E"] | None = None,
        remat: sharding.Remat = "layers",
    ) -> DiVAOutput:
        """Run the frozen LLM as student (on speech) and as teacher (on the transcript).

            student  [prefix | virtual tokens | suffix | response] -> last K hidden states
            teacher  [prefix | transcript     | suffix | response] -> the K that match

        The K = A + 1 states predict the response: one at the end of the suffix, then one at each
        response token. Only the student's carry a gradient, through the LLM to the connector.

        Args:
            transcript, lengths: right-padded token ids, and how many of each row are real.
            prefix, suffix: chat template around the user's words, the same for all clips.
            response: the teacher's greedy response without its last token; [B, 0] for K = 1.
            audio: 16 kHz samples, padded to the window. Not used if `encoder_states` are given.
            encoder_states, teacher_states: precomputed; both come from frozen weights.
            remat: what the backward pass recomputes.
        """
        num_states = response.shape[1] + 1
        if encoder_states is None:
            encoder_states = self.encode(audio)
        virtual_tokens = self.connector(encoder_states, remat)

        # Student: the virtual tokens are the user's turn. Teacher: the transcript is.
        tail = suffix_and_response(suffix, response)
        student = jnp.concatenate([virtual_tokens, self.llm.embed(tail)], axis=1)
        sequences = {"student": student}
        if teacher_states is None:
            sequences["teacher"] = self.llm.embed(append_rows(transcript, lengths, tail))

        # One pass over the layers for both; the prefix, the same for all clips, is computed once.
        hidden = self.llm(sequences, remat, self.llm.embed(prefix[None]))
        if teacher_states is None:
            start = lengths + len(suffix) - 1
            teacher_states = take_states(hidden["teacher"], start, num_states)

        return DiVAOutput(
            encoder_states=encoder_states,
            virtual_tokens=virtual_tokens,
            transcript_embeds=self.llm.embed(transcript),
            student_states=hidden["student"][:, -num_states:],
            teacher_states=jax.lax.stop_gradient(teacher_states),
        )

    def encode(self, audio: Float[Array, "B S"]) -> Float[Array, "B T D"]:
        """Encoder states of audio that is padded to the window. Carries no gradient."""
        log_mel = functools.partial(whisper.log_mel, num_mel_bins=self.num_mel_bins)
        mel = sharding.shard_map_batch(log_mel, audio)
        mel = mel.astype(self.encoder.conv1.weight.dtype)
        return jax.lax.stop_gradient(self.encoder(mel))

    def virtual_tokens(self, audio: Float[Array, "B S"]) -> Float[Array, "B Q E"]:
        """What the LLM reads instead of the words of each clip."""
        return self.connector(self.encode(audio))

    def embed_turn(
        self,
        virtual_tokens: Float[Array, "B Q E"],
        prefix: Int[Array, "P"],
        suffix: Int[Array, "R"],
    ) -> Float[Array, "B positions E"]:
        """The user's turn as input embeddings of the LLM: prefix, virtual tokens, suffix."""
        batch_size = len(virtual_tokens)
        before, after = (
            self.llm.embed(jnp.broadcast_to(ids, (batch_size, len(ids))))
            for ids in (prefix, suffix)
        )
        return jnp.concatenate([before, virtual_tokens.astype(before.dtype), after], axis=1)


def suffix_and_response(
    suffix: Int[Array, "R"], response: Int[Array, "B A"]
) -> Int[Array, "B R_plus_A"]:
    """The tokens that follow the user's words, the same for student and teacher."""
    rows = jnp.broadcast_to(suffix, (len(response), len(suffix)))
    return jnp.concatenate([rows, response], axis=1)


def append_rows(
    rows: Int[Array, "B L"], lengths: Int[Array, "B"], tail: Int[Array, "B A"]
) -> Int[Array, "B L_plus_A"]:
    """[row[:length] | tail | padding] for each row: the tail starts at the row's own length."""
    position = jnp.arange(rows.shape[1] + tail.shape[1])
    padded = jnp.pad(rows, ((0, 0), (0, tail.shape[1])))
    index = jnp.clip(position - lengths[:, None], 0, tail.shape[1] - 1)
    return jnp.where(position < lengths[:, None], padded, jnp.take_along_axis(tail, index, axis=1))


def take_states(
    hidden: Float[Array, "B n E"], start: Int[Array, "B"], num_states: int
) -> Float[Array, "B K E"]:
    """`num_states` consecutive states of each row, from position `start` on."""
    index = start[:, None] + jnp.arange(num_states)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def trainable(diva: DiVA) -> DiVA:
    """Mask of the trained arrays: the connector without its token-embedding table.

    Queries never use the table, and weight decay would shrink it. It is kept so that the exported
    decoder is complete.
    """
    mask = jax.tree.map(lambda _: False, diva)
    connector_mask = jax.tree.map(lambda _: True, diva.connector)
    connector_mask = eqx.tree_at(lambda c: c.decoder.embed_tokens.weight, connector_mask, False)
    return eqx.tree_at(lambda m: m.connector, mask, connector_mask)


@sharding.use_model_mesh
@eqx.filter_jit
def virtual_tokens_jit(diva: DiVA, audio: Float[Array, "B S"]) -> Float[Array, "B Q E"]:
    """`DiVA.virtual_tokens`, compiled."""
    return diva.virtual_tokens(audio)


@sharding.use_model_mesh
@eqx.filter_jit
def nearest_token_ids(llm: llama.Llama, virtual_tokens: Float[Array, "B Q E"]) -> Int[Array, "B Q"]:
    """The token whose embedding is nearest (L2) to each virtual token, compiled."""
    return llama.nearest_tokens(virtual_tokens, llm.model.embed_tokens.weight)


# ---------------------------------------------------------------------------------------------
# Initialisation


def init_connector(
    decoder: whisper.Decoder,
    *,
    llm_width: int,
    embedding_rms: float,
    num_queries: int | None,
    key: PRNGKeyArray,
) -> Connector:
    """A connector that starts as the ASR model's decoder, with virtual tokens as long (L2) as the
    LLM's token embeddings.

    The decoder's last norm yields w x + b, where x has variance 1 and w of a published Whisper is
    near 10. It is rescaled here so that its output has variance 1, and the scale moves into the
    projection: weights of standard deviation embedding_rms / sqrt(D). Adam changes weights by about
    the learning rate whatever their size, so small weights behind large inputs would be overrun.

    Args:
        embedding_rms: root mean square of the LLM's token embeddings.
        num_queries: at most the positions of the decoder; None for all of them.

    Raises ValueError if the decoder has fewer positions than `num_queries`.
    """
    positions, width = decoder.embed_positions.weight.shape
    num_queries = positions if num_queries is None else num_queries
    if not 1 <= num_queries <= positions:
        raise ValueError(
            f"queries: got {num_queries}; expected 1 to {positions}, the positions of this "
            "Whisper's decoder. Give fewer queries, or none for all positions."
        )
    query_key, projection_key = jax.random.split(key)

    norm = decoder.layer_norm
    rms = jnp.sqrt((jnp.square(norm.weight) + jnp.square(norm.bias)).mean())
    norm = jax.tree.map(lambda x: x / rms, norm)

    weight = jax.random.normal(projection_key, (width, llm_width)) * embedding_rms / width**0.5
    return Connector(
        query_tokens=0.02 * jax.random.normal(query_key, (num_queries, width)),
        decoder=eqx.tree_at(lambda d: d.layer_norm, decoder, norm),
        projection=Projection(weight, jnp.zeros(llm_width)),
    )


def init_random(
    config: whisper.WhisperConfig, llm_width: int, num_queries: int | None, key: PRNGKeyArray
) -> Connector:
    """A connector of these sizes with random weights: used by `weights.abstract` for its shapes."""
    decoder = whisper.Whisper.init(config, key).decoder
    return init_connector(
        decoder, llm_width=llm_width, embedding_rms=1.0, num_queries=num_queries, key=key
    )


def create(
    asr: whisper.Whisper, llm: llama.Llama, num_queries: int | None, key: PRNGKeyArray
) -> DiVA:
    """An untrained DiVA. The connector's arrays are float32: they are the master weights."""
    decoder = jax.tree.map(lambda x: x.astype(jnp.float32), asr.decoder)
    table = llm.model.embed_tokens.weight.astype(jnp.float32)
    connector = init_connector(
        decoder,
        llm_width=table.shape[1],
        embedding_rms=float(jnp.sqrt(jnp.square(table).mean())),
        num_queries=num_queries,
        key=key,
    )
    return DiVA(asr.encoder, connector, llm, asr.config.num_mel_bins)


def load_untrained(
    asr_path: str,
    llm_path: str,
    *,
    num_queries: int | None,
    key: PRNGKeyArray,
    dtype=jnp.float32,
    shard: Callable = lambda template: template,
    window: float | None = None,
) -> DiVA:
    """A new connector between two published models.

    Args:
        dtype: of the frozen encoder and LLM.
        shard: gives the template of each model its shardings.
        window: seconds of audio, if less than the Whisper's own window.
    """
    asr = whisper.Whisper.load(asr_path, jnp.float32, shard)
    encoder = truncate_positions(asr.encoder, with_window(asr.config, window))
    encoder = jax.tree.map(lambda x: x.astype(dtype), encoder)
    asr = eqx.tree_at(lambda w: w.encoder, asr, encoder)
    return create(asr, llama.Llama.load(llm_path, dtype, shard), num_queries, key)


def abstract(
    asr: whisper.WhisperConfig, llm: llama.LlamaConfig, num_queries: int | None, dtype
) -> DiVA:
    """The shapes of `load_untrained`, from the two configs alone."""
    key = jax.random.key(0)
    return DiVA(
        encoder=weights.abstract(lambda: whisper.Whisper.init(asr, key).encoder, dtype=dtype),
        connector=weights.abstract(init_random, asr, llm.hidden_size, num_queries, key),
        llm=weights.abstract(llama.Llama.init, llm, key, dtype=dtype),
        num_mel_bins=asr.num_mel_bins,
    )


# ---------------------------------------------------------------------------------------------
# Checkpoints


def with_window(asr: whisper.WhisperConfig, window: float | None) -> whisper.WhisperConfig:
    """The config of a Whisper whose encoder takes `window` seconds; None keeps its own window.

    Raises ValueError if the window is longer than the Whisper's own.
    """
    if window is None:
        return asr
    positions = round(window * POSITIONS_PER_SECOND)
    if not 1 <= positions <= asr.max_source_positions:
        longest = asr.max_source_positions / POSITIONS_PER_SECOND
        raise ValueError(
            f"a window of {window:g} s: expected more than 0 and at most {longest:g} s, the window "
            "of this Whisper. Give another --window, or none."
        )
    return dataclasses.replace(asr, max_source_positions=positions)


def truncate_positions(encoder: whisper.Encoder, asr: whisper.WhisperConfig) -> whisper.Encoder:
    """The encoder with only the first of its positions, as many as `asr` has.

    They are sinusoids, so each means the same time in a window of any length.
    """
    first = encoder.embed_positions.weight[: asr.max_source_positions]
    return eqx.tree_at(lambda e: e.embed_positions.weight, encoder, first)


def to_published(connector: Connector) -> dict[str, Any]:
    """The arrays under the names of the published DiVA checkpoints."""
    return {
        "query_tokens": connector.query_tokens,
        "connector": connector.decoder,
        "projection": connector.projection,
    }


def published(folder: Path, dtype=None) -> weights.Published:
    """Template of the connector that a DiVA's folder holds; floats in `dtype`."""
    asr_path, llm_path = map(weights.resolve, references(folder))
    asr = weights.read_config(whisper.WhisperConfig, asr_path)
    llm = weights.read_config(llama.LlamaConfig, llm_path)
    config = files.read_json(folder / "config.json")
    num_queries = model_config.count(folder / "config.json", "queries", config)
    shapes = weights.abstract(
        init_random,
        asr,
        llm.hidden_size,
        num_queries or asr.max_target_positions,
        jax.random.key(0),
        dtype=dtype,
    )
    unused = {
        "encoder.": "frozen: read from reference_encoder",
        "decoder.": "frozen: read from reference_decoder",
    }
    return weights.Published(to_published(shapes), unused=unused)


def load(path: str | Path, dtype=jnp.float32, shard: Callable = lambda template: template) -> DiVA:
    """A trained DiVA: its connector, and the Whisper and the Llama that config.json names."""
    folder = weights.resolve(path)
    asr_path, llm_path = references(folder)
    asr_config = encoder_config(folder)
    asr = whisper.Whisper.load(asr_path, dtype, shard)
    llm = llama.Llama.load(llm_path, dtype, shard)
    template, prefix, unused = published(folder, dtype)
    tree = weights.load(shard(template), folder, prefix, unused)
    return DiVA(
        encoder=truncate_positions(asr.encoder, asr_config),
        connector=Connector(tree["query_tokens"], tree["connector"], tree["projection"]),
        llm=llm,
        num_mel_bins=asr_config.num_mel_bins,
    )


def save(diva: DiVA, path: str | Path, asr_path: str, llm_path: str) -> None:
    """Write the connector as a published-layout checkpoint that refers to its two models."""
    folder = Path(path)
    weights.save(to_published(diva.connector), folder)
    config = {
        "model_type": "diva",
        "architectures": ["DiVAModel"],
        "vocab_size": diva.llm.config.vocab_size,
        "queries": len(diva.connector.query_tokens),
        "max_source_positions": len(diva.encoder.embed_positions.weight),
        "reference_encoder": _reference(folder, asr_path),
        "reference_decoder": _reference(folder, llm_path),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def references(path: str | Path) -> tuple[str, str]:
    """Path or repo id of the Whisper and of the Llama that a DiVA checkpoint was trained between.

    A path in config.json may be relative to the checkpoint's folder. Raises ValueError if absent.
    """
    folder = weights.resolve(path)
    config = files.read_json(folder / "config.json")
    keys = ("reference_encoder", "reference_decoder")
    absent = [key for key in keys if not isinstance(config.get(key), str)]
    if absent:
        raise ValueError(
            f"{folder / 'config.json'}: no {', '.join(absent)}; expected the folder or repo of the "
            "Whisper and of the Llama that the connector was trained between. Is this a DiVA?"
        )
    asr_path, llm_path = (
        str(folder / config[key]) if (folder / config[key]).is_dir() else config[key]
        for key in keys
    )
    return asr_path, llm_path


def templates(path: str | Path, dtype) -> tuple[Any, Any, Any]:
    """The shapes that `load` reads for a DiVA checkpoint: Whisper, Llama, connector."""
    folder = weights.resolve(path)
    asr, llm = map(weights.resolve, references(folder))
    return (
        whisper.Whisper.published(asr, dtype).template,
        llama.Llama.published(llm, dtype).template,
        published(folder, dtype).template,
    )


def encoder_config(path: str | Path) -> whisper.WhisperConfig:
    """Config of the Whisper that a DiVA refers to, with the window that it was trained on."""
    folder = weights.resolve(path)
    asr = weights.read_config(whisper.WhisperConfig, weights.resolve(references(folder)[0]))
    file = folder / "config.json"
    positions = model_config.count(file, "max_source_positions", files.read_json(file))
    return with_window(asr, positions and positions / POSITIONS_PER_SECOND)


def _reference(folder: Path, path: str) -> str:
    """How config.json names a model: a path relative to the checkpoint, or a repo id."""
    # resolved: from a folder behind a symbolic link, `..` leads out of where the folder really is
    return os.path.relpath(path, folder.resolve()) if Path(path).is_dir() else str(path)


# ---------------------------------------------------------------------------------------------
# Command line


def main(
    clip: Annotated[Path, tyro.conf.Positional] = cli.EXAMPLE,
    model: str = "toy/diva",
    last: int = 8,
) -> None:
    """Decode the last virtual tokens of a clip to their nearest text tokens.

    Args:
        clip: audio file, at most as long as the model's window.
        model: folder or repo id of a trained DiVA.
        last: how many virtual tokens to show; the transcript is aligned with the last ones.
    """
    asr_path, llm_path = references(model)
    # Before any weights are read: a clip that cannot be used is refused at once.
    audio = jnp.asarray(audio_files.load_window(clip, encoder_config(model).window_samples))
    dtype = sharding.compute_dtype(jax.default_backend())
    mesh = sharding.local_mesh(templates(model, dtype))
    shard = functools.partial(sharding.shard_params, mesh=mesh)

    trained = load(model, dtype, shard)
    asr = whisper.Whisper.load(asr_path, dtype, shard)
    num_queries = len(trained.connector.query_tokens)
    initial = create(asr, trained.llm, num_queries, jax.random.key(0)).connector
    untrained = eqx.tree_at(lambda diva: diva.connector, trained, initial)

    tokenizer = llama.Chat.load(llm_path).tokenizer
    for name, diva in (("before training", untrained), ("after training", trained)):
        ids = nearest_token_ids(diva.llm, virtual_tokens_jit(diva, audio))[0, -last:]
        print(f"{name:16}" + " ".join(tokenizer.decode([i]) or "_" for i in ids.tolist()))


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
