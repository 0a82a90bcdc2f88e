"""eval.py: every clip counts once and as what it was, nothing is asked twice, stars are earned.

Scores are counted here anew, from the answers in predictions.jsonl. Where it does not matter what
the models say, a stand-in for `systems.answer` says it. Axes: N items, Y systems.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import checks
import jax
import numpy as np
import pytest
import scipy.stats
import soundfile
import tyro
import universe
from sacrebleu.metrics import BLEU, CHRF

import eval as evaluation
from evaluation import published, report, significance, suites, systems
from evaluation.systems import SYSTEMS, Ask
from runtime import sharding

HEARING = ("untrained", "diva", "cascade")  # those that need the clip


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def write_tasks(folder: Path, tasks: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    return folder


def clip(n: int = 0, text: str | None = None, *answers: str, **more: str) -> suites.Example:
    """A clip with words of its own, unless they are given."""
    words = f"question {n}" if text is None else text
    return suites.Example(str(n), f"/nowhere/{n}.wav", words, answers or ("red",), **more)


def items_of(task: evaluation.Task, name: str = "task") -> list[evaluation.Item]:
    return [evaluation.Item(name, task.ask(example), example) for example in task.examples]


def scored(task: evaluation.Task, **said: list[str | None]) -> dict:
    """What eval.json says of a task; a system that is not given says what diva does."""
    answers = {system: said.get(system, said["diva"]) for system in (*SYSTEMS, *said)}
    return evaluation.score_task(task, items_of(task), answers)[0]


# ------------------------------------------------------------------------------------------- tasks

ROW = {"audio": "a.wav", "text": "is it", "answer": "red"}
OWN = {"suite": "manifest", "path": "own.jsonl", "prompt": "Say it.", "metrics": ["f1"]}


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with own.jsonl, in which there is one clip."""
    write_lines(tmp_path / "own.jsonl", [ROW])
    return tmp_path


@pytest.fixture
def meld(tmp_path) -> Path:
    """Two rows of MELD, test and dev, as they are published."""
    folder, head = tmp_path / "MELD.Raw", "Utterance,Emotion,Dialogue_ID,Utterance_ID\n"
    for split, emotion in (("test", "anger"), ("dev", "joy")):
        (folder / suites.MELD_VIDEOS[split]).mkdir(parents=True)
        (folder / f"{split}_sent_emo.csv").write_text(head + f"Well!,{emotion},3,1\n")
    return folder


@pytest.fixture
def mustard(tmp_path) -> Path:
    """One row of MUStARD."""
    folder = tmp_path / "mustard"
    (folder / "utterances_final").mkdir(parents=True)
    row = {"1_60": {"utterance": "Sure.", "sarcasm": True, "show": "BBT"}}
    (folder / "sarcasm_data.json").write_text(json.dumps(row))
    return folder


def test_a_folder_its_file_and_several_sources_give_the_tasks_in_their_order(own, meld, mustard):
    write_tasks(own, {"b": OWN, "a": OWN})
    assert list(evaluation.read_tasks([own])) == ["b", "a"]
    assert evaluation.read_tasks([own / "tasks.json"]) == evaluation.read_tasks([str(own)])
    other = shutil.copy(own / "tasks.json", own / "mine.json")
    assert evaluation.read_tasks([other]) == evaluation.read_tasks([own])
    found = evaluation.read_tasks([f"mustard={mustard}", own, f"meld={meld}"])
    assert list(found) == ["mustard", "b", "a", "meld"]


def test_a_suite_by_its_name_has_its_own_prompt_metrics_and_labels(meld):
    """SUITE=PATH, a name in tasks.json, and "suite" in it are the same."""
    (task,) = evaluation.read_tasks([f"meld={meld}"]).values()
    suite = suites.SUITES["meld"]
    assert task == evaluation.Task(
        "meld", suite.read(meld), suite.prompt, ("weighted_f1", "accuracy"), suites.MELD_LABELS
    )
    assert task.label_score == "first_token" and task.max_new_tokens == 64
    entries = {"meld": {"path": str(meld)}, "moods": {"suite": "meld", "path": meld.name}}
    found = evaluation.read_tasks([write_tasks(meld.parent, entries)])
    assert found == {"meld": task, "moods": task}


def test_what_tasks_json_says_replaces_what_the_suite_says(meld):
    more = {"prompt": None, "metrics": ["accuracy"], "labels": ["Joy", "Anger"]}
    more |= {"label_score": "whole_label", "max_new_tokens": 3, "split": "dev"}
    write_tasks(meld.parent, {"meld": {"path": "MELD.Raw"} | more})
    task = evaluation.read_tasks([meld.parent])["meld"]
    assert task == evaluation.Task(
        "meld",
        suites.SUITES["meld"].read(meld, split="dev"),
        None,
        ("accuracy",),
        ("Joy", "Anger"),
        "whole_label",
        3,
    )
    assert task.ask(task.examples[0]) == Ask(None, ("Joy", "Anger"), "whole_label", 3)


def test_the_split_is_replaced_where_there_is_one(meld, mustard):
    """Also one that tasks.json names; MUStARD has none, and is read as it is."""
    entries = {
        "meld": {"path": "MELD.Raw"},
        "again": {"suite": "meld", "path": "MELD.Raw", "split": "test"},
        "mustard": {"path": "mustard"},
    }
    write_tasks(meld.parent, entries)
    for split, label in (("dev", "Joy"), ("test", "Anger"), (None, "Anger")):
        found = evaluation.read_tasks([meld.parent], split)
        answers = [task.examples[0].answers[0] for task in found.values()]
        assert answers == [label, label, "Yes"], split


def test_paths_are_relative_to_the_file_also_those_of_the_readers_options(tmp_path, monkeypatch):
    calls = []

    def read(path: Path, split="dev", audio=None, common_voice=None, unpack=None, languages=()):
        calls.append((Path(path), split, audio, common_voice, unpack, languages))
        return [clip()]

    monkeypatch.setitem(suites.SUITES, "fake", suites.Suite(read, "Say it.", ("f1",)))
    options = {"audio": "/wavs", "common_voice": "../cv", "unpack": "scratch", "languages": ["de"]}
    write_tasks(tmp_path / "deep", {"fake": {"path": "set", "split": "x"} | options})
    evaluation.read_tasks([tmp_path / "deep"])
    here = tmp_path / "deep"
    voice, scratch = str(here / "../cv"), str(here / "scratch")
    assert calls == [(here / "set", "x", "/wavs", voice, scratch, ["de"])]
    evaluation.read_tasks(["fake=set"])
    assert calls[1] == (Path("set"), "dev", None, None, None, ())


@pytest.mark.parametrize("folders", [1, 2])
def test_a_name_that_comes_twice_is_refused(own, meld, folders):
    write_tasks(own, {"meld": {"path": "MELD.Raw"}})
    sources = [own, f"meld={meld}"] if folders == 2 else [own, own]
    with pytest.raises(ValueError, match="'meld' comes twice; expected a name for each task"):
        evaluation.read_tasks(sources)


def test_the_language_of_each_answer_stands_in_its_prompt(own):
    rows = [ROW | {"language": code} for code in ("de", "zh-CN")]
    write_lines(own / "own.jsonl", rows)
    write_tasks(own, {"qa": OWN | {"prompt": "Into {language}, {really}!"}})
    task = evaluation.read_tasks([own])["qa"]
    asked = [task.ask(example).prompt for example in task.examples]
    assert asked == ["Into German, {really}!", "Into Mandarin, {really}!"]
    assert dataclasses.replace(task, prompt=None).ask(task.examples[0]).prompt is None


def without(key: str) -> dict:
    return {k: v for k, v in OWN.items() if k != key}


@pytest.mark.parametrize(
    "entry, message",
    [
        ("own.jsonl", "'own.jsonl'; expected an object with \"path\""),
        (["own.jsonl"], "expected an object with"),
        (None, "None; expected an object with"),
        (without("path"), "expected an object with \"path\""),
        (OWN | {"path": 3}, "'path': 3.*expected an object with"),
        (without("suite"), "unknown suite 'qa'; expected one of heysquad, .* manifest, .*JSONL"),
        (OWN | {"suite": "manifst"}, "unknown suite 'manifst'; expected"),
        (OWN | {"suite": None}, "unknown suite None; expected"),
        (OWN | {"suite": ["manifest"]}, "unknown suite .*manifest.*; expected"),
        (OWN | {"promt": "x"}, "unknown promt; expected only path, suite, prompt, .* split"),
        (OWN | {"audio": "wavs"}, "unknown audio; expected only"),  # of another reader
        (OWN | {"prompt": 3}, "prompt 3; expected a text as prompt"),
        (OWN | {"metrics": "f1"}, "metrics 'f1'"),
        (OWN | {"metrics": {"f1": 1}}, "metrics {'f1': 1}"),
        (OWN | {"metrics": 3}, "metrics 3"),
        (OWN | {"metrics": None}, "metrics None"),
        (OWN | {"metrics": ["f1", "f2"]}, "metric 'f2'; expected .* exact_match, contains, f1"),
        (OWN | {"metrics": [["f1"]]}, r"metric \['f1'\]"),
        (OWN | {"metrics": []}, "no metrics; expected"),
        (OWN | {"metrics": ["f1", "weighted_f1"]}, "weighted_f1 without labels; expected"),
        (OWN | {"labels": "red"}, "labels 'red'; expected .*a list of texts"),
        (OWN | {"labels": 3}, "labels 3"),
        (OWN | {"labels": None}, "labels None"),
        (OWN | {"labels": ["red", 3]}, "label 3; expected"),
        (OWN | {"label_score": "last_token"}, "label_score 'last_token'; .* first_token or whole"),
        (OWN | {"label_score": None}, "label_score None"),
        (OWN | {"max_new_tokens": "64"}, "max_new_tokens '64'; .*a whole number"),
        (OWN | {"max_new_tokens": 6.5}, "max_new_tokens 6.5"),
        (OWN | {"labels": ["green", "blue"]}, "the answer of 0 is 'red'; .* labels green, blue"),
        (OWN | {"prompt": "Into {language}."}, "0 has no language, .* prompt asks for; .* ar, ca"),
    ],
)  # fmt: skip
def test_a_wrong_entry_names_file_task_and_value(own, entry, message):
    write_tasks(own, {"fine": OWN, "qa": entry})
    with pytest.raises(ValueError, match=rf"(?s)tasks\.json: qa: .*{message}"):
        evaluation.read_tasks([own])


def test_a_file_of_ones_own_is_a_task_as_it_stands(own):
    """manifest=FILE, without a tasks.json: no prompt, and any of a line's answers counts."""
    write_lines(own / "own.jsonl", [ROW, {"audio": "b.wav", "answers": ["moon", "dog"]}])
    (task,) = evaluation.read_tasks([f"manifest={own / 'own.jsonl'}"]).values()
    assert task.suite == "manifest" and task.prompt is None and task.labels == ()
    assert [example.answers for example in task.examples] == [("red",), ("moon", "dog")]
    assert task.metrics == ("contains", "f1", "exact_match", "wer")


@pytest.mark.parametrize("most", [True, False, 0, -3])
def test_no_answer_can_be_shorter_than_a_token(own, most):
    """And true is no number, though Python takes it for 1."""
    write_tasks(own, {"qa": OWN | {"max_new_tokens": most}})
    with pytest.raises(ValueError, match=f"tasks.json: qa: max_new_tokens {most}; expected"):
        evaluation.read_tasks([own])


@pytest.mark.parametrize(
    "labels, row",
    [
        (["red", "Red!"], ROW),  # one label to every metric: normalised, they are equal
        (["+", "-"], ROW | {"answer": "+"}),  # both are nothing at all
        (["red", "other"], ROW),  # what histograms call all that is no label
        (["red", "no answer"], ROW),
    ],
)
def test_labels_that_no_score_can_tell_apart_are_refused(own, labels, row):
    write_lines(own / "own.jsonl", [row])
    write_tasks(own, {"qa": OWN | {"labels": labels, "metrics": ["accuracy"]}})
    with pytest.raises(ValueError, match=r"tasks\.json: qa: .*label"):
        evaluation.read_tasks([own])


@pytest.mark.parametrize("name", ["a/b", "", "/tmp/a"])
def test_a_name_that_cannot_be_a_file_is_refused(own, name):
    """Each task has charts/NAME.png."""
    write_tasks(own, {name: OWN})
    with pytest.raises(ValueError, match=r"tasks\.json: .*name"):
        evaluation.read_tasks([own])


@pytest.mark.parametrize("options", [{"audio": 3}, {"audio": None}])
def test_a_path_of_the_reader_that_is_no_text_is_refused(meld, options):
    write_tasks(meld.parent, {"meld": {"path": "MELD.Raw"} | options})
    with pytest.raises(ValueError, match=r"tasks\.json: meld: .*audio"):
        evaluation.read_tasks([meld.parent])


@pytest.mark.parametrize("source", ["nowhere", "nowhere/tasks.json", "sung=/data", "{empty}"])
def test_tasks_that_are_not_there_are_named_with_what_could_be(tmp_path, source):
    (tmp_path / "empty").mkdir()
    source = source.format(empty=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=f"{source}: no such tasks; .*heysquad, sd_qa"):
        evaluation.read_tasks([source])


@pytest.mark.parametrize("text", ['{"qa": ', "[]", "3"])
def test_a_file_that_holds_no_tasks_is_named(tmp_path, text):
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(ValueError, match=r"tasks\.json"):
        evaluation.read_tasks([tmp_path])


def test_what_is_missing_of_a_suite_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test_sent_emo\.csv is missing"):
        evaluation.read_tasks([f"meld={tmp_path}"])


def test_a_sample_is_random_but_the_same_and_in_order():
    """And has of each group its share: equally likely clips need no weights."""
    groups = ["usa"] * 50 + ["kenya"] * 30 + ["nz"] * 20
    clips = [suites.Example(str(i), "", "", (), g) for i, g in enumerate(groups, 100)]
    some = evaluation.some(clips, 20)
    assert evaluation.some(clips, 20) == some == sorted(some, key=lambda clip: clip.id)
    assert Counter(clip.group for clip in some) == {"usa": 10, "kenya": 6, "nz": 4}
    numbers = [int(clip.id) for clip in some]
    assert len({b - a for a, b in itertools.pairwise(numbers)}) > 3, "every n-th clip"
    assert evaluation.some(clips, 100) == evaluation.some(clips, 999) == clips
    odd = Counter(clip.group for clip in evaluation.some(clips, 7))
    assert sum(odd.values()) == 7
    assert all(abs(odd[group] - n * 0.07) < 1 for group, n in Counter(groups).items())


# ------------------------------------------------------------------------------------- predictions

MODEL = "0123456789ab"


SAY = Ask("Say it.")


def one_item(ask: Ask = SAY, **example: object) -> evaluation.Item:
    return evaluation.Item("qa", ask, dataclasses.replace(clip(), **example))


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "predictions.jsonl"


def test_an_answer_is_on_disk_as_soon_as_it_is_told(file):
    kept, item = evaluation.Predictions(file, MODEL), one_item(group="gbr")
    assert kept.lacks("diva", item) and kept.get("diva", item) is None
    kept.tell("diva", item, "two", {"heard": "to", "transcript": "too"})
    (line,) = read_lines(file)
    assert line == {
        "key": kept.key("diva", item),
        "system": "diva",
        "task": "qa",
        "id": "0",
        "group": "gbr",
        "audio": "/nowhere/0.wav",
        "text": "question 0",
        "prompt": "Say it.",
        "answer": "two",
        "transcript": "too",
        "heard": "to",
        "references": ["red"],
    }
    again = evaluation.Predictions(file, MODEL)
    assert not again.lacks("diva", item) and again.get("diva", item) == line
    assert again.lacks("cascade", item)
    again.tell("cascade", item, "", {})
    assert [line["system"] for line in read_lines(file)] == ["diva", "cascade"]
    assert not evaluation.Predictions(file, MODEL).lacks("cascade", item), "'' is an answer"


@pytest.mark.parametrize("left", ["{", '{"key": "0', "within a letter", "but }", "but the end"])
def test_the_line_that_a_killed_run_left_half_written_is_asked_again(file, left):
    """Wherever it was cut, also within a letter of several bytes. What is told next stays."""
    kept, first, second = evaluation.Predictions(file, MODEL), one_item(id="a"), one_item(id="b")
    kept.tell("diva", first, "größe", {})
    before = file.read_bytes()
    kept.tell("diva", second, "größe", {})
    line = file.read_bytes()[len(before) :]
    ends = {"within a letter": line.index("ö".encode()) + 1, "but }": -2, "but the end": -1}
    file.write_bytes(before + line[: ends.get(left, len(left))])
    again = evaluation.Predictions(file, MODEL)
    assert not again.lacks("diva", first)
    assert again.lacks("diva", second) == (left != "but the end"), "nothing but the new line lacks"
    again.tell("text", first, "klein", {})
    again.tell("diva", second, "klein", {})
    last = evaluation.Predictions(file, MODEL)
    answers = [last.get(*at) for at in (("diva", first), ("text", first), ("diva", second))]
    assert [line and line["answer"] for line in answers] == ["größe", "klein", "klein"]


@pytest.mark.parametrize(
    "change",
    [
        {"ask": Ask("Say it!")},
        {"ask": Ask(None)},
        {"ask": Ask("Say it.", ("red", "blue"))},
        {"ask": Ask("Say it.", label_score="whole_label")},
        {"ask": Ask("Say it.", max_new_tokens=65)},
        {"text": "question 1"},
        {"audio": "/nowhere/1.wav"},
        {"id": "1"},
    ],
)
def test_an_answer_to_something_else_is_no_answer(file, change):
    evaluation.Predictions(file, MODEL).tell("diva", one_item(), "two", {})
    assert evaluation.Predictions(file, MODEL).lacks("diva", one_item(**change))


def test_an_answer_by_other_weights_or_another_system_or_for_another_task_is_no_answer(file):
    evaluation.Predictions(file, MODEL).tell("diva", one_item(), "two", {})
    kept = evaluation.Predictions(file, MODEL)
    assert evaluation.Predictions(file, MODEL[::-1]).lacks("diva", one_item())
    assert kept.lacks("untrained", one_item())
    assert kept.lacks("diva", one_item()._replace(task="ab"))


def test_an_answer_stays_one_where_only_the_references_or_the_folder_changed(file):
    """They are not asked. What is written in the end is what counts now."""
    evaluation.Predictions(file, MODEL).tell("diva", one_item(), "two", {"heard": "x"})
    kept = evaluation.Predictions(file, MODEL)
    now = one_item(answers=("two", "2"), audio="/there/0.wav", group="usa")
    assert not kept.lacks("diva", now)
    for system in SYSTEMS:
        if kept.lacks(system, now):
            kept.tell(system, now, "two", {})
    kept.finish([now], {(system, 0): {"f1": 100.0} for system in SYSTEMS})
    for line in read_lines(file):
        told = line["references"], line["audio"], line["group"], line["answer"]
        assert told == (["two", "2"], "/there/0.wav", "usa", "two"), line["system"]


def test_an_answer_is_to_a_sound_wherever_it_lies_and_not_to_a_name(file, tmp_path):
    """Another clip of that name, or one that has changed, is asked about; a moved one is not."""
    clips = {name: tmp_path / name / "0.wav" for name in ("here", "there", "moved")}
    for clip, content in zip(clips.values(), (b"a", b"b", b"a"), strict=True):
        clip.parent.mkdir()
        clip.write_bytes(content)
    items = {name: one_item(audio=str(clip)) for name, clip in clips.items()}
    evaluation.Predictions(file, MODEL).tell("diva", items["here"], "two", {})

    def lacking() -> list[str]:
        kept = evaluation.Predictions(file, MODEL)
        return [name for name, item in items.items() if kept.lacks("diva", item)]

    assert lacking() == ["there"]
    clips["here"].write_bytes(b"c")
    assert lacking() == ["here", "there"]
    clips["here"].unlink()  # what is not there has no sound: its name says which clip it was
    assert lacking() == ["here", "there"]
    clips["moved"].rename(clips["here"])
    assert lacking() == ["there", "moved"]


def test_a_clip_is_read_once_for_all_its_keys(file, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"a")
    item, reads, plain = one_item(audio=str(tmp_path / "a.wav")), [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: reads.append(1) or plain(*a))
    kept = evaluation.Predictions(file, MODEL)
    assert len({kept.key(system, item) for system in SYSTEMS}) == 4 and len(reads) == 1
    (tmp_path / "a.wav").write_bytes(b"b")
    again = evaluation.Predictions(file, MODEL)
    same = [system for system in SYSTEMS if again.key(system, item) == kept.key(system, item)]
    assert same == ["text"], "it hears nothing"


def test_what_could_not_be_answered_is_asked_again_and_says_why(file):
    evaluation.Predictions(file, MODEL).tell("diva", one_item(), None, {"error": "no samples"})
    kept = evaluation.Predictions(file, MODEL)
    assert kept.lacks("diva", one_item())
    assert kept.get("diva", one_item())["error"] == "no samples"
    kept.tell("diva", one_item(), "two", {"heard": "x"})
    last = evaluation.Predictions(file, MODEL).get("diva", one_item())
    assert last["answer"] == "two" and "error" not in last


def test_in_the_end_the_lines_stand_in_order_with_their_scores(file):
    """Those of this model about other items stand behind them, those of other models go."""
    items, old = [one_item(id=str(n)) for n in (2, 0, 1)], one_item(id="old")
    evaluation.Predictions(file, MODEL[::-1]).tell("diva", items[0], "not ours", {})
    kept, scores = evaluation.Predictions(file, MODEL), {}
    kept.tell("text", old, "of old", {})
    for system in reversed(SYSTEMS):
        for i in (1, 0, 2):
            kept.tell(system, items[i], f"{system} {i}", {})
            scores[system, i] = {"f1": float(i)}
    kept.finish(items, scores)
    lines = read_lines(file)
    ours = [(line["answer"], line["scores"]) for line in lines[:-1]]
    assert ours == [(f"{y} {i}", {"f1": float(i)}) for i in range(3) for y in SYSTEMS]
    assert lines[-1]["answer"] == "of old" and "scores" not in lines[-1]
    again = evaluation.Predictions(file, MODEL)
    assert not any(again.lacks(system, item) for system in SYSTEMS for item in items)
    assert not again.lacks("text", old)
    again.tell("diva", old, "more", {})  # the file can be gone on with
    assert len(read_lines(file)) == 14


def test_what_is_written_in_the_end_is_whole_or_not_at_all(file, monkeypatch):
    """A run that is killed while it writes leaves the lines that were told."""
    kept = evaluation.Predictions(file, MODEL)
    for system in SYSTEMS:
        kept.tell(system, one_item(), "two", {})
    before = file.read_text()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        kept.finish([one_item()], {(system, 0): {} for system in SYSTEMS})
    assert file.read_text() == before


def test_only_a_new_line_ends_a_line(file):
    """Not the other separators that Unicode knows; answers may hold them, and new lines."""
    said = "one\u2028two\u2029three\x85four\x0bfive\nsix\rseven\x1ceight 😀"
    kept = evaluation.Predictions(file, MODEL)
    for system in SYSTEMS:
        kept.tell(system, one_item(), said, {})
    assert evaluation.Predictions(file, MODEL).get("text", one_item())["answer"] == said
    kept.finish([one_item()], {(system, 0): {} for system in SYSTEMS})
    again = evaluation.Predictions(file, MODEL)
    assert [again.get(system, one_item())["answer"] for system in SYSTEMS] == [said] * 4
    assert evaluation.read_predictions(f"old={file}", [one_item()]) == ("old", [said])


def test_the_fingerprint_is_that_of_weights_and_config(tmp_path):
    names = ("model-1.safetensors", "model-2.safetensors", "config.json")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    prints = [evaluation.fingerprint(tmp_path)]
    (tmp_path / "eval.json").write_text("{}")
    (tmp_path / "predictions.jsonl").write_text("")
    assert evaluation.fingerprint(tmp_path) == prints[0], "what we write changes no model"
    assert evaluation.fingerprint(shutil.copytree(tmp_path, tmp_path / "copy")) == prints[0]
    for name in names:
        (tmp_path / name).write_bytes(b"other" + name.encode())
        prints.append(evaluation.fingerprint(tmp_path))
    assert len(set(prints)) == 4 and {len(text) for text in prints} == {12}


# -------------------------------------------------------------------------------------- one task


def task_of(count: int, *metrics: str, labels: tuple[str, ...] = (), **more) -> evaluation.Task:
    """`count` clips, each with words of its own; the answer to each is red."""
    examples = [clip(n, **more) for n in range(count)]
    return evaluation.Task("manifest", examples, "Say it.", metrics or ("exact_match",), labels)


def right(n: int, count: int = 40) -> list[str]:
    """The first n answers are right."""
    return ["red"] * n + ["blue"] * (count - n)


def best(entries: dict[str, dict]) -> list[str]:
    return [system for system, entry in entries.items() if entry["best"]]


def test_a_task_tells_scores_intervals_p_values_and_who_did_not_answer():
    said = [*right(20, 39), None]
    found = scored(task_of(40), diva=said, cascade=right(30), other=["red"] * 40)
    assert found["suite"] == "manifest" and found["n"] == 40 and found["prompt"] == "Say it."
    assert found["errors"] == {"untrained": 1, "diva": 1, "cascade": 0, "text": 1, "other": 0}
    entries = found["metrics"]["exact_match"]
    assert list(entries) == [*SYSTEMS, "other"]
    scores = {system: entry["score"] for system, entry in entries.items()}
    assert scores == {"untrained": 50, "diva": 50, "cascade": 75, "text": 50, "other": 100}
    for system, entry in entries.items():
        assert entry["n"] == 40 and entry["low"] <= entry["score"] <= entry["high"]
        assert ("p_bootstrap" in entry) == ("p_permutation" in entry) == (system != "diva")
    assert entries["untrained"]["p_permutation"] == 1 and entries["other"]["p_permutation"] < 0.01
    assert entries["diva"]["low"] == pytest.approx(35, abs=3)  # 50 - 1.96 * 100 * sqrt(1/4/40)
    assert not {"predicted", "published"} & found.keys() and found["groups"] == {}
    json.dumps(found)


def test_the_best_is_starred_only_if_it_differs_from_every_other_but_the_bound():
    """A text that answers everything takes no star and bars none."""
    task = task_of(40)
    starred = {"diva": right(35), "untrained": right(0), "cascade": right(15), "text": right(40)}
    assert best(scored(task, **starred)["metrics"]["exact_match"]) == ["diva"]
    close = starred | {"cascade": right(33)}  # two clips: p is 1/2
    assert best(scored(task, **close)["metrics"]["exact_match"]) == []
    same = starred | {"cascade": right(35)}
    assert best(scored(task, **same)["metrics"]["exact_match"]) == []
    bound = starred | {"text": right(35)}
    assert best(scored(task, **bound)["metrics"]["exact_match"]) == ["diva"]
    rival = starred | {"other": right(34)}
    assert best(scored(task, **rival)["metrics"]["exact_match"]) == []


def test_another_than_diva_is_starred_by_its_own_differences():
    """Not by those from diva: cascade differs from diva, but not from untrained."""
    task = task_of(40)
    answers = {"diva": right(10), "untrained": right(28), "text": right(0), "cascade": right(30)}
    entries = scored(task, **answers)["metrics"]["exact_match"]
    assert entries["cascade"]["p_permutation"] < 0.001
    assert best(entries) == [] and entries["cascade"]["p_best"] == pytest.approx(0.5, abs=0.02)
    answers["untrained"] = right(10)
    assert best(scored(task, **answers)["metrics"]["exact_match"]) == ["cascade"]
    answers["other"] = right(40)
    assert best(scored(task, **answers)["metrics"]["exact_match"]) == ["other"]


def test_where_less_is_better_the_least_is_starred():
    """Repeating the question is what a good system does not."""
    examples = [clip(n, f"what is {n}") for n in range(40)]
    task = evaluation.Task("manifest", examples, None, ("prompt_ignoring", "wer"))
    asked, fine = [example.text for example in examples], ["red"] * 40
    said = {"diva": fine[:5] + asked[5:], "untrained": asked, "text": fine}
    entries = scored(task, cascade=fine[:30] + asked[30:], **said)["metrics"]
    assert entries["prompt_ignoring"]["cascade"]["score"] == 25
    assert best(entries["prompt_ignoring"]) == best(entries["wer"]) == ["cascade"]


def test_clips_of_one_sentence_are_not_as_many_witnesses():
    """One sentence said by 40 people is one; of unknown words each clip stands alone."""
    answers = {"diva": right(0), "cascade": right(40)}
    p = {}
    for name, words in (("own", None), ("same", "is it"), ("unknown", "")):
        task = evaluation.Task("manifest", [clip(n, words) for n in range(40)], None, ("f1",))
        p[name] = scored(task, **answers)["metrics"]["f1"]["cascade"]["p_permutation"]
    assert p["own"] < 0.001 and p["same"] == 1 and p["unknown"] == p["own"]


def grouped(counts: dict[str, int], metric: str = "exact_match") -> evaluation.Task:
    names = [group for group, count in counts.items() for _ in range(count)]
    examples = [clip(n, group=group) for n, group in enumerate(names)]
    return evaluation.Task("manifest", examples, None, (metric,))


def test_groups_are_scored_apart_and_a_clip_without_one_counts_in_the_whole_alone():
    task = grouped({"usa": 4, "gbr": 2, "": 3})
    answers = ["red", "red", "red", "blue", "blue", None, "red", "red", "blue"]
    found = scored(task, diva=answers, cascade=["red"] * 9)
    parts = {group: part["exact_match"]["diva"] for group, part in found["groups"].items()}
    assert list(parts) == ["gbr", "usa"], "in order"
    assert (parts["gbr"]["score"], parts["gbr"]["n"]) == (0, 2)
    assert (parts["usa"]["score"], parts["usa"]["n"]) == (75, 4)
    whole = found["metrics"]["exact_match"]["diva"]
    assert (whole["score"], whole["n"]) == (pytest.approx(100 * 5 / 9), 9)
    assert found["groups"]["gbr"]["exact_match"]["cascade"]["score"] == 100


def test_one_group_alone_is_the_whole_and_not_told_twice():
    assert scored(grouped({"usa": 4}), diva=right(2, 4))["groups"] == {}


def test_the_p_values_of_groups_are_corrected_for_their_number():
    """Of three groups: three times the least p that one has alone, twice the next."""
    said = [right(9, 20), right(8, 20), right(0, 20)]
    diva, cascade = right(0, 60), [answer for some in said for answer in some]
    task = grouped({"a": 20, "b": 20, "c": 20})
    groups = scored(task, diva=diva, cascade=cascade)["groups"]
    found = [part["exact_match"] for part in groups.values()]
    alone = []
    for g, answers in enumerate(said):
        some = dataclasses.replace(task, examples=task.examples[20 * g : 20 * g + 20])
        alone.append(scored(some, diva=right(0, 20), cascade=answers)["metrics"]["exact_match"])
    p = [entries["cascade"]["p_permutation"] for entries in alone]
    assert p[0] < p[1] < 0.02 and p[2] == 1
    corrected = [entries["cascade"]["p_permutation"] for entries in found]
    assert corrected == pytest.approx([3 * p[0], 2 * p[1], 1])
    assert best(alone[1]) == best(found[0]) == ["cascade"] and best(found[2]) == []


def test_holms_correction_is_over_the_groups_for_each_system_and_for_the_stars():
    """By hand: the least p times three, the next times two, the last as it is, never falling."""
    p = {"cascade": (0.03, 0.01, 0.04), "text": (0.5, 0.6, 0.001)}
    bests = {"diva": (0.02, None, None), "cascade": (None, 0.03, 0.016)}
    parts = []
    for g in range(3):
        part = {"diva": {"score": 50.0, "best": False}}
        for system, values in p.items():
            part[system] = {"p_bootstrap": values[g], "p_permutation": values[-g], "best": False}
        for system, values in bests.items():
            if values[g] is not None:
                part[system] |= {"p_best": values[g], "best": True}
        parts.append(part)
    evaluation.correct_for_groups(parts)
    assert [part["cascade"]["p_bootstrap"] for part in parts] == pytest.approx([0.06, 0.03, 0.06])
    assert [part["cascade"]["p_permutation"] for part in parts] == pytest.approx([0.06, 0.06, 0.03])
    assert [part["text"]["p_bootstrap"] for part in parts] == pytest.approx([1, 1, 0.003])
    stars = [next(e for e in part.values() if "p_best" in e) for part in parts]
    assert [entry["p_best"] for entry in stars] == pytest.approx([0.048, 0.048, 0.048])
    assert all(entry["best"] for entry in stars)
    evaluation.correct_for_groups(parts)  # 0.048 three times: 0.144
    assert not any(entry["best"] for part in parts for entry in part.values())
    assert parts[0]["diva"].keys() == {"score", "best", "p_best"}
    evaluation.correct_for_groups([])


@pytest.mark.parametrize("labels", [("No", "Yes"), ("0", "1"), ("Yes", "No", "Maybe")])
def test_the_first_label_counts_like_any_other(labels):
    """Class 0 and "no" are labels, however they read to a program; None is none of them."""
    meant = [labels[0]] * 3 + [labels[1]] * 2
    examples = [clip(n, None, label) for n, label in enumerate(meant)]
    task = evaluation.Task("manifest", examples, None, ("accuracy", "weighted_f1"), labels)
    said = [labels[0], labels[1], None, labels[0], labels[1]]
    found = scored(task, diva=said, text=meant, cascade=[labels[0]] * 5)
    rest = dict.fromkeys([*labels[2:], "other"], 0)
    assert found["predicted"]["diva"] == {labels[0]: 2, labels[1]: 2, **rest, "no answer": 1}
    assert found["predicted"]["cascade"] == {labels[0]: 5, labels[1]: 0, **rest, "no answer": 0}
    accuracy, f1 = found["metrics"]["accuracy"], found["metrics"]["weighted_f1"]
    scores = [accuracy[system]["score"] for system in ("diva", "text", "cascade")]
    assert scores == [40, 100, 60]
    # F1 of 0: 1 hit, 2 said, 3 meant; of 1: 1 hit, 2 said, 2 meant
    assert f1["diva"]["score"] == pytest.approx(100 * (0.6 * 2 / 5 + 0.4 * 2 / 4))
    assert f1["text"]["score"] == pytest.approx(100)
    assert f1["cascade"]["score"] == pytest.approx(100 * 0.6 * 6 / 8)
    assert found["errors"]["diva"] == 1 and found["n"] == 5


def test_the_histogram_knows_labels_as_the_metrics_do_and_loses_no_answer():
    said = ["yes.", " NO ", "No", "Yes, it is", "", None, "no answer"]
    found = evaluation.label_histogram(("No", "Yes"), said)
    assert found == {"No": 2, "Yes": 1, "other": 3, "no answer": 1}
    assert list(found) == ["No", "Yes", "other", "no answer"]


def test_p_against_guessing_is_that_of_an_exact_test():
    """Of two labels, a half are right by chance; of four, a quarter."""
    for labels in (("red", "blue"), ("red", "blue", "green", "pink")):
        task = task_of(20, "accuracy", labels=labels)
        entries = scored(task, diva=right(17, 20), text=[None] * 20)["metrics"]["accuracy"]
        for system, n in (("diva", 17), ("text", 0)):
            p = scipy.stats.binomtest(n, 20, 1 / len(labels)).pvalue
            assert entries[system]["p_chance"] == pytest.approx(p), (labels, system)


def test_a_metric_that_applies_to_no_clip_is_left_out():
    """Which script German is written in says nothing; whether unknown words are repeated neither"""
    examples = [clip(n, "", language="de") for n in range(3)]
    metrics = ("wrong_script", "prompt_ignoring", "f1")
    task = evaluation.Task("manifest", examples, None, metrics)
    found, single = evaluation.score_task(task, items_of(task), dict.fromkeys(SYSTEMS, right(1, 3)))
    assert list(found["metrics"]) == list(single) == ["f1"]
    assert single["f1"].tolist() == [[100] * 4, [0] * 4, [0] * 4]


def test_a_classifier_that_is_not_installed_leaves_its_metric_out(monkeypatch):
    monkeypatch.setattr(evaluation.metrics, "judge", lambda: None)
    found = scored(task_of(3, "pedant", "f1"), diva=right(1, 3))
    assert list(found["metrics"]) == ["f1"]

    class Half:
        def get_scores(self, references, answer, question):
            return {r: {answer: 0.5 if answer == r else 0.1} for r in references}

    monkeypatch.setattr(evaluation.metrics, "judge", lambda: (Half(), "qa-metrics 1 PEDANT"))
    found = scored(task_of(3, "pedant", "f1"), diva=right(1, 3))
    assert found["metrics"]["pedant"]["diva"]["score"] == pytest.approx(100 * 0.7 / 3)
    assert found["signatures"] == {"pedant": "qa-metrics 1 PEDANT"}


TRANSLATIONS = {  # by language: references, and what diva says
    "de": (
        ("der Hund ist rot und gut", "eins zwei drei vier", "die Sonne ist blau"),
        ("der Hund ist rot und alt", "eins zwei drei fünf", "die Sonne ist blau"),
    ),
    "zh-CN": (("等等,他说。", "她说不。"), ("等等他说。", "她说不是。")),
}


def translated() -> tuple[evaluation.Task, dict[str, list[str]]]:
    examples, said = [], []
    for code, (wanted, replies) in TRANSLATIONS.items():
        examples += [
            suites.Example(f"{code}{n}", "a.wav", f"{code} {n}", (text,), code, code)
            for n, text in enumerate(wanted)
        ]
        said += replies
    order = [3, 0, 4, 1, 2]  # languages mixed
    examples = [examples[n] for n in order]
    task = evaluation.Task("covost", examples, "Into {language}.", ("bleu", "chrf", "exact_match"))
    return task, {"diva": [said[n] for n in order], "text": ["eins"] * 5}


def test_translations_are_scored_by_language_and_then_averaged():
    """Each as sacrebleu scores it, with the tokenizer of its language; not all in one corpus."""
    task, answers = translated()
    found = scored(task, **answers)
    for name, scorers in (("bleu", (BLEU(), BLEU(tokenize="zh"))), ("chrf", (CHRF(), CHRF()))):
        each = [
            scorer.corpus_score(list(said), [list(wanted)]).score
            for scorer, (wanted, said) in zip(scorers, TRANSLATIONS.values(), strict=True)
        ]
        assert abs(each[0] - each[1]) > 1, "two languages that score alike show nothing"
        score = found["metrics"][name]["diva"]["score"]
        assert score == pytest.approx(np.mean(each)), name
        for code, one in zip(TRANSLATIONS, each, strict=True):
            assert found["groups"][code][name]["diva"]["score"] == pytest.approx(one), (code, name)
        entry = found["metrics"][name]["diva"]
        assert entry["low"] <= score <= entry["high"] and entry["n"] == 5
    entry = found["metrics"]["exact_match"]["diva"]
    assert entry["score"] == pytest.approx(100 * 2 / 5), "a share is one of all clips"
    signed = found["signatures"]
    assert list(signed) == ["bleu de", "bleu zh-CN", "chrf de", "chrf zh-CN"]
    assert "tok:13a" in signed["bleu de"] and "tok:zh" in signed["bleu zh-CN"]
    assert found["published"] == published.PUBLISHED["covost"]


def test_the_score_of_each_answer_alone_is_told_by_system():
    task = evaluation.Task("manifest", [clip(0), clip(1)], None, ("f1", "wer"))
    answers = {system: ["red", "dark red"] for system in SYSTEMS} | {"text": [None, "blue"]}
    single = evaluation.score_task(task, items_of(task), answers)[1]
    np.testing.assert_allclose(single["f1"], [[100, 100, 100, 0], [200 / 3] * 3 + [0]])
    np.testing.assert_allclose(single["wer"], [[0, 0, 0, 100], [100] * 4])


# ----------------------------------------------------------------------- answers of other systems


@pytest.fixture
def asked() -> list[evaluation.Item]:
    """Three questions of one task, and one of another with the same id."""
    items = [evaluation.Item("qa", Ask(None), clip(n)) for n in range(3)]
    return [*items, evaluation.Item("mood", Ask(None, ("No", "Yes")), clip(0))]


def test_answers_of_another_system_find_their_items_by_task_and_id(tmp_path, asked, capsys):
    rows = [
        {"task": "qa", "id": "2", "answer": "two"},
        {"task": "mood", "id": "0", "answer": "yes!", "more": 1},
        {"task": "qa", "id": "0", "answer": None},
        {"task": "qa", "id": "1", "answer": ""},
    ]
    file = write_lines(tmp_path / "other.jsonl", rows)
    name, answers = evaluation.read_predictions(f"Qwen 2={file}", asked)
    assert (name, answers) == ("Qwen 2", [None, "", "two", "yes!"])
    assert capsys.readouterr().out == "", "nothing is missing, nothing too much"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_answers_are_read_as_other_programs_write_them(tmp_path, asked, encoding, end):
    lines = [json.dumps({"task": "qa", "id": str(n), "answer": "größer"}) for n in range(2)]
    (tmp_path / "other.jsonl").write_bytes((end.join(lines)).encode(encoding))
    answers = evaluation.read_predictions(f"other={tmp_path / 'other.jsonl'}", asked)[1]
    assert answers == ["größer", "größer", None, None]


def test_missing_answers_are_counted_as_wrong_and_those_in_excess_are_told(tmp_path, asked, capsys):
    rows = [{"task": "qa", "id": i, "answer": "red"} for i in ("1", "7", "8")]
    file = write_lines(tmp_path / "other.jsonl", rows)
    answers = evaluation.read_predictions(f"other={file}", asked)[1]
    assert answers == [None, "red", None, None]
    shown = capsys.readouterr().out
    assert f"{file}: no answer to 3 of 4 items; they count as wrong" in shown
    assert f"{file}: 2 answers to what is not asked here are not counted" in shown
    task = task_of(3)
    said = {"diva": right(3, 3), "other": answers[:3]}
    found = scored(task, **said)
    assert found["metrics"]["exact_match"]["other"]["score"] == pytest.approx(100 / 3)
    assert found["errors"]["other"] == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"task": "qa", "answer": "x"}', 'expected "task" and "id"'),
        ('{"id": "1", "answer": "x"}', 'expected "task" and "id"'),
        ('{"task": "qa", "id": 1, "answer": "x"}', 'expected "task" and "id"'),
        ('{"task": "qa", "id": "1", "answer": 3}', 'expected .* "answer" .*a text, or null'),
        ('{"task": "qa", "id": "1", "answer": ["x"]}', 'expected .* "answer"'),
        ('{"task": "qa", "id": "1", "response": "x"}', 'expected .* "answer"'),
        ('{"task": "qa", "id": "0", "answer": "x"}', r"a second answer to \('qa', '0'\)"),
    ],
)
def test_a_wrong_line_of_answers_is_named(tmp_path, asked, line, message):
    file = tmp_path / "other.jsonl"
    file.write_text('{"task": "qa", "id": "0", "answer": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"other\.jsonl:3: .*{message}"):
        evaluation.read_predictions(f"other={file}", asked)


@pytest.mark.parametrize("source", ["other", "other=", "=a.jsonl", *[f"{s}=x" for s in SYSTEMS]])
def test_a_name_that_is_taken_or_lacking_is_refused(asked, source):
    with pytest.raises(ValueError, match=f"--predictions {source}: expected NAME=FILE.jsonl.*diva"):
        evaluation.read_predictions(source, asked)


def test_a_file_of_answers_that_is_not_there_is_named(tmp_path, asked):
    with pytest.raises(FileNotFoundError, match=r"nowhere=x\.jsonl is missing"):
        evaluation.read_predictions(f"other={tmp_path}/nowhere=x.jsonl", asked)


def test_our_own_predictions_of_another_model_are_its_divas(file, asked):
    """Also where lines stand behind them that were answers to another prompt."""
    old = evaluation.Predictions(file, MODEL)
    for item in (asked[0]._replace(ask=Ask("Another prompt.")), *asked):
        for system in SYSTEMS:
            words = "old words" if item.ask.prompt else f"{system} to {item.example.id}"
            old.tell(system, item, words, {})
    old.finish(asked, {(system, i): {} for system in SYSTEMS for i in range(4)})
    name, answers = evaluation.read_predictions(f"before={file}", asked)
    assert name == "before" and answers == [f"diva to {n}" for n in (0, 1, 2, 0)]


# ----------------------------------------------------------------------------- the whole, made up


class Run(NamedTuple):
    """What evaluate() returned and left behind."""

    found: dict
    folder: Path
    told: list[tuple[int, str]]  # (item, system) of each answer that was asked for


@pytest.fixture
def no_charts(monkeypatch) -> None:
    """Where they are not looked at."""
    monkeypatch.setattr(report, "chart", lambda *_: None)


@pytest.fixture
def made_up(tmp_path, monkeypatch, no_charts) -> Callable[..., Run]:
    """evaluate() with a stand-in for the models, which says say(system, question)."""
    model, said = tmp_path / "model", {}
    model.mkdir()
    for name in ("model.safetensors", "config.json", "train.json"):
        (model / name).write_text(name)

    def answer(models, questions, lacking, transcripts, batch_size, tell):
        for i, some in enumerate(lacking):
            for system in sorted(some):
                said["told"].append((i, system))
                reply = said["say"](system, questions[i])
                tell(i, system, reply, {"error": "no reason"} if reply is None else {})

    monkeypatch.setattr(systems.Models, "load", staticmethod(lambda folder: None))
    monkeypatch.setattr(systems, "answer", answer)
    monkeypatch.setattr(significance, "RESAMPLES", 200)

    def run(tasks: dict, say: Callable = lambda *_: "red", **options) -> Run:
        said.update(say=say, told=[])
        write_tasks(tmp_path, tasks)
        found = evaluation.evaluate(model, [tmp_path], **options)
        return Run(found, Path(options.get("out") or model), said["told"])

    return run


def manifest(folder: Path, count: int, **more: list[str]) -> dict:
    """An entry of tasks.json, and its file with `count` clips. `more` is by clip, in turn."""
    rows = [{"audio": f"{n}.wav", "text": f"what is {n}", "answer": "red"} for n in range(count)]
    for name, values in more.items():
        for n, row in enumerate(rows):
            row[name] = values[n % len(values)]
    write_lines(folder / "own.jsonl", rows)
    return OWN.copy()


def test_what_is_returned_is_what_stands_in_eval_json(tmp_path, made_up, capsys):
    run = made_up({"qa": manifest(tmp_path, 4)})
    text = (run.folder / "eval.json").read_text(encoding="utf-8")
    assert json.loads(text) == run.found
    assert run.found.keys() == {*"model split limit systems errors tasks seconds".split()}
    assert run.found["model"] == str(run.folder) and run.found["systems"] == list(SYSTEMS)
    assert report.table(run.found) in capsys.readouterr().out
    written = {path.name for path in run.folder.iterdir()}
    assert written >= {"eval.json", "predictions.jsonl", "report.html", "cases.tsv", "charts"}


@pytest.mark.parametrize("wrong", ["tasks", "predictions", "model"])
def test_what_is_wrong_is_told_before_a_model_is_loaded_or_a_folder_made(
    tmp_path, made_up, monkeypatch, wrong
):
    """Tasks and predictions before the model is even looked for: it may be far away."""
    monkeypatch.setattr(systems.Models, "load", lambda *_: pytest.fail("a model was loaded"))
    sought, plain = [], evaluation.weights.resolve
    monkeypatch.setattr(evaluation.weights, "resolve", lambda m: sought.append(m) or plain(m))
    write_tasks(tmp_path, {"qa": manifest(tmp_path, 2)})
    given = {"model": tmp_path / "model", "tasks": [tmp_path], "predictions": ()}
    given |= {
        "tasks": {"tasks": [tmp_path / "taks"]},
        "predictions": {"predictions": [f"other={tmp_path}/nowhere.jsonl"]},
        "model": {"model": tmp_path / "no/such/model"},
    }[wrong]
    with pytest.raises(FileNotFoundError, match={"tasks": "taks: no such"}.get(wrong, "no")):
        evaluation.evaluate(**given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and bool(sought) == (wrong == "model")


def test_the_split_of_the_command_is_the_one_that_is_scored(tmp_path, made_up):
    for n, split in enumerate(("test", "dev"), 2):
        write_lines(tmp_path / f"set/{split}.jsonl", [ROW] * n)
    for split, n in ((None, 2), ("dev", 3)):
        found = made_up({"qa": OWN | {"path": "set"}}, split=split).found
        assert found["split"] == split and found["tasks"]["qa"]["n"] == n


def test_results_go_where_they_are_wanted(tmp_path, made_up):
    """Also into a folder that is not there yet; nothing is left beside the model then."""
    model = tmp_path / "model"
    run = made_up({"qa": manifest(tmp_path, 2)}, out=str(tmp_path / "deep/er"))
    assert (tmp_path / "deep/er/eval.json").is_file()
    assert len(read_lines(tmp_path / "deep/er/predictions.jsonl")) == 8
    assert {path.name for path in model.iterdir()} == {
        "model.safetensors",
        "config.json",
        "train.json",
    }
    assert run.found["model"] == str(model)


def test_a_repo_is_evaluated_into_a_folder_of_its_name(tmp_path, made_up, monkeypatch):
    made_up({"qa": manifest(tmp_path, 2)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation.weights, "resolve", lambda model: tmp_path / "model")
    evaluation.evaluate("someone/diva-8b", [tmp_path])
    assert (tmp_path / "runs/diva-8b/eval.json").is_file()


def test_results_stay_with_a_run_and_never_beside_other_weights(tmp_path):
    """A clone's own student is left as it is: what git keeps is not written over."""
    (tmp_path / "train.json").touch()
    assert evaluation.results_in(tmp_path, tmp_path, None) == tmp_path
    assert evaluation.results_in("toy/diva", Path("toy/diva"), None) == Path("runs/diva")
    assert evaluation.results_in("owner/NAME", Path("/cache/7f"), None) == Path("runs/NAME")
    assert evaluation.results_in(tmp_path, tmp_path, "here") == Path("here")


def test_every_option_of_the_command_is_one_of_evaluate(monkeypatch):
    calls = []

    def evaluate(model, tasks, split, limit, batch_size, predictions, degrade, out):
        calls.append((model, tasks, split, limit, batch_size, predictions, degrade, out))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    flags = (
        "--model a --tasks b meld=c --split d --limit 5 --batch-size 6 --predictions e=f "
        "--degrade white:5 reverb --out g"
    )
    tyro.cli(evaluation.main, args=flags.split())
    tyro.cli(evaluation.main, args=[])
    assert calls[0] == ("a", ("b", "meld=c"), "d", 5, 6, ("e=f",), ("white:5", "reverb"), "g")
    assert calls[1] == ("toy/diva", ("toy/tasks",), None, 0, 64, (), (), None)


def test_the_limit_draws_from_each_task_and_is_told(tmp_path, made_up):
    tasks = {"a": manifest(tmp_path, 30), "b": OWN}
    few = made_up(tasks, limit=5)
    assert few.found["limit"] == 5
    assert {name: part["n"] for name, part in few.found["tasks"].items()} == {"a": 5, "b": 5}
    ids = [line["id"] for line in read_lines(few.folder / "predictions.jsonl")]
    assert len({*ids}) == 5 and ids == [name for name in ids[:20:4] for _ in SYSTEMS] * 2
    shown = " ".join((few.folder / "report.html").read_text(encoding="utf-8").split())
    assert "43.8 from 5, 13.9 from 50, 6.9 from 200, 3.1 from 1,000 clips" in shown
    assert made_up(tasks, limit=5).told == []
    more = made_up(tasks)  # without it, only the others are asked
    assert len(more.told) == 2 * 4 * (30 - 5) and more.found["tasks"]["a"]["n"] == 30
    assert made_up(tasks, limit=99).found["tasks"] == more.found["tasks"]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"limit": -1}])
def test_batches_of_nothing_and_limits_below_it_are_refused(tmp_path, made_up, options):
    with pytest.raises(ValueError, match=r"--batch-size .* --limit .*expected"):
        made_up({"qa": manifest(tmp_path, 2)}, **options)


def test_each_clip_is_asked_as_it_is_and_under_each_condition(tmp_path, made_up, monkeypatch):
    """The conditions are the groups, beside each other; other files are heard, under other ids."""
    monkeypatch.chdir(tmp_path)
    for n in range(6):
        soundfile.write(tmp_path / f"{n}.wav", np.sin(np.arange(1600) * (n + 1) / 9), 16_000)
    tasks, heard = {"qa": manifest(tmp_path, 6)}, []

    def say(system, question):
        heard.append((system, question.audio))
        return "red" if question.audio.startswith(str(tmp_path)) else "blue"

    run = made_up(tasks, say, degrade=("white:5", "babble:10"), limit=4)
    groups = run.found["tasks"]["qa"]["groups"]
    scores = {name: part["f1"]["diva"]["score"] for name, part in groups.items()}
    assert scores == {"as it is": 100, "babble  10 dB": 0, "white   5 dB": 0}
    assert run.found["degrade"] == ["white:5", "babble:10"]
    assert len({clip for _, clip in heard}) == 12 and len(heard) == 4 * 12
    ids = [line["id"] for line in read_lines(run.folder / "predictions.jsonl")]
    assert len({*ids}) == 12 and sum(name.endswith(" babble:10") for name in ids) == 4 * 4
    again = made_up(tasks, say, degrade=("white:5", "babble:10"), limit=4)
    assert not again.told, "the same noise, so nothing is asked anew"


def test_only_what_changed_is_asked_again(tmp_path, made_up):
    """Another prompt of one task; other references change scores, but no answer."""
    tasks = {"a": manifest(tmp_path, 4), "b": OWN}
    assert len(made_up(tasks).told) == 4 * 8
    other = made_up(tasks | {"b": OWN | {"prompt": "Say it again."}})
    assert sorted(other.told) == sorted((i, s) for i in range(4, 8) for s in SYSTEMS)
    assert made_up(tasks).told == [], "the answers to the first prompt are still there"
    manifest(tmp_path, 4, answer=["red", "blue"])
    run = made_up(tasks)
    assert run.told == []
    assert run.found["tasks"]["a"]["metrics"]["f1"]["diva"]["score"] == 50
    (tmp_path / "model/model.safetensors").write_text("other weights")
    assert len(made_up(tasks).told) == 4 * 8
    assert len(read_lines(run.folder / "predictions.jsonl")) == 4 * 8


def test_what_gave_no_answer_is_asked_again_and_counts_as_wrong_until_then(tmp_path, made_up):
    tasks = {"qa": manifest(tmp_path, 4)}

    def half(system, question):
        return None if question.audio.endswith("1.wav") and system != "text" else "red"

    run = made_up(tasks, half)
    clip = str(tmp_path / "1.wav")
    assert run.found["errors"] == {clip: "no reason"}
    part = run.found["tasks"]["qa"]
    assert part["n"] == 4 and part["errors"] == {s: int(s in HEARING) for s in SYSTEMS}
    scores = {s: entry["score"] for s, entry in part["metrics"]["f1"].items()}
    assert scores == {s: 75 if s in HEARING else 100 for s in SYSTEMS}
    again = made_up(tasks)
    assert sorted(again.told) == [(1, "cascade"), (1, "diva"), (1, "untrained")]
    assert again.found["errors"] == {} and again.found["tasks"]["qa"]["errors"]["diva"] == 0
    assert again.found["tasks"]["qa"]["metrics"]["f1"]["diva"]["score"] == 100


def test_other_systems_stand_beside_ours_in_every_file(tmp_path, made_up, capsys):
    """Five and six systems: in the scores, the table, the cases, the page; not among our lines."""
    entry = manifest(tmp_path, 3, group=["usa", "gbr"])
    mood = OWN | {"labels": ["Blue", "Red"], "metrics": ["accuracy"]}
    tasks = {"qa": entry | {"metrics": ["f1", "prompt_ignoring"]}, "mood": mood}
    rows = [{"task": "qa", "id": str(n), "answer": "dark red"} for n in range(3)]
    rows += [{"task": "mood", "id": "0", "answer": "RED."}]
    rows += [{"task": "mood", "id": "1", "answer": "It sounds red"}]
    first = write_lines(tmp_path / "first.jsonl", rows)
    second = write_lines(tmp_path / "second.jsonl", rows[:1])
    made_up(tasks, lambda *_: "blue", out=tmp_path / "before")
    sources = [f"first={first}", f"second={second}"]
    sources += [f"before={tmp_path}/before/predictions.jsonl"]
    run = made_up(tasks, predictions=sources)
    names = [*SYSTEMS, "first", "second", "before"]
    assert run.found["systems"] == names
    qa, moods = run.found["tasks"]["qa"], run.found["tasks"]["mood"]
    entries = [*qa["metrics"].values(), *moods["metrics"].values()]
    entries += [part["f1"] for part in qa["groups"].values()]
    assert all(list(entry) == names for entry in entries) and len(qa["groups"]) == 2
    scores = {name: round(e["score"], 1) for name, e in qa["metrics"]["f1"].items()}
    assert scores == dict.fromkeys(SYSTEMS, 100) | {"first": 66.7, "second": 22.2, "before": 0}
    assert qa["errors"]["second"] == 2 and moods["errors"]["second"] == 3
    predicted = moods["predicted"]
    assert predicted["first"] == {"Blue": 0, "Red": 1, "other": 1, "no answer": 1}
    assert predicted["before"] == {"Blue": 3, "Red": 0, "other": 0, "no answer": 0}
    assert moods["metrics"]["accuracy"]["first"]["score"] == pytest.approx(100 / 3)
    assert len(read_lines(run.folder / "predictions.jsonl")) == 4 * 6
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    cases = (run.folder / "cases.tsv").read_text().split("\n")[1:-1]
    assert [line.split("\t")[2] for line in cases] == names * 3
    page = (run.folder / "report.html").read_text()
    assert json.dumps(names) in page and "It sounds red" in page


def test_a_name_given_to_two_files_is_refused(tmp_path, made_up):
    """One of them would silently be left out."""
    tasks = {"qa": manifest(tmp_path, 1)}
    row = {"task": "qa", "id": "0", "answer": "red"}
    files = [write_lines(tmp_path / f"{n}.jsonl", [row]) for n in range(2)]
    with pytest.raises(ValueError, match=r"--predictions .*other"):
        made_up(tasks, predictions=[f"other={file}" for file in files])


def test_every_task_is_scored_by_its_own_items(tmp_path, made_up):
    """Two tasks over the same clips, answered differently; in predictions.jsonl each score stands
    with its answer."""
    tasks = {"a": manifest(tmp_path, 3), "b": OWN | {"prompt": "Other.", "metrics": ["wer"]}}

    def say(system, question):
        n = int(Path(question.audio).stem)
        if question.ask.prompt == "Other.":
            return "red " * (n + SYSTEMS.index(system))
        return "red" if n <= SYSTEMS.index(system) else "blue"

    run = made_up(tasks, say)
    found = {name: part["metrics"] for name, part in run.found["tasks"].items()}
    for y, system in enumerate(SYSTEMS):
        assert found["a"]["f1"][system]["score"] == pytest.approx(min(100, 100 * (y + 1) / 3))
        errors = sum(abs(n + y - 1) for n in range(3))
        assert found["b"]["wer"][system]["score"] == pytest.approx(100 * errors / 3)
    for line in read_lines(run.folder / "predictions.jsonl"):
        n, y = int(line["id"]), SYSTEMS.index(line["system"])
        wanted = (
            {"f1": 100.0 * (n <= y)} if line["task"] == "a" else {"wer": 100.0 * abs(n + y - 1)}
        )
        assert line["scores"] == pytest.approx(wanted), line


def test_a_task_of_which_no_metric_can_be_counted_is_named(tmp_path, made_up, monkeypatch):
    """Instead of an end without a word when all answers are there."""
    entry = manifest(tmp_path, 2) | {"metrics": ["pedant"]}
    monkeypatch.setattr(evaluation.metrics, "judge", lambda: None)
    with pytest.raises(ValueError, match="qa"):
        made_up({"qa": entry})


# ---------------------------------------------------------------------- the whole, in the universe

TEXTS = (
    *("what is the colour of the sun", "what is one", "is it good") * 2,
    *("the dog is red", "the cat is blue", "the sun is it", "good moon"),
    *("good dog", "what cat is it", "the moon is green", "sun"),
    *("say two", "three dog four", "one"),
)
LABELS = ("red", "green", "blue", "sun")
TASKS = {
    "spoken_qa": {"path": "qa.jsonl", "prompt": "say what it is", "max_new_tokens": 6}
    | {"metrics": ["exact_match", "f1", "prompt_ignoring"]},
    "translation": {"path": "translation.jsonl", "prompt": "say it in {language}"}
    | {"metrics": ["bleu", "chrf"], "max_new_tokens": 9},
    "emotion": {"path": "emotion.jsonl", "prompt": "what colour is the moon", "labels": LABELS}
    | {"metrics": ["accuracy", "weighted_f1"]},
    "repeat": {"path": "repeat.jsonl", "prompt": None, "metrics": ["wer"], "max_new_tokens": 6},
}
CLIPS = dict(zip(TASKS, (range(6), range(6, 10), range(10, 14), range(14, 17)), strict=True))
ITEMS = sum(map(len, CLIPS.values()))


def write_universe(folder: Path, answers: Callable[[str, int], str]) -> Path:
    """tasks.json and a manifest for each task; answers(task, number of the clip)."""
    for task, numbers in CLIPS.items():
        rows = []
        for n in numbers:
            more = {"spoken_qa": {"group": "ab"[n % 2]}}
            more["translation"] = {"language": ("de", "tr")[n % 2]}
            row = {"audio": f"{n}.wav", "id": f"clip {n}", "text": TEXTS[n]} | more.get(task, {})
            rows.append(row | {"answer": answers(task, n)})
        write_lines(folder / TASKS[task]["path"], rows)
    return write_tasks(folder, {name: {"suite": "manifest"} | task for name, task in TASKS.items()})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """whisper/, llama/ and diva/ in the published layouts, tasks/ with the clips."""
    with universe.compiled_fast():
        root = tmp_path_factory.mktemp("universe")
        universe.build(root)
        universe.write_clips(root / "tasks", len(TEXTS))
        yield root


@contextlib.contextmanager
def counting(most: int | None = None) -> Iterator[list[tuple[int, str]]]:
    """The answers that are asked for; after `most` of them, someone presses Ctrl+C."""
    told, plain = [], systems.answer

    def counted(models, questions, lacking, transcripts, batch_size, tell):
        def count(i, system, answer, note):
            if len(told) == most:
                raise KeyboardInterrupt
            told.append((i, system))
            tell(i, system, answer, note)

        plain(models, questions, lacking, transcripts, batch_size, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(systems, "answer", counted)
        yield told


@pytest.fixture(scope="module")
def first(root) -> Path:
    """predictions.jsonl of a run over the universe; the references tell nothing yet."""
    write_universe(root / "tasks", lambda task, n: "red")
    with counting() as told, pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "chart", lambda *_: None)
        evaluation.evaluate(root / "diva", [root / "tasks"], batch_size=4, out=root / "first")
    assert sorted(told) == sorted((i, system) for i in range(ITEMS) for system in SYSTEMS)
    return root / "first/predictions.jsonl"


@pytest.fixture(scope="module")
def known(root, first) -> Path:
    """The same clips, with references from the answers: for each system some that it says."""
    said = {
        (line["task"], line["id"], line["system"]): line["answer"] for line in read_lines(first)
    }

    def answers(task: str, n: int) -> str:
        wanted = SYSTEMS[n % 4]
        return said[task, f"clip {n}", wanted] or "one two"

    folder = shutil.copytree(root / "tasks", root / "known")
    return write_universe(folder, answers)


@pytest.fixture(scope="module")
def whole(root, known) -> Run:
    """An evaluation that nothing disturbs, with everything that it writes."""
    with counting() as told:
        found = evaluation.evaluate(root / "diva", [known], batch_size=4, out=root / "whole")
    return Run(found, root / "whole", told)


def test_each_process_asks_about_its_own_clips(tmp_path, monkeypatch):
    """Whatever is asked about one clip is asked by one process, and nothing by none or two."""
    asked = []
    monkeypatch.setattr(systems.Models, "load", staticmethod(lambda folder: None))
    monkeypatch.setattr(systems, "answer", lambda models, _, lacking, *rest: asked.append(lacking))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "wait_for_all", lambda: None)
    items = [one_item(id=str(n), audio=f"{n // 2}.wav") for n in range(6)]
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        kept = evaluation.Predictions(tmp_path / "predictions.jsonl", MODEL, index)
        evaluation.ask_what_is_lacking(tmp_path, items, kept, 4)
    everything, nothing = set(SYSTEMS), set()
    first = [everything, everything, nothing, nothing, everything, everything]
    assert asked == [first, [everything - systems for systems in first]]


def test_two_processes_answer_what_one_does(root, known, whole, tmp_path):
    """As on two hosts: each asks about its own clips, and one of them writes the one file of
    answers and the same scores. What a killed one has left beside it is taken in."""
    address = checks.free_address()
    lines = (whole.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines(True)
    (tmp_path / "predictions.jsonl.1").write_text("".join(lines[:3]) + lines[3][:40])
    given = {"--model": root / "diva", "--tasks": known, "--batch-size": 4, "--out": tmp_path}
    command = [sys.executable, "eval.py", *(str(word) for pair in given.items() for word in pair)]
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    together["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
    together["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "True"  # as where the one was run
    processes = [
        subprocess.Popen(
            command,
            cwd=Path(evaluation.__file__).parent,
            env=os.environ | together | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "better" in outputs[0] and "better" not in outputs[1], "the first alone speaks"
    found = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert found["tasks"] == json.loads((whole.folder / "eval.json").read_text())["tasks"]
    assert [*tmp_path.glob("predictions.jsonl*")] == [tmp_path / "predictions.jsonl"]
    ours = read_lines(tmp_path / "predictions.jsonl")
    answers = [(line["key"], line["answer"]) for line in ours]
    wanted = [(line["key"], line["answer"]) for line in map(json.loads, lines)]
    assert answers == wanted[: len(answers)] and len(answers) == 4 * ITEMS


def words(text: str | None) -> list[str]:
    """Without the article, which SQuAD's comparison does not count; the universe has one."""
    return [word for word in (text or "").split() if word != "the"]


@functools.cache
def slow_edits(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The definition, tried in every way."""
    if not a or not b:
        return len(a) + len(b)
    change = slow_edits(a[1:], b[1:]) + (a[0] != b[0])
    return min(change, slow_edits(a[1:], b) + 1, slow_edits(a, b[1:]) + 1)


def slow_f1(said: list[str], wanted: list[str]) -> float:
    common = sum(min(said.count(word), wanted.count(word)) for word in set(said))
    return 2 * common / (len(said) + len(wanted)) if said and wanted else float(said == wanted)


def slow_weighted_f1(pairs: list[tuple[str, str]]) -> float:
    total = 0.0
    for label in LABELS:
        hits = sum(said == wanted == label for said, wanted in pairs)
        said, wanted = (sum(pair[k] == label for pair in pairs) for k in range(2))
        total += wanted * 2 * hits / max(1, said + wanted)
    return total / len(pairs)


def test_the_scores_are_those_of_the_answers_on_disk(whole):
    """Counted here, BLEU and chrF by sacrebleu; every system has some that it alone has right."""
    assert json.loads((whole.folder / "eval.json").read_text(encoding="utf-8")) == whole.found
    lines, scores = read_lines(whole.folder / "predictions.jsonl"), []
    assert len(lines) == 4 * ITEMS
    metrics = {name: part["metrics"] for name, part in whole.found["tasks"].items()}
    for system in SYSTEMS:
        pairs = {
            task: [
                (line["answer"], line["references"][0])
                for line in lines
                if (line["system"], line["task"]) == (system, task)
            ]
            for task in TASKS
        }
        asked = [(words(a), words(b)) for a, b in pairs["spoken_qa"]]
        repeated = [(tuple(a.split()), tuple(b.split())) for a, b in pairs["repeat"]]
        errors = sum(slow_edits(a, b) for a, b in repeated)
        length = sum(len(b) for _, b in repeated)
        wanted = {
            ("spoken_qa", "exact_match"): np.mean([a == b for a, b in asked]),
            ("spoken_qa", "f1"): np.mean([slow_f1(a, b) for a, b in asked]),
            ("emotion", "accuracy"): np.mean([a == b for a, b in pairs["emotion"]]),
            ("emotion", "weighted_f1"): slow_weighted_f1(pairs["emotion"]),
            ("repeat", "wer"): errors / length,
        }
        for name, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
            corpora = [pairs["translation"][k::2] for k in range(2)]
            each = [
                scorer.corpus_score([a for a, _ in corpus], [[b for _, b in corpus]]).score
                for corpus in corpora
            ]
            wanted["translation", name] = np.mean(each) / 100
        for (task, metric), score in wanted.items():
            found = metrics[task][metric][system]
            assert found["score"] == pytest.approx(100 * score), (system, task, metric)
            assert found["n"] == len(CLIPS[task])
        scores.append([*wanted.values()])
    assert len({*map(tuple, scores)}) == 4 and np.ptp(scores, 0).all(), "all systems score alike"


def test_groups_of_the_universe_are_scored_by_their_own_clips(whole):
    lines = read_lines(whole.folder / "predictions.jsonl")
    groups = whole.found["tasks"]["spoken_qa"]["groups"]
    assert list(groups) == ["a", "b"]
    assert whole.found["tasks"]["translation"]["groups"] == {}, "languages are no groups"
    for group, part in groups.items():
        for system in SYSTEMS:
            scores = [
                slow_f1(words(line["answer"]), words(line["references"][0]))
                for line in lines
                if (line["task"], line["system"], line["group"]) == ("spoken_qa", system, group)
            ]
            assert part["f1"][system]["n"] == len(scores) == 3
            assert part["f1"][system]["score"] == pytest.approx(100 * np.mean(scores))


def test_each_line_says_what_was_asked_and_heard(whole):
    lines = read_lines(whole.folder / "predictions.jsonl")
    assert [line["system"] for line in lines] == list(SYSTEMS) * ITEMS
    assert [line["id"] for line in lines[::4]] == [f"clip {n}" for n in range(ITEMS)]
    prompts = {line["prompt"] for line in lines if line["task"] == "translation"}
    assert prompts == {"say it in German", "say it in Turkish"}
    for diva, cascade in zip(lines[1::4], lines[2::4], strict=True):
        assert diva["transcript"] == cascade["transcript"] != "" and "heard" not in cascade
    assert len({diva["heard"] for diva in lines[1::4]} - {""}) > 5
    for line in lines[::4] + lines[3::4]:
        assert not {"transcript", "heard"} & line.keys()


def test_a_repeated_run_loads_no_model_and_finds_the_same(
    root, known, whole, monkeypatch, no_charts
):
    monkeypatch.setattr(systems.Models, "load", lambda *_: pytest.fail("a model was loaded"))
    out = shutil.copytree(whole.folder, root / "again")
    found = evaluation.evaluate(root / "diva", [known], batch_size=4, out=out)
    assert found["tasks"] == whole.found["tasks"] and found["errors"] == {}
    lines = (whole.folder / "predictions.jsonl").read_text(encoding="utf-8")
    assert (out / "predictions.jsonl").read_text(encoding="utf-8") == lines


@pytest.mark.parametrize("told_first", [1, 23, 53])
def test_a_run_that_is_stopped_goes_on_with_what_is_missing(
    root, known, whole, no_charts, told_first
):
    """And ends as if it had never been stopped: within the speech, and within the texts."""
    out = root / f"stopped {told_first}"
    with counting(told_first) as before, pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(root / "diva", [known], batch_size=4, out=out)
    assert len(read_lines(out / "predictions.jsonl")) == told_first
    assert not (out / "eval.json").exists()
    with counting() as after:
        found = evaluation.evaluate(root / "diva", [known], batch_size=4, out=out)
    assert len(before) == told_first and not set(before) & set(after)
    assert sorted(before + after) == sorted((i, s) for i in range(ITEMS) for s in SYSTEMS)
    assert found["tasks"] == whole.found["tasks"]
    assert read_lines(out / "predictions.jsonl") == read_lines(whole.folder / "predictions.jsonl")


def test_a_cascade_that_is_missing_alone_listens_to_no_clip_again(
    root, known, whole, monkeypatch, no_charts
):
    """The transcript stands beside diva's answer; in older files it is called `heard`."""
    lines = read_lines(whole.folder / "predictions.jsonl")
    for line in lines[1::8]:
        line["heard"] = line.pop("transcript")
    out = root / "without cascade"
    some = [line for line in lines if line["system"] != "cascade"]
    write_lines(out / "predictions.jsonl", some)
    monkeypatch.setattr(systems, "loaded", lambda clips, *_: iter(clips and pytest.fail("a clip")))
    with counting() as told:
        found = evaluation.evaluate(root / "diva", [known], batch_size=4, out=out)
    assert sorted(told) == [(i, "cascade") for i in range(ITEMS)]
    assert found["tasks"] == whole.found["tasks"]


def test_answers_are_the_same_every_time_and_in_batches_of_any_size(root, known, whole, no_charts):
    with counting() as told:
        evaluation.evaluate(root / "diva", [known], batch_size=99, out=root / "large")
    assert len(told) == 4 * ITEMS
    answers = [
        [
            (line["key"], line["answer"], line.get("heard"), line.get("transcript"))
            for line in read_lines(folder)
        ]
        for folder in (root / "large/predictions.jsonl", whole.folder / "predictions.jsonl")
    ]
    assert answers[0] == answers[1]


def test_clips_that_cannot_be_decoded_count_as_wrong_and_are_listed(root, whole, no_charts, capsys):
    """The run goes on, each is named with its reason, all others get their own answers; a clip
    that has been mended is asked for again, and it alone."""
    folder = shutil.copytree(root / "known", root / "spoilt")
    (folder / "0.wav").write_bytes(b"RIFF, but not really")
    (folder / "6.wav").unlink()
    soundfile.write(folder / "10.wav", np.zeros(universe.WINDOW + 1), 16000)
    soundfile.write(folder / "11.wav", np.zeros(0), 16000)
    bad = {str(folder / f"{n}.wav") for n in (0, 6, 10, 11)}
    out = root / "spoilt out"
    with counting() as told:
        found = evaluation.evaluate(root / "diva", [folder], batch_size=4, out=out)
    assert sorted(told) == sorted((i, system) for i in range(ITEMS) for system in SYSTEMS)
    shown = capsys.readouterr()

    assert found["errors"].keys() == bad
    reasons = {"0.wav": "not audio", "6.wav": "missing", "10.wav": "window", "11.wav": "no samples"}
    for name, reason in reasons.items():
        assert reason in found["errors"][str(folder / name)]
        assert f"counted as wrong: {folder / name}" in shown.out + shown.err
    assert "4 clips could not be decoded" in shown.out
    old = {line["key"]: line for line in read_lines(whole.folder / "predictions.jsonl")}
    lines = read_lines(out / "predictions.jsonl")
    assert len(lines) == len(old) == 4 * ITEMS
    for line in lines:
        lost = line["audio"] in bad and line["system"] in HEARING
        assert line["answer"] == (None if lost else old[line["key"]]["answer"]), line
        assert ("error" in line) == lost and not (lost and {"heard", "transcript"} & line.keys())
        if lost:
            assert line["scores"].get("accuracy", 0) == line["scores"].get("exact_match", 0) == 0
    lost = {"spoken_qa": 1, "translation": 1, "emotion": 2, "repeat": 0}
    for name, part in found["tasks"].items():
        assert part["n"] == len(CLIPS[name])
        assert part["errors"] == {s: lost[name] * (s in HEARING) for s in SYSTEMS}
        assert {e["n"] for entries in part["metrics"].values() for e in entries.values()} == {
            len(CLIPS[name])
        }
    for system, counts in found["tasks"]["emotion"]["predicted"].items():
        said = [line["answer"] for line in lines if line["task"] == "emotion"]
        said = said[SYSTEMS.index(system) :: 4]
        assert counts["no answer"] == (2 if system in HEARING else 0) and sum(counts.values()) == 4
        assert [counts[label] for label in LABELS] == [said.count(label) for label in LABELS]
    accuracy = found["tasks"]["emotion"]["metrics"]["accuracy"]
    for y, system in enumerate(SYSTEMS):
        some = [line for line in lines if line["task"] == "emotion"][y::4]
        right = sum(line["answer"] == line["references"][0] for line in some)
        assert accuracy[system]["score"] == 25 * right

    shutil.copy(root / "known/6.wav", folder / "6.wav")
    with counting() as told:
        mended = evaluation.evaluate(root / "diva", [folder], batch_size=4, out=out)
    assert sorted(told) == sorted((i, system) for i in (0, 6, 10, 11) for system in HEARING)
    assert mended["errors"].keys() == bad - {str(folder / "6.wav")}
    assert mended["tasks"]["translation"] == whole.found["tasks"]["translation"]


def test_without_a_transcript_the_upper_bound_alone_is_wrong(root, first, no_charts):
    tasks = write_universe(root / "untold", lambda task, n: "red")
    for name in TASKS:
        rows = read_lines(tasks / TASKS[name]["path"])
        for row in rows:
            del row["text"]
            row["audio"] = f"../tasks/{row['audio']}"
        write_lines(tasks / TASKS[name]["path"], rows)
    out = root / "untold out"
    found = evaluation.evaluate(root / "diva", [tasks], batch_size=4, out=out)
    old = {(line["id"], line["system"]): line["answer"] for line in read_lines(first)}
    for line in read_lines(out / "predictions.jsonl"):
        told = line["system"] == "text"
        assert line["answer"] == (None if told else old[line["id"], line["system"]])
    assert found["errors"] == {}, "the clips are fine"
    assert found["tasks"]["emotion"]["errors"] == {s: 4 * (s == "text") for s in SYSTEMS}


def test_clips_of_ones_own_are_scored_without_a_tasks_json(root, first, no_charts):
    """manifest=FILE from the files to the table: what diva says is right, and a word for another
    an error."""
    lines = [line for line in read_lines(first) if line["system"] == "diva"]
    rows = [{"audio": line["audio"], "answer": line["answer"] or "one"} for line in lines[:3]]
    rows[1]["answer"] += " two"
    write_lines(root / "own/mine.jsonl", rows)
    source, out = f"manifest={root / 'own/mine.jsonl'}", root / "own/out"
    found = evaluation.evaluate(root / "diva", [source], batch_size=4, out=out)
    part = found["tasks"]["manifest"]
    assert part["prompt"] is None and part["n"] == 3 and not found["errors"]
    assert list(part["metrics"]) == ["contains", "f1", "exact_match", "wer"]
    said = [line["answer"] for line in read_lines(out / "predictions.jsonl")][1::4]
    right = [words(a) == words(row["answer"]) for a, row in zip(said, rows, strict=True)]
    assert part["metrics"]["exact_match"]["diva"]["score"] == pytest.approx(100 * np.mean(right))
