"""Systems: a trained DiVA beside what it must be compared with, over one Whisper and one LLM.

    untrained   the same connector before training: what is owed to the initialisation alone
    diva        speech -> virtual tokens -> LLM
    cascade     speech -> Whisper's transcript -> the same LLM (what most people would build)
    text        the reference transcript -> the same LLM: the upper bound

All of them answer greedily under the same prompt, which stands in the system turn; the connector
was never trained with one. Batches have one size and few lengths, so little is compiled; a row's
answer depends neither on the other rows nor on the padding.

Axes: B batch, S audio samples, T frames, D Whisper's width, Q virtual tokens, L positions of a
prompt, E the LLM's width, K labels, W tokens of a label.
Reads: connector.py, whisper.py, llama.py, data.py.   Read next: metrics.py.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import connector
import generate
import llama
from formats import audio_files
from runtime import sharding

SYSTEMS = ("untrained", "diva", "cascade", "text")
ROUND = 16  # prompts are padded to a multiple of this, so that few lengths are compiled
LABEL_SCORES = ("first_token", "whole_label")


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is asked about a clip: an instruction, and whether to generate or to choose."""

    prompt: str | None
    labels: tuple[str, ...] = ()  # choose the likeliest of these instead of generating
    # first_token, as in the paper; whole_label: the mean log-probability of all its tokens
    label_score: str = "first_token"
    max_new_tokens: int = 64  # as in the paper


class Question(NamedTuple):
    """One clip and what is asked about it."""

    ask: Ask
    audio: str  # a path
    text: str  # the transcript, '' if unknown


# ---------------------------------------------------------------------------------------------
# Models


@dataclasses.dataclass(frozen=True)
class Models:
    """All systems over one Whisper and one LLM."""

    diva: connector.DiVA
    connectors: dict[str, connector.Connector]  # of the systems that answer from virtual tokens
    asr: generate.Transcriber
    chat: llama.Chat
    devices: int = 1  # among which the clips of a batch are shared

    @staticmethod
    def load(folder: Path) -> "Models":
        """float32 on a CPU, bfloat16 elsewhere; on all devices of this process."""
        dtype = sharding.compute_dtype(jax.default_backend())
        asr_path, llm_path = connector.references(folder)
        templates = connector.templates(folder, dtype)
        # there are two connectors
        mesh = sharding.local_mesh((*templates, templates[-1]), share=True)
        place = functools.partial(sharding.shard_params, mesh=mesh)
        diva = connector.load(folder, dtype, place)
        asr = generate.Transcriber.load(asr_path, "en", dtype, place, diva.encoder)
        queries = len(diva.connector.query_tokens)
        fresh = connector.create(asr.model, diva.llm, queries, jax.random.key(0)).connector
        # placed like the trained one: otherwise the same program would be compiled for each
        fresh = jax.tree.map(
            lambda x, like: jax.device_put(x.astype(dtype), like.sharding), fresh, diva.connector
        )
        connectors = {"untrained": fresh, "diva": diva.connector}
        devices = 1 if mesh is None else mesh.size
        return Models(diva, connectors, asr, llama.Chat.load(llm_path), devices)

    def nearest(self, virtual: Float[Array, "B Q E"]) -> list[str]:
        """What the LLM hears of each clip, as text: the tokens nearest to its virtual tokens."""
        ids = np.asarray(connector.nearest_token_ids(self.diva.llm, virtual))
        return [" ".join(self.chat.decode(row).split()) for row in ids]


@sharding.use_model_mesh
@eqx.filter_jit
def listen(diva: connector.DiVA, audio: Float[Array, "B S"]) -> Float[Array, "B T D"]:
    """Encoder states, compiled; every system hears the same ones."""
    return diva.encode(audio)


@sharding.use_model_mesh
@eqx.filter_jit
def speak(module: connector.Connector, states: Float[Array, "B T D"]) -> Float[Array, "B Q E"]:
    """Virtual tokens of one system's connector, compiled."""
    return module(states)


@sharding.use_model_mesh
@eqx.filter_jit
def fill(
    llm: llama.Llama,
    ids: Int[Array, "B L"],
    starts: Int[Array, "B"],
    virtual: Float[Array, "any Q E"],
    rows: Int[Array, "B"],
) -> Float[Array, "B L E"]:
    """Embeddings of the prompts, with virtual[rows] written over the hole that begins at starts."""
    return generate.insert_virtual_tokens(
        llm.embed(ids), sharding.shard_batch(virtual[rows]), starts
    )


@sharding.use_model_mesh
@eqx.filter_jit
def label_scores(
    llm: llama.Llama,
    embeds: Float[Array, "B L E"],
    lengths: Int[Array, "B"],
    labels: Int[Array, "B K W"],
    sizes: Int[Array, "B K"],
) -> Float[Array, "B K"]:
    """Mean log-probability of the first `sizes` tokens of each label as the answer.

    With one token to a label this is the first token's log-probability and needs no step.
    """
    hidden, cache = llm.prefill(embeds, lengths, room=labels.shape[2] - 1)
    first = jnp.take_along_axis(jax.nn.log_softmax(llm.logits(hidden)), labels[:, :, 0], axis=1)

    def later(label: Int[Array, "B W"]) -> Float[Array, "B later"]:
        def step(cache, at):
            hidden, cache = llm.step(label[:, at], lengths + at, cache)
            scores = jax.nn.log_softmax(llm.logits(hidden))
            return cache, jnp.take_along_axis(scores, label[:, at + 1, None], axis=1)[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(label.shape[1] - 1))[1].T

    scores = first[..., None]
    if labels.shape[2] > 1:  # one label after another: the cache is kept once
        more = jax.lax.map(later, labels.swapaxes(0, 1)).swapaxes(0, 1)
        scores = jnp.concatenate([scores, more], axis=2)
    counted = jnp.arange(labels.shape[2]) < sizes[..., None]
    return jnp.where(counted, scores, 0).sum(2) / sizes


# ---------------------------------------------------------------------------------------------
# Answers


class Responder:
    """The LLM under every prompt, over batches of one size (the last one filled up)."""

    def __init__(self, llm: llama.Llama, chat: llama.Chat, asks: set[Ask], size: int):
        self.llm, self.chat, self.size = llm, chat, size
        self.wraps = {ask: chat.wrap(ask.prompt) for ask in asks}
        self.labels = {ask: label_tokens(chat, ask) for ask in asks if ask.labels}
        most = [ask.max_new_tokens for ask in asks if not ask.labels]
        self.max_new_tokens = max(most, default=0)  # one for all prompts: one compilation

    def texts(self, asked: list[tuple[Ask, str]]) -> Iterator[dict[tuple[Ask, str], str | None]]:
        """{(ask, text): answer} of batch after batch; texts of like length share one.

        None if the LLM has too few positions for the text.
        """
        ids = {pair: self.chat.encode(pair[1]) for pair in asked}
        most = self.llm.config.max_position_embeddings

        def needed(ask: Ask, text: str) -> int:
            """Positions of the prompt and of the longest answer."""
            answers = map(len, self.labels[ask]) if ask.labels else [ask.max_new_tokens]
            return len(ids[ask, text]) + sum(map(len, self.wraps[ask])) + max(answers)

        long = {pair for pair in ids if needed(*pair) > most}
        if long:
            yield dict.fromkeys(long)
        order = sorted(ids.keys() - long, key=lambda pair: (len(ids[pair]), str(pair)))
        for batch in self.batches(order, lambda pair: pair[0]):
            asks = [ask for ask, _ in batch]
            prompts, lengths, _ = self.frame(asks, [ids[pair] for pair in batch])
            replies = self.reply(asks, self.llm.embed(prompts), lengths)
            yield dict(zip(batch, replies, strict=True))

    def speech(
        self, asks: list[Ask], virtual: Float[Array, "any Q E"], rows: list[int]
    ) -> list[str]:
        """The answers to virtual[rows[i]] under asks[i]."""
        said = [""] * len(asks)
        queries = [0] * virtual.shape[1]
        for batch in self.batches(range(len(asks)), lambda i: asks[i]):
            some = [asks[i] for i in batch]
            ids, lengths, starts = self.frame(some, [queries] * len(batch))
            embeds = fill(self.llm, ids, starts, virtual, jnp.asarray([rows[i] for i in batch]))
            for i, reply in zip(batch, self.reply(some, embeds, lengths), strict=True):
                said[i] = reply
        return said

    def batches(self, entries: Sequence, ask_of: Callable[[Any], Ask]) -> Iterator[list]:
        """Entries in full batches, those with labels apart from those to be generated."""
        for labelled in (False, True):
            some = [e for e in entries if (ask_of(e) in self.labels) == labelled]
            for start in range(0, len(some), self.size):
                batch = some[start : start + self.size]
                yield batch + [batch[-1]] * (self.size - len(batch))

    def frame(
        self, asks: list[Ask], users: list[list[int]]
    ) -> tuple[Int[Array, "B L"], Int[Array, "B"], Int[Array, "B"]]:
        """Right-padded ids of [prefix; user; suffix], their lengths, and where the user begins."""
        wraps = [self.wraps[ask] for ask in asks]
        rows = [before + user + after for (before, after), user in zip(wraps, users, strict=True)]
        lengths = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), -(-lengths.max() // ROUND) * ROUND), np.int32)
        for into, row in zip(ids, rows, strict=True):
            into[: len(row)] = row
        starts = [len(before) for before, _ in wraps]
        return jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(starts)

    def reply(
        self, asks: list[Ask], embeds: Float[Array, "B L E"], lengths: Int[Array, "B"]
    ) -> list[str]:
        """The greedy answers, or the likeliest labels if labels are given."""
        if asks[0] in self.labels:
            tables = list(self.labels.values())
            most = max(map(len, tables)), max(len(label) for table in tables for label in table)
            ids, sizes = np.zeros((len(asks), *most), np.int32), np.ones((len(asks), most[0]), int)
            for row, size, ask in zip(ids, sizes, asks, strict=True):
                table = self.labels[ask]
                # filled up with the first label: argmax takes the first of equals
                for k, label in enumerate([*table, *[table[0]] * (most[0] - len(table))]):
                    row[k, : len(label)], size[k] = label, len(label)
            scores = label_scores(self.llm, embeds, lengths, jnp.asarray(ids), jnp.asarray(sizes))
            best = np.asarray(scores.argmax(-1))
            return [ask.labels[i] for ask, i in zip(asks, best, strict=True)]
        tokens = generate.generate(
            self.llm,
            embeds,
            lengths,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.chat.stop_ids,
        )
        cut = [ask.max_new_tokens for ask in asks]
        return [self.decode(row[:n]) for row, n in zip(np.asarray(tokens), cut, strict=True)]

    def decode(self, ids: Int[np.ndarray, "new"]) -> str:
        """The text before the first stop token."""
        stops = np.flatnonzero(np.isin(ids, self.chat.stop_ids))
        return self.chat.decode(ids[: stops[0]] if len(stops) else ids).strip()


def label_tokens(chat: llama.Chat, ask: Ask) -> list[list[int]]:
    """What is scored of each label. Raises ValueError if it is nothing, or the same for two."""
    whole = ask.label_score == "whole_label"
    tokens = [chat.encode(label)[: None if whole else 1] for label in ask.labels]
    for i, some in enumerate(tokens):
        if not some or some in tokens[:i]:
            twin = f"the same as {ask.labels[tokens.index(some)]!r}" if some else "empty"
            hint = "" if whole else ", or let tasks.json say: label_score whole_label"
            raise ValueError(
                f"labels {', '.join(ask.labels)}: {ask.labels[i]!r} is {twin} in its "
                f"{'tokens' if whole else 'first token'}; expected labels that differ there, since "
                f"only that is scored. Rename one{hint}."
            )
    return tokens


def answer(
    models: Models,
    questions: list[Question],
    lacking: list[set[str]],
    transcripts: dict[int, str],
    batch_size: int,
    tell: Callable[[int, str, str | None, dict[str, str]], None],
) -> None:
    """Let each system that is `lacking` to a question answer it.

    `transcripts` holds those that are known already, by the question's number; those of the others
    are added to it. `tell(number, system, answer, note)` is called as soon as an answer is known:
    if there is none, the answer is None and note["error"] the reason.

    Every clip is decoded once, whatever is asked of it; every text is answered once, however many
    clips say it.
    """
    spoken = [
        i
        for i, systems in enumerate(lacking)
        if systems & set(models.connectors) or ("cascade" in systems and i not in transcripts)
    ]
    asks = {question.ask for question, systems in zip(questions, lacking, strict=True) if systems}
    size = min(batch_size, len({question.audio for question in questions}))
    size = -(-size // models.devices) * models.devices  # the same for each; filled up
    responder = Responder(models.diva.llm, models.chat, asks, size)
    _answer_speech(models, responder, questions, spoken, lacking, transcripts, tell)
    wanted = collections.defaultdict(list)  # {(ask, text): who asks it}
    for i, (question, systems) in enumerate(zip(questions, lacking, strict=True)):
        if "cascade" in systems and i in transcripts:
            note = {"transcript": transcripts[i]}
            wanted[question.ask, transcripts[i]].append((i, "cascade", note))
        if "text" in systems and question.text:
            wanted[question.ask, question.text].append((i, "text", {}))
        elif "text" in systems:
            tell(i, "text", None, {"error": "its transcript is unknown"})
    with tqdm(total=len(wanted), unit="text", desc="texts", disable=None) as bar:
        for replies in responder.texts([*wanted]):
            for pair, reply in replies.items():
                error = {"error": "too long for the LLM"} if reply is None else {}
                for i, system, note in wanted[pair]:
                    tell(i, system, reply, note | error)
            bar.update(len(replies))


def _answer_speech(
    models: Models,
    responder: Responder,
    questions: list[Question],
    spoken: list[int],
    lacking: list[set[str]],
    transcripts: dict[int, str],
    tell: Callable,
) -> None:
    asked = collections.defaultdict(list)  # {clip: numbers of its questions}
    for i in spoken:
        asked[questions[i].audio].append(i)
    # clips of which the same is asked stand together: fewer batches have to be filled up
    clips = sorted(asked, key=lambda clip: [str(questions[i].ask) for i in asked[clip]])
    with tqdm(total=len(clips), unit="clip", desc="speech", disable=None) as bar:
        for some, audio, reasons in loaded(clips, responder.size, models.diva.window_samples):
            for i in (i for clip in reasons for i in asked[clip]):
                needs_sound = lacking[i] - {"text"} - ({"cascade"} if i in transcripts else set())
                for system in sorted(needs_sound):
                    tell(i, system, None, {"error": reasons[questions[i].audio]})
            rows = {i: row for row, clip in enumerate(some) for i in asked[clip]}
            rows = {i: row for i, row in rows.items() if questions[i].audio not in reasons}
            states = listen(models.diva, jnp.asarray(audio))
            if any(i not in transcripts for i in rows):
                texts = models.asr(jnp.asarray(audio))
                transcripts |= {i: texts[row] for i, row in rows.items() if i not in transcripts}
            for system, module in models.connectors.items():
                work = [i for i in rows if system in lacking[i]]
                if not work:
                    continue
                asks, places = [questions[i].ask for i in work], [rows[i] for i in work]
                virtual = speak(module, states)
                said = responder.speech(asks, virtual, places)
                heard = models.nearest(virtual) if system == "diva" else []
                for i, reply in zip(work, said, strict=True):
                    note = {"transcript": transcripts[i], "heard": heard[rows[i]]} if heard else {}
                    tell(i, system, reply, note)
            bar.update(len(some))


def loaded(
    clips: list[str], size: int, window: int
) -> Iterator[tuple[list[str], Float[np.ndarray, "B S"], dict[str, str]]]:
    """Batches of clips, each decoded while the one before it is answered: the clips, their audio
    with silence up to `size` rows, and {clip: reason} of those that could not be decoded."""

    def load(start: int):
        some, failed = clips[start : start + size], {}
        audio = np.zeros((size, window), np.float32)
        for row, clip in zip(audio, some, strict=False):
            try:
                row[:] = audio_files.load_window(clip, window)[0]
            except (ValueError, OSError) as error:
                failed[clip] = str(error)
                tqdm.write(f"counted as wrong: {error}")
        return some, audio, failed

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, 0)
        for start in range(size, len(clips) + size, size):
            batch, ahead = ahead.result(), pool.submit(load, start)
            yield batch
