"""Evaluation: tasks, the answers of all systems to them, and the scores.

    python eval.py --model runs/toy                                      the toy universe
    python eval.py --model DIVA --tasks heysquad=/data/HeySQuAD meld=/data/MELD.Raw ...
    python eval.py --model DIVA --tasks mine/tasks.json --predictions SALMONN=salmonn.jsonl

A task is a set of clips with references (suites.py), a prompt, and metrics (metrics.py). Each
answer is written to predictions.jsonl as soon as it is known and is not asked for again: a run that
was stopped goes on, and one that is repeated only counts anew.

Axes: N items, Y systems, C numbers of a metric.
Reads: suites.py, systems.py, metrics.py, significance.py, report.py.   Read next: demo.py.
"""

import collections
import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import tyro

import metrics
import record
import report
import significance
import suites
import systems
import weights
from systems import SYSTEMS, Ask

PATHS = {"audio", "common_voice", "unpack"}  # those of the readers' options that are paths

# ---------------------------------------------------------------------------------------------
# Tasks


@dataclasses.dataclass(frozen=True)
class Task:
    """Clips with references, what is asked about them, and what counts."""

    suite: str  # of suites.SUITES
    examples: list[suites.Example]
    prompt: str | None  # {language} in it is the language of the answer
    metrics: tuple[str, ...]  # of metrics.METRICS; the first one is the headline
    labels: tuple[str, ...] = ()
    label_score: str = "first_token"
    max_new_tokens: int = 64

    def ask(self, example: suites.Example) -> Ask:
        """What is asked about one clip."""
        prompt = self.prompt
        if prompt is not None and "{language}" in prompt:
            prompt = prompt.replace("{language}", suites.LANGUAGES[example.language])
        return Ask(prompt, self.labels, self.label_score, self.max_new_tokens)


class Item(NamedTuple):
    """One clip with one thing that is asked of it."""

    task: str
    ask: Ask
    example: suites.Example


def read_tasks(sources: Sequence[str | Path], split: str | None = None) -> dict[str, Task]:
    """The tasks of each source: SUITE=PATH, a tasks.json, or a folder with one.

    tasks.json is {name: {"suite": ..., "path": ..., ...}}: the suite may be left out if the name
    says it, the path is relative to the file; "prompt", "metrics", "labels", "label_score" and
    "max_new_tokens" replace those of the suite, other keys go to its reader. `split` replaces the
    split of every suite that has some. Raises ValueError or FileNotFoundError that names what is
    wrong.
    """
    tasks: dict[str, Task] = {}
    for source in map(str, sources):
        name, equals, path = source.partition("=")
        if equals and name in suites.SUITES:
            entries, where, folder = {name: {"path": path}}, f"--tasks {source}", Path()
        else:
            file = Path(source) / "tasks.json" if Path(source).is_dir() else Path(source)
            if not file.is_file():
                raise FileNotFoundError(
                    f"{source}: no such tasks; expected a tasks.json, a folder with one like "
                    f"toy/tasks, or SUITE=PATH with one of {', '.join(suites.SUITES)}. Check "
                    "--tasks."
                )
            entries, where, folder = weights.read_json(file), str(file), file.parent
            if not entries:
                raise ValueError(f"{file}: no tasks; expected at least one, like toy/tasks.")
        for name, entry in entries.items():
            if name in tasks:
                raise ValueError(f"{where}: {name!r} comes twice; expected a name for each task.")
            tasks[name] = _read_task(name, entry, f"{where}: {name}", folder, split)
    return tasks


def _read_task(name: str, entry: Any, where: str, folder: Path, split: str | None) -> Task:
    if not name or "/" in name or "\\" in name or name in (".", ".."):
        raise ValueError(f"{where}: expected a name that a file can have: charts are called so.")
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f'{where}: {entry!r}; expected an object with "path", where clips are.')
    suite_name = entry.get("suite", name)
    if not isinstance(suite_name, str) or suite_name not in suites.SUITES:
        raise ValueError(
            f"{where}: unknown suite {suite_name!r}; expected one of {', '.join(suites.SUITES)} "
            '(for a JSONL file of your own: "suite": "manifest").'
        )
    suite = suites.SUITES[suite_name]
    known = {"path": "", "suite": "", "prompt": suite.prompt, "metrics": [*suite.metrics]}
    known |= {"labels": [*suite.labels], "label_score": "first_token", "max_new_tokens": 64}
    settings = known | {key: value for key, value in entry.items() if key in known}
    options = {key: value for key, value in entry.items() if key not in known}
    takes = list(inspect.signature(suite.read).parameters)[1:]
    if strange := options.keys() - takes:
        raise ValueError(
            f"{where}: unknown {', '.join(sorted(strange))}; expected only "
            f"{', '.join([*known, *takes])}."
        )
    if wrong := [*_wrong(settings), *_wrong_paths(options)]:
        raise ValueError(
            f"{where}: {', '.join(wrong)}; expected a text as prompt (or null), labels (a list of "
            f"texts), metrics from {', '.join(metrics.METRICS)}, label_score "
            f"{' or '.join(systems.LABEL_SCORES)}, max_new_tokens a whole number above 0."
        )
    if split is not None and "split" in takes:
        options["split"] = split
    for key in options.keys() & PATHS:  # relative to the file, like the path itself
        options[key] = str(folder / options[key])
    examples = suite.read(folder / settings.pop("path"), **options)
    settings |= {"suite": suite_name, "examples": examples}
    settings |= {key: tuple(settings[key]) for key in ("metrics", "labels")}
    task = Task(**settings)
    labels = [metrics.normalise(label) for label in task.labels]
    if len({*labels, *metrics.NO_LABELS}) < len(labels) + len(metrics.NO_LABELS):
        raise ValueError(
            f"{where}: labels {', '.join(task.labels)}; expected labels that differ in more than "
            f"case and punctuation, and none called {' or '.join(metrics.NO_LABELS)}. Rename some."
        )
    for example in examples:
        if labels and metrics.normalise(example.answers[0]) not in labels:
            raise ValueError(
                f"{where}: the answer of {example.id} is {example.answers[0]!r}; expected one of "
                f"the labels {', '.join(task.labels)}."
            )
        if "{language}" in (task.prompt or "") and example.language not in suites.LANGUAGES:
            raise ValueError(
                f"{where}: {example.id} has no language, which the prompt asks for; expected one "
                f"of {', '.join(suites.LANGUAGES)}."
            )
    return task


def _wrong(settings: dict[str, Any]) -> list[str]:
    """The settings that cannot be, each with its value."""
    prompt, labels, names = settings["prompt"], settings["labels"], settings["metrics"]
    wrong = [] if prompt is None or isinstance(prompt, str) else [f"prompt {prompt!r}"]
    if not isinstance(labels, list):
        wrong.append(f"labels {labels!r}")
    else:
        wrong += [f"label {label!r}" for label in labels if not isinstance(label, str)]
    if not isinstance(names, list):
        wrong.append(f"metrics {names!r}")
    else:
        wrong += ["no metrics"] if not names else []
        wrong += [f"metric {name!r}" for name in names if name not in list(metrics.METRICS)]
        wrong += ["weighted_f1 without labels"] if "weighted_f1" in names and not labels else []
    if settings["label_score"] not in systems.LABEL_SCORES:
        wrong.append(f"label_score {settings['label_score']!r}")
    most = settings["max_new_tokens"]
    if type(most) is not int or most < 1:  # bool is an int, too
        wrong.append(f"max_new_tokens {most!r}")
    return wrong


def _wrong_paths(options: dict[str, Any]) -> list[str]:
    return [f"{k} {v!r}" for k, v in options.items() if k in PATHS and not isinstance(v, str)]


# ---------------------------------------------------------------------------------------------
# Predictions


class Predictions:
    """predictions.jsonl: one line for each answer of each system.

    A line's key is a digest of the model and of all that is asked: what was answered by other
    weights, to another prompt or about another transcript is not taken for an answer.
    """

    def __init__(self, file: Path, model: str):
        self.file, self.model = file, model
        self.lines: dict[str, dict] = {}
        self.stream: TextIO | None = None
        before = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        self.cut = bool(before) and not before.endswith("\n")  # a killed run's last line
        if before:
            for text in before.split("\n"):
                try:
                    line = json.loads(text)
                    self.lines[line["key"]] = line
                except (ValueError, TypeError, KeyError):
                    continue  # the last line of a run that was killed, to be answered again

    def key(self, system: str, item: Item) -> str:
        example = item.example
        asked = [system, item.task, *dataclasses.astuple(item.ask), example.id, example.text]
        text = json.dumps([*asked, Path(example.audio).name])
        return f"{self.model}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def get(self, system: str, item: Item) -> dict | None:
        """The line of an answer, or None; of a clip that gave none, it says the reason."""
        return self.lines.get(self.key(system, item))

    def lacks(self, system: str, item: Item) -> bool:
        """What could not be answered is lacking too: the clip may be mended by now. A transcript
        that is unknown stays so."""
        line, unknown = self.get(system, item), system == "text" and not item.example.text
        return line is None or (line["answer"] is None and not unknown)

    def line(self, system: str, item: Item, said: dict[str, Any]) -> dict[str, Any]:
        """All that is written of an answer; `said` has "answer" and maybe "heard" and "error"."""
        example = item.example
        line = {"key": self.key(system, item), "system": system, "task": item.task}
        line |= {"id": example.id, "group": example.group, "audio": example.audio}
        line |= {"text": example.text, "prompt": item.ask.prompt}
        line |= {key: said[key] for key in ("answer", "heard", "error") if key in said}
        return line | {"references": list(example.answers)}

    def tell(self, system: str, item: Item, answer: str | None, note: dict[str, str]) -> None:
        """Add an answer and write it."""
        line = self.line(system, item, note | {"answer": answer})
        self.lines[line["key"]] = line
        if self.stream is None:
            self.stream = self.file.open("a", encoding="utf-8", newline="\n")
            self.stream.write("\n" if self.cut else "")
        self.stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.stream.flush()

    def finish(self, items: list[Item], scores: dict[tuple[str, int], dict[str, float]]) -> None:
        """Write the lines of these items anew, each with its scores, in order. Those of this model
        about other items stand behind them; those of other models go."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        ours = {self.key(s, item): (s, i) for i, item in enumerate(items) for s in SYSTEMS}
        first = [
            self.line(system, items[i], self.lines[key]) | {"scores": scores[system, i]}
            for key, (system, i) in ours.items()
        ]
        rest = [
            line
            for key, line in self.lines.items()
            if key not in ours and key.startswith(self.model)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in first + rest)
        record.write_text(self.file, text)


def fingerprint(folder: Path) -> str:
    """A digest of a model's own files, and of the names of the models that it refers to."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def read_predictions(source: str, items: list[Item]) -> tuple[str, list[str | None]]:
    """Of NAME=FILE.jsonl the name and the answer to each item, None where there is none.

    Each line has "task", "id" and "answer" (a text, or null). A predictions.jsonl of ours is taken
    for what its diva said. Raises ValueError that names the line.
    """
    name, _, path = source.partition("=")
    file = Path(path)
    if not name or not path or name in SYSTEMS:
        raise ValueError(
            f"--predictions {source}: expected NAME=FILE.jsonl, with a name other than "
            f"{', '.join(SYSTEMS)}."
        )
    found: dict[tuple[str, str], str | None] = {}
    keys: dict[tuple[str, str], str] = {}  # of a file of ours
    for where, line in suites.json_lines(file):
        place, answer = (line.get("task"), line.get("id")), line.get("answer")
        if line.get("system", "diva") != "diva":
            continue
        texts = all(isinstance(x, str) for x in place) and isinstance(answer, str | None)
        if not texts or "answer" not in line:
            raise ValueError(
                f'{where}: expected "task" and "id" (texts, as in predictions.jsonl) and "answer" '
                "(a text, or null if there was none). Correct the line."
            )
        if keys.get(place, line.get("key")) != line.get("key"):
            continue  # in a file of ours, what was answered to another prompt stands behind
        if place in found and place not in keys:
            raise ValueError(f"{where}: a second answer to {place}; expected one. Remove one.")
        if "key" in line:
            keys[place] = line["key"]
        # JSON can hold halves of letters, which cannot be written
        found[place] = None if answer is None else answer.encode("utf-8", "replace").decode()
    answers = [found.get((item.task, item.example.id)) for item in items]
    known = {(item.task, item.example.id) for item in items}
    if lacking := sum((item.task, item.example.id) not in found for item in items):
        print(f"{file}: no answer to {lacking} of {len(items)} items; they count as wrong")
    if extra := len(found.keys() - known):
        print(f"{file}: {extra} answers to what is not asked here are not counted")
    return name, answers


# ---------------------------------------------------------------------------------------------
# Scores


def score_task(
    task: Task, items: list[Item], answers: dict[str, list[str | None]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What eval.json says of one task, and {metric: score of each answer alone, [N, Y]}."""
    found: dict[str, Any] = {"suite": task.suite, "n": len(items), "prompt": task.prompt}
    found |= {"metrics": {}, "groups": {}, "signatures": {}}
    found["errors"] = {y: sum(answer is None for answer in said) for y, said in answers.items()}
    if task.labels:
        found["predicted"] = {y: label_histogram(task.labels, said) for y, said in answers.items()}
    examples, single = [item.example for item in items], {}
    groups = sorted({example.group for example in examples} - {""})
    for name in task.metrics:
        metric = metrics.METRICS[name]
        if name == "pedant" and metrics.judge() is None:
            continue
        columns = np.array(
            [
                [metric.measure(said[n], example, task.labels) for said in answers.values()]
                for n, example in enumerate(examples)
            ]
        )
        if not columns.any():  # does not apply: for instance, no language with a script of its own
            continue
        single[name] = metric.combine(columns)
        found["metrics"][name] = compare(columns, examples, metric, list(answers))
        for group in groups if len(groups) > 1 else ():
            rows = [n for n, example in enumerate(examples) if example.group == group]
            if not columns[rows].any():
                continue
            parts = compare(columns[rows], [examples[n] for n in rows], metric, list(answers))
            found["groups"].setdefault(group, {})[name] = parts
        correct_for_groups([parts[name] for parts in found["groups"].values() if name in parts])
        for language in sorted({example.language for example in examples}):
            some = [len(example.answers) for example in examples if example.language == language]
            if text := metrics.signature(name, language, max(some)):
                found["signatures"][f"{name} {language}".strip()] = text
    if not found["metrics"]:
        raise ValueError(
            f"{items[0].task}: none of {', '.join(task.metrics)} can be computed of these clips; "
            "expected at least one metric that applies (pedant needs its package). The answers are "
            "kept: correct tasks.json and start again."
        )
    for entry in found["metrics"].get("accuracy", {}).values() if task.labels else ():
        right = round(entry["score"] * len(items) / 100)
        entry["p_chance"] = significance.against_chance(right, len(items), len(task.labels))
    if published := suites.PUBLISHED.get(task.suite):
        found["published"] = published
    return found, single


def compare(
    columns: np.ndarray, examples: list[suites.Example], metric: metrics.Metric, names: list[str]
) -> dict[str, dict]:
    """{system: {"score", "low", "high", ...}} of one metric; stars as in the paper's charts.

    p_bootstrap and p_permutation say whether a system differs from diva; "best" marks the best one
    if it differs from every other, the upper bound aside.
    """
    languages = sorted({example.language for example in examples})
    many = len(languages) if metric.by_language else 1
    strata = np.array([languages.index(e.language) if many > 1 else 0 for e in examples])
    # clips with the same words stand or fall together; of unknown ones each stands alone
    sentences = [f"t{e.text}" if e.text else f"i{e.id}" for e in examples]
    sums = significance.by_sentence(columns, sentences, strata)

    def combine(totals: np.ndarray) -> np.ndarray:
        if many == 1:
            return metric.combine(totals)
        return metric.combine(totals.reshape(*totals.shape[:-1], many, -1)).mean(-1)

    rivals = [y for y, name in enumerate(names) if name != "text"]
    sign = -1 if metric.lower_is_better else 1
    entries = significance.compare(sums, names.index("diva"), rivals, sign, combine)
    found = {name: entry | {"n": len(examples)} for name, entry in zip(names, entries, strict=True)}
    for entry in found.values():
        entry["best"] = entry.get("p_best", 1.0) < significance.ALPHA
    return found


def correct_for_groups(parts: list[dict[str, dict]]) -> None:
    """Holm's correction of each p over the groups: of eleven dialects, one differs by chance."""
    for system in parts[0] if parts else ():
        for kind in ("p_bootstrap", "p_permutation"):
            some = [part[system] for part in parts if kind in part[system]]
            for entry, p in zip(some, significance.holm([e[kind] for e in some]), strict=True):
                entry[kind] = p
    best = [entry for part in parts for entry in part.values() if "p_best" in entry]
    for entry, p in zip(best, significance.holm([e["p_best"] for e in best]), strict=True):
        entry["p_best"], entry["best"] = p, p < significance.ALPHA


def label_histogram(labels: Sequence[str], said: Sequence[str | None]) -> dict[str, int]:
    """How often each label was said, and what was none of them: other answers, and no answer."""
    label_of = {metrics.normalise(label): label for label in labels}
    counts = collections.Counter(
        "no answer" if text is None else label_of.get(metrics.normalise(text), "other")
        for text in said
    )
    return {name: counts[name] for name in [*labels, *metrics.NO_LABELS]}


# ---------------------------------------------------------------------------------------------
# The whole


def evaluate(
    model: str | Path,
    tasks: Sequence[str | Path] = ("toy/tasks",),
    split: str | None = None,
    limit: int = 0,
    batch_size: int = 64,
    predictions: Sequence[str] = (),
    out: str | Path | None = None,
) -> dict:
    """Score all systems on all tasks: prints the table, writes what report.py says, and returns
    what stands in eval.json. Arguments as in `main`.

    Raises ValueError or FileNotFoundError for what is missing or wrong.
    """
    if batch_size < 1 or limit < 0:
        raise ValueError(
            f"--batch-size {batch_size} --limit {limit}; expected a batch of at least one clip, "
            "and a limit of 0 (all) or more."
        )
    start, home = time.monotonic(), weights.resolve(model)
    folder = Path(out or (home if Path(model).is_dir() else Path("runs") / Path(model).name))
    folder.mkdir(parents=True, exist_ok=True)
    settings = read_tasks(tasks, split)
    items = [
        Item(name, task.ask(example), example)
        for name, task in settings.items()
        for example in (suites.sample(task.examples, limit) if limit else task.examples)
    ]
    others = dict(read_predictions(source, items) for source in predictions)
    if len(others) < len(predictions):
        raise ValueError(
            f"--predictions {' '.join(predictions)}: a name comes twice, such as "
            f"{next(iter(others))}; expected a name for each file."
        )
    kept = Predictions(folder / "predictions.jsonl", fingerprint(home))
    lacking = [{system for system in SYSTEMS if kept.lacks(system, item)} for item in items]
    if any(lacking):
        told = (kept.get("diva", item) or {} for item in items)
        heard = {i: line["heard"] for i, line in enumerate(told) if "heard" in line}
        systems.answer(
            systems.Models.load(home),
            [systems.Question(item.ask, item.example.audio, item.example.text) for item in items],
            lacking,
            heard,
            batch_size,
            lambda i, system, answer, note: kept.tell(system, items[i], answer, note),
        )
    answers = {s: [kept.get(s, item)["answer"] for item in items] for s in SYSTEMS} | others
    found: dict[str, Any] = {"model": str(model), "split": split, "limit": limit}
    found["systems"] = list(answers)
    found["errors"] = {
        item.example.audio: line["error"]
        for item in items
        if "error" in (line := kept.get("diva", item))
    }
    found["tasks"], scores = {}, collections.defaultdict(dict)
    for name, task in settings.items():
        rows = [i for i, item in enumerate(items) if item.task == name]
        said = {system: [texts[i] for i in rows] for system, texts in answers.items()}
        found["tasks"][name], single = score_task(task, [items[i] for i in rows], said)
        for metric, values in single.items():
            for i, row in zip(rows, values, strict=True):
                for system, value in zip(answers, row, strict=True):
                    scores[system, i][metric] = float(value)
    kept.finish(items, scores)
    found["seconds"] = round(time.monotonic() - start, 1)
    report.write(folder, found, items, answers, scores)
    print(report.table(found))
    return found


def main(
    model: str = "toy/diva",
    tasks: tuple[str, ...] = ("toy/tasks",),
    split: str | None = None,
    limit: int = 0,
    batch_size: int = 64,
    predictions: tuple[str, ...] = (),
    out: str | None = None,
) -> None:
    """Score a trained DiVA beside the untrained one, the cascade and the text upper bound.

    Args:
        model: folder of a trained DiVA, such as runs/toy, or a repo id.
        tasks: what to ask: SUITE=PATH for a benchmark of the paper, or a folder with tasks.json.
        split: another split than each suite's own; keep `test` for the last look.
        limit: at most so many clips of each task, drawn at random (0: all).
        batch_size: clips at a time.
        predictions: answers of other systems to the same clips, NAME=FILE.jsonl.
        out: where eval.json, predictions.jsonl, report.html and the rest go (default: the model's
            folder).
    """
    evaluate(model, tasks, split, limit, batch_size, predictions, out)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
