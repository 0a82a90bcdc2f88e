"""What the toy universe shows: `python -m benchmarks.toy` (hours on 2 cores; goes on where it was).

    default   the default command with three seeds, beside the other systems
    weights   how much of each response loss, beside the alignment: chosen on the dev split
    grid      how many tokens of the teacher's answer are distilled, by which loss; then without
              alignment, and without response: shorter runs, on the test split

The grid begins with one seed of each row. Prints toy/README.md's tables. What is known stands in
runs/benchmarks/toy.json as soon as a run is done, and is not run again: begin with a copy of
benchmarks/toy.json to go on from there.
"""

import functools
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from benchmarks import side_by_side
from evaluation import metrics, systems, tasks
from runtime import files

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
SEEDS = 0, 1, 2
STEPS = {"dev": 1500, "test": 3000}  # of a run that chooses a weight, and of one of the grid
COLUMNS = {  # heading: (task, metric) in eval.json
    "spoken QA %": ("spoken_qa", "exact_match"),
    "translation exact %": ("translation", "exact_match"),
    "BLEU": ("translation", "bleu"),
    "emotion %": ("emotion", "accuracy"),
    "repeat WER %": ("repeat", "wer"),
    "ignores prompt %": ("spoken_qa", "prompt_ignoring"),
}
MORE = {"KL, nats": 3, "CPU-min": 1}  # of the grid: of whole answers, 64 dev clips; of training
TOKENS = 1, 2, 4, "all"
TRIED = {  # weights, with TUNED tokens
    "l2": (0.3, 1, 3, 10),
    "gram": (0.3, 1, 3, 10),
    "kl": (0.3, 1, 3, 10),
}
TUNED = 4


def flags_of(tokens: int | str, loss: str, weight: float, more: str = "") -> str:
    """The part of a command line that tells a run of the grid."""
    found = f"--response-tokens {tokens} --response-loss {loss} --response-weight {weight:g}"
    return f"{found} {more}".strip()


def rows(weight: dict[str, float]) -> dict[str, str]:
    """{a row of the grid: its flags}, for the weight of each loss."""
    found = {
        f"{tokens} by {loss}": flags_of(tokens, loss, weight[loss])
        for tokens in TOKENS
        for loss in TRIED
    }
    for tokens in TOKENS[0], TOKENS[-1]:
        found[f"{tokens} by l2, no alignment"] = flags_of(
            tokens, "l2", weight["l2"], "--align-weight 0"
        )
    found["alignment alone"] = "--response-weight 0"
    return found


# --------------------------------------------------------------------------------------- measuring


def train(flags: str, out: Path) -> dict[str, float]:
    """A run of train.py: CPU-minutes, and the last KL of the watched clips."""
    command = ["train.py", "--out", str(out.relative_to(ROOT)), *flags.split()]
    print("$ python", *command, flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = (out / "metrics.jsonl").read_text().splitlines()
    watched = [line["kl"] for line in map(json.loads, lines) if "kl" in line]
    return {"KL, nats": round(watched[-1], 4), "CPU-min": round(seconds / 60, 2)}


def compared(flags: str, out: Path) -> dict:
    """Training, and the scores of all systems, by the evaluation that it ends with."""
    trained = train(flags, out)
    return {"flags": flags} | trained | scores(out)


def scores(folder: Path) -> dict:
    """{"scores": {system: {heading: score}}} of folder/eval.json."""
    found = files.read_json(folder / "eval.json")["tasks"]
    return {
        "scores": {
            system: {
                heading: round(found[task]["metrics"][metric][system]["score"], 3)
                for heading, (task, metric) in COLUMNS.items()
            }
            for system in systems.SYSTEMS
        }
    }


@functools.cache
def asked(split: str) -> list[tasks.Item]:
    """All clips of a split with what is asked of them."""
    settings = tasks.read_tasks([ROOT / "toy/tasks"], split)
    return [tasks.Item(n, t.ask(e), e) for n, t in settings.items() for e in t.examples]


def diva_alone(folder: Path, split: str) -> dict[str, float]:
    """{heading: score} of a student on a split; the other systems are not asked again."""
    items, said = asked(split), {}
    questions = [systems.Question(item.ask, item.example.audio, "") for item in items]
    unheard = dict.fromkeys(range(len(items)), "")  # nobody asks for Whisper's transcripts

    def tell(i: int, system: str, answer: str | None, note: dict) -> None:
        said[i] = answer

    models = systems.Models.load(folder)
    systems.answer(models, questions, [{"diva"}] * len(items), unheard, 64, tell)
    found = {}
    for heading, (task, name) in COLUMNS.items():
        metric = metrics.METRICS[name]
        counts = [
            metric.measure(said[i], item.example, item.ask.labels)
            for i, item in enumerate(items)
            if item.task == task
        ]
        found[heading] = round(float(metric.combine(np.sum(counts, axis=0))), 3)
    return found


def alone(flags: str, seed: int, out: Path, split: str) -> dict:
    """A short run and its scores on a split."""
    trained = train(f"{flags} --steps {STEPS[split]} --seed {seed} --tasks None", out)
    return {"flags": flags} | trained | {split: diva_alone(out, split)}


def choose(known: dict[str, dict]) -> dict[str, float]:
    """{loss: the weight that is best on the dev split}."""

    def worth(loss: str, weight: float) -> float:
        found = known[f"{loss} x {weight:g}"]["dev"]
        asks = "spoken QA %", "translation exact %", "emotion %"
        return sum(found[heading] for heading in asks) - found["repeat WER %"]

    return {
        loss: max(weights, key=functools.partial(worth, loss)) for loss, weights in TRIED.items()
    }


def measure(known: dict) -> Iterator[None]:
    """Adds to `known` what is lacking in it, and stops after each run."""
    runs = ROOT / "runs"
    for part in ("default", "weights", "grid"):
        known.setdefault(part, {})
    for seed in SEEDS:
        if f"seed {seed}" not in known["default"]:
            out = runs / f"toy-seed-{seed}"
            known["default"][f"seed {seed}"] = compared(f"--seed {seed}", out)
            yield
    for loss, weights in TRIED.items():
        for weight in weights:
            name, flags = f"{loss} x {weight:g}", flags_of(TUNED, loss, weight)
            if name not in known["weights"]:
                known["weights"][name] = alone(flags, 0, runs / f"toy-{loss}-{weight:g}", "dev")
                yield
    for seed in SEEDS:
        for name, flags in rows(choose(known["weights"])).items():
            row = known["grid"].setdefault(name, {})
            if f"seed {seed}" not in row:
                out = runs / f"toy-{name.replace(',', '').replace(' ', '-')}-{seed}"
                row[f"seed {seed}"] = alone(flags, seed, out, "test")
                yield


# ------------------------------------------------------------------------------------------ tables


def cells(runs: list[dict[str, float]], digits: dict[str, int]) -> str:
    """One score each, or the mean of several with the lowest and the highest."""
    texts = []
    for heading, n in digits.items():
        values = [run[heading] for run in runs]
        text = f"{sum(values) / len(values):.{n}f}"
        if len(values) > 1:
            text += f" ({min(values):.{n}f}-{max(values):.{n}f})"
        texts.append(text)
    return " | ".join(texts)


def head(first: str, headings: list[str]) -> str:
    return f"| {first} | {' | '.join(headings)} |\n|---|{'--:|' * len(headings)}"


def systems_table(known: dict) -> str:
    """The default command beside the other systems."""
    digits, seeds = dict.fromkeys(COLUMNS, 1), [run["scores"] for run in known["default"].values()]
    names = {
        "untrained": "untrained connector",
        "diva": f"**DiVA, default run**, {len(seeds)} seeds",
        "cascade": "cascade: Whisper, then the LLM",
        "text": "text: the LLM reads the transcript",
    }
    lines = [head("system", [*COLUMNS])]
    for system, name in names.items():
        some = seeds if system == "diva" else seeds[:1]
        lines.append(f"| {name} | {cells([run[system] for run in some], digits)} |")
    return "\n".join(lines)


def grid_table(known: dict) -> str:
    """The rows of the grid that were run, with the number of their seeds."""
    digits = dict.fromkeys(COLUMNS, 1) | MORE
    weight = choose(known["weights"])
    lines = [head("tokens of the answer, loss", ["weight", "seeds", *digits])]
    for name in filter(known["grid"].get, rows(weight)):
        runs = known["grid"][name]
        loss = next((loss for loss in TRIED if f"by {loss}" in name), None)
        some = [run["test"] | {heading: run[heading] for heading in MORE} for run in runs.values()]
        much = f"{weight[loss]:g}" if loss else "0"
        lines.append(f"| {name} | {much} | {len(some)} | {cells(some, digits)} |")
    return "\n".join(lines)


def weights_table(known: dict) -> str:
    """What each weight of each loss scored on the dev split."""
    some = [heading for heading in COLUMNS if heading not in ("BLEU", "ignores prompt %")]
    digits = dict.fromkeys(some, 1) | MORE
    lines = [head(f"{TUNED} tokens, loss x weight (dev)", [*digits])]
    for name, run in known["weights"].items():
        lines.append(f"| {name} | {cells([run['dev'] | run], digits)} |")
    return "\n".join(lines)


def main() -> None:
    fresh = side_by_side.fresh(FILE)
    known = files.read_json(fresh) if fresh.is_file() else {}
    for _ in measure(known):
        side_by_side.write(FILE, known)
    print(systems_table(known), weights_table(known), grid_table(known), sep="\n\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
