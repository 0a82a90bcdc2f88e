"""What the toy universe shows: `python -m benchmarks.toy` (about 45 minutes on 2 cores).

Runs the default command with three seeds and each ablation with one, evaluates all of them and the
shipped student on the test split, and prints toy/README.md's tables. A run that is finished is not
run again; what was measured is kept in benchmarks/toy.json.
"""

import json
import subprocess
import sys
from pathlib import Path

import tyro

from evaluation import systems

ROOT = Path(__file__).parents[1]
SEEDS = {"seed 0": "", "seed 1": "--seed 1", "seed 2": "--seed 2"}
ABLATIONS = {
    "no token alignment": "--align-weight 0",
    "no response distillation": "--response-weight 0",
    "response by gram": "--response-loss gram",
    "response by exact KL": "--response-loss kl",
}
COLUMNS = {  # heading: (task, metric) in eval.json
    "spoken QA %": ("spoken_qa", "exact_match"),
    "translation exact %": ("translation", "exact_match"),
    "BLEU": ("translation", "bleu"),
    "emotion %": ("emotion", "accuracy"),
    "repeat WER %": ("repeat", "wer"),
    "ignores prompt %": ("spoken_qa", "prompt_ignoring"),
}


def measure(flags: str) -> dict:
    """The scores of all systems after one run of train.py, and the seconds that its steps took."""
    out = "runs/toy" + "".join(f"-{word}" for word in flags.replace("--", "").split())
    command = ["train.py", "--out", out, *flags.split()]
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    out = ROOT / out
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(step["seconds"] for step in steps)
    return {"flags": flags, "steps": len(steps), "seconds": round(seconds)} | scores(out)


def scores(folder: Path) -> dict:
    """{"scores": {system: {heading: score}}} of folder/eval.json."""
    tasks = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["tasks"]
    return {
        "scores": {
            system: {
                heading: round(tasks[task]["metrics"][metric][system]["score"], 3)
                for heading, (task, metric) in COLUMNS.items()
            }
            for system in systems.SYSTEMS
        }
    }


def cells(runs: list[dict[str, float]]) -> str:
    """One score, or the mean of several with the lowest and the highest."""
    texts = []
    for heading in COLUMNS:
        values = [run[heading] for run in runs]
        text = f"{sum(values) / len(values):.1f}"
        if len(values) > 1:
            text += f" ({min(values):.1f}-{max(values):.1f})"
        texts.append(text)
    return " | ".join(texts)


def tables(measured: dict[str, dict]) -> str:
    """The tables, in Markdown: the systems, then what each loss buys."""
    seeds = [measured[name]["scores"] for name in SEEDS]
    head = " | ".join(COLUMNS)
    head = f"| {{}} | {head} |\n|---|{'--:|' * len(COLUMNS)}"
    lines = [
        head.format("system"),
        f"| untrained connector | {cells([seeds[0]['untrained']])} |",
        f"| **DiVA, default run**, 3 seeds | {cells([run['diva'] for run in seeds])} |",
        f"| DiVA, longer run (`toy/diva`) | {cells([measured['longer']['scores']['diva']])} |",
        f"| cascade: Whisper, then the LLM | {cells([seeds[0]['cascade']])} |",
        f"| text: the LLM reads the transcript | {cells([seeds[0]['text']])} |",
        "",
        head.format("losses (seed 0)"),
        f"| both, response by l2 (the default) | {cells([seeds[0]['diva']])} |",
    ]
    for name in ABLATIONS:
        flags = measured[name]["flags"]
        lines.append(f"| {name} (`{flags}`) | {cells([measured[name]['scores']['diva']])} |")
    return "\n".join(lines)


def main() -> None:
    file = ROOT / "benchmarks" / "toy.json"
    measured = {"longer": scores(ROOT / "toy" / "diva")}
    for name, flags in (SEEDS | ABLATIONS).items():
        measured[name] = measure(flags)
    file.write_text(json.dumps(measured, indent=2) + "\n")
    print(tables(measured))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
