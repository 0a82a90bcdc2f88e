"""report.py: what is shown is what was found, stays within its lines, and breaks on no name.

Tasks are scored by eval.py, from answers made up here; where only a mark matters, the entries are
made up too.
"""

import csv
import html
import html.parser
import json
import re
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure

import eval as evaluation
from evaluation import report, significance, suites
from evaluation.published import PUBLISHED, PUBLISHED_SYSTEMS
from evaluation.systems import SYSTEMS

YES_NO = ("Yes", "No")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch) -> None:
    """How sure the scores are is of no account here."""
    monkeypatch.setattr(significance, "RESAMPLES", 200)


class Evaluated(NamedTuple):
    """What write() is given."""

    found: dict
    items: list[evaluation.Item]
    answers: dict[str, list[str | None]]
    scores: dict[tuple[str, int], dict[str, float]]


def clip(n: int, text: str = "", *answers: str, **more: str) -> suites.Example:
    audio = more.pop("audio", f"/nowhere/{n}.wav")
    return suites.Example(str(n), audio, text or f"what is {n}", answers or ("red",), **more)


def task_of(examples: list[suites.Example], *metrics: str, **more) -> evaluation.Task:
    more = {"suite": "manifest", "prompt": "Say it."} | more
    return evaluation.Task(examples=examples, metrics=metrics or ("f1",), **more)


def red(system: str, n: int) -> str | None:
    return "red"


def evaluated(
    tasks: dict[str, evaluation.Task],
    say: Callable[[str, int], str | None] = red,
    others: Sequence[str] = (),
) -> Evaluated:
    """Every system says say(system, number of the clip in its task)."""
    names, items = [*SYSTEMS, *others], []
    found = {"model": "runs/mine", "split": None, "limit": 0, "systems": names}
    found |= {"errors": {}, "tasks": {}}
    answers, scores = {name: [] for name in names}, {}
    for name, task in tasks.items():
        some = [evaluation.Item(name, task.ask(example), example) for example in task.examples]
        said = {system: [say(system, n) for n in range(len(some))] for system in names}
        found["tasks"][name], single = evaluation.score_task(task, some, said)
        for metric, rows in single.items():
            for n, row in enumerate(rows, len(items)):
                for system, value in zip(names, row, strict=True):
                    scores.setdefault((system, n), {})[metric] = float(value)
        items += some
        for system in names:
            answers[system] += said[system]
    return Evaluated(found, items, answers, scores)


def heard_of(run: Evaluated) -> list[dict[str, str]]:
    """What stands beside diva's answers: of the first clip nothing, since it gave none."""
    said = (item.example.text for item in run.items)
    return [{"transcript": text, "heard": f"um {text}"} if n else {} for n, text in enumerate(said)]


def entry(score: float, reach: float = 1.0, **more: object) -> dict:
    return {"score": score, "low": score - reach, "high": score + reach, "n": 9} | more


def found_of(metrics: dict[str, dict[str, dict]], **more: object) -> dict:
    """Of one task, with entries that are made up: {metric: {system: entry}}."""
    systems = list(next(iter(metrics.values())))
    part = {"suite": "manifest", "n": 9, "prompt": None, "metrics": metrics, "groups": {}}
    part |= {"signatures": {}, "errors": {}} | more
    return {"model": "m", "limit": 0, "systems": systems, "errors": {}, "tasks": {"qa": part}}


# ------------------------------------------------------------------------------------- the table


def lines_of(found: dict) -> list[str]:
    return report.table(found).split("\n")


def names_of(lines: list[str]) -> list[str]:
    return [line[:24].rstrip() for line in lines]


def cells_of(line: str, count: int = 4) -> list[tuple[str, str, str]]:
    """Score, mark and interval of each system, from where they must stand."""
    line = line.ljust(24 + 19 * count)
    parts = [line[24 + 19 * k : 43 + 19 * k] for k in range(count)]
    assert all(part[0] == part[7] == " " for part in parts), line
    return [(part[1:6].strip(), part[6].strip(), part[8:].strip()) for part in parts]


def test_each_metric_has_a_row_and_the_headline_one_for_each_group():
    examples = [clip(n, group="ab"[n % 2]) for n in range(6)]
    mood = task_of([clip(0), clip(1)], "accuracy", "weighted_f1", labels=("red", "blue"))
    tasks = {"qa": task_of(examples, "f1", "exact_match", "wer"), "mood": mood}
    lines = lines_of(evaluated(tasks).found)
    wanted = ["qa (6)", " f1", "  a", "  b", " exact_match", " wer -"]
    wanted += ["mood (2)", " accuracy", " weighted_f1"]
    assert names_of(lines)[1 : len(wanted) + 1] == wanted
    assert lines[0].split() == list(SYSTEMS)
    assert lines[len(wanted) + 1].startswith("score (0 to 100) and its 95 % interval")


def test_each_cell_holds_the_score_and_the_interval_of_its_system():
    """In percent, with one decimal; the columns stand under the names."""
    examples = [clip(n, group="ab"[n % 2]) for n in range(12)]

    def say(system, n):
        return "red" if n < 3 * SYSTEMS.index(system) else "blue" if n % 3 else "dark red"

    found = evaluated({"qa": task_of(examples, "f1", "wer")}, say).found
    lines, part = lines_of(found), found["tasks"]["qa"]
    rows = {" f1": part["metrics"]["f1"], " wer -": part["metrics"]["wer"]}
    rows |= {f"  {group}": part["groups"][group]["f1"] for group in "ab"}
    shown = dict(zip(names_of(lines), lines, strict=True))
    for name, entries in rows.items():
        for (score, _, interval), e in zip(cells_of(shown[name]), entries.values(), strict=True):
            assert score == f"{e['score']:.1f}", name
            assert interval == f"{e['low']:.1f}-{e['high']:.1f}", name
    assert len({cell[0] for cell in cells_of(shown[" f1"])}) == 4
    assert [lines[0].index(system) for system in SYSTEMS] == [25 + 19 * k for k in range(4)]


def test_marks_tell_what_differs_from_diva_and_what_is_the_best_of_all():
    """A p of 5 % is none; the best is marked as such, whether or not it is diva."""
    p = {"diva": {}, "a": {"p_permutation": 0.049}, "b": {"p_permutation": 0.05}}
    p["c"] = {"p_permutation": 0.001, "best": True}
    p["d"] = {"p_bootstrap": 0.001, "p_permutation": 0.2, "best": False}
    entries = {name: entry(40.0, **more) for name, more in p.items()}
    found = found_of({"f1": entries})
    found["systems"] = list("abcd")
    row = lines_of(found)[2]
    assert [mark for _, mark, _ in cells_of(row)] == ["*", "", "!", ""]
    entries["diva"]["best"] = True
    found["systems"] = ["diva", "a"]
    assert [mark for _, mark, _ in cells_of(lines_of(found)[2], 2)] == ["!", "*"]
    text = report.table(found)
    assert "* differs from diva: p < 0.05" in text and "! the best of all but text" in text


def test_where_less_is_better_the_row_says_so():
    metrics = {name: dict.fromkeys(SYSTEMS, entry(9.0)) for name in report.METRICS}
    lines = lines_of(found_of(metrics))
    lower = {name.split()[0] for name in names_of(lines) if name.endswith(" -")}
    assert lower == {"prompt_ignoring", "wrong_script", "wer"}
    assert "- lower is better" in "\n".join(lines)


def test_scores_beyond_a_thousand_are_shown_without_decimals():
    """64 words said for one are 6,400 per cent."""
    entries = dict.fromkeys(SYSTEMS, entry(6400.0, 192.0)) | {"text": entry(999.9, 0.0)}
    cells = cells_of(lines_of(found_of({"wer": entries}))[2])
    assert cells == [("6400", "", "6208-6592")] * 3 + [("999.9", "", "999.9-999.9")]


LONG = "a very long name of something that nobody uses, " * 3


@pytest.mark.parametrize("what", ["groups", "labels", "systems", "tasks", "scores"])
def test_no_line_is_wider_than_a_hundred_columns(what):
    """Whatever is long or many."""

    def long(kind: str, name: str) -> str:
        return LONG + name if what == kind else name

    many = 7 if what == "systems" else 0
    others = [long("systems", f"system {k}") for k in range(many)]
    most = 30 if what == "labels" else 2
    labels = [*YES_NO, *(long("labels", f"label {k}") for k in range(most - 2))]
    some = [clip(n, "", "Yes", group=long("groups", "ab"[n % 2])) for n in range(6)]
    qa = task_of(some, "f1", "wer")
    mood = task_of(some, "accuracy", labels=tuple(labels))
    humour = task_of(some, "accuracy", labels=YES_NO, suite="ur_funny")
    into = [clip(n, "", "ja", language="de") for n in range(2)]
    tasks = {"qa": qa, "mood": mood, "humour": humour, "into": task_of(into, "bleu", "chrf")}

    def say(system, n):
        return None if n == 5 else labels[n % most]

    found = evaluated({long("tasks", name): t for name, t in tasks.items()}, say, others).found
    if what == "scores":
        part = next(iter(found["tasks"].values()))
        part["metrics"]["wer"] = dict.fromkeys(found["systems"], entry(102_400.0, 2_400.0))
    lines = lines_of(found)
    assert max(map(len, lines)) <= 100, max(lines, key=len)


def test_more_than_four_systems_stand_in_blocks_below_each_other():
    """Each of them once, with all rows."""
    others = [f"system {k}" for k in range(5)]
    examples = [clip(n, group="ab"[n % 2]) for n in range(4)]

    def say(system, n):
        return "red" if n < [*SYSTEMS, *others].index(system) / 2 else "blue"

    found = evaluated({"qa": task_of(examples, "f1", "wer")}, say, others).found
    lines = lines_of(found)
    ends = [n for n, line in enumerate(lines) if line.startswith("score (0 to 100)")]
    blocks = "\n".join(lines[: ends[0]]).split("\n\n")
    assert len(blocks) == 3 and len(ends) == 1
    heads = [re.split(r" {2,}", block.split("\n")[0].strip()) for block in blocks]
    assert heads == [list(SYSTEMS), others[:4], others[4:]]
    for block, systems in zip(blocks, heads, strict=True):
        rows = block.split("\n")[1:]
        assert names_of(rows) == ["qa (4)", " f1", "  a", "  b", " wer -"]
        entries = found["tasks"]["qa"]["metrics"]["f1"]
        scores = [f"{entries[system]['score']:.1f}" for system in systems]
        assert [cell[0] for cell in cells_of(rows[1], len(systems))] == scores


def moods(*labels: str, say: Callable = lambda system, n: None, **more) -> dict:
    meant = [labels[n % 2] for n in range(6)]
    examples = [clip(n, "", label) for n, label in enumerate(meant)]
    return evaluated({"mood": task_of(examples, "accuracy", labels=labels, **more)}, say).found


def test_what_each_system_named_is_told_and_what_nobody_named_is_not():
    said = {"diva": ["Yes", "Yes", "Yes", "No", "well", None], "cascade": ["No"] * 6}
    found = moods(*YES_NO, "Maybe", say=lambda system, n: said.get(system, ["Yes"] * 6)[n])
    lines = lines_of(found)
    assert "mood as diva names it: Yes 3, No 1, other 1, no answer 1" in lines
    assert "mood as cascade names it: No 6" in lines
    assert sum("names it" in line for line in lines) == 4
    assert "names it" not in report.table(evaluated({"qa": task_of([clip(0)])}).found)


@pytest.mark.parametrize("labels", [YES_NO, ("0", "1"), ("red", "green", "blue")])
def test_p_against_guessing_is_shown_where_there_are_two_labels(labels):
    found = moods(*labels, say=lambda system, n: labels[0] if system == "diva" else labels[n % 2])
    lines = [line for line in lines_of(found) if "against guessing" in line]
    if len(labels) > 2:
        assert lines == []
        return
    # 3 of 6 by one label alone: p is 1; 6 of 6: 2 / 2^6
    shown = "untrained 0.031, diva 1, cascade 0.031, text 0.031"
    assert lines == [f"mood: p against guessing: {shown}"]


def test_each_signature_is_told_once():
    into = [clip(n, "", "ja", language=code) for n, code in enumerate(("de", "zh-CN"))]
    task = task_of(into, "bleu", "chrf")
    lines = lines_of(evaluated({"one": task, "two": task}).found)
    signed = [line for line in lines if re.match("(bleu|chrf) ", line)]
    names = ["bleu de: BLEU", "bleu zh-CN: BLEU", "chrf de: chrF2", "chrf zh-CN: chrF2"]
    assert [line.split("|")[0] for line in signed] == names
    assert "|tok:13a|" in signed[0] and "|tok:zh|" in signed[1]


def test_what_gave_no_answer_is_told_for_each_task():
    def say(system, n):
        return None if n < {"diva": 2, "text": 1}.get(system, 0) else "red"

    tasks = {"qa": task_of([clip(n) for n in range(3)])}
    found = evaluated(tasks, say).found
    lines = lines_of(found)
    assert lines[-1] == "qa: without an answer, counted as wrong: diva 2, text 1"
    assert "could not be decoded" not in report.table(found)
    found["errors"] = {"a.wav": "no samples", "b.wav": "missing"}
    assert "2 clips could not be decoded and count as wrong (see eval.json)" in lines_of(found)
    assert "without an answer" not in report.table(evaluated(tasks).found)


def test_published_scores_stand_apart_and_say_what_they_are():
    """Of the suites of the paper alone, as read off its charts, by group."""
    groups = [clip(n, group=("usa", "kenya")[n % 2]) for n in range(4)]
    tasks = {"mine": task_of(groups), "sd": task_of(groups, "f1", "wer", suite="sd_qa")}
    lines = lines_of(evaluated(tasks).found)
    at = lines.index("") + 1
    assert lines[at].startswith("read off the published charts ")
    heads = [lines[at][34 + 16 * k :][:15].strip() for k in range(4)]
    assert heads == list(PUBLISHED_SYSTEMS)
    assert lines[-1].startswith("(pedant there: PANDA, an older classifier")
    shown = {line[:34].rstrip(): line[34:].split() for line in lines[at + 1 : -1]}
    published = PUBLISHED["sd_qa"]
    assert shown.keys() == {f"sd pedant {group}".rstrip() for group in published}
    for group, entries in published.items():
        scores = [f"{value:.1f}" for value in entries["pedant"].values()]
        assert shown[f"sd pedant {group}".rstrip()] == scores
    assert "published" not in report.table(evaluated({"mine": tasks["mine"]}).found)


# ------------------------------------------------------------------------------------ the charts


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Callable[..., Figure]:
    """chart() that also returns the figure that it drew."""
    figures = []

    class Kept(Figure):
        def __init__(self, **given):
            super().__init__(**given)
            figures.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)

    def draw(found: dict, task: str = "qa") -> Figure:
        report.chart(found, task, tmp_path / "qa")
        return figures[-1]

    return draw


def bars_of(figure: Figure) -> dict[str, list[float]]:
    """{name in the legend: heights}"""
    (axes,) = figure.axes
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    boxes = [c for c in axes.containers if hasattr(c, "patches")]
    assert [box.get_label() for box in boxes] == names
    return {box.get_label(): [bar.get_height() for bar in box.patches] for box in boxes}


def ticks_of(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


@pytest.mark.parametrize("groups", [1, 2, 15])
def test_a_chart_is_a_png_and_an_svg(tmp_path, drawn, groups):
    examples = [clip(n, group=f"g{n % groups}") for n in range(2 * groups)]
    drawn(evaluated({"qa": task_of(examples)}).found)
    png = (tmp_path / "qa.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[12:16] == b"IHDR" and png[-8:-4] == b"IEND"
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
    assert 600 <= width <= 4000 and 400 <= height <= 800
    root = ET.parse(tmp_path / "qa.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}path")) > 8 * (groups if groups > 1 else 1)
    assert {path.name for path in tmp_path.iterdir()} == {"qa.png", "qa.svg"}


def test_a_chart_shows_the_headline_of_each_system_by_group_and_of_all(drawn):
    examples = [clip(n, group="ab"[n % 2]) for n in range(12)]

    def say(system, n):
        return "red" if n < 2 * names.index(system) else "blue"

    names = [*SYSTEMS, "a", "b"]
    found = evaluated({"qa": task_of(examples, "exact_match", "f1")}, say, names[4:]).found
    figure, part = drawn(found), found["tasks"]["qa"]
    entries = [part["groups"]["a"], part["groups"]["b"], part["metrics"]]
    entries = [some["exact_match"] for some in entries]
    assert ticks_of(figure) == ["a", "b", "all"]
    bars = bars_of(figure)
    assert list(bars) == names
    for name, heights in bars.items():
        assert heights == pytest.approx([some[name]["score"] for some in entries])
    (axes,) = figure.axes
    assert axes.get_ylabel() == "exact_match" and axes.get_title().startswith("qa: 95 % intervals")
    for box in (c for c in axes.containers if hasattr(c, "patches")):
        (ends,) = box.errorbar.lines[2]
        for (bottom, top), some in zip(ends.get_segments(), entries, strict=True):
            low, high = some[box.get_label()]["low"], some[box.get_label()]["high"]
            assert [bottom[1], top[1]] == pytest.approx([low, high])
    places = [[bar.get_x() for bar in box.patches] for box in axes.containers[1::2]]
    assert len({x for some in places for x in some}) == 18, "two bars stand in one place"
    colours = [box.patches[0].get_facecolor() for box in axes.containers[1::2]]
    assert len(set(colours)) == 6


def test_a_star_stands_over_the_best_of_its_place_alone(drawn):
    entries = {name: entry(50.0 + 9 * k, best=name == "cascade") for k, name in enumerate(SYSTEMS)}
    plain = {name: e | {"best": name == "diva"} for name, e in entries.items()}
    groups = {"a": {"f1": plain}, "b": {"f1": {n: e | {"best": False} for n, e in entries.items()}}}
    axes = drawn(found_of({"f1": entries}, groups=groups)).axes[0]
    stars = [text for text in axes.texts if text.get_text() == "*"]
    wanted = []
    for place, name in ((0, "diva"), (2, "cascade")):
        box = next(c for c in axes.containers if c.get_label() == name and hasattr(c, "patches"))
        bar = box.patches[place]
        wanted.append((bar.get_x() + bar.get_width() / 2, bar.get_height() + 1))
    np.testing.assert_allclose(sorted(star.xy for star in stars), wanted)


def test_a_chart_says_where_less_is_better_and_shows_scores_of_zero(drawn):
    examples = [clip(n) for n in range(3)]
    figure = drawn(evaluated({"qa": task_of(examples, "prompt_ignoring")}).found)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "prompt_ignoring (lower is better)"
    assert bars_of(figure) == {system: [0.0] for system in SYSTEMS}
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 1


MARK = " (published, read off a chart)"


def test_published_bars_are_hatched_and_say_so(drawn):
    """Only where the same metric was published, and with a gap where a group was not."""
    groups = [clip(n, group=("kenya", "usa")[n % 2]) for n in range(4)]
    found = evaluated({"qa": task_of(groups, "f1", suite="sd_qa")}).found
    assert list(bars_of(drawn(found))) == list(SYSTEMS), "F1 was not published"
    part = found["tasks"]["qa"]
    for entries in (part["metrics"], *part["groups"].values()):
        entries["pedant"] = entries.pop("f1")
    part["published"] = {
        g: {m: dict(s) for m, s in e.items()} for g, e in part["published"].items()
    }
    del part["published"][""]["pedant"]["Qwen Audio"]
    figure = drawn(found)
    bars = bars_of(figure)
    assert list(bars) == [*SYSTEMS, *(name + MARK for name in PUBLISHED_SYSTEMS)]
    for name in PUBLISHED_SYSTEMS:
        kenya, usa, whole = bars[name + MARK]
        scores = [entries["pedant"][name] for entries in (PUBLISHED["sd_qa"]["usa"],)]
        assert np.isnan(kenya) and [usa] == scores
        if name == "Qwen Audio":
            assert np.isnan(whole)
        else:
            assert whole == PUBLISHED["sd_qa"][""]["pedant"][name]
    boxes = [c for c in figure.axes[0].containers if hasattr(c, "patches")]
    assert len({bar.get_x() for box in boxes for bar in box.patches}) == 8 * 3
    for box in boxes:
        published = box.get_label().endswith(MARK)
        assert {bool(bar.get_hatch()) for bar in box.patches} == {published}


def test_a_system_that_is_called_like_a_published_one_keeps_its_own_bar(drawn):
    """The first thing that anyone does: to run SALMONN, and put it beside the published one."""
    examples = [clip(n, "", YES_NO[n % 2]) for n in range(4)]
    task = task_of(examples, "accuracy", labels=YES_NO, suite="mustard")
    found = evaluated({"qa": task}, lambda s, n: "Yes" if s == "SALMONN" else "well", ["SALMONN"])
    bars = bars_of(drawn(found.found))
    assert bars["SALMONN"] == [50] and bars["SALMONN" + MARK] == [50.1]
    assert len(bars) == 9


def test_a_published_score_of_zero_is_no_missing_one(drawn):
    """DiVA's prompt_ignoring, in 50 answers that its authors read."""
    task = task_of([clip(0)], "prompt_ignoring", suite="heysquad")
    bars = bars_of(drawn(evaluated({"qa": task}).found))
    drawn_too = [bars.get(name + MARK) for name in PUBLISHED_SYSTEMS]
    assert drawn_too == [[30], [4], [8], [0]]


def test_a_group_that_is_called_all_is_not_the_whole(drawn):
    examples = [clip(n, group=("all", "none")[n % 2]) for n in range(4)]
    run = evaluated({"qa": task_of(examples)}, lambda s, n: "blue" if n % 2 else "red")
    figure = drawn(run.found)
    assert bars_of(figure)["diva"] == [100, 0, 50] and len(set(ticks_of(figure))) == 3


@pytest.mark.parametrize("name", ["$x_$", "50 $ or $ 60", r"\frac", "_under", "größe %"])
def test_names_are_drawn_as_they_are_written(tmp_path, drawn, name):
    """Not as formulas, nor as what matplotlib hides."""
    examples = [clip(n, group=(name, "b")[n % 2]) for n in range(4)]
    figure = drawn(evaluated({name: task_of(examples)}, others=[name]).found, name)
    assert (tmp_path / "qa.png").stat().st_size > 1000
    (axes,), (legend,) = figure.axes, figure.legends
    texts = [*axes.get_xticklabels(), *legend.get_texts(), axes.title]
    assert sum(name in text.get_text().replace(r"\$", "$") for text in texts) == 3
    for text in texts:
        assert not text.get_parse_math() or "$" not in text.get_text().replace(r"\$", "")


# ------------------------------------------------------------------- cases to be judged by hand


def rows_of(text: str) -> list[dict[str, str]]:
    assert text.endswith("\n")
    rows = list(csv.DictReader(text.split("\n")[:-1], delimiter="\t", strict=True))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def test_fifty_questions_of_each_task_are_drawn_with_every_systems_answer():
    """The same ones for all systems, drawn at random, in order; tasks that ask nothing are left
    out; the last column waits for the reader."""
    tasks = {
        "few": task_of([clip(n, "", "red", "rot") for n in range(3)], "f1", "prompt_ignoring"),
        "mood": task_of([clip(0)], "accuracy", labels=("red", "blue")),
        "many": task_of([clip(n) for n in range(130)], "prompt_ignoring"),
    }

    def say(system, n):
        return f"what is {n}" if system == "diva" and n % 2 else f"{system} {n}"

    run = evaluated(tasks, say, ["other"])
    rows = rows_of(report.cases(*run))
    names = [*SYSTEMS, "other"]
    head = "task id system question answer references ignores_prompt judged"
    assert list(rows[0]) == head.split()
    assert [row["system"] for row in rows] == names * (3 + 50)
    assert [row["id"] for row in rows[: 3 * 5 : 5]] == ["0", "1", "2"]
    ids = [int(row["id"]) for row in rows if row["task"] == "many"]
    drawn = ids[::5]
    assert ids == [n for n in drawn for _ in names] and len(set(drawn)) == 50
    assert drawn == sorted(drawn) and max(drawn) > 110 and drawn != list(range(0, 130, 3))[:50]
    for row in rows:
        n, odd = int(row["id"]), int(row["id"]) % 2 and row["system"] == "diva"
        assert row["question"] == f"what is {n}" and row["judged"] == ""
        assert row["answer"] == (f"what is {n}" if odd else f"{row['system']} {n}")
        assert row["ignores_prompt"] == ("1" if odd else "0")
        assert row["references"] == ("red | rot" if row["task"] == "few" else "red")
    assert report.cases(*run) == report.cases(*evaluated(tasks, say, ["other"]))


def test_no_answer_breaks_the_rows_of_the_cases():
    """Tabs, new lines of any kind and quotes stay within their cell."""
    odd = ["a\tb", "a\nb", "a\r\nb", "a\u2028b\x85c\x0bd", '"a" b', '"', "", None, "'", '"a\tb']
    examples = [clip(n, (odd[n] or "") + " ?", "x\ty") for n in range(len(odd))]
    run = evaluated({"qa": task_of(examples, "prompt_ignoring")}, lambda s, n: odd[n])
    text = report.cases(*run)
    assert len(text.splitlines()) == 1 + 4 * len(odd)
    rows = rows_of(text)[::4]
    plain = ["a b", "a b", "a b", "a b c d", '"a" b', '"', "", "(none)", "'", '"a b']
    assert [row["answer"] for row in rows] == plain
    assert {row["references"] for row in rows} == {"x y"} and rows[0]["question"] == "a b ?"
    assert rows[7]["ignores_prompt"] == "" and rows[6]["ignores_prompt"] == "0"


def test_without_questions_there_are_no_cases():
    assert rows_of(report.cases(*evaluated({"qa": task_of([clip(0)])}))) == []


# -------------------------------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """The elements of a page, as a browser takes it apart, and what a script of it holds."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}  # by tag, or by id
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data

    @property
    def content(self) -> dict:
        return json.loads(self.texts["content"])


def page_of(run: Evaluated, folder: Path = Path("/out")) -> Page:
    return Page(report.page(folder, *run, heard_of(run)))


def outline(page: Page) -> list[str]:
    return [tag for tag, _ in page.tags]


def test_the_page_shows_table_charts_and_every_clip_with_its_answers():
    examples = [clip(n, "", "red", "rot", group="ab"[n % 2]) for n in range(4)]
    labels = ("red", "blue")
    tasks = {
        "qa": task_of(examples, "f1", "wer"),
        "re peat": task_of([clip(0)], "wer", "f1", prompt=None),
        "mood": task_of([clip(1, group="x")], "accuracy", labels=labels),
        "into": task_of([clip(2, language="de")], "chrf", prompt="Into {language}."),
    }

    def say(system, n):
        return {"diva": "red", "text": "dark red", "other": None}.get(system, "blue")

    run = evaluated(tasks, say, ["other"])
    page = page_of(run)
    assert page.texts["title"] == page.texts["h1"] == "Evaluation of runs/mine"
    assert page.texts["pre"] == report.table(run.found)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    names = ("qa", "re%20peat", "mood", "into")
    assert images == [f"charts/{name}.svg" for name in names]
    assert page.content["systems"] == [*SYSTEMS, "other"]
    first, *_, repeated, mood, into = page.content["clips"]
    assert len(page.content["clips"]) == 7 and into["prompt"] == "Into German."
    assert first == {
        "task": "qa",
        "id": "0",
        "group": "a",
        "text": "what is 0",
        "audio": "../nowhere/0.wav",
        "prompt": "Say it.",
        "references": ["red", "rot"],
        "transcript": "",
        "heard": "",
        "said": [  # the answer, its score, whether there is nothing to gain
            ["blue", 0, False],
            ["red", 100, True],
            ["blue", 0, False],
            ["dark red", 66.7, False],
            [None, 0, False],
        ],
    }
    assert repeated["prompt"] is None, "of a word error rate, 0 is the best"
    assert [value[1:] for value in repeated["said"][1:4]] == [[0, True], [100, False], [100, False]]
    assert (into["transcript"], into["heard"]) == ("what is 2", "um what is 2")
    assert mood["group"] == "x" and mood["said"][0] == ["blue", 0, False]


def test_the_page_shows_some_clips_of_each_task_at_most(monkeypatch):
    monkeypatch.setattr(report, "SHOWN", 20)
    tasks = {"a": task_of([clip(n) for n in range(70)]), "b": task_of([clip(n) for n in range(5)])}
    page = page_of(evaluated(tasks))
    ids = [int(c["id"]) for c in page.content["clips"] if c["task"] == "a"]
    assert len(ids) == 20 and ids == sorted(set(ids)) and max(ids) > 50
    assert [c["id"] for c in page.content["clips"] if c["task"] == "b"] == list("01234")
    assert "At most 20 of each task" in page.texts["p"]


ODD = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]> &lt; &amp; \\u003c \\",
    "@TABLE@ @TITLE@ @CONTENT@ @CHARTS@ @SHOWN@",
    "a\u2028b\u2029c\x00d\ttab \"quoted\" 'single' größe 你好 😀",
    "{{ }} ${x} %s {0}",
]


def test_no_transcript_and_no_answer_breaks_the_page():
    """Whatever is said arrives as it is, and the page is made of the same elements as ever."""
    plain = [clip(n, "is it", "a") for n in range(len(ODD))]
    odd = [clip(n, text, text) for n, text in enumerate(ODD)]
    run = evaluated({"qa": task_of(odd, prompt=ODD[0])}, lambda s, n: ODD[n])
    page = page_of(run)
    assert outline(page) == outline(page_of(evaluated({"qa": task_of(plain)})))
    assert page.texts["pre"] == report.table(run.found)
    for entry, text in zip(page.content["clips"], ODD, strict=True):
        assert entry["text"] == text and entry["references"] == [text]
        assert entry["said"] == [[text, 100, True]] * 4
        assert entry["prompt"] == ODD[0]


@pytest.mark.parametrize("odd", [*ODD[:4], '"><img src=x onerror=alert(1)>', "a&b"])
def test_no_name_breaks_the_page(odd):
    """Of the model, a task, a group, a label, a system, an id."""
    examples = [clip(n, "", odd, group=(odd, "b")[n % 2]) for n in range(4)]
    examples = [suites.Example(f"{odd}{n}", *e) for n, e in enumerate(map(fields, examples))]
    plain = [clip(n, "", "a", group="ab"[n % 2]) for n in range(4)]
    run = evaluated({odd: task_of(examples, "f1")}, lambda s, n: odd, [odd])
    run.found["model"] = odd
    wanted = page_of(evaluated({"qa": task_of(plain, "f1")}, others=["other"]))
    page = page_of(run)
    assert outline(page) == outline(wanted)
    assert page.texts["title"] == page.texts["h1"] == f"Evaluation of {odd}"
    assert page.texts["pre"] == report.table(run.found)
    assert page.content["systems"][-1] == page.content["clips"][0]["task"] == odd
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert image["alt"] == f"scores of {odd}"
    assert urllib.parse.unquote(image["src"]) == f"charts/{odd}.svg"


def fields(example: suites.Example) -> list:
    return [example.audio, example.text, example.answers, example.group, example.language]


def test_no_mark_of_the_page_is_left():
    text = report.page(Path("/out"), *(run := evaluated({"qa": task_of([clip(0)])})), heard_of(run))
    assert not re.findall("@[A-Z]+@", text)
    assert set(re.findall("@[A-Z]+@", report.PAGE)) == {
        *("@TITLE@", "@TABLE@", "@CHARTS@", "@SHOWN@", "@CONTENT@")
    }


def test_the_page_takes_nothing_from_elsewhere():
    """No address, no style sheet, no script but its own."""
    text = report.page(Path("/out"), *(run := evaluated({"qa": task_of([clip(0)])})), heard_of(run))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|<object", text)
    assert [a for t, a in Page(text).tags if t == "script" and "src" in a] == []


@pytest.mark.parametrize("relative", [False, True])
def test_clips_are_found_from_where_the_page_lies(tmp_path, monkeypatch, relative):
    """As a browser follows it, whatever stands in a file's name."""
    names = ["a b.wav", "c#1.wav", "50%.wav", "50%25.wav", "größe.wav", "what?.wav", "a&b.wav"]
    names += ['"x".wav', "<y>.wav", "a:b.wav", "你好.wav", "a+b.wav", "a;b.wav", "./z.wav"]
    monkeypatch.chdir(tmp_path)
    home = Path() if relative else tmp_path
    (tmp_path / "clips here").mkdir()
    for name in names:
        soundfile.write(tmp_path / "clips here" / name, np.zeros(8), 16000)
    audio = [str(home / "clips here" / name) for name in names]
    examples = [clip(n, audio=path) for n, path in enumerate(audio)]
    folder = home / "runs #1" / "mine"
    page = page_of(evaluated({"qa": task_of(examples)}), folder)
    base = (tmp_path / "runs #1" / "mine" / "report.html").as_uri()
    for entry, path in zip(page.content["clips"], audio, strict=True):
        address = urllib.parse.urlsplit(urllib.parse.urljoin(base, entry["audio"]))
        assert (address.scheme, address.query, address.fragment) == ("file", "", "")
        there = Path(urllib.request.url2pathname(address.path))
        assert there.is_file() and there.samefile(path), entry["audio"]
        assert not entry["audio"].startswith("/"), "the folder can be moved with its clips"


# ----------------------------------------------------------------------------------- all of it


def test_everything_is_written_into_the_folder(tmp_path):
    """And written anew over what stood there."""
    examples = [clip(n, group="ab"[n % 2]) for n in range(4)]
    tasks = {"qa": task_of(examples, "prompt_ignoring"), "re peat": task_of([clip(0)], "wer")}
    run = evaluated(tasks, lambda s, n: "größe", ["other"])
    (tmp_path / "report.html").write_text("old" * 9999)
    for _ in range(2):
        report.write(tmp_path, *run, heard_of(run))
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    charts = {f"charts/{name}.{ending}" for name in tasks for ending in ("png", "svg")}
    assert written == {"eval.json", "cases.tsv", "report.html"} | charts
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8")) == run.found
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == report.page(tmp_path, *run, heard_of(run)) and "größe" in page
    assert (tmp_path / "cases.tsv").read_text(encoding="utf-8") == report.cases(*run)


def test_the_headline_is_the_first_metric_that_could_be_counted():
    task = task_of([clip(0, language="de")], "wrong_script", "f1", "wer")
    assert report.headline(evaluated({"qa": task}).found["tasks"]["qa"]) == "f1"
