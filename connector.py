"""Connector: Whisper's states become the input embeddings of a Llama. The only trained part.

    audio [B, S] -> log-mel -> Whisper encoder (FROZEN)        states   [B, T, D]
    query tokens [Q, D] + positions -> Whisper decoder (TRAINED) hidden [B, Q, D]
    projection (TRAINED)                              virtual tokens    [B, Q, E]
    [prefix; virtual tokens; suffix] -> Llama (FROZEN)                  [B, P + Q + R, E]

A Whisper decoder writes words while it listens. Fed with learned queries instead of the words so
far, it writes all of them at once, into vectors: one pass, no sampling, differentiable end to end.

Axes: B batch, S audio samples, T encoder positions, Q query tokens, D width of Whisper, E width of
the LLM, P and R length of the chat template before and after the user's words, L text tokens,
A tokens of an answer that are fed, K = A + 1 states that say it, V vocabulary.

Annex: `sharding.all_gather_params` brings split arrays to the device that computes with them.
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
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

import llama
import weights
import whisper
from formats import audio_files, model_config
from runtime import cli, files, sharding

POSITIONS_PER_SECOND = (
    whisper.SAMPLE_RATE // whisper.HOP_LENGTH // whisper.FRAMES_PER_POSITION
)  # a second


class Projection(eqx.Module):
    """y = x W + b. Published DiVA checkpoints store W as [in, out], unlike every other tensor."""

    weight: Float[Array, "D E"]
    bias: Float[Array, "E"]

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        return x @ self.weight.astype(x.dtype) + self.bias.astype(x.dtype)


class Connector(eqx.Module):
    """Q queries through a causal Whisper decoder that listens, then into the LLM's space."""

    query_tokens: Float[Array, "Q D"]
    decoder: whisper.Decoder
    projection: Projection

    def __call__(
        self, states: Float[Array, "B T D"], remat: sharding.Remat = "layers"
    ) -> Float[Array, "B Q E"]:
        queries, projection = sharding.all_gather_params(
            (self.query_tokens, self.projection), states.dtype
        )
        queries = jnp.broadcast_to(queries, (len(states), *queries.shape)).astype(states.dtype)
        return sharding.shard_batch(projection(self.decoder(queries, states, remat)))

    @staticmethod
    def init(
        decoder: whisper.Decoder,
        width: int,
        volume: float,
        queries: int | None,
        key: PRNGKeyArray,
    ) -> "Connector":
        """A connector that starts as the recogniser's decoder and speaks at the LLM's volume.

        Its last norm gives w x + b with x of variance 1, and a published Whisper's w is near 10.
        Here it is scaled to states of variance 1: weights of deviation volume / sqrt(D), the volume
        being rms(embedding), then give virtual tokens as long as the LLM's token embeddings. (Adam
        moves weights by the learning rate: the small ones behind loud states it throws about.)
        Raises ValueError if the decoder has fewer positions than `queries` (None: all of them).
        """
        positions, inner = decoder.embed_positions.weight.shape
        queries = positions if queries is None else queries
        if not 1 <= queries <= positions:
            raise ValueError(
                f"queries: got {queries}; expected 1 to {positions}, the positions of this "
                "Whisper's decoder. Give fewer queries, or none for all positions."
            )
        query_key, projection_key = jax.random.split(key)
        norm = decoder.layer_norm
        rms = jnp.sqrt((jnp.square(norm.weight) + jnp.square(norm.bias)).mean())
        norm = jax.tree.map(lambda x: x / rms, norm)
        weight = jax.random.normal(projection_key, (inner, width)) * volume / inner**0.5
        return Connector(
            query_tokens=0.02 * jax.random.normal(query_key, (queries, inner)),
            decoder=eqx.tree_at(lambda d: d.layer_norm, decoder, norm),
            projection=Projection(weight, jnp.zeros(width)),
        )

    @staticmethod
    def random(
        config: whisper.WhisperConfig, width: int, queries: int | None, key: PRNGKeyArray
    ) -> "Connector":
        """A connector in these sizes, none of it learnt: for `weights.abstract`."""
        decoder = whisper.Whisper.init(config, key).decoder
        return Connector.init(decoder, width, 1.0, queries, key)

    def published(self) -> dict[str, Any]:
        """The same arrays under the names of the published DiVA checkpoints."""
        return {
            "query_tokens": self.query_tokens,
            "connector": self.decoder,
            "projection": self.projection,
        }

    @staticmethod
    def from_published(tree: dict[str, Any]) -> "Connector":
        return Connector(tree["query_tokens"], tree["connector"], tree["projection"])


class DiVAOutput(NamedTuple):
    """What one pass makes of some clips: speech beside transcript, student beside teacher."""

    states: Float[Array, "B T D"]  # of the encoder
    virtual: Float[Array, "B Q E"]  # virtual tokens, and what the last of them are aligned with:
    targets: Float[Array, "B L E"]  # the LLM's embeddings of the transcript
    student: Float[Array, "B K E"]  # states from which the LLM says its response to the speech
    teacher: Float[Array, "B K E"]  # and to the transcript; no gradient passes


class DiVA(eqx.Module):
    """Encoder + connector + LLM: speech in, hidden states of the answer out."""

    encoder: whisper.Encoder
    connector: Connector
    llm: llama.Llama
    num_mel_bins: int = eqx.field(static=True)

    @property
    def window_samples(self) -> int:
        return (
            len(self.encoder.embed_positions.weight)
            * whisper.FRAMES_PER_POSITION
            * whisper.HOP_LENGTH
        )

    def __call__(
        self,
        audio: Float[Array, "B S"] | Float[Array, "B T D"],
        ids: Int[Array, "B L"],
        lengths: Int[Array, "B"],
        prefix: Int[Array, "*B P"],
        suffix: Int[Array, "R"],
        answers: Int[Array, "B A"] | None = None,
        pads: Int[Array, "B"] | None = None,
        taught: Float[Array, "B K E"] | None = None,
        remat: sharding.Remat = "layers",
    ) -> DiVAOutput:
        """The whole method: the LLM once as student, on speech, and once as teacher, on its
        transcript `ids`, both between the same `prefix` and `suffix` of the chat template, and both
        with the teacher's answer behind it, but for its last token (None: it has but one). One
        prefix for all is read once; of each clip's own, the first `pads` tokens are padding. What
        the frozen networks said before is given: states as `audio`, the teacher's as `taught`."""
        answers = ids[:, :0] if answers is None else answers
        before, prefix = shared(self.llm, prefix)
        states = self.encode(audio) if audio.ndim == 2 else audio
        virtual = self.connector(states, remat)
        targets, said = self.llm.embed(ids), self.llm.embed(answers)
        speech = jnp.concatenate([self.embed_turn(virtual, prefix, suffix), said], axis=1)
        text, first = text_turn(ids, lengths, prefix, suffix, answers, pads)
        count = answers.shape[1] + 1
        spoken = jnp.full_like(first, speech.shape[1] - count)
        if pads is not None:
            speech, spoken = pads_last(speech, pads), spoken - pads
        # Side by side, so that each layer is gathered once for both.
        read = (self.llm.embed(text),) if taught is None else ()
        student, *teacher = self.llm((speech, *read), remat, before)
        student = take_states(student, spoken, count)
        taught = take_states(teacher[0], first, count) if taught is None else taught
        return DiVAOutput(states, virtual, targets, student, jax.lax.stop_gradient(taught))

    @staticmethod
    def create(
        asr: whisper.Whisper, llm: llama.Llama, queries: int | None, key: PRNGKeyArray
    ) -> "DiVA":
        """An untrained DiVA; the connector's arrays are float32, the master weights."""
        decoder = jax.tree.map(lambda x: x.astype(jnp.float32), asr.decoder)
        table = llm.model.embed_tokens.weight.astype(jnp.float32)
        volume = float(jnp.sqrt(jnp.square(table).mean()))
        connector = Connector.init(decoder, table.shape[1], volume, queries, key)
        return DiVA(asr.encoder, connector, llm, asr.config.num_mel_bins)

    @staticmethod
    def untrained(
        asr_path: str,
        llm_path: str,
        queries: int | None,
        key: PRNGKeyArray,
        dtype=jnp.float32,
        place: Callable = lambda template: template,
        window: float | None = None,
    ) -> "DiVA":
        """A new connector between two published models; these, being frozen, in `dtype`. `window`:
        seconds that are heard, if less than the Whisper can."""
        asr = whisper.Whisper.load(asr_path, jnp.float32, place)
        encoder = truncate_positions(asr.encoder, with_window(asr.config, window))
        encoder = jax.tree.map(lambda x: x.astype(dtype), encoder)
        asr = eqx.tree_at(lambda w: w.encoder, asr, encoder)
        return DiVA.create(asr, llama.Llama.load(llm_path, dtype, place), queries, key)

    @staticmethod
    def abstract(
        asr: whisper.WhisperConfig, llm: llama.LlamaConfig, queries: int | None, dtype
    ) -> "DiVA":
        """The shapes of `untrained`, from the sizes of the two models alone."""
        key = jax.random.key(0)
        return DiVA(
            weights.abstract(lambda: whisper.Whisper.init(asr, key).encoder, dtype=dtype),
            weights.abstract(Connector.random, asr, llm.hidden_size, queries, key),
            weights.abstract(llama.Llama.init, llm, key, dtype=dtype),
            asr.num_mel_bins,
        )

    @staticmethod
    def load(
        path: str | Path, dtype=jnp.float32, place: Callable = lambda template: template
    ) -> "DiVA":
        """A trained DiVA: its connector, and the Whisper and the Llama that config.json names."""
        folder = weights.resolve(path)
        asr_path, llm_path = references(folder)
        asr_config = encoder_config(folder)
        encoder = truncate_positions(
            whisper.Whisper.load(asr_path, dtype, place).encoder, asr_config
        )
        llm = llama.Llama.load(llm_path, dtype, place)
        template, prefix, unused = DiVA.published(folder, dtype)
        tree = weights.load(place(template), folder, prefix, unused)
        return DiVA(encoder, Connector.from_published(tree), llm, asr_config.num_mel_bins)

    @staticmethod
    def published(folder: Path, dtype=None) -> weights.Published:
        """What a DiVA's own folder holds: the connector; floats in `dtype`."""
        asr_path, llm_path = map(weights.resolve, references(folder))
        asr_config = weights.read_config(whisper.WhisperConfig, asr_path)
        width = weights.read_config(llama.LlamaConfig, llm_path).hidden_size
        positions = asr_config.max_target_positions
        said = files.read_json(folder / "config.json")
        queries = model_config.count(folder / "config.json", "queries", said) or positions
        shapes = weights.abstract(
            Connector.random, asr_config, width, queries, jax.random.key(0), dtype=dtype
        )
        unused = {
            "encoder.": "frozen: read from reference_encoder",
            "decoder.": "frozen: read from reference_decoder",
        }
        return weights.Published(shapes.published(), unused=unused)

    def save(self, path: str | Path, asr_path: str, llm_path: str) -> None:
        """Write the connector as a published-layout checkpoint that refers to its two models."""
        folder = Path(path)
        weights.save(self.connector.published(), folder)
        config = {
            "model_type": "diva",
            "architectures": ["DiVAModel"],
            "vocab_size": self.llm.config.vocab_size,
            "queries": len(self.connector.query_tokens),
            "max_source_positions": len(self.encoder.embed_positions.weight),
            "reference_encoder": _refer(folder, asr_path),
            "reference_decoder": _refer(folder, llm_path),
        }
        text = json.dumps(config, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")

    def encode(self, audio: Float[Array, "B S"]) -> Float[Array, "B T D"]:
        """Encoder states of audio that is padded to the window; no gradient passes."""
        mel_of = functools.partial(whisper.log_mel, num_mel_bins=self.num_mel_bins)
        mel = sharding.shard_map_batch(mel_of, audio)
        mel = mel.astype(self.encoder.conv1.weight.dtype)
        return jax.lax.stop_gradient(self.encoder(mel))

    def virtual_tokens(self, audio: Float[Array, "B S"]) -> Float[Array, "B Q E"]:
        return self.connector(self.encode(audio))

    def embed_turn(
        self, virtual: Float[Array, "B Q E"], prefix: Int[Array, "*B P"], suffix: Int[Array, "R"]
    ) -> Float[Array, "B positions E"]:
        """The user's turn as the LLM's input: template, virtual tokens, template."""
        before, after = (
            self.llm.embed(jnp.broadcast_to(ids, (len(virtual), ids.shape[-1])))
            for ids in (prefix, suffix)
        )
        return jnp.concatenate([before, virtual.astype(before.dtype), after], axis=1)


def shared(
    llm: llama.Llama, prefix: Int[Array, "*B P"]
) -> tuple[Float[Array, "1 P E"] | None, Int[Array, "*B p"]]:
    """What the LLM reads once for all clips, and what is left for each: all of it, if each has its
    own."""
    return (llm.embed(prefix[None]), prefix[:0]) if prefix.ndim == 1 else (None, prefix)


def text_turn(
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    prefix: Int[Array, "*B P"],
    suffix: Int[Array, "R"],
    answers: Int[Array, "B A"],
    pads: Int[Array, "B"] | None = None,
) -> tuple[Int[Array, "B positions"], Int[Array, "B"]]:
    """The transcript as the user's turn, for the teacher; and where its response begins.

    Each row is [prefix; transcript; suffix; answer; padding]; the state that predicts the response
    stands at the end of the suffix, and the causal mask keeps the padding out of sight.
    """
    behind = jnp.concatenate([suffix * jnp.ones_like(ids[:, :1]), answers], axis=1)
    position = jnp.arange(ids.shape[1] + behind.shape[1])
    start = lengths[:, None]  # [B, 1] where the suffix begins
    text = ids[:, jnp.clip(position, 0, ids.shape[1] - 1)]
    at = jnp.clip(position - start, 0, behind.shape[1] - 1)
    tail = jnp.take_along_axis(behind, at, axis=1)
    head = jnp.broadcast_to(prefix, (len(ids), prefix.shape[-1]))
    row = jnp.concatenate([head, jnp.where(position < start, text, tail)], axis=1)
    last = lengths + prefix.shape[-1] + len(suffix) - 1
    return (row, last) if pads is None else (pads_last(row, pads), last - pads)


def pads_last(rows: Shaped[Array, "B n *any"], pads: Int[Array, "B"]) -> Shaped[Array, "B n *any"]:
    """The first `pads` positions of each row go to its end, out of sight."""
    return jax.vmap(lambda row, by: jnp.roll(row, -by, axis=0))(rows, pads)


def take_states(
    hidden: Float[Array, "B n E"], first: Int[Array, "B"], count: int
) -> Float[Array, "B K E"]:
    """So many states of each row, from its position `first` on."""
    at = first[:, None] + jnp.arange(count)
    return jnp.take_along_axis(hidden, at[..., None], axis=1)


def with_window(asr: whisper.WhisperConfig, window: float | None) -> whisper.WhisperConfig:
    """The sizes of a Whisper whose encoder hears `window` seconds, or all that it can (None).
    Raises ValueError if that is more than it can."""
    if window is None:
        return asr
    positions, most = round(window * POSITIONS_PER_SECOND), asr.max_source_positions
    if not 1 <= positions <= most:
        raise ValueError(
            f"a window of {window:g} s: expected more than 0 and at most "
            f"{most / POSITIONS_PER_SECOND:g} s, the window of this Whisper. "
            "Give another --window, or none."
        )
    return dataclasses.replace(asr, max_source_positions=positions)


def truncate_positions(encoder: whisper.Encoder, sizes: whisper.WhisperConfig) -> whisper.Encoder:
    """The encoder with the first of its positions alone: they are sinusoids, and each means the
    same time in a window of any length."""
    keep = encoder.embed_positions.weight[: sizes.max_source_positions]
    return eqx.tree_at(lambda e: e.embed_positions.weight, encoder, keep)


def trainable(diva: DiVA) -> DiVA:
    """The mask of what is trained: the connector, less the token table that queries never touch
    (weight decay would eat it; it is kept so that the exported decoder is whole)."""
    mask = jax.tree.map(lambda _: False, diva)
    connector = jax.tree.map(lambda _: True, diva.connector)
    connector = eqx.tree_at(lambda c: c.decoder.embed_tokens.weight, connector, False)
    return eqx.tree_at(lambda m: m.connector, mask, connector)


@sharding.use_model_mesh
@eqx.filter_jit
def virtual_tokens_jit(diva: DiVA, audio: Float[Array, "B S"]) -> Float[Array, "B Q E"]:
    """Virtual tokens, compiled."""
    return diva.virtual_tokens(audio)


@sharding.use_model_mesh
@eqx.filter_jit
def nearest_token_ids(llm: llama.Llama, virtual: Float[Array, "B Q E"]) -> Int[Array, "B Q"]:
    """What the LLM hears: the tokens nearest to the virtual tokens, compiled."""
    return llama.nearest_tokens(virtual, llm.model.embed_tokens.weight)


def main(
    clip: Annotated[Path, tyro.conf.Positional] = cli.EXAMPLE,
    model: str = "toy/diva",
    last: int = 8,
) -> None:
    """Print what the LLM hears: the text tokens nearest to the last virtual tokens.

    Args:
        clip: audio file, at most as long as the model's window.
        model: folder or repo id of a trained DiVA.
        last: how many virtual tokens to show; the last ones are those that stand for words.
    """
    asr_path, llm_path = references(model)
    # first: what cannot be heard is refused before weights are read
    sound = jnp.asarray(audio_files.load_window(clip, encoder_config(model).window_samples))
    dtype = sharding.compute_dtype(jax.default_backend())
    place = functools.partial(
        sharding.shard_params, mesh=sharding.local_mesh(templates(model, dtype))
    )
    trained = DiVA.load(model, dtype, place)
    queries = len(trained.connector.query_tokens)
    asr = whisper.Whisper.load(asr_path, dtype, place)
    fresh = DiVA.create(asr, trained.llm, queries, jax.random.key(0)).connector
    untrained = eqx.tree_at(lambda diva: diva.connector, trained, fresh)
    tokenizer = llama.Chat.load(llm_path).tokenizer
    for name, diva in (("before training", untrained), ("after training", trained)):
        ids = nearest_token_ids(diva.llm, virtual_tokens_jit(diva, sound))[0, -last:]
        print(f"{name:16}" + " ".join(tokenizer.decode([i]) or "_" for i in ids.tolist()))


def references(path: str | Path) -> tuple[str, str]:
    """Path or repo of the Whisper and of the Llama that a DiVA checkpoint was trained between.

    A path in config.json may be relative to the checkpoint's folder. Raises ValueError if absent.
    """
    folder = weights.resolve(path)
    config = files.read_json(folder / "config.json")
    keys = ("reference_encoder", "reference_decoder")
    if absent := [key for key in keys if not isinstance(config.get(key), str)]:
        raise ValueError(
            f"{folder / 'config.json'}: no {', '.join(absent)}; expected the folder or repo of the "
            "Whisper and of the Llama that the connector was trained between. Is this a DiVA?"
        )
    beside = [folder / config[key] for key in keys]
    return tuple(
        str(path) if path.is_dir() else config[key] for path, key in zip(beside, keys, strict=True)
    )


def templates(path: str | Path, dtype) -> tuple[Any, Any, Any]:
    """The shapes of what is loaded for a DiVA checkpoint: its Whisper, its Llama, its connector."""
    folder = weights.resolve(path)
    asr, llm = map(weights.resolve, references(folder))
    frozen = whisper.Whisper.published(asr, dtype), llama.Llama.published(llm, dtype)
    return tuple(one.template for one in (*frozen, DiVA.published(folder, dtype)))


def encoder_config(path: str | Path) -> whisper.WhisperConfig:
    """The sizes of the Whisper that a DiVA refers to, with the window that it was trained on."""
    folder = weights.resolve(path)
    asr = weights.read_config(whisper.WhisperConfig, weights.resolve(references(folder)[0]))
    file = folder / "config.json"
    positions = model_config.count(file, "max_source_positions", files.read_json(file))
    return with_window(asr, positions and positions / POSITIONS_PER_SECOND)


def _refer(folder: Path, path: str) -> str:
    """How config.json names a model: relative to the checkpoint for a folder, else the repo id."""
    # resolved: from a folder behind a symbolic link, `..` leads out of where the folder really is
    return os.path.relpath(path, folder.resolve()) if Path(path).is_dir() else str(path)


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
