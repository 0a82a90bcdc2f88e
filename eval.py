"""Evaluation: what a DiVA can do with speech, beside the systems that it must be compared with.

    untrained   the same connector before training: what is owed to the initialisation alone
    diva        speech -> virtual tokens -> LLM
    cascade     speech -> Whisper's transcript -> the same LLM (what most people would build)
    text        the reference transcript -> the same LLM: the upper bound

The instruction stands in the system turn; the connector was never trained with one. Every score
is a function of sums over the clips, score = f(sum_i c_i), and so is each bootstrap replicate.

Axes: B batch, S audio samples, Q virtual tokens, L positions of a prompt, E width of the LLM,
N items, Y systems, C columns of a metric, R bootstrap resamples.
Reads: connector.py, whisper.py, llama.py, data.py.   The last chapter.
"""

import collections
import concurrent.futures
import dataclasses
import json
import re
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int
from sacrebleu.metrics import BLEU
from tqdm import tqdm

import connector
import data
import llama
import weights
import whisper

SYSTEMS = ("untrained", "diva", "cascade", "text")
RESAMPLES = 10_000
REPEATED = 4  # one clip in so many is also asked to be repeated
ROUND = 16  # prompts are padded to a multiple of this, so that few lengths are compiled


# ---------------------------------------------------------------------------------------------
# Tasks


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is put to the LLM."""

    system: str | None
    labels: tuple[str, ...] = ()  # choose the likeliest of these instead of generating
    max_new_tokens: int = 64  # as in the paper


@dataclasses.dataclass(frozen=True)
class Item:
    """One clip with one thing that is asked of it."""

    audio: str
    text: str  # the transcript
    task: str
    answer: str  # the reference
    accent: str = ""


def read_tasks(folder: Path) -> dict[str, Task]:
    """The prompts in folder/tasks.json. Raises an error that names the file and the task."""
    file, tasks = folder / "tasks.json", {}
    keys = [field.name for field in dataclasses.fields(Task)]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing; expected a folder with tasks.json (the prompts) and one JSONL "
            "file for each split, like toy/tasks. Check --tasks."
        )
    for name, entry in weights.read_json(file).items():
        if name not in METRICS:
            raise ValueError(f"{file}: unknown task {name!r}; expected {', '.join(METRICS)}.")
        if not isinstance(entry, dict) or "system" not in entry or set(entry) - set(keys):
            raise ValueError(
                f"{file}: task {name!r} is {json.dumps(entry)}; expected an object with the key "
                f"system (the instruction, or null) and at most {', '.join(keys[1:])}."
            )
        tasks[name] = Task(**(entry | {"labels": tuple(entry.get("labels", ()))}))
    return tasks


def read_items(folder: Path, split: str, tasks: dict[str, Task]) -> list[Item]:
    """What folder/SPLIT.jsonl asks, and a share of its clips to be repeated if tasks.json says how.

    Raises FileNotFoundError, or ValueError that names the line.
    """
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        there = sorted(path.stem for path in folder.glob("*.jsonl"))
        raise FileNotFoundError(
            f"{file} is missing; expected one JSON object a line, with the clips of the split. "
            f"Splits here: {', '.join(there) or 'none'}. Check --split and --tasks."
        )
    # not splitlines: a JSON string may hold the other separators that Unicode knows
    lines = file.read_text(encoding="utf-8").split("\n")
    items = [
        _read_item(line, f"{file}:{number}", folder, tasks)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not items:
        raise ValueError(f"{file}: no lines; expected one JSON object a line.")
    if "repeat" in tasks and all(item.task != "repeat" for item in items):
        chosen = sample(items, -(-len(items) // REPEATED))
        items += [dataclasses.replace(i, task="repeat", answer=i.text) for i in chosen]
    return items


def _read_item(line: str, where: str, folder: Path, tasks: dict[str, Task]) -> Item:
    keys = ("audio", "text", "task", "answer")
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); expected one object a line.") from error
    entry = entry if isinstance(entry, dict) else {}
    # An empty string is an answer like any other; what is not a string is a mistake.
    wrong = [key for key in keys if not isinstance(entry.get(key), str)]
    if wrong:
        raise ValueError(
            f"{where}: no text under {', '.join(wrong)}; expected a string under each of "
            f"{', '.join(keys)} (and, if known, accent). Correct the line."
        )
    if entry["task"] not in tasks:
        raise ValueError(
            f"{where}: unknown task {entry['task']!r}; expected one of {', '.join(tasks)}, the "
            "tasks of tasks.json. Correct the line, or give the task a prompt there."
        )
    labels = tasks[entry["task"]].labels
    if labels and normalise(entry["answer"]) not in map(normalise, labels):
        raise ValueError(
            f"{where}: the answer is {entry['answer']!r}; expected one of the labels of "
            f"{entry['task']} in tasks.json: {', '.join(labels)}."
        )
    fields = {key: entry[key] for key in keys} | {"accent": str(entry.get("accent", ""))}
    return Item(**(fields | {"audio": str(folder / entry["audio"])}))


def sample(items: list[Item], most: int) -> list[Item]:
    """At most `most` items at random, in their order; every n-th could meet one accent alone."""
    chosen = np.random.default_rng(0).permutation(len(items))[:most]
    return [items[i] for i in sorted(chosen)]


# ---------------------------------------------------------------------------------------------
# Metrics: a few numbers for each answer, and the score as a function of their sums


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    plain = re.sub(r"[^\w\s]", "", unicodedata.normalize("NFC", text).lower())
    return " ".join(plain.split())


def edits(a: str, b: str, substitution: int = 1) -> int:
    """The least cost of insertions, deletions (1 each) and substitutions of words from a to b."""
    source, target = normalise(a).split(), normalise(b).split()
    row = list(range(len(target) + 1))
    for i, word in enumerate(source, 1):
        above, row = row, [i]
        for j, other in enumerate(target, 1):
            change = above[j - 1] + substitution * (word != other)
            row.append(min(above[j] + 1, row[j - 1] + 1, change))
    return row[-1]


def correct(answer: str | None, item: Item) -> tuple[float, ...]:
    """Normalised exact match. No answer is wrong, even where the reference is empty."""
    return float(answer is not None and normalise(answer) == normalise(item.answer)), 1.0


def word_errors(answer: str | None, item: Item) -> tuple[float, ...]:
    """Word edits from the answer to the reference, and the reference's words."""
    return float(edits(answer or "", item.answer)), float(len(normalise(item.answer).split()))


def ignores_prompt(answer: str | None, item: Item) -> tuple[float, ...]:
    """Does the answer repeat the question instead: does it hold at least three quarters of the
    question's words in their order (longest common subsequence), and not the reference?

    "The capital of France is Paris" shares much with its question, but answers it.
    """
    said, asked = normalise(answer or ""), normalise(item.text)
    words = len(asked.split())
    # with substitutions at the price of a deletion and an insertion, only common words are free
    common = (len(said.split()) + words - edits(said, asked, substitution=2)) / 2
    answers = f" {normalise(item.answer)} " in f" {said} "
    return float(words > 0 and common >= 0.75 * words and not answers), 1.0


def bleu_counts(answer: str | None, item: Item) -> tuple[float, ...]:
    """sacrebleu's n-gram matches (4), n-grams (4) and lengths of the answer and the reference."""
    counts = _BLEU.sentence_score(answer or "", [item.answer])
    return (*map(float, (*counts.counts, *counts.totals, counts.sys_len, counts.ref_len)),)


_BLEU = BLEU(effective_order=True)  # changes no count; without it single sentences are warned about


def ratio(sums: Float[np.ndarray, "*R 2"]) -> Float[np.ndarray, "*R"]:
    """The first column over the second."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def bleu(sums: Float[np.ndarray, "*R 10"]) -> Float[np.ndarray, "*R"]:
    """Corpus BLEU (0 to 100) with sacrebleu's default smoothing, for many corpora at once.

    Orders without a match count as 1/2, 1/4, ... of a match, in turn (`smooth:exp`).
    """
    matches, totals, said, wanted = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    none = matches == 0
    smooth = np.where(none, 0.5 ** np.cumsum(none, -1), matches)
    precision = smooth / np.maximum(totals, 1)
    mean = np.exp(np.log(np.maximum(precision, 1e-300)).mean(-1))
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(said, 1e-9)))
    return np.where(none.all(-1) | (totals == 0).any(-1), 0.0, 100 * brevity * mean)


class Metric(NamedTuple):
    """A few numbers for each answer, and what their sums over the items mean."""

    measure: Callable[[str | None, Item], tuple[float, ...]]  # None: the clip was not decoded
    combine: Callable[[np.ndarray], np.ndarray]


METRICS = {  # {task: {name in eval.json: metric}}
    "spoken_qa": {
        "spoken_qa": Metric(correct, ratio),
        "prompt_ignoring": Metric(ignores_prompt, ratio),
    },
    "translation": {
        "translation": Metric(correct, ratio),
        "translation_bleu": Metric(bleu_counts, bleu),
    },
    "emotion": {"emotion": Metric(correct, ratio)},
    "repeat": {"repeat_wer": Metric(word_errors, ratio)},
}


METRIC_OF = {name: metric for metrics in METRICS.values() for name, metric in metrics.items()}


# ---------------------------------------------------------------------------------------------
# Statistics


def resample(
    columns: Float[np.ndarray, "N Y C"], clusters: Sequence[str]
) -> Float[np.ndarray, "R Y C"]:
    """Bootstrap sums of the columns; the same draws for all systems, which makes them paired.

    Clips of one sentence stand or fall together, so whole sentences are drawn: drawing clips would
    make the intervals too narrow.
    """
    names, group = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(names), *columns.shape[1:]))
    np.add.at(sums, group, columns)
    flat, rng, blocks = sums.reshape(len(names), -1), np.random.default_rng(0), []
    for start in range(0, RESAMPLES, 500):  # [500, n] numbers at a time
        block = min(500, RESAMPLES - start)
        draws = rng.integers(len(names), size=(block, len(names)))
        draws += len(names) * np.arange(block)[:, None]
        counts = np.bincount(draws.ravel(), minlength=block * len(names))
        blocks.append(counts.reshape(block, -1).astype(float) @ flat)
    return np.concatenate(blocks).reshape(RESAMPLES, *columns.shape[1:])


def compare(
    columns: Float[np.ndarray, "N Y C"], clusters: Sequence[str], combine: Callable
) -> dict[str, dict]:
    """{system: {"score", "low", "high", "n", "p"}}, with a 95 % bootstrap interval.

    p says whether DiVA differs from the system: two-sided, from the share of paired resamples in
    which the difference changes its sign.
    """
    scores, replicates = combine(columns.sum(0)), combine(resample(columns, clusters))
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    gain = replicates[:, [SYSTEMS.index("diva")]] - replicates
    tail = np.minimum((gain <= 0).sum(0), (gain >= 0).sum(0))
    p = np.minimum(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
    entries = {}
    for y, system in enumerate(SYSTEMS):
        entry = {"score": scores[y], "low": low[y], "high": high[y]}
        if system != "diva":
            entry["p"] = p[y]
        entries[system] = {k: float(v) for k, v in entry.items()} | {"n": len(columns)}
    return entries


def score(
    tasks: dict[str, Task], items: list[Item], answers: dict[str, list[str | None]]
) -> dict[str, dict[str, dict]]:
    """{metric: {system: {"score", "low", "high", "n", "p", "errors", ...}}} of all tasks."""
    results = {}
    for task, metrics in METRICS.items():
        numbers = [i for i, item in enumerate(items) if item.task == task]
        some = [items[i] for i in numbers]
        said = {system: [answers[system][i] for i in numbers] for system in SYSTEMS}
        for name, metric in metrics.items() if some else ():
            columns = np.array(
                [[metric.measure(said[y][n], item) for y in SYSTEMS] for n, item in enumerate(some)]
            )
            texts = [item.text for item in some]
            results[name] = compare(columns, texts, metric.combine)
            if name == "spoken_qa":
                _add_accents(results[name], columns, some, metric.combine)
            for system, entry in results[name].items():
                entry["errors"] = sum(answer is None for answer in said[system])
                if labels := tasks[task].labels:
                    counts = collections.Counter(said[system])
                    entry["predicted"] = {label: counts[label] for label in labels}
                if metric.combine is bleu:
                    entry["signature"] = bleu_signature()
    return results


def _add_accents(
    entries: dict[str, dict], columns: np.ndarray, items: list[Item], combine: Callable
) -> None:
    for accent in sorted({item.accent for item in items}):
        rows = [n for n, item in enumerate(items) if item.accent == accent]
        parts = compare(columns[rows], [items[n].text for n in rows], combine)
        for system, part in parts.items():
            entries[system].setdefault("accents", {})[accent or "unknown"] = part


def bleu_signature() -> str:
    """sacrebleu's own name for the settings of the BLEU that is reported."""
    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])  # sets the number of references
    return str(metric.get_signature())


# ---------------------------------------------------------------------------------------------
# Answers


@dataclasses.dataclass(frozen=True)
class Models:
    """All systems over one Whisper and one LLM."""

    diva: connector.DiVA
    connectors: dict[str, connector.Connector]  # of the systems that answer from virtual tokens
    asr: whisper.Transcriber
    chat: llama.Chat

    @staticmethod
    def load(folder: Path, diva: connector.DiVA | None = None) -> "Models":
        asr_path, llm_path = connector.references(folder)
        diva = connector.DiVA.load(folder) if diva is None else diva
        asr, chat = whisper.Transcriber.load(asr_path), llama.Chat.load(llm_path)
        shared = eqx.tree_at(lambda model: model.encoder, asr.model, diva.encoder)
        asr = dataclasses.replace(asr, model=shared)  # one encoder in memory, not two
        queries = len(diva.connector.query_tokens)
        fresh = connector.DiVA.create(asr.model, diva.llm, queries, jax.random.key(0))
        connectors = {"untrained": fresh.connector, "diva": diva.connector}
        return Models(diva, connectors, asr, chat)


@eqx.filter_jit
def listen(diva: connector.DiVA, audio: Float[Array, "B S"]) -> Float[Array, "B T D"]:
    """Encoder states, compiled; every system hears the same ones."""
    return diva.listen(audio)


@eqx.filter_jit
def speak(module: connector.Connector, states: Float[Array, "B T D"]) -> Float[Array, "B Q E"]:
    """Virtual tokens of one system's connector, compiled."""
    return module(states)


@eqx.filter_jit
def fill(
    llm: llama.Llama,
    ids: Int[Array, "B L"],
    starts: Int[Array, "B"],
    virtual: Float[Array, "any Q E"],
    rows: Int[Array, "B"],
) -> Float[Array, "B L E"]:
    """Embeddings of the prompts, with virtual[rows] written over the hole that begins at starts."""
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0)))
    embeds = llm.embed(ids)
    return put(embeds, virtual[rows].astype(embeds.dtype), starts)


@eqx.filter_jit
def label_scores(
    llm: llama.Llama,
    embeds: Float[Array, "B L E"],
    lengths: Int[Array, "B"],
    labels: Int[Array, "B labels"],
) -> Float[Array, "B labels"]:
    """Log-probability of each label's first token as the first token of the answer."""
    hidden, _ = llm.prefill(embeds, lengths, room=0)
    return jnp.take_along_axis(jax.nn.log_softmax(llm.logits(hidden)), labels, axis=1)


class Responder:
    """The LLM under every task's prompt, over batches of one size (the last one filled up)."""

    def __init__(self, llm: llama.Llama, chat: llama.Chat, tasks: dict[str, Task], size: int):
        self.llm, self.chat, self.tasks, self.size = llm, chat, tasks, size
        self.wraps = {name: chat.wrap(task.system) for name, task in tasks.items()}
        self.labels = {
            name: first_tokens(chat, name, task.labels)
            for name, task in tasks.items()
            if task.labels
        }
        most = [task.max_new_tokens for task in tasks.values() if not task.labels]
        self.max_new_tokens = max(most, default=0)  # one for all tasks: one compilation

    def texts(self, asked: list[tuple[str, str]], progress: Callable) -> dict[tuple[str, str], str]:
        """{(task, text): answer}; texts of like length share a batch."""
        ids = {pair: self.chat.encode(pair[1]) for pair in asked}
        order, said = sorted(asked, key=lambda pair: (len(ids[pair]), pair)), {}
        for batch in self.batches(order, lambda pair: pair[0]):
            names = [task for task, _ in batch]
            prompts, lengths, _ = self.frame(names, [ids[pair] for pair in batch])
            replies = self.reply(names, self.llm.embed(prompts), lengths)
            said |= zip(batch, replies, strict=True)
            progress(len(set(batch)))
        return said

    def speech(
        self, names: list[str], virtual: dict[str, Float[Array, "any Q E"]], rows: list[int]
    ) -> dict[str, list[str]]:
        """{system: the answers to virtual[system][rows[i]] under the prompt of task names[i]}."""
        said = {system: [""] * len(names) for system in virtual}
        queries = [0] * next(iter(virtual.values())).shape[1]
        for batch in self.batches(range(len(names)), lambda i: names[i]):
            some = [names[i] for i in batch]
            ids, lengths, starts = self.frame(some, [queries] * len(batch))
            heard = jnp.asarray([rows[i] for i in batch])
            for system, tokens in virtual.items():
                embeds = fill(self.llm, ids, starts, tokens, heard)
                for i, reply in zip(batch, self.reply(some, embeds, lengths), strict=True):
                    said[system][i] = reply
        return said

    def batches(self, entries: Sequence, task_of: Callable[[Any], str]) -> Iterator[list]:
        """Entries in full batches, those with labels apart from those to be generated."""
        for labelled in (False, True):
            some = [e for e in entries if (task_of(e) in self.labels) == labelled]
            for start in range(0, len(some), self.size):
                batch = some[start : start + self.size]
                yield batch + [batch[-1]] * (self.size - len(batch))

    def frame(
        self, names: list[str], users: list[list[int]]
    ) -> tuple[Int[Array, "B L"], Int[Array, "B"], Int[Array, "B"]]:
        """Right-padded ids of [prefix; user; suffix], their lengths, and where the user begins."""
        rows = [
            self.wraps[name][0] + user + self.wraps[name][1]
            for name, user in zip(names, users, strict=True)
        ]
        lengths = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), -(-lengths.max() // ROUND) * ROUND), np.int32)
        for into, row in zip(ids, rows, strict=True):
            into[: len(row)] = row
        starts = [len(self.wraps[name][0]) for name in names]
        return jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(starts)

    def reply(
        self, names: list[str], embeds: Float[Array, "B L E"], lengths: Int[Array, "B"]
    ) -> list[str]:
        """The greedy answers, or the likeliest labels if the tasks have labels."""
        if names[0] in self.labels:
            widest = max(map(len, self.labels.values()))
            # filled up with the first label: argmax takes the first of equals
            table = {n: [*ids, *[ids[0]] * (widest - len(ids))] for n, ids in self.labels.items()}
            labels = jnp.asarray([table[name] for name in names])
            best = np.asarray(label_scores(self.llm, embeds, lengths, labels).argmax(-1))
            return [self.tasks[name].labels[i] for name, i in zip(names, best, strict=True)]
        tokens = llama.generate(
            self.llm,
            embeds,
            lengths,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.chat.stop_ids,
        )
        cut = [self.tasks[name].max_new_tokens for name in names]
        return [self.decode(row[:n]) for row, n in zip(np.asarray(tokens), cut, strict=True)]

    def decode(self, ids: Int[np.ndarray, "new"]) -> str:
        """The text before the first stop token."""
        stops = np.flatnonzero(np.isin(ids, self.chat.stop_ids))
        return self.chat.decode(ids[: stops[0]] if len(stops) else ids).strip()


def first_tokens(chat: llama.Chat, task: str, labels: tuple[str, ...]) -> list[int]:
    """The first token of each label. Raises ValueError if a label has none or two share one."""
    tokens = [next(iter(chat.encode(label)), -1) for label in labels]
    for i, token in enumerate(tokens):
        if token == -1 or token in tokens[:i]:
            other = "nothing" if token == -1 else repr(labels[tokens.index(token)])
            raise ValueError(
                f"tasks.json: {task}: label {labels[i]!r} begins with the same token as {other}; "
                "expected labels with different first tokens, since only those are scored. "
                "Rename one."
            )
    return tokens


def answer(
    models: Models, tasks: dict[str, Task], items: list[Item], batch_size: int
) -> tuple[dict[str, list[str | None]], dict[str, str]]:
    """{system: its answer to each item, None for a clip that cannot be decoded} and {clip: reason}.

    Every clip is decoded, encoded and transcribed once, whatever is asked of it; every text is
    answered once, however many clips say it.
    """
    asked = collections.defaultdict(list)  # {clip: numbers of its items}
    for i, item in enumerate(items):
        asked[item.audio].append(i)
    # clips of which the same is asked stand together: fewer batches have to be filled up
    clips = sorted(asked, key=lambda clip: [items[i].task for i in asked[clip]])
    size = min(batch_size, len(clips))
    responder = Responder(models.diva.llm, models.chat, tasks, size)
    answers: dict[str, list] = {system: [None] * len(items) for system in SYSTEMS}
    heard, failed = {}, {}
    with tqdm(total=len(clips), unit="clip", desc="speech", disable=None) as bar:
        for some, audio, reasons in loaded(clips, size, models.diva.window_samples):
            failed |= reasons
            states = listen(models.diva, jnp.asarray(audio))
            virtual = {name: speak(c, states) for name, c in models.connectors.items()}
            heard |= zip(some, models.asr(jnp.asarray(audio)), strict=False)
            rows = [row for row, clip in enumerate(some) if clip not in failed for _ in asked[clip]]
            work = [i for clip in some if clip not in failed for i in asked[clip]]
            replies = responder.speech([items[i].task for i in work], virtual, rows)
            for system, said in replies.items():
                for i, reply in zip(work, said, strict=True):
                    answers[system][i] = reply
            bar.update(len(some))
    pairs = {"text": [(item.task, item.text) for item in items]}
    pairs["cascade"] = [(i.task, heard[i.audio]) if i.audio not in failed else None for i in items]
    unique = sorted({pair for some in pairs.values() for pair in some if pair is not None})
    with tqdm(total=len(unique), unit="text", desc="texts", disable=None) as bar:
        said = responder.texts(unique, bar.update)
    for system, some in pairs.items():
        answers[system] = [None if pair is None else said[pair] for pair in some]
    return answers, failed


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
                row[:] = data.load_window(clip, window)[0]
            except (ValueError, OSError) as error:
                failed[clip] = str(error)
                tqdm.write(f"counted as wrong: {error}")
        return some, audio, failed

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, 0)
        for start in range(size, len(clips) + size, size):
            batch, ahead = ahead.result(), pool.submit(load, start)
            yield batch


# ---------------------------------------------------------------------------------------------
# The report


def evaluate(
    model: str | Path,
    tasks: str | Path = "toy/tasks",
    split: str = "test",
    limit: int = 0,
    batch_size: int = 64,
    diva: connector.DiVA | None = None,
) -> dict:
    """Score all systems on all tasks; prints the table, writes MODEL/eval.json and returns it.

    `limit` > 0 takes only so many items of each task, at random; `diva` is the model of that folder
    if it is loaded already. Raises ValueError or FileNotFoundError for what is missing or wrong.
    """
    start, folder = time.monotonic(), Path(tasks)
    settings = read_tasks(folder)
    items = read_items(folder, split, settings)
    if limit:
        groups = [[item for item in items if item.task == name] for name in settings]
        items = [item for group in groups for item in sample(group, limit)]
    home = weights.resolve(model)
    answers, failed = answer(Models.load(home, diva), settings, items, batch_size)
    report: dict[str, Any] = {"model": str(model), "split": split, "limit": limit, "errors": failed}
    report["tasks"] = score(settings, items, answers)
    report["seconds"] = round(time.monotonic() - start, 1)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (home / "eval.json").write_text(text, encoding="utf-8")
    print(table(report))
    return report


def table(report: dict) -> str:
    """The scores as text, at most 100 columns wide."""
    tasks = report["tasks"]
    lines = [f"{'':24}" + "".join(f" {system:18}" for system in SYSTEMS)]
    for name, systems in tasks.items():
        scale = 1.0 if METRIC_OF[name].combine is bleu else 100.0  # BLEU has its own 0 to 100
        lines.append(f"{name:24}" + "".join(_cell(systems[y], scale) for y in SYSTEMS))
        for accent in systems["diva"].get("accents", {}):
            parts = [systems[y]["accents"][accent] for y in SYSTEMS]
            lines.append(f"  {accent[:22]:22}" + "".join(_cell(part, scale) for part in parts))
    lines.append("score in per cent and its 95 % interval; * differs from diva (p < 0.05, paired)")
    lines.append("lower is better: prompt_ignoring, repeat_wer")
    for name, systems in tasks.items():
        for system in SYSTEMS if "predicted" in systems["diva"] else ():
            counts = ", ".join(f"{k} {v}" for k, v in systems[system]["predicted"].items())
            text = f"{name} as {system} names it: {counts}"
            lines += textwrap.wrap(text, 100, subsequent_indent="  ")
    if errors := report["errors"]:
        lines.append(f"{len(errors)} clips could not be decoded and count as wrong (see eval.json)")
    return "\n".join(line.rstrip() for line in lines)


def _cell(entry: dict, scale: float) -> str:
    star = "*" if entry.get("p", 1.0) < 0.05 else " "
    # a word error rate has no upper end: 64 words said for one are 6,400 per cent
    digits = 1 if scale * entry["high"] < 1000 else 0
    low, high = (f"{scale * entry[key]:.{digits}f}" for key in ("low", "high"))
    return f"{scale * entry['score']:6.1f}{star} {low + '-' + high:11}"


def main(
    model: str = "toy/diva",
    tasks: str = "toy/tasks",
    split: str = "test",
    limit: int = 0,
    batch_size: int = 64,
) -> None:
    """Score a trained DiVA beside the untrained one, the cascade and the text upper bound.

    Args:
        model: folder of a trained DiVA, such as runs/toy; eval.json is written there.
        tasks: folder with tasks.json and one JSONL file for each split.
        split: which of them; keep `test` for the last look.
        limit: at most so many clips of each task, drawn at random (0: all).
        batch_size: clips at a time.
    """
    evaluate(model, tasks, split, limit, batch_size)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
