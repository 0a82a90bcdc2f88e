"""Evaluation: what a DiVA can do with speech, beside the systems that it must be compared with.

    untrained   the same connector before training: what is owed to the initialisation alone
    diva        speech -> virtual tokens -> LLM
    cascade     speech -> Whisper's transcript -> the same LLM (what most people would build)
    text        the reference transcript -> the same LLM: the upper bound

The instruction stands in the system turn; the connector has never been trained with one. Every score
comes with a 95 % bootstrap interval and the paired significance of DiVA against each other system.

Axes: B batch, S audio samples, U positions of the user's turn, L positions in all, E width of the LLM.
Reads: connector.py, whisper.py, llama.py, data.py.   Read next: demo.py.
"""

import collections
import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
import whisper

SYSTEMS = ("untrained", "diva", "cascade", "text")
RESAMPLES = 10_000
BLEU_RESAMPLES = 1_000  # sacrebleu's own default
KEYS = ("audio", "text", "task", "answer")  # that every row of a task file has


# ---------------------------------------------------------------------------------------------
# Tasks


@dataclasses.dataclass(frozen=True)
class Row:
    """One clip with what is asked of it."""

    audio: str
    text: str  # the transcript
    task: str
    answer: str  # the reference
    accent: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is put to the LLM."""

    system: str | None
    labels: tuple[str, ...] = ()  # classification: choose among these instead of generating
    max_new_tokens: int = 64  # as in the paper


def read_tasks(folder: str | Path, split: str) -> tuple[dict[str, Task], list[Row]]:
    """tasks.json and SPLIT.jsonl of a folder. Raises an error that names the file and the line."""
    folder = Path(folder)
    settings, file = folder / "tasks.json", folder / f"{split}.jsonl"
    for path in (settings, file):
        if not path.is_file():
            there = sorted(p.name for p in folder.glob("*.json*")) or "nothing of the kind"
            raise FileNotFoundError(
                f"{path} is missing; {folder} holds {there}. Expected tasks.json with the prompts "
                "and one JSONL file for each split: check --tasks and --split."
            )
    tasks = {
        name: Task(**(entry | {"labels": tuple(entry.get("labels", ()))}))
        for name, entry in json.loads(settings.read_text(encoding="utf-8")).items()
    }
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not a JSON object ({error}).") from error
        if absent := [key for key in KEYS if key not in entry]:
            raise ValueError(
                f"{file}:{number}: no {', '.join(absent)}; expected the keys {', '.join(KEYS)} in "
                "every line (accent is optional)."
            )
        if entry["task"] not in tasks:
            raise ValueError(
                f"{file}:{number}: task {entry['task']!r} is not in {settings}; expected one of "
                f"{', '.join(tasks)}."
            )
        fields = {key: entry[key] for key in (*KEYS, "accent") if key in entry}
        rows.append(Row(**(fields | {"audio": str(folder / entry["audio"])})))
    if not rows:
        raise ValueError(f"{file}: no rows; expected one JSON object a line.")
    return tasks, rows


# ---------------------------------------------------------------------------------------------
# Metrics: each item has a numerator and a denominator; a score is the ratio of their sums


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def exact(answer: str, reference: str) -> bool:
    return normalise(answer) == normalise(reference)


def word_errors(answer: str, reference: str) -> int:
    """Substitutions, insertions and deletions that make the reference from the answer."""
    target = normalise(reference).split()
    row = list(range(len(target) + 1))
    for i, word in enumerate(normalise(answer).split(), 1):
        above, row = row, [i]
        for j, other in enumerate(target, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def ignores_prompt(answer: str, question: str) -> bool:
    """Does the answer repeat the question: does it hold at least half of its words?"""
    asked = collections.Counter(normalise(question).split())
    shared = asked & collections.Counter(normalise(answer).split())
    return shared.total() * 2 >= asked.total() > 0


def resample(numbers: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Bootstrap replicates [RESAMPLES] of sum(numbers) / sum(weights); the same draws every time.

    The same draws for every system make differences paired.
    """
    rng = np.random.default_rng(0)
    weights = np.ones(len(numbers)) if weights is None else weights
    replicates = []
    for _ in range(0, RESAMPLES, 500):  # 500 at a time: [500, n] counts
        counts = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=500)
        replicates.append((counts @ numbers) / np.maximum(counts @ weights, 1e-12))
    return np.concatenate(replicates)


def score(numbers: np.ndarray, weights: np.ndarray | None = None) -> tuple[dict, np.ndarray]:
    """{"score", "low", "high", "n"} with a 95 % interval, and the replicates behind it."""
    replicates = resample(numbers, weights)
    low, high = np.quantile(replicates, [0.025, 0.975])
    total = len(numbers) if weights is None else weights.sum()
    entry = {"score": numbers.sum() / max(total, 1e-12), "low": low, "high": high}
    return {k: float(v) for k, v in entry.items()} | {"n": len(numbers)}, replicates


def p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided paired bootstrap test that two systems differ, from paired replicates."""
    difference = ours - theirs
    tail = min((difference <= 0).mean(), (difference >= 0).mean())
    return float(min(1.0, 2 * tail))


# ---------------------------------------------------------------------------------------------
# Systems: a user's turn as embeddings [B, U, E] with lengths [B], from audio or from text


@eqx.filter_jit
def compose(
    llm: llama.Llama,
    prefix: Int[Array, "P"],
    prefix_length: Int[Array, ""],
    user: Float[Array, "B U E"],
    lengths: Int[Array, "B"],
    suffix: Int[Array, "R"],
) -> tuple[Float[Array, "B L E"], Int[Array, "B"]]:
    """[prefix; user; suffix] of each row without gaps, right-padded; L = P + U + R.

    The prefix is padded too (to P), so that all instructions share one compilation.
    """
    rows, most = user.shape[:2]
    at = jnp.arange(len(prefix) + most + len(suffix))[None]
    start, end = prefix_length, prefix_length + lengths[:, None]
    ids = jnp.where(at < start, prefix[jnp.minimum(at, len(prefix) - 1)], 0)
    ids = jnp.where(at >= end, suffix[jnp.clip(at - end, 0, len(suffix) - 1)], ids)
    spoken = jnp.take_along_axis(user, jnp.clip(at - start, 0, most - 1)[..., None], axis=1)
    is_user = (at >= start) & (at < end)
    embeds = jnp.where(is_user[..., None], spoken.astype(user.dtype), llm.embed(ids))
    return embeds, (end + len(suffix))[:, 0]


@eqx.filter_jit
def label_scores(
    llm: llama.Llama, embeds: Float[Array, "B L E"], lengths: Int[Array, "B"], labels: Int[Array, "N"]
) -> Float[Array, "B N"]:
    """Log-probability of each label's first token as the first token of the answer."""
    hidden, _ = llm.prefill(embeds, lengths, room=0)
    return jax.nn.log_softmax(llm.logits(hidden))[:, labels]


class Listener:
    """All systems over one Whisper and one LLM; gives the user's turn of a batch for each."""

    def __init__(self, folder: str | Path):
        asr_path, llm_path = connector.references(folder)
        self.diva = connector.DiVA.load(folder)
        self.asr = whisper.Transcriber.load(asr_path)
        self.chat = llama.Chat.load(llm_path)
        self.llm = self.diva.llm
        queries = len(self.diva.connector.query_tokens)
        untrained = connector.DiVA.create(self.asr.model, self.llm, queries, jax.random.key(0))
        self.connectors = {"untrained": untrained.connector, "diva": self.diva.connector}
        self.hear = eqx.filter_jit(lambda diva, audio: diva.listen(audio))
        self.speak = eqx.filter_jit(lambda connector, states: connector(states))

    def turns(self, audio: np.ndarray, texts: list[str], most: int) -> dict[str, tuple]:
        """{system: (embeddings [B, U, E], lengths [B])}, and the transcripts of the cascade."""
        states = self.hear(self.diva, audio)
        turns = {}
        for name, module in self.connectors.items():
            virtual = self.speak(module, states)
            turns[name] = virtual, jnp.full(len(audio), virtual.shape[1])
        turns["cascade"] = self._read(self.asr(jnp.asarray(audio)), most)
        turns["text"] = self._read(texts, most)
        return turns

    def _read(self, texts: list[str], most: int) -> tuple:
        ids = np.zeros((len(texts), most), np.int32)
        rows = [self.chat.encode(text)[:most] for text in texts]
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return self.llm.embed(jnp.asarray(ids)), jnp.asarray([len(row) for row in rows])


def answer_rows(
    listener: Listener, task: Task, rows: list[Row], *, prefix_room: int, text_room: int,
    batch_size: int, progress: Callable[[int], Any],
) -> dict[str, list[str]]:  # fmt: skip
    """{system: the answer to each row}. Audio that cannot be decoded is silence: a wrong answer."""
    prefix, suffix = listener.chat.wrap(task.system)
    prefix_ids = jnp.asarray(prefix + [0] * (prefix_room - len(prefix)))
    labels = first_tokens(listener.chat, task.labels)
    answers = {name: [] for name in SYSTEMS}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        full = batch + [batch[-1]] * (batch_size - len(batch))  # one shape, one compilation
        audio = load_batch(full, listener.diva.window_samples)
        turns = listener.turns(audio, [row.text for row in full], text_room)
        for name, (user, lengths) in turns.items():
            embeds, ends = compose(
                listener.llm, prefix_ids, jnp.asarray(len(prefix)), user, lengths, jnp.asarray(suffix)
            )
            if task.labels:
                best = label_scores(listener.llm, embeds, ends, labels).argmax(-1)
                replies = [task.labels[i] for i in np.asarray(best)]
            else:
                tokens = llama.generate(
                    listener.llm, embeds, ends,
                    max_new_tokens=task.max_new_tokens, stop_ids=listener.chat.stop_ids,
                )  # fmt: skip
                replies = [decode(listener.chat, row) for row in np.asarray(tokens)]
            answers[name] += replies[: len(batch)]
        progress(len(batch))
    return answers


def decode(chat: llama.Chat, ids: np.ndarray) -> str:
    """The text before the first stop token."""
    stops = np.flatnonzero(np.isin(ids, chat.stop_ids))
    return chat.decode(ids[: stops[0]] if len(stops) else ids)


def first_tokens(chat: llama.Chat, labels: tuple[str, ...]) -> Int[Array, "N"]:
    """The first token of each label. Raises ValueError if two labels share it."""
    tokens = [chat.encode(label)[0] for label in labels]
    for i, token in enumerate(tokens):
        if token in tokens[:i]:
            raise ValueError(
                f"labels {labels[tokens.index(token)]!r} and {labels[i]!r} begin with the same token; "
                "expected different ones, since only the first is scored. Rename one in tasks.json."
            )
    return jnp.asarray(tokens, jnp.int32)


def load_batch(rows: list[Row], window: int) -> Float[np.ndarray, "B S"]:
    audio = []
    for row in rows:
        try:
            audio.append(_samples(row.audio))
        except (ValueError, OSError) as error:
            tqdm.write(f"counted as wrong: {error}")
            audio.append(np.zeros(window, np.float32))
    return data.pad(audio, window)


_samples = functools.lru_cache(maxsize=4096)(data.load_audio)


# ---------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    model: str | Path,
    tasks: str | Path = "toy/tasks",
    split: str = "test",
    limit: int = 0,
    batch_size: int = 64,
) -> dict:
    """Score all systems on all tasks; prints the table, writes MODEL/eval.json, returns its content.

    `limit` > 0 takes only so many rows of each task, spread evenly. Raises ValueError or
    FileNotFoundError for what is missing or malformed.
    """
    start = time.monotonic()
    settings, rows = read_tasks(tasks, split)
    work = {name: spread([r for r in rows if r.task == name], limit) for name in settings}
    if "repeat" in settings:  # said of any clip: every fourth of them all
        work["repeat"] = spread([dataclasses.replace(r, task="repeat") for r in rows[::4]], limit)
    work = {name: some for name, some in work.items() if some}
    listener = Listener(model)
    prefix_room = max(len(listener.chat.wrap(settings[name].system)[0]) for name in work)
    text_room = max(len(listener.chat.encode(row.text)) for some in work.values() for row in some)
    answers = {}
    with tqdm(total=sum(map(len, work.values())), unit="clip", desc="evaluating") as bar:
        for name, some in work.items():
            answers[name] = answer_rows(
                listener, settings[name], some, prefix_room=prefix_room, text_room=text_room,
                batch_size=batch_size, progress=bar.update,
            )  # fmt: skip
    results = {}
    for name, some in work.items():
        results |= score_task(name, some, answers[name], settings[name].labels)
    report = {"model": str(model), "split": split, "tasks": results}
    report["seconds"] = round(time.monotonic() - start, 1)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (Path(model) / "eval.json").write_text(text, encoding="utf-8")
    print(table(report))
    return report


def spread(rows: list[Row], limit: int) -> list[Row]:
    """At most `limit` rows (0: all), evenly spaced."""
    if not limit or len(rows) <= limit:
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def score_task(
    name: str, rows: list[Row], answers: dict[str, list[str]], labels: tuple[str, ...]
) -> dict[str, dict[str, dict]]:
    """{metric: {system: {"score", "low", "high", "n", "p" (DiVA against it), ...}}} of one task."""
    references = [row.answer for row in rows]
    if name == "repeat":
        words = np.array([len(normalise(row.text).split()) for row in rows], float)
        errors = {
            system: np.array([word_errors(a, r.text) for a, r in zip(said, rows, strict=True)], float)
            for system, said in answers.items()
        }
        return {"repeat_wer": compare(errors, words)}
    correct = {
        system: np.array([exact(a, r) for a, r in zip(said, references, strict=True)], float)
        for system, said in answers.items()
    }
    result = {name: compare(correct)}
    for system, entry in result[name].items():
        if labels:
            counts = collections.Counter(answers[system])
            entry["predicted"] = {label: counts[label] for label in labels}
        entry["accents"] = by_accent(rows, correct[system])
    if name == "translation":
        result["translation_bleu"] = bleu(answers, references)
    if name == "spoken_qa":
        ignored = {
            system: np.array(
                [ignores_prompt(a, r.text) for a, r in zip(said, rows, strict=True)], float
            )
            for system, said in answers.items()
        }
        result["prompt_ignoring"] = compare(ignored)
    return result


def compare(numbers: dict[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, dict]:
    """Score every system on the same items, with the p-value of DiVA against it."""
    scored = {system: score(values, weights) for system, values in numbers.items()}
    return {
        system: entry | ({} if system == "diva" else {"p": p_value(scored["diva"][1], replicates)})
        for system, (entry, replicates) in scored.items()
    }


def by_accent(rows: list[Row], correct: np.ndarray) -> dict[str, dict]:
    accents = sorted({row.accent for row in rows if row.accent})
    return {
        accent: score(correct[[row.accent == accent for row in rows]])[0] for accent in accents
    }


def bleu(answers: dict[str, list[str]], references: list[str]) -> dict[str, dict]:
    """Corpus BLEU (0 to 100) with sacrebleu, its signature, and bootstrap intervals."""
    metric, result, replicates = BLEU(), {}, {}
    rng = np.random.default_rng(0)
    draws = rng.integers(len(references), size=(BLEU_RESAMPLES, len(references)))
    for system, said in answers.items():
        total = metric.corpus_score(said, [references])
        replicates[system] = _bleu_replicates(said, references, draws)
        low, high = np.quantile(replicates[system], [0.025, 0.975])
        result[system] = {"score": total.score, "low": float(low), "high": float(high)}
        result[system] |= {"n": len(said), "signature": str(metric.get_signature())}
    for system, entry in result.items():
        if system != "diva":
            entry["p"] = p_value(replicates["diva"], replicates[system])
    return result


def _bleu_replicates(said: list[str], references: list[str], draws: np.ndarray) -> np.ndarray:
    """BLEU of each resampled corpus from the counts of its sentences."""
    metric = BLEU(effective_order=True)
    items = [metric.sentence_score(a, [r]) for a, r in zip(said, references, strict=True)]
    counts = np.array([[*i.counts, *i.totals, i.sys_len, i.ref_len] for i in items], float)
    sums = counts[draws].sum(axis=1)
    return np.array(
        [
            BLEU.compute_bleu(
                correct=list(s[:4]), total=list(s[4:8]), sys_len=int(s[8]), ref_len=int(s[9]),
                smooth_method="exp",
            ).score
            for s in sums
        ]
    )  # fmt: skip


def table(report: dict) -> str:
    """The scores as text, at most 100 columns wide."""
    percent = {"translation_bleu": 1.0}  # BLEU is on a scale of 100 already
    lines = [f"{'':18}" + "".join(f"{system:>20}" for system in SYSTEMS)]
    for name, systems in report["tasks"].items():
        cells = ""
        for system in SYSTEMS:
            entry, scale = systems[system], percent.get(name, 100.0)
            star = "*" if entry.get("p", 1.0) < 0.05 else " "
            low, high = (f"{scale * entry[k]:.1f}" for k in ("low", "high"))
            cells += f"{scale * entry['score']:8.1f}{star}[{low}, {high}]".rjust(20)
        lines.append(f"{name:18}{cells}")
    if accents := report["tasks"].get("spoken_qa", {}).get("diva", {}).get("accents"):
        lines.append("\nspoken_qa by accent")
        for accent in accents:
            cells = "".join(
                f"{100 * report['tasks']['spoken_qa'][s]['accents'][accent]['score']:20.1f}"
                for s in SYSTEMS
            )
            lines.append(f"  {accent[:24]:24}"[:18].ljust(18) + cells)
    if predicted := report["tasks"].get("emotion", {}).get("diva", {}).get("predicted"):
        shares = ", ".join(f"{label} {count}" for label, count in predicted.items())
        lines.append(f"\nemotions DiVA named: {shares}")
    lines.append("per cent, [95 % bootstrap interval], * differs from diva at p < 0.05 (paired)")
    return "\n".join(lines)


def main(
    model: str = "toy/diva",
    tasks: str = "toy/tasks",
    split: str = "test",
    limit: int = 0,
    batch_size: int = 64,
) -> None:
    """Score a trained DiVA beside the untrained one, the cascade and the text upper bound.

    Args:
        model: folder of a trained DiVA, such as runs/toy.
        tasks: folder with tasks.json and one JSONL file for each split.
        split: which of them; keep `test` for the last look.
        limit: at most so many clips of each task (0: all).
        batch_size: clips at a time.
    """
    evaluate(model, tasks, split, limit, batch_size)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
