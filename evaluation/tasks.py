"""Tasks: what is asked about which clips, and what counts. From tasks.json, or SUITE=PATH.

Reads: suites.py, voicebench.py, systems.py, metrics.py.   Read next: predictions.py.
"""

import collections
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation import metrics, suites, systems, voicebench
from evaluation.systems import Ask
from runtime import files

SUITES = collections.ChainMap(voicebench.SUITES, suites.SUITES)  # which names the latter first
PATHS = {"audio", "common_voice", "unpack"}  # those of the readers' options that are paths


@dataclasses.dataclass(frozen=True)
class Task:
    """Clips with references, what is asked about them, and what counts."""

    suite: str  # of SUITES
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
        if equals and name in (*SUITES, "voicebench"):
            names = map(voicebench.task_of, voicebench.BOARD) if name == "voicebench" else [name]
            entries = {name: {"path": path} for name in names}
            where, folder = f"--tasks {source}", Path()
        else:
            file = Path(source) / "tasks.json" if Path(source).is_dir() else Path(source)
            if not file.is_file():
                raise FileNotFoundError(
                    f"{source}: no such tasks; expected a tasks.json, a folder with one like "
                    f"toy/tasks, or SUITE=PATH with voicebench, {', '.join(SUITES)}. Check --tasks."
                )
            entries, where, folder = files.read_json(file), str(file), file.parent
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
    if not isinstance(suite_name, str) or suite_name not in SUITES:
        raise ValueError(
            f"{where}: unknown suite {suite_name!r}; expected one of {', '.join(SUITES)} "
            '(for a JSONL file of your own: "suite": "manifest").'
        )
    suite = SUITES[suite_name]
    known = {"path": "", "suite": "", "prompt": suite.prompt, "metrics": [*suite.metrics]}
    known |= {"labels": [*suite.labels], "label_score": "first_token"}
    known |= {"max_new_tokens": suite.max_new_tokens}
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
    _check_answers(task, where)
    return task


def _check_answers(task: Task, where: str) -> None:
    """Raises ValueError if the labels cannot be told apart, or an example does not fit the task."""
    labels = [metrics.normalise(label) for label in task.labels]
    if len({*labels, *metrics.NO_LABELS}) < len(labels) + len(metrics.NO_LABELS):
        raise ValueError(
            f"{where}: labels {', '.join(task.labels)}; expected labels that differ in more than "
            f"case and punctuation, and none called {' or '.join(metrics.NO_LABELS)}. Rename some."
        )
    for example in task.examples:
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
