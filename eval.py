"""Evaluation: what is compared, and how. The answers of all systems to all tasks, and the scores.

    python eval.py --model runs/toy                                      the toy universe
    python eval.py --model DIVA --tasks heysquad=/data/HeySQuAD meld=/data/MELD.Raw ...
    python eval.py --model DIVA --tasks mine/tasks.json --predictions SALMONN=salmonn.jsonl

    for each task:  clips with references, a prompt, metrics
        for each of untrained, DiVA, cascade, text:  an answer to every clip
            a score with its interval, and p of its difference from DiVA

Each answer is written to predictions.jsonl as soon as it is known and is not asked for again: a run
that was stopped goes on, and one that is repeated only counts anew.

Annex: evaluation/ reads the sets (suites.py) and tasks.json (tasks.py), lets the systems answer in
batches (systems.py), counts (metrics.py), draws anew (significance.py) and shows it (report.py).

Axes: N items, Y systems, C numbers of a metric.
Reads: weights.py.   Read next: demo.py.
"""

import collections
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import weights
from evaluation import metrics, published, report, significance, suites, systems, voicebench
from evaluation.degrade import conditions
from evaluation.predictions import Predictions, fingerprint, read_predictions
from evaluation.systems import SYSTEMS
from evaluation.tasks import Item, Task, read_tasks
from runtime import cli, sharding

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
        if not metrics.can_count(name, examples, answers):
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
            "expected at least one metric that applies (pedant needs its package, judged a judge). "
            "The answers are kept: correct tasks.json and start again."
        )
    for entry in found["metrics"].get("accuracy", {}).values() if task.labels else ():
        right = round(entry["score"] * len(items) / 100)
        entry["p_chance"] = significance.against_chance(right, len(items), len(task.labels))
    if figures := published.PUBLISHED.get(task.suite):
        found["published"] = figures
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
    degrade: Sequence[str] = (),
    out: str | Path | None = None,
) -> dict:
    """Score all systems on all tasks: prints the table, writes what report.py says, and returns
    what stands in eval.json; of several processes the first does so. Arguments as in `main`.

    Raises ValueError or FileNotFoundError for what is missing or wrong.
    """
    if batch_size < 1 or limit < 0:
        raise ValueError(
            f"--batch-size {batch_size} --limit {limit}; expected a batch of at least one clip, "
            "and a limit of 0 (all) or more."
        )
    start, settings = time.monotonic(), read_tasks(tasks, split)
    items = [
        Item(name, task.ask(example), example)
        for name, task in settings.items()
        for example in conditions(some(task.examples, limit), task.examples, degrade)
    ]
    others, home = read_others(predictions, items), weights.resolve(model)
    folder = results_in(model, home, out)
    folder.mkdir(parents=True, exist_ok=True)
    kept = Predictions(folder / "predictions.jsonl", fingerprint(home), jax.process_index())
    ask_what_is_lacking(home, items, kept, batch_size)
    if jax.process_index() > 0:
        return {}
    answers = {s: [kept.get(s, item)["answer"] for item in items] for s in SYSTEMS} | others
    found: dict[str, Any] = {"model": str(model), "split": split, "limit": limit}
    found |= {"degrade": list(degrade)} if degrade else {}
    found |= {"systems": list(answers), "errors": kept.errors(items)}
    found["tasks"], scores = score(settings, items, answers, folder)
    suite_of = {name: task.suite for name, task in settings.items()}
    if board := voicebench.board(folder, suite_of, list(answers)):
        found["voicebench"] = board
    kept.finish(items, scores)
    found["seconds"] = round(time.monotonic() - start, 1)
    heard = [kept.get("diva", item) for item in items]
    report.write(folder, found, items, answers, scores, heard)
    print(report.table(found))
    return found


def score(
    settings: dict[str, Task], items: list[Item], answers: dict[str, list], folder: Path
) -> tuple[dict[str, dict], dict[tuple[str, int], dict[str, float]]]:
    """{task: what eval.json says of it}, and {(system, item): {metric: score of its answer}}."""
    found, scores = {}, collections.defaultdict(dict)
    for name, task in settings.items():
        rows = [i for i, item in enumerate(items) if item.task == name]
        said = {system: [texts[i] for i in rows] for system, texts in answers.items()}
        if task.suite in voicebench.SUITES:
            voicebench.export(folder, name, [items[i].example for i in rows], said)
            voicebench.import_verdicts(folder, name, list(said))
        found[name], single = score_task(task, [items[i] for i in rows], said)
        for metric, values in single.items():
            for i, row in zip(rows, values, strict=True):
                for system, value in zip(answers, row, strict=True):
                    scores[system, i][metric] = float(value)
    return found, scores


def some(examples: list[suites.Example], limit: int) -> list[suites.Example]:
    """`limit` of them, drawn at random; all, if it is 0."""
    groups = [example.group for example in examples]
    return [examples[i] for i in significance.sample(groups, limit or len(groups))]


def results_in(model: str | Path, home: Path, out: str | Path | None) -> Path:
    """`out`; else the folder of a run; else runs/NAME: nothing of ours is written beside weights
    that came from elsewhere."""
    if out is not None:
        return Path(out)
    of_run = Path(model).is_dir() and (home / "train.json").is_file()
    return home if of_run else Path("runs") / Path(model).name


def read_others(predictions: Sequence[str], items: list[Item]) -> dict[str, list[str | None]]:
    """{name: answers} of NAME=FILE.jsonl. Raises ValueError, also where a name comes twice."""
    others = dict(read_predictions(source, items) for source in predictions)
    if len(others) < len(predictions):
        raise ValueError(
            f"--predictions {' '.join(predictions)}: a name comes twice, such as "
            f"{next(iter(others))}; expected a name for each file."
        )
    return others


def ask_what_is_lacking(home: Path, items: list[Item], kept: Predictions, batch_size: int) -> None:
    """Let each system answer what it has not answered before; loads nothing if that is nothing.
    Of several processes each asks about its own clips, and then knows what the others were told."""
    clips = [*dict.fromkeys(item.example.audio for item in items)]
    mine = {*clips[jax.process_index() :: jax.process_count()]}
    lacking = [
        {system for system in SYSTEMS if item.example.audio in mine and kept.lacks(system, item)}
        for item in items
    ]
    if any(lacking):
        told = (kept.get("diva", item) or {} for item in items)
        known = {i: line["transcript"] for i, line in enumerate(told) if "transcript" in line}
        systems.answer(
            systems.Models.load(home),
            [systems.Question(item.ask, item.example.audio, item.example.text) for item in items],
            lacking,
            known,
            batch_size,
            lambda i, system, answer, note: kept.tell(system, items[i], answer, note),
        )
    if jax.process_count() > 1:
        kept.close()
        sharding.wait_for_all()
        kept.read()


def main(
    model: str = "toy/diva",
    tasks: tuple[str, ...] = ("toy/tasks",),
    split: str | None = None,
    limit: int = 0,
    batch_size: int = 64,
    predictions: tuple[str, ...] = (),
    degrade: tuple[str, ...] = (),
    out: str | None = None,
) -> None:
    """Score a trained DiVA beside the untrained one, the cascade and the text upper bound.

    Args:
        model: folder of a trained DiVA, such as runs/toy, or a repo id.
        tasks: what to ask: SUITE=PATH for a benchmark of the paper, or a folder with tasks.json.
        split: another split than each suite's own; keep `test` for the last look.
        limit: at most so many clips of each task, at random, of each group its share (0: all).
        batch_size: clips at a time.
        predictions: answers of other systems to the same clips, NAME=FILE.jsonl.
        degrade: ask each clip also with noise and the like, such as babble:10 white:0 reverb.
        out: where eval.json, predictions.jsonl, report.html and the rest go (default: the folder
            of a run; of any other model runs/NAME).
    """
    sharding.join_cluster()
    evaluate(model, tasks, split, limit, batch_size, predictions, degrade, out)


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
