"""benchmarks/README.md says what is so: its tables were measured, its commands are there."""

import contextlib
import itertools
import json
import re
from pathlib import Path

import pytest
import test_cost

from benchmarks import (
    compiling,
    forward,
    generate,
    gpu,
    loss,
    pair,
    scaling,
    side_by_side,
    slices,
    speech,
    step,
    toy,
)
from training import cost, recipe

FOLDER = Path(__file__).parents[1] / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def read(module) -> dict | list:
    """What a benchmark has measured; nothing, where it has not been run."""
    return json.loads(module.FILE.read_text()) if module.FILE.is_file() else {}


def test_every_command_is_there_and_is_named():
    """The commands of the index are the files with a main, and no text names another."""
    files = {file.stem for file in FOLDER.glob("*.py") if "__main__" in file.read_text()}
    command = r"`python -m benchmarks\.(\w+)`"
    assert set(re.findall("^\\| " + command, README, re.MULTILINE)) == files
    assert set(re.findall(command, README)) == files and len(files) > 10
    for name in files:  # each names itself first
        opening = (FOLDER / f"{name}.py").read_text().splitlines()[0]
        assert f"`python -m benchmarks.{name}`" in opening
        assert re.search(r"tyro\.cli\(main", (FOLDER / f"{name}.py").read_text()), "--help"
    assert all((FOLDER / link).is_file() for link in re.findall(r"\]\(([^)]+)\)", README))


@pytest.mark.parametrize("module", [generate, step, forward, loss, compiling, scaling, gpu, pair])
def test_the_tables_are_what_was_measured(module):
    """Each is what its benchmark prints from its JSON, on the processor that README names."""
    measured = read(module)
    for table in module.table(measured).split("\n\n"):
        assert table in README
    if "machine" in measured and module is not gpu:
        assert measured["machine"].partition(";")[0] in " ".join(README.split())


def test_what_was_compared_agrees():
    """Losses and gradients of the step, outcomes of the forward passes, both KLs, the tokens."""
    for row in read(step)["rows"]:
        assert row["agreement"]["tensors"] == 102
        assert max(row["agreement"]["losses"], row["agreement"]["gradients"]) <= 1e-5
    assert all(row["apart"] <= 1e-4 for row in read(forward)["rows"])
    assert read(loss)["agreement"] <= 1e-4
    assert all(row["same"] == 1 for row in read(generate)["generation"])


def test_the_work_of_a_chip_falls_as_their_number_rises():
    """Of 1, 8, 64 and 128 chips: what all of them compute is what one would, and the template's
    head once more on each."""
    rows, llm = read(scaling), cost.PUBLISHED[recipe.parse(["--preset", "diva-8b"]).llm]
    assert [row["chips"] for row in rows] == [1, 8, 64, 128]
    head = test_cost.shared_products(llm, "layers")
    for row in rows:
        work = rows[0]["flops"] + (row["chips"] - 1) * head
        assert row["flops"] * row["chips"] == pytest.approx(work, rel=1e-5)


def test_the_program_does_not_grow_with_the_layers():
    """The toy's step with twice the layers in every stack has the same lines of StableHLO."""
    lines = {len(compiling.lower("toy", times).as_text().splitlines()) for times in (1, 2)}
    assert len(lines) == 1
    for preset in ("toy", "diva-8b"):
        rows = [row for row in read(compiling)["rows"] if row["preset"] == preset]
        assert len(rows) == len(compiling.DEPTHS) and len({row["lines"] for row in rows}) == 1


def test_a_table_that_was_stopped_goes_on(monkeypatch, tmp_path):
    """Behind the last row that was written; a whole one begins anew."""
    measured, wanted = [], [(n,) for n in range(3)]
    monkeypatch.setattr(side_by_side, "fresh", lambda file: tmp_path / file)

    def measure(n: int) -> dict:
        measured.append(n)
        if measured == [0, 1]:
            raise KeyboardInterrupt
        return {"n": n}

    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt):
            side_by_side.keep_each(Path("rows.json"), measure, wanted, str)
    assert measured == [0, 1, 1, 2, 0, 1, 2]
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"n": n} for n in range(3)]


def test_a_run_costs_its_chip_hours():
    """4,000 steps of 0.9 s are an hour; of 64 chips of v5p at $4.20."""
    row = {"preset": "diva-8b", "slice": "v5p:4x4x4", "flags": "--queries 64 --window 10"}
    row |= {"chips": 64, "memory": 2**34, "flops": 4e12, "flops_compiled": 4.2e12}
    row |= {"steps": 4000, "step_seconds": [0.3, 0.9]}
    (line,) = slices.costs([row]).splitlines()[2:]
    cells = "`diva-8b` | `v5p:4x4x4` | `--queries 64 --window 10` | 4.0 / 4.2 | 16.0 | 0.90"
    assert line == f"| {cells} | 60 | 64 | 269 |"


def test_the_gpus_batch_is_searched_for_once(monkeypatch):
    """The first row that fits says what the others begin with; one that fails says why, and shows
    it in the table, which is empty where nothing was measured."""
    tried = []

    def alone(function, *arguments):
        if function is not gpu.step:
            return {"flops": 1e15, "bandwidth": 3e12, "tokens": 100.0, "bytes": 15e9}
        tried.append(arguments[-1])
        if len(tried) == 1:
            raise RuntimeError("no cuDNN\nat all")
        return {"batch": 48, "remat": "layers", "seconds": 1.5, "flops": 4e14, "memory": 2**36}

    monkeypatch.setattr(gpu, "alone", alone)
    table = gpu.table(gpu.measure("a Whisper", "a Llama")).splitlines()
    assert tried == [32, 32, 48, 48]
    assert table[2] == "| l2 | xla | no cuDNN |  |  |  |  |"
    assert table[3] == "| l2 | cudnn | 48, layers | 1.50 | 32.0 | 40 | 64.0 |"
    assert table[-1] == "| Llama-3-8B, bfloat16 | 100.0 | 50 |"
    assert gpu.table({}) == ""


def test_the_toys_grid_goes_on_where_it_was(monkeypatch):
    """Each run once: weights of each loss, of which dev chooses, then all rows, seed by seed; what
    is lacking stays out of the tables."""
    ran = []

    def alone(flags, seed, out, split):
        ran.append((flags, seed, split))
        weight = float(re.search(r"weight (\S+)", flags)[1])
        found = dict.fromkeys(toy.COLUMNS, 50.0) | {"repeat WER %": abs(weight - 3)}
        return {"flags": flags, split: found, "KL, nats": 0.5, "CPU-min": 2}

    monkeypatch.setattr(toy, "alone", alone)
    monkeypatch.setattr(toy, "train", lambda flags, out: pytest.fail("nothing is run"))
    found = {system: dict.fromkeys(toy.COLUMNS, 1.0) for system in toy.systems.SYSTEMS}
    known = {"default": {f"seed {seed}": {"scores": found} for seed in toy.SEEDS}}
    tried, rows = sum(map(len, toy.TRIED.values())), len(toy.rows(dict.fromkeys(toy.TRIED, 1)))
    for _ in itertools.islice(toy.measure(known), tried + rows + 2):
        pass
    assert {split for *_, split in ran[:tried]} == {"dev"} and ran[tried][2] == "test"
    assert toy.choose(known["weights"]) == {"l2": 3, "gram": 3, "kl": 3}
    assert [seed for _, seed, _ in ran[tried:]] == [0] * rows + [1] * 2
    lines = toy.grid_table(known).splitlines()
    assert len(lines) == 2 + rows and lines[2].startswith("| 1 by l2 | 3 | 2 | 50.0 (50.0-50.0) |")
    assert lines[-1].startswith("| alignment alone | 0 | 1 | 50.0 |")
    for _ in toy.measure(known):
        pass
    assert len(ran) == len({*ran}) == tried + 3 * rows


@pytest.fixture(scope="module")
def spoken():
    return list(itertools.islice(speech.sentences(0), 8_000))


def test_spoken_sentences_are_many_and_short(spoken):
    """No two differ in case or punctuation alone; 3,000 words, of 4 to 14 a sentence."""
    assert len({" ".join(sentence.words()) for sentence in spoken}) == len(spoken)
    assert len({word for sentence in spoken for word in sentence.words()}) >= 3000
    assert {len(sentence.words()) for sentence in spoken} <= set(range(4, 15))
    for sentence in spoken:
        assert re.fullmatch(r"[A-Z][A-Za-z ,]+[.?]", sentence.text), sentence
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouh]", sentence.text), sentence


def test_spoken_sentences_come_again_by_their_seed(spoken):
    assert list(itertools.islice(speech.sentences(0), 100)) == spoken[:100]
    assert list(itertools.islice(speech.sentences(1), 100)) != spoken[:100]


def test_held_out_sentences_are_new_and_their_words_are_not(spoken):
    """Of dev and test: no sentence is in another split, and every word is in train."""
    splits = speech.split(spoken)
    train = {word for sentence in splits["train"] for word in sentence.words()}
    for name, clips in speech.HELD_OUT.items():
        assert len(splits[name]) >= clips
        assert train.issuperset(word for sentence in splits[name] for word in sentence.words())
    together = [sentence for said in splits.values() for sentence in said]
    assert sorted(map(str, together)) == sorted(map(str, spoken))  # each once: see above


def test_words_take_the_forms_that_grammar_gives_them():
    """What words.txt gives, else what the rules do."""
    forms = {"bake": "baked baking bakes", "fry/fried/frying": "fried frying fries"}
    forms |= {
        "steal/stole/stealing/stolen": "stole stealing steals",
        "wash": "washed washing washes",
    }
    forms |= {"hang up/hung up/hanging up": "hung up hanging up hangs up"}
    for verb, expected in forms.items():
        word = verb.split("/")
        assert " ".join(speech.inflect(word, form) for form in ("ed", "ing", "s")) == expected
    assert speech.inflect(["steal", "stole", "stealing", "stolen"], "en") == "stolen"
    assert speech.inflect(["wash"], "en") == "washed"
    nouns = {"mouse/mice": "mice", "cherry": "cherries", "fox": "foxes", "monkey": "monkeys"}
    assert [speech.inflect(n.split("/"), "pl") for n in nouns] == list(nouns.values())
