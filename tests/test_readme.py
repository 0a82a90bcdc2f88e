"""README says what is so: commands print what is shown, numbers are those that were measured."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train
from benchmarks import slices, toy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def console_examples() -> list[tuple[str, str]]:
    """(command, output) of every ```console block."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [
        (command.strip(), output.strip())
        for block in blocks
        for command, _, output in (part.partition("\n") for part in block.split("$ ")[1:])
    ]


@pytest.mark.parametrize("command, output", console_examples(), ids=lambda text: text[:30])
def test_the_examples_print_what_is_shown(command, output):
    """Each command of a console block, run as written, prints the lines below it."""
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == output


def test_there_is_an_example_of_every_chapter_that_answers_at_once():
    """whisper, llama and connector."""
    commands = {command.split()[1] for command, _ in console_examples()}
    assert commands >= {"whisper.py", "llama.py", "connector.py"}


def test_the_tables_are_the_measurements():
    """Both tables are what benchmarks/toy.py prints from benchmarks/toy.json."""
    measured = json.loads((ROOT / "benchmarks" / "toy.json").read_text())
    for table in toy.tables(measured).split("\n\n"):
        assert table in README


def test_the_table_of_slices_is_what_was_compiled():
    """The TPU table is what benchmarks/slices.py prints from benchmarks/slices.json."""
    rows = json.loads((ROOT / "benchmarks" / "slices.json").read_text())
    assert [(row["preset"], row["slice"]) for row in rows] == slices.SLICES
    assert slices.table(rows) in README


def test_the_longer_run_is_the_shipped_student():
    """Its scores in the table are those of toy/diva/eval.json, on the whole test split."""
    measured = json.loads((ROOT / "benchmarks" / "toy.json").read_text())
    report = json.loads((ROOT / "toy" / "diva" / "eval.json").read_text())
    assert measured["longer"] == toy.scores(ROOT / "toy" / "diva")
    assert (report["split"], report["limit"], report["errors"]) == ("test", 0, {})


def test_the_shown_table_is_that_of_the_default_command():
    """The table below the first command has the scores measured with seed 0."""
    scores = json.loads((ROOT / "benchmarks" / "toy.json").read_text())["seed 0"]["scores"]
    for metric in toy.COLUMNS:
        line = re.search(rf"^{metric} .*$", README, re.MULTILINE).group()
        numbers = [float(x) for x in re.findall(r"(?<=\s)\d+\.\d(?=[* ])", line)]
        factor = 1 if metric == "translation_bleu" else 100
        expected = [factor * scores[system][metric] for system in evaluation.SYSTEMS]
        assert numbers == pytest.approx(expected, abs=0.051)


def test_the_training_commands_are_understood():
    """Every `python train.py` command of README parses, flags and all."""
    text = README.replace("\\\n", " ")
    commands = set(re.findall(r"python train\.py([^`\n>&]*)", text))
    assert any("--preset diva-8b" in command for command in commands)
    for command in commands - {" --help"}:
        train.parse(shlex.split(command, comments=True))


def test_every_file_that_is_linked_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 8
    assert not [link for link in links if not (ROOT / link).exists()]
