"""READMEs say what is so: commands print what is shown, numbers are those that were measured."""

import dataclasses
import functools
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import test_cost
import tyro

import connector
import demo
import eval as evaluation
from benchmarks import pair, slices, toy
from evaluation import suites, systems
from runtime import files
from runtime.cli import EXAMPLE
from training import cost, recipe

ROOT = Path(__file__).parents[1]
PACKAGES = "runtime formats training evaluation serving".split()
ROOMS = ("", *PACKAGES, "toy", "benchmarks", "tests")
TEXTS = {room: (ROOT / room / "README.md").read_text(encoding="utf-8") for room in ROOMS}
README, ALL = TEXTS[""], "\n".join(TEXTS.values())


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


def test_the_default_clip_says_what_readme_says():
    """As the list of the test split has it, and as Whisper and the shipped student hear it."""
    rows = files.table(ROOT / "toy/common_voice/en/test.tsv", ["path", "sentence"], [], **files.TSV)
    (said,) = (row["sentence"] for _, row in rows if row["path"] == EXAMPLE.name)
    assert f'says "{said}"' in " ".join(README.split())
    outputs = {tuple(line.split()[1:]): output for line, output in console_examples()}
    assert outputs["whisper.py",] == said
    assert outputs["connector.py",].splitlines()[1].endswith(said)


def test_there_is_an_example_of_every_chapter_that_answers_at_once():
    """whisper, llama and connector."""
    commands = {command.split()[1] for command, _ in console_examples()}
    assert commands >= {"whisper.py", "llama.py", "connector.py"}


def test_the_tables_are_the_measurements():
    """They are what benchmarks/toy.py prints from benchmarks/toy.json."""
    measured = json.loads(toy.FILE.read_text())
    for table in (toy.systems_table, toy.weights_table, toy.grid_table):
        assert table(measured) in TEXTS["toy"]
    assert toy.systems_table(measured) in README


def test_the_real_pairs_scores_are_the_measurement():
    """The first table that benchmarks/pair.py prints from benchmarks/pair.json."""
    scores, _ = pair.table(json.loads(pair.FILE.read_text())).split("\n\n")
    assert scores in README


def test_the_tables_of_slices_are_what_was_compiled():
    """Both are what benchmarks/slices.py prints from benchmarks/slices.json; of the published slice
    README says it again."""
    rows = json.loads((ROOT / "benchmarks" / "slices.json").read_text())
    found = [(row["preset"], row["slice"], row["flags"]) for row in rows]
    assert found == slices.WANTED
    tables = slices.table(rows).split("\n\n")
    assert len(tables) == 2 and all(table in TEXTS["training"] for table in tables)
    memory, room = (rows[0][name] / cost.GIB for name in ("memory", "room"))
    said = (
        f"{memory:.1f} of {room:.0f} GiB a chip, {rows[0]['step_seconds'][1]:.2f} s at 40 % of peak"
    )
    assert said in " ".join(README.split())


@pytest.mark.parametrize("row", json.loads(slices.FILE.read_text()), ids=str)
def test_what_was_compiled_for_a_slice_does_the_products_of_its_recipe(row):
    """Queries and window as asked for: the products by hand, what is computed again, and the head
    of the template on each chip."""
    config = recipe.parse(["--preset", row["preset"], *row["flags"].split()])
    asr = connector.with_window(cost.PUBLISHED[config.whisper], config.window)
    llm, way = cost.PUBLISHED[config.llm], row["remat"]
    queries = config.queries or asr.max_target_positions
    by_hand = sum(test_cost.flops(asr, llm, queries, cost.TEXT).values())
    assert row["flops"] == by_hand
    again = test_cost.computed_again(asr, llm, queries, way)
    mel = test_cost.mel_products(asr) + test_cost.spectrum_products(asr)
    once = test_cost.shared_products(llm, way) * row["chips"] / config.batch_size
    # one of these programs has the scores of Whisper's encoder twice: for their maximum, and again
    scores = 2 * asr.encoder_layers * asr.max_source_positions**2 * asr.d_model
    expected = by_hand + again + mel + once
    expected += scores * (row["slice"] == "v6e:8x8" and bool(row["flags"]))
    assert row["flops_compiled"] == pytest.approx(expected, rel=1e-3)


def test_the_shipped_student_is_the_default_run_s():
    """It scores on the whole test split as the run of seed 0 did, but for its half precision."""
    report = json.loads((ROOT / "toy" / "diva" / "eval.json").read_text())
    assert (report["split"], report["limit"], report["errors"]) == (None, 0, {})
    assert [part["n"] for part in report["tasks"].values()] == [891, 460, 409, 440]
    shipped = toy.scores(ROOT / "toy" / "diva")["scores"]
    run = json.loads(toy.FILE.read_text())["default"]["seed 0"]["scores"]
    for system in systems.SYSTEMS:
        assert shipped[system] == pytest.approx(run[system], abs=1)


def test_the_shown_table_is_that_of_the_default_command():
    """The table below the first command has the scores measured with seed 0."""
    scores = json.loads(toy.FILE.read_text())["default"]["seed 0"]["scores"]
    for heading, (task, metric) in toy.COLUMNS.items():
        text = TEXTS["toy"]
        block = text[text.index(f"\n{task} (") :]
        line = re.search(rf"^ {metric}( -)? .*$", block, re.MULTILINE).group()
        numbers = [float(x) for x in re.findall(r"(?<=\s)\d+\.\d(?=[*! ])", line)]
        expected = [scores[system][heading] for system in systems.SYSTEMS]
        assert numbers == pytest.approx(expected, abs=0.051)


def test_the_training_commands_are_understood():
    """Every `python train.py` command of README parses, flags and all."""
    text = ALL.replace("\\\n", " ")
    commands = set(re.findall(r"python train\.py([^`\n>&|]*)", text))
    assert any("--preset diva-8b" in command for command in commands)
    for command in commands - {" --help"}:
        recipe.parse(shlex.split(command, comments=True))


def test_the_evaluation_commands_are_understood(monkeypatch):
    """Every `python eval.py` command of README parses, and names suites that there are."""
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: None)
    commands = re.findall(r"python eval\.py([^`\n]*)", ALL)
    assert len(commands) > 3
    for command in commands:
        words = shlex.split(command)
        tyro.cli(evaluation.main, args=words)
        names = {word.partition("=")[0] for word in words if "=" in word}
        assert names <= {"SALMONN", "voicebench", *suites.SUITES}


def test_the_demos_commands_are_understood(monkeypatch, tmp_path):
    """Every `python demo.py` command of README parses; the models are not loaded."""
    asked = []

    def load(model):
        asked.append(model)
        raise InterruptedError

    monkeypatch.setattr(demo.Assistant, "load", staticmethod(load))
    monkeypatch.setattr(connector, "encoder_config", load)  # asked first, where there is a clip
    monkeypatch.setitem(sys.modules, "serving.page", types.ModuleType("serving.page"))
    commands = re.findall(r"python demo\.py([^`\n#|]*)", ALL)
    monkeypatch.chdir(tmp_path)
    EXAMPLE.parent.mkdir(parents=True)
    EXAMPLE.touch()
    for command in commands:
        words = shlex.split(command)
        for clip in (word for word in words if Path(word).suffix in demo.ENDINGS):
            Path(clip).touch()
        with pytest.raises(InterruptedError):
            tyro.cli(demo.main, args=words)
    assert len(asked) == len(commands) > 4 and "WillHeld/DiVA-llama-3-v0-8b" in asked


def test_the_shown_tasks_are_understood(monkeypatch, tmp_path):
    """Keys, labels and metrics of README's tasks.json; the sets themselves are not there."""
    (text,) = re.findall(r"```json\n(.*?)```", ALL, re.DOTALL)
    (tmp_path / "tasks.json").write_text(text)
    for name, suite in list(suites.SUITES.items()):

        @functools.wraps(suite.read)
        def read(path, answer=suite.labels or ("Yes",), **options):
            return [suites.Example("0", "a.wav", "", answer[:1], "", "de")]

        monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(suite, read=read))
    assert list(evaluation.read_tasks([tmp_path])) == ["covost", "iemocap", "stress"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_that_is_linked_is_there(room):
    links = re.findall(r"\]\(([^)#:]+)\)", TEXTS[room])
    assert len(links) > (8 if not room else 0)
    assert not [link for link in links if not (ROOT / room / link).exists()]
