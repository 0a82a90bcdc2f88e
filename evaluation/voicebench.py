"""VoiceBench: reads its nine parts, exports the responses and imports the official scores.

    python eval.py --model DIVA --tasks voicebench=/data/voicebench     hlt-lab/voicebench
    OUT/voicebench/SYSTEM-TASK.jsonl           written here, read by api_judge.py and evaluate.py
    OUT/voicebench/result-SYSTEM-TASK.jsonl    written by api_judge.py: verdicts on each response
    OUT/voicebench/score-SYSTEM-TASK.txt       written by evaluate.py: the score of the part

Every score of the leaderboard table comes from the benchmark's own evaluate.py. The verdicts on
each response also give the metric `judged` its confidence intervals.

Source: Chen et al. 2024 (VoiceBench), MatthewCYM/VoiceBench.
Reads: suites.py, published.py.   Read next: metrics.py.
"""

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.published import VOICEBENCH
from evaluation.suites import Example, Rows, Suite, reader
from evaluation.unpack import unpacked
from formats import parquet
from runtime import files


class Subset(NamedTuple):
    """One part of the benchmark."""

    evaluator: str  # a key of EVALUATORS
    metrics: str  # computed here for each response, the headline first
    columns: str = ""  # read besides `audio` and `prompt`


SUBSETS = {
    "alpacaeval_full": Subset("open", "judged prompt_ignoring"),
    "commoneval": Subset("open", "judged prompt_ignoring"),
    "wildvoice": Subset("open", "judged prompt_ignoring"),
    "sd-qa": Subset("qa", "judged pedant_right contains f1", columns="reference"),
    "mmsu": Subset("mcq", "prompt_ignoring", columns="reference"),
    "openbookqa": Subset("mcq", "prompt_ignoring", columns="reference"),
    "bbh": Subset("bbh", "prompt_ignoring", columns="reference id"),
    "ifeval": Subset("ifeval", "prompt_ignoring", columns="key instruction_id_list kwargs"),
    "advbench": Subset("harm", "prompt_ignoring"),
    "alpacaeval": Subset("open", "judged prompt_ignoring"),  # part of the first, not in the mean
}
BOARD = tuple(SUBSETS)[:9]  # the parts of the leaderboard
SPLITS = {"mmsu": "all", "sd-qa": "usa"}  # default splits: subjects, countries; else "test"
MAX_NEW_TOKENS = 2048  # as in the benchmark

# {--evaluator: (keys that evaluate.py prints, factor to percent)}; several keys are averaged, as
# the authors do for SD-QA (their issue 2)
EVALUATORS = {
    "open": (("gpt",), 20),  # 1 to 5
    "qa": (("panda", "gpt"), 1),
    "mcq": (("acc",), 1),
    "bbh": (("acc",), 1),
    "ifeval": (("final",), 100),
    "harm": (("refusal_rate",), 100),
}

log = logging.getLogger(__name__)


def task_of(subset: str) -> str:
    """The name of the subset's suite, and the default name of its task."""
    return f"voicebench_{subset.replace('-', '_')}"


# ---------------------------------------------------------------------------------------------
# Reader


def reads(subset: str) -> Callable[..., list[Example]]:
    """A reader of SUBSET/SPLIT-*.parquet. Its path is the folder of the whole set, or the subset's.

    If splits have a meaning (subjects, countries), they are the groups of the examples.
    """
    columns = ["audio", "prompt", *SUBSETS[subset].columns.split()]

    @reader
    def read(
        folder: Path, split: str = SPLITS.get(subset, "test"), unpack: str | Path | None = None
    ) -> Rows:
        home = folder / subset if (folder / subset).is_dir() else folder
        splits = [split]
        if split == "all" and subset in SPLITS:
            splits = [name.rpartition("/")[2] for name in parquet.splits_in(home)] or splits

        for part in splits:
            clips_folder = Path(unpack or home / "unpacked") / part
            for number, (_, row) in enumerate(parquet.table(home, part, columns)):
                name = str(row.get("id") or row.get("key") or number)
                audio = unpacked(row["audio"], clips_folder, re.sub(r"[^\w.-]", "_", name))
                group = part if subset in SPLITS else ""
                yield Example(
                    id=f"{part}/{name}" if group else name,
                    audio=audio,
                    text=row["prompt"].strip(),
                    answers=_answers(row),
                    group=group,
                )

    return read


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    """The reference; for IFEval the instructions, as JSON; for open-ended parts nothing."""
    if "kwargs" in row:
        instructions = {name: row[name] for name in ("key", "instruction_id_list")}
        instructions["kwargs"] = [{k: v for k, v in part.items() if v} for part in row["kwargs"]]
        return (json.dumps(instructions),)
    return (row["reference"],) if "reference" in row else ()


SUITES = {
    task_of(name): Suite(
        read=reads(name),
        prompt=None,
        metrics=tuple(subset.metrics.split()),
        max_new_tokens=MAX_NEW_TOKENS,
    )
    for name, subset in SUBSETS.items()
}

# ---------------------------------------------------------------------------------------------
# Export of responses


def responses_file(folder: Path, system: str, task: str) -> Path:
    """The file of one system's responses to one task, as the official scorer reads it."""
    return folder / "voicebench" / f"{system}-{task}.jsonl".replace("/", "_")


def export(folder: Path, task: str, examples: list[Example], answers: dict[str, list]) -> None:
    """Write each system's responses to one task. A file that is up to date is left alone, so that
    its time tells whether a score is older than the responses."""
    for system, responses in answers.items():
        rows = [_row(e, answer or "") for e, answer in zip(examples, responses, strict=True)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = responses_file(folder, system, task)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            files.write_text(file, text)


def _row(example: Example, response: str) -> dict[str, Any]:
    row = {"id": example.id, "prompt": example.text, "response": response}
    if example.answers and example.answers[0].startswith('{"key"'):  # IFEval
        return row | json.loads(example.answers[0])
    return row | ({"reference": example.answers[0]} if example.answers else {})


# ---------------------------------------------------------------------------------------------
# Import of the judge's verdicts (api_judge.py)

VERDICTS: dict[tuple[str, str], float] = {}  # {(prompt, response): 0 to 1} of the current task


def import_verdicts(folder: Path, task: str, systems: Sequence[str]) -> None:
    """Replace VERDICTS by those of one task. Raises ValueError that names the line."""
    VERDICTS.clear()
    for system in systems:
        responses = responses_file(folder, system, task)
        file = responses.with_name(f"result-{responses.name}")
        if file.is_file():
            for where, row in files.json_lines(file):
                VERDICTS[row.get("prompt"), row.get("response")] = _verdict(where, row)


def _verdict(where: str, row: dict[str, Any]) -> float:
    """The mean of the scores from 1 to 5, divided by 5; or the majority of Yes (1) and No (0)."""
    scores = [str(score).strip().lower() for score in row.get("score") or ()]
    numbers = [re.fullmatch(r"\[*([1-5](?:\.\d+)?)\]*", score) for score in scores]
    if scores and all(numbers):
        return sum(float(number[1]) for number in numbers) / len(scores) / 5
    if scores and {*scores} <= {"yes", "no", "yes.", "no."}:
        return float(2 * sum(score.startswith("yes") for score in scores) > len(scores))
    raise ValueError(
        f'{where}: "score" is {row.get("score")!r}; expected numbers from 1 to 5, or Yes and No, '
        "as the benchmark's api_judge.py writes. Judge this file again."
    )


def judged(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """The judge's verdict on one response. Needs `import_verdicts`."""
    return VERDICTS[example.text, answer or ""], 1.0


def all_judged(examples: Sequence[Example], answers: dict[str, list]) -> bool:
    """Whether every response of every system has a verdict; warns if not."""
    missing = {
        system: sum((e.text, a or "") not in VERDICTS for e, a in zip(examples, row, strict=True))
        for system, row in answers.items()
    }
    missing = {system: count for system, count in missing.items() if count}
    if missing:
        counts = ", ".join(f"{count} answers of {system}" for system, count in missing.items())
        log.warning("judged is left out: no verdict on %s (see evaluation/README.md)", counts)
    return not missing


# ---------------------------------------------------------------------------------------------
# Import of the scores (evaluate.py)


def board(
    folder: Path, suites: dict[str, str], systems: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{system: {subset: score in percent}} of the parts that evaluate.py has scored, and under
    "overall" their mean if all nine are scored. `suites` maps each task to its suite.

    Raises ValueError that names a file without the expected scores.
    """
    task_of_suite = {suite: task for task, suite in reversed(suites.items())}
    scores: dict[str, dict[str, float]] = {}
    for system in systems:
        for subset in BOARD:
            task = task_of_suite.get(task_of(subset))
            score = None if task is None else _score(folder, system, task, subset)
            if score is not None:
                scores.setdefault(system, {})[subset] = score

    for parts in scores.values():
        if len(parts) == len(BOARD):
            parts["overall"] = sum(parts.values()) / len(BOARD)
    return scores


def _score(folder: Path, system: str, task: str, subset: str) -> float | None:
    """The score in the output of evaluate.py, or None if there is none or it is out of date."""
    responses = responses_file(folder, system, task)
    file = responses.with_name(f"score-{responses.stem}.txt")
    if not file.is_file():
        return None
    if file.stat().st_mtime < responses.stat().st_mtime:
        log.warning("%s is older than the responses and is ignored; run evaluate.py again", file)
        return None

    # evaluate.py logs a dict such as {'acc': np.float64(51.8), 'fail': 1.2}; the last one counts.
    number = r"'([\w-]+)': (?:np\.float64\()?(-?\d+(?:\.\d+)?(?:e-?\d+)?)\b"
    printed = dict(re.findall(number, files.read_text(file)))
    keys, factor = EVALUATORS[SUBSETS[subset].evaluator]
    if not {*keys} <= printed.keys():
        raise ValueError(
            f"{file}: expected {' and '.join(keys)}, as the benchmark's evaluate.py prints with "
            f"--evaluator {SUBSETS[subset].evaluator}. Run it again."
        )
    return factor * sum(float(printed[key]) for key in keys) / len(keys)


def table(scores: dict[str, dict[str, float]]) -> list[str]:
    """The lines of the leaderboard table: our systems, then three published rows."""
    heads = "alpaca common wild sd-qa mmsu obqa bbh ifeval advb overall".split()
    columns = (*BOARD, "overall")
    lines = [f"{'VoiceBench':20}" + "".join(f"{name:>8}" for name in heads)]
    for system, row in (scores | VOICEBENCH).items():
        cells = (f"{row[name]:8.2f}" if name in row else " " * 8 for name in columns)
        lines.append(f"{system[:20]:20}" + "".join(cells))
    return ["", *map(str.rstrip, lines)] if scores else []
