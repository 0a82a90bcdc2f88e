"""Generate: token after token. Whisper's transcript and the LLM's answer, each with a cache.

    prefill: all that was said -> keys and values of every layer, and the first token
    step:    one token -> the next one; the cache grows by a position

A transformer that writes must look back at what it wrote. The keys and values of the past do not
change, so they are kept (the KV cache) and each step computes one position alone. On the device all
steps are one compiled loop (`lax.while_loop`) until every row has met its stop token; to show words
while they come, `stream` calls one compiled step at a time.

Axes: B batch, S audio samples, L positions, E width of the LLM, V vocabulary.
Reads: whisper.py, llama.py, weights.py.   Read next: connector.py.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tokenizers import Tokenizer

import weights
from formats import audio_files, model_config
from llama import Chat, Llama
from runtime import cli, files, sharding
from whisper import Encoder, Whisper, WhisperConfig, log_mel

# ---------------------------------------------------------------------------------------------
# The transcript of a Whisper, greedily


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
    """Token ids [B, max_length] that begin with `forced` and are filled up with the end token.

    One compiled loop with a cache, until every clip has ended. `suppress` tokens are never chosen,
    `begin_suppress` ones (an empty transcript) not as the first free token.
    """
    end = model.config.eos_token_id
    vocabulary = np.arange(model.config.vocab_size)
    banned = np.where(np.isin(vocabulary, suppress), -np.inf, 0.0)
    banned_first = np.where(np.isin(vocabulary, begin_suppress), -np.inf, banned)
    banned, banned_first = jnp.asarray(banned, jnp.float32), jnp.asarray(banned_first, jnp.float32)
    mel_of = functools.partial(log_mel, num_mel_bins=model.config.num_mel_bins)
    mel = sharding.shard_map_batch(mel_of, audio)
    states = model.encoder(mel.astype(model.encoder.conv1.weight.dtype))

    def body(state):
        position, tokens, done, cache = state
        logits, cache = model.decoder.decode_step(tokens[:, position], cache, position)
        # kept apart: XLA would fuse the sum into the product, and run that on one core of a CPU
        logits = jax.lax.optimization_barrier(logits)
        first = position + 1 == len(forced)
        chosen = (logits.astype(jnp.float32) + jnp.where(first, banned_first, banned)).argmax(-1)
        chosen = jnp.where(done, end, chosen)
        chosen = jnp.where(position + 1 < len(forced), tokens[:, position + 1], chosen)
        done = done | ((position + 1 >= len(forced)) & (chosen == end))
        return position + 1, tokens.at[:, position + 1].set(chosen), done, cache

    def going(state):
        return (state[0] < max_length - 1) & ~state[2].all()

    start = jnp.full((len(audio), max_length), end).at[:, : len(forced)].set(jnp.asarray(forced))
    cache = model.decoder.empty_cache(states, max_length)
    done = jnp.zeros(len(audio), bool)
    return jax.lax.while_loop(going, body, (jnp.asarray(0), start, done, cache))[1]


def decoding_rules(folder: Path, config: WhisperConfig, language: str) -> dict[str, Any]:
    """The arguments of `greedy` that a model's files set; it transcribes without times.

    Multilingual files name tokens for the language and the task; older and English-only ones list
    forced_decoder_ids instead, in generation_config.json or in config.json. Raises ValueError for a
    language that the model does not know, or what is not computed here.
    """
    file, rules = model_config.transcribing(folder)

    def tokens(key: str, rows: int | None = config.vocab_size) -> tuple[int, ...]:
        return model_config.token_ids(file, key, rules.get(key), rows)

    def named(key: str) -> dict[str, int]:
        return model_config.mapping(file, key, rules.get(key), config.vocab_size)

    if tokens("eos_token_id") not in ((), (config.eos_token_id,)):
        raise ValueError(
            f"{file}: eos_token_id is {rules['eos_token_id']!r}; expected {config.eos_token_id}, "
            "as in config.json. Download both again."
        )
    start = (config.decoder_start_token_id,)
    for key, ids in (("eos_token_id", config.eos_token_id), ("decoder_start_token_id", *start)):
        model_config.token_ids(folder / "config.json", key, ids, config.vocab_size)
    forced = [*(tokens("decoder_start_token_id") or start)]
    languages = named("lang_to_id") if rules.get("is_multilingual", True) else {}
    if languages:
        if f"<|{language}|>" not in languages:
            known = ", ".join(sorted(name.strip("<|>") for name in languages))
            raise ValueError(f"{file}: no language {language!r}; expected one of {known}.")
        forced.append(languages[f"<|{language}|>"])
        forced += [id for task, id in named("task_to_id").items() if task == "transcribe"]
    elif language != "en":
        why = "no lang_to_id" if rules.get("is_multilingual", True) else "an English-only model"
        raise ValueError(
            f"{file}: {why}, so language {language!r} cannot be set; expected 'en'. Leave the "
            "language out, or use a multilingual model, such as openai/whisper-base."
        )
    else:
        forced += _older_forced(folder, file, rules, config)
    if (without_times := tokens("no_timestamps_token_id")) != tuple(forced[-1:]):
        forced += without_times
    return {
        "forced": tuple(forced),
        "suppress": tokens("suppress_tokens", None),
        "begin_suppress": tokens("begin_suppress_tokens", None),
        "max_length": _longest(file, rules, len(forced), config.max_target_positions),
    }


def _longest(file: Path, rules: dict[str, Any], forced: int, positions: int) -> int:
    """Tokens of the longest transcript, the `forced` ones at its head included."""
    # as transformers counts them: both are tokens beside the forced ones
    counts = [model_config.count(file, key, rules) for key in ("max_new_tokens", "max_length")]
    whole = min(forced + (counts[0] or counts[1] or positions), positions)
    if whole <= forced:
        raise ValueError(
            f"{file}: {forced} tokens are forced; expected fewer than the model's {positions} "
            "positions."
        )
    return whole


def _older_forced(
    folder: Path, file: Path, rules: dict[str, Any], config: WhisperConfig
) -> list[int]:
    """The tokens of forced_decoder_ids: [[1, id], [2, id], ...]; an id of null is left out.

    A generation_config.json without the key leaves it to config.json."""
    pairs = rules.get("forced_decoder_ids")
    if not pairs and file.name != "config.json":
        file = folder / "config.json"
        pairs = files.read_json(file).get("forced_decoder_ids")
    pairs = pairs or []
    if not isinstance(pairs, list) or [
        pair[:1] if isinstance(pair, list) and len(pair) == 2 else pair for pair in pairs
    ] != [[at] for at in range(1, len(pairs) + 1)]:
        raise ValueError(
            f"{file}: forced_decoder_ids is {pairs!r}; expected [[1, id], [2, id], ...]. Download "
            "it again."
        )
    ids = [token for _, token in pairs if token is not None]
    return [*model_config.token_ids(file, "forced_decoder_ids", ids, config.vocab_size)]


@dataclasses.dataclass(frozen=True)
class Transcriber:
    """A Whisper with its tokenizer and the rules by which its files let it write."""

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
        """`encoder`: the same one, if it is in memory already. Raises FileNotFoundError without
        tokenizer.json, ValueError for an unknown language."""
        folder = weights.resolve(path)
        tokenizer, config = (
            model_config.tokenizer(folder),
            weights.read_config(WhisperConfig, folder),
        )
        rules = decoding_rules(folder, config, language)  # refused before weights are read
        model = Whisper.load(folder, dtype, place)
        if encoder is not None:
            model = dataclasses.replace(model, encoder=encoder)
        return Transcriber(model, tokenizer, rules)

    def __call__(self, audio: Float[Array, "B S"]) -> list[str]:
        """Transcripts of audio that is padded to the model's window."""
        tokens = greedy_decode(self.model, audio, **self.rules)
        rows = np.asarray(tokens)[:, len(self.rules["forced"]) :].tolist()
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def transcripts(clip: Path, model: str, language: str, long: bool) -> Iterator[str]:
    """Of a recording, or, if it is `long`, of each of its parts. Raises ValueError or
    FileNotFoundError; what cannot be heard is refused before weights are read."""
    folder = weights.resolve(model)
    window = weights.read_config(WhisperConfig, folder).window_samples
    parts = audio_files.windows(clip, window, long)
    asr = Transcriber.load(folder, language, place=sharding.shard_params_locally)
    for part in parts:
        yield asr(jnp.asarray(part)[None])[0]


# ---------------------------------------------------------------------------------------------
# The answer of an LLM


def sample(
    logits: Float[Array, "B V"], temperature: float, top_p: float, key: PRNGKeyArray
) -> Int[Array, "B"]:
    """The next token: the likeliest at temperature 0, else drawn from the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, -1)
    before = jnp.cumsum(jax.nn.softmax(ranked), -1) - jax.nn.softmax(ranked)
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    rank = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(order, rank[:, None], -1)[:, 0]


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
    """Answer each right-padded row: prefill, then one compiled loop until all rows have stopped.

    The first stop token of a row and all that would follow it are `stop_ids[0]`. A row's tokens do
    not depend on the other rows or on its padding. Sampling (temperature > 0) needs a `key`.
    """
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} without a key; expected a jax.random.key.")
    key = jax.random.key(0) if key is None else key
    stops = jnp.asarray(stop_ids)

    def pick(hidden, step):
        return sample(llm.logits(hidden), temperature, top_p, jax.random.fold_in(key, step))

    def body(state):
        step, tokens, ids, stopped, cache = state
        stopped |= (ids[:, None] == stops).any(-1)
        tokens = tokens.at[:, step].set(jnp.where(stopped, stops[0], ids))
        hidden, cache = llm.step(ids, lengths + step, cache)
        return step + 1, tokens, pick(hidden, step + 1), stopped, cache

    def going(state):
        return (state[0] < max_new_tokens) & ~state[3].all()

    hidden, cache = llm.prefill(embeds, lengths, room=max_new_tokens)
    tokens = jnp.full((len(embeds), max_new_tokens), stops[0])
    start = (0, tokens, pick(hidden, 0), jnp.zeros(len(embeds), bool), cache)
    return jax.lax.while_loop(going, body, start)[1]


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
    """The tokens of `generate` for one row, each as soon as it is known, up to a stop token."""
    key = jax.random.key(0) if key is None else key
    hidden, cache = _prefill(llm, embeds, lengths, max_new_tokens)
    for step in range(max_new_tokens):
        ids, hidden, cache = decode_one_token(
            llm, hidden, cache, lengths, step, key, temperature, top_p
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
def decode_one_token(llm, hidden, cache, lengths, step, key, temperature, top_p):
    """Choose a token and go one step on: a single call, so that the device need not wait."""
    ids = sample(llm.logits(hidden), temperature, top_p, jax.random.fold_in(key, step))
    return ids, *llm.step(ids, lengths + step, cache)


def pad_to_bucket(length: int) -> int:
    """How many positions a prompt is given: a power of two, so that few lengths are compiled."""
    return max(64, 1 << (length - 1).bit_length())


def padded_row(ids: Sequence[int]) -> Int[np.ndarray, "1 L"]:
    """The ids of a prompt with its padding behind."""
    return np.pad(np.array([ids], np.int32), ((0, 0), (0, pad_to_bucket(len(ids)) - len(ids))))


def insert_virtual_tokens(
    embeds: Float[Array, "B L E"], virtual: Float[Array, "B Q E"], starts: Int[Array, "B"]
) -> Float[Array, "B L E"]:
    """Prompts with the virtual tokens written over the holes that begin at `starts`."""
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0)))
    return sharding.shard_map_batch(write, embeds, virtual.astype(embeds.dtype), starts)


def text_pieces(chat: Chat, tokens: Iterator[int]) -> Iterator[str]:
    """Decode a stream of tokens into pieces of text, never a broken character.

    A token can end inside a character of several bytes, which decodes to U+FFFD until the rest has
    come: such an ending is held back.
    """
    ids, shown = [], ""
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
    """Tokens of a question in its template. Raises ValueError if the context is too short."""
    prefix, suffix = chat.wrap(system)
    ids = [*prefix, *chat.encode(question), *suffix]
    most = llm.config.max_position_embeddings
    if len(ids) + max_new_tokens > most:
        raise ValueError(
            f"the question has {len(ids)} tokens with its template; expected at most "
            f"{most - max_new_tokens} ({most} positions less {max_new_tokens} for the answer). "
            "Ask something shorter."
        )
    return ids


def answer(
    llm: Llama, chat: Chat, question: str, system: str | None = None, max_new_tokens: int = 256
) -> Iterator[str]:
    """Stream the greedy answer to a question. Raises ValueError if the context is too short."""
    ids = prompt_ids(llm, chat, question, system, max_new_tokens)
    embeds, lengths = llm.embed(jnp.asarray(padded_row(ids))), jnp.asarray([len(ids)])
    tokens = stream(llm, embeds, lengths, max_new_tokens=max_new_tokens, stop_ids=chat.stop_ids)
    return text_pieces(chat, tokens)


def main(
    question: Annotated[str, tyro.conf.Positional] = "what is the capital of france",
    model: str = "toy/llama",
    system: str | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Watch an LLM answer: a line for each token, with its probability and the time it took.

    Args:
        question: what the user says.
        model: folder or Hugging Face repo id.
        system: instruction in the system turn.
        max_new_tokens: the answer stops here at the latest.
    """
    chat, dtype = Chat.load(model), sharding.compute_dtype(jax.default_backend())
    llm = Llama.load(model, dtype, sharding.shard_params_locally)
    ids = prompt_ids(llm, chat, question, system, max_new_tokens)
    embeds, lengths = llm.embed(jnp.asarray(padded_row(ids))), jnp.asarray([len(ids)])
    hidden, cache = _prefill(llm, embeds, lengths, max_new_tokens)
    print(f"{'token':16} {'p':>6} {'ms':>8}   the runner-up")
    for step in range(max_new_tokens):
        began = time.perf_counter()
        p = jax.nn.softmax(llm.logits(hidden))[0]
        second, first = (int(i) for i in jnp.argsort(p)[-2:])
        _, hidden, cache = decode_one_token(
            llm, hidden, cache, lengths, step, jax.random.key(0), 0.0, 1.0
        )
        jax.block_until_ready(hidden)
        took = 1e3 * (time.perf_counter() - began)
        name, other = (chat.tokenizer.id_to_token(i) for i in (first, second))
        print(f"{name:16} {float(p[first]):6.3f} {took:8.2f}   {other} {float(p[second]):.3f}")
        if first in chat.stop_ids:
            break


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
