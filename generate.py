"""Autoregressive decoding with a KV cache: Whisper's transcripts and the LLM's answers.

    prefill      the prompt -> keys and values of every layer, and the first token
    decode step  one token -> the next token; the cache grows by one position

Keys and values of earlier positions do not change, so they are cached, and each step computes one
position. `greedy_decode` and `generate` run all steps as one compiled loop (`lax.while_loop`) until
every row has produced a stop token. `stream` calls one compiled step at a time, to show tokens as
they are generated.

Axes: B batch, S audio samples, L positions, E width of the LLM, V vocabulary.
Reads: whisper.py, llama.py, weights.py.   Read next: connector.py.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from tokenizers import Tokenizer

import weights
from formats import audio_files, model_config
from formats.decoding_rules import decoding_rules
from llama import Cache, Chat, Llama
from runtime import cli, sharding
from whisper import DecoderCache, Encoder, Whisper, WhisperConfig, log_mel

# ---------------------------------------------------------------------------------------------
# Whisper: greedy transcripts


class TranscriptState(NamedTuple):
    """Loop state of `greedy_decode`."""

    position: Int[Array, ""]  # of the last token that is decided
    tokens: Int[Array, "B L"]
    done: Bool[Array, "B"]  # rows that have produced the end token
    cache: DecoderCache


@sharding.use_model_mesh
@functools.partial(jax.jit, static_argnames=("forced", "suppress", "begin_suppress", "max_length"))
def greedy_decode(
    model: Whisper,
    audio: Float[Array, "B S"],
    *,
    forced: tuple[int, ...],
    suppress: tuple[int, ...],
    begin_suppress: tuple[int, ...],
    max_length: int,
) -> Int[Array, "B L"]:
    """Token ids [B, max_length]: the `forced` tokens, the transcript, then end tokens as padding.

    One compiled loop with a KV cache, until every clip has ended.

    Args:
        forced: start, language and task tokens.
        suppress: tokens that are never chosen.
        begin_suppress: tokens that are not chosen as the first one of the transcript, such as the
            end token.
        max_length: number of tokens, including the forced ones.
    """
    end = model.config.eos_token_id

    # Biases that are added to the logits: -inf for suppressed tokens.
    vocabulary = np.arange(model.config.vocab_size)
    bias = np.where(np.isin(vocabulary, suppress), -np.inf, 0.0)
    first_bias = np.where(np.isin(vocabulary, begin_suppress), -np.inf, bias)
    bias = jnp.asarray(bias, jnp.float32)
    first_bias = jnp.asarray(first_bias, jnp.float32)

    # Encode the audio.
    mel_of = functools.partial(log_mel, num_mel_bins=model.config.num_mel_bins)
    mel = sharding.shard_map_batch(mel_of, audio)
    states = model.encoder(mel.astype(model.encoder.conv1.weight.dtype))

    def is_running(state: TranscriptState) -> Bool[Array, ""]:
        return (state.position < max_length - 1) & ~state.done.all()

    def decode_next(state: TranscriptState) -> TranscriptState:
        position, tokens, done, cache = state
        logits, cache = model.decoder.decode_step(tokens[:, position], cache, position)
        # Without the barrier, XLA fuses the addition into the matmul, which then runs on a single
        # CPU core.
        logits = jax.lax.optimization_barrier(logits)

        # The next token: forced, or the most likely one, or the end token after the end.
        is_first = position + 1 == len(forced)
        biased = logits.astype(jnp.float32) + jnp.where(is_first, first_bias, bias)
        next_ids = jnp.where(done, end, biased.argmax(-1))
        next_ids = jnp.where(position + 1 < len(forced), tokens[:, position + 1], next_ids)

        return TranscriptState(
            position=position + 1,
            tokens=tokens.at[:, position + 1].set(next_ids),
            done=done | ((position + 1 >= len(forced)) & (next_ids == end)),
            cache=cache,
        )

    tokens = jnp.full((len(audio), max_length), end)
    start = TranscriptState(
        position=jnp.asarray(0),
        tokens=tokens.at[:, : len(forced)].set(jnp.asarray(forced)),
        done=jnp.zeros(len(audio), bool),
        cache=model.decoder.empty_cache(states, cache_length=max_length),
    )
    return jax.lax.while_loop(is_running, decode_next, start).tokens


@dataclasses.dataclass(frozen=True)
class Transcriber:
    """A Whisper with its tokenizer and its decoding rules."""

    model: Whisper
    tokenizer: Tokenizer
    rules: dict[str, Any]

    @staticmethod
    def load(
        path: str | Path,
        language: str = "en",
        dtype=jnp.float32,
        place: Callable = lambda template: template,
        encoder: Encoder | None = None,
    ) -> "Transcriber":
        """Load a published model.

        Args:
            place: adds shardings to the template's arrays.
            encoder: this model's encoder, if it is in memory already.

        Raises:
            FileNotFoundError: tokenizer.json is missing.
            ValueError: the model does not support the language.
        """
        # Check everything else before reading the weights.
        folder = weights.resolve(path)
        tokenizer = model_config.tokenizer(folder)
        config = weights.read_config(WhisperConfig, folder)
        rules = decoding_rules(folder, config, language)

        model = Whisper.load(folder, dtype, place)
        if encoder is not None:
            model = dataclasses.replace(model, encoder=encoder)
        return Transcriber(model=model, tokenizer=tokenizer, rules=rules)

    def __call__(self, audio: Float[Array, "B S"]) -> list[str]:
        """Transcripts of audio that is padded to the model's window."""
        tokens = greedy_decode(self.model, audio, **self.rules)
        rows = np.asarray(tokens)[:, len(self.rules["forced"]) :].tolist()
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def transcripts(clip: Path, model: str, language: str, long: bool) -> Iterator[str]:
    """Transcribe a recording; if `long`, split it and yield one transcript per part.

    Raises ValueError or FileNotFoundError; checks the recording before reading the weights.
    """
    folder = weights.resolve(model)
    window = weights.read_config(WhisperConfig, folder).window_samples
    parts = audio_files.windows(clip, window, long)
    asr = Transcriber.load(folder, language, place=sharding.shard_params_locally)
    for part in parts:
        yield asr(jnp.asarray(part)[None])[0]


# ---------------------------------------------------------------------------------------------
# LLM: sampled or greedy answers


def sample(
    logits: Float[Array, "B V"], temperature: float, top_p: float, key: PRNGKeyArray
) -> Int[Array, "B"]:
    """The next token: the most likely one at temperature 0, else drawn by nucleus sampling.

    The nucleus is the smallest set of most likely tokens whose probabilities sum to `top_p`.
    """
    if temperature == 0.0:
        return logits.argmax(-1)

    # Sort by probability, and drop the tokens after the nucleus.
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    cumulative = jnp.cumsum(jax.nn.softmax(ranked), -1) - jax.nn.softmax(ranked)  # exclusive
    ranked = jnp.where(cumulative < top_p, ranked, -jnp.inf)

    # Draw a rank, and look up its token.
    rank = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


class AnswerState(NamedTuple):
    """Loop state of `generate`."""

    step: Int[Array, ""]
    tokens: Int[Array, "B new"]
    ids: Int[Array, "B"]  # sampled, not yet in `tokens`
    stopped: Bool[Array, "B"]  # rows that have produced a stop token
    cache: Cache


@sharding.use_model_mesh
@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids", "temperature", "top_p"))
def generate(
    llm: Llama,
    embeds: Float[Array, "B L E"],
    lengths: Int[Array, "B"],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "B new"]:
    """Generate an answer for each right-padded row: prefill, then one compiled decoding loop.

    After its first stop token, a row is filled with `stop_ids[0]`. A row's tokens do not depend on
    the other rows or on its padding. Sampling (temperature > 0) needs a `key`.
    """
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} without a key; expected a jax.random.key.")
    key = jax.random.key(0) if key is None else key
    stops = jnp.asarray(stop_ids)

    def sample_at(hidden: Float[Array, "B E"], step: int | Int[Array, ""]) -> Int[Array, "B"]:
        step_key = jax.random.fold_in(key, step)
        return sample(llm.logits(hidden), temperature, top_p=top_p, key=step_key)

    def is_running(state: AnswerState) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~state.stopped.all()

    def decode_next(state: AnswerState) -> AnswerState:
        step, tokens, ids, stopped, cache = state
        stopped |= (ids[:, None] == stops).any(-1)
        tokens = tokens.at[:, step].set(jnp.where(stopped, stops[0], ids))

        hidden, cache = llm.step(ids, lengths + step, cache)
        return AnswerState(
            step=step + 1,
            tokens=tokens,
            ids=sample_at(hidden, step + 1),
            stopped=stopped,
            cache=cache,
        )

    hidden, cache = llm.prefill(embeds, lengths, room=max_new_tokens)
    start = AnswerState(
        step=0,
        tokens=jnp.full((len(embeds), max_new_tokens), stops[0]),
        ids=sample_at(hidden, 0),
        stopped=jnp.zeros(len(embeds), bool),
        cache=cache,
    )
    return jax.lax.while_loop(is_running, decode_next, start).tokens


def stream(
    llm: Llama,
    embeds: Float[Array, "1 L E"],
    lengths: Int[Array, "1"],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
) -> Iterator[int]:
    """Yield the tokens of `generate` for one row as they are generated, without the stop token."""
    key = jax.random.key(0) if key is None else key
    hidden, cache = _prefill(llm, embeds, lengths, max_new_tokens)
    for step in range(max_new_tokens):
        ids, hidden, cache = decode_one_token(
            llm,
            hidden,
            cache=cache,
            lengths=lengths,
            step=step,
            key=key,
            temperature=temperature,
            top_p=top_p,
        )
        token = int(ids[0])
        if token in stop_ids:
            return
        yield token


_prefill = sharding.use_model_mesh(jax.jit(Llama.prefill, static_argnames="room"))


@sharding.use_model_mesh
@functools.partial(
    jax.jit, static_argnames=("temperature", "top_p"), donate_argnames=("hidden", "cache")
)
def decode_one_token(
    llm: Llama,
    hidden: Float[Array, "B E"],
    cache: Cache,
    lengths: Int[Array, "B"],
    step: Int[Array, ""],
    key: PRNGKeyArray,
    temperature: float,
    top_p: float,
) -> tuple[Int[Array, "B"], Float[Array, "B E"], Cache]:
    """Sample a token and feed it to the LLM, in one call so that the device does not wait."""
    step_key = jax.random.fold_in(key, step)
    ids = sample(llm.logits(hidden), temperature, top_p=top_p, key=step_key)
    return ids, *llm.step(ids, lengths + step, cache)


def pad_to_bucket(length: int) -> int:
    """Padded length of a prompt: a power of two, so that few lengths are compiled."""
    return max(64, 1 << (length - 1).bit_length())


def padded_row(ids: Sequence[int]) -> Int[np.ndarray, "1 L"]:
    """One prompt as a batch of one row, right-padded."""
    padding = pad_to_bucket(len(ids)) - len(ids)
    return np.pad(np.array([ids], np.int32), ((0, 0), (0, padding)))


def insert_virtual_tokens(
    embeds: Float[Array, "B L E"], virtual: Float[Array, "B Q E"], starts: Int[Array, "B"]
) -> Float[Array, "B L E"]:
    """Prompts with the virtual tokens written over the placeholders that begin at `starts`."""
    write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0)))
    return sharding.shard_map_batch(write, embeds, virtual.astype(embeds.dtype), starts)


def text_pieces(chat: Chat, tokens: Iterator[int]) -> Iterator[str]:
    """Decode a stream of tokens into pieces of text, without incomplete characters.

    A token can end inside a multi-byte character, which decodes to U+FFFD until the remaining bytes
    have arrived: such an ending is buffered.
    """
    ids = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = chat.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield chat.decode(ids)[len(shown) :]


def prompt_ids(
    llm: Llama, chat: Chat, question: str, system: str | None, max_new_tokens: int
) -> list[int]:
    """Token ids of a question in the chat template. Raises ValueError if it is too long."""
    prefix, suffix = chat.wrap(system)
    ids = [*prefix, *chat.encode(question), *suffix]
    context_length = llm.config.max_position_embeddings
    if len(ids) + max_new_tokens > context_length:
        raise ValueError(
            f"the question has {len(ids)} tokens with its template; expected at most "
            f"{context_length - max_new_tokens} ({context_length} positions less {max_new_tokens} "
            "for the answer). "
            "Ask something shorter."
        )
    return ids


def answer(
    llm: Llama, chat: Chat, question: str, system: str | None = None, max_new_tokens: int = 256
) -> Iterator[str]:
    """Stream the greedy answer to a question, as text. Raises ValueError if it is too long."""
    ids = prompt_ids(llm, chat, question=question, system=system, max_new_tokens=max_new_tokens)
    embeds = llm.embed(jnp.asarray(padded_row(ids)))
    lengths = jnp.asarray([len(ids)])
    tokens = stream(llm, embeds, lengths, max_new_tokens=max_new_tokens, stop_ids=chat.stop_ids)
    return text_pieces(chat, tokens)


def main(
    question: Annotated[str, tyro.conf.Positional] = "what is the capital of france",
    model: str = "toy/llama",
    system: str | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Answer a question; prints each token with its probability, latency and runner-up.

    Args:
        question: the user's message.
        model: folder or Hugging Face repo id.
        system: system prompt.
        max_new_tokens: maximum length of the answer, in tokens.
    """
    chat = Chat.load(model)
    dtype = sharding.compute_dtype(jax.default_backend())
    llm = Llama.load(model, dtype, place=sharding.shard_params_locally)

    # Prefill.
    ids = prompt_ids(llm, chat, question=question, system=system, max_new_tokens=max_new_tokens)
    embeds = llm.embed(jnp.asarray(padded_row(ids)))
    lengths = jnp.asarray([len(ids)])
    hidden, cache = _prefill(llm, embeds, lengths, max_new_tokens)

    # Decode token by token.
    print(f"{'token':16} {'p':>6} {'ms':>8}   the runner-up")
    for step in range(max_new_tokens):
        # The two most likely tokens.
        start_time = time.perf_counter()
        probs = jax.nn.softmax(llm.logits(hidden))[0]
        second, first = (int(i) for i in jnp.argsort(probs)[-2:])

        _, hidden, cache = decode_one_token(
            llm,
            hidden,
            cache=cache,
            lengths=lengths,
            step=step,
            key=jax.random.key(0),
            temperature=0.0,
            top_p=1.0,
        )
        jax.block_until_ready(hidden)
        milliseconds = 1e3 * (time.perf_counter() - start_time)

        token, runner_up = (chat.tokenizer.id_to_token(i) for i in (first, second))
        print(
            f"{token:16} {float(probs[first]):6.3f} {milliseconds:8.2f}   "
            f"{runner_up} {float(probs[second]):.3f}"
        )
        if first in chat.stop_ids:
            break


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
