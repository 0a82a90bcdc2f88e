"""The report: what an evaluation found, as a table, charts, a page to browse, cases to judge.

    eval.json      all scores with intervals and p values, histograms of labels, signatures
    charts/        the headline of each task by group, with 95 % intervals, PNG and SVG
    report.html    the same, and clips to play beside question, reference and answers
    cases.tsv      answers to questions, drawn at random, to be judged by hand

Reads: metrics.py, significance.py, suites.py, record.py.   Read next: eval.py.
"""

import csv
import html
import io
import itertools
import json
import os
import re
import textwrap
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import voicebench
from evaluation.metrics import METRICS, NO_LABELS
from evaluation.published import PUBLISHED_SYSTEMS
from evaluation.significance import ALPHA, sample
from runtime import files

CASES = 50  # as many as the paper's authors read of each system
SHOWN = 500  # clips of each task on the page; predictions.jsonl has all
PER_BLOCK = 4  # systems beside each other in the terminal
DRAWS = 50, 200, 1000  # clips
NAME = 24  # width of the first column
COLOURS = {"untrained": "#bbbbbb", "diva": "#c0392b", "cascade": "#2874a6", "text": "#444444"}
MORE_COLOURS = ("#d68910", "#1e8449", "#7d3c98", "#117864", "#a04000")


def write(
    folder: Path, found: dict, items: list, answers: dict, scores: dict, heard: list[dict]
) -> None:
    """All of it, into `folder`. `items` as in eval.py; answers {system: [text or None]}; scores
    {(system, number of the item): {metric: score of this answer alone}}; `heard` is of each item
    what predictions.jsonl says beside diva's answer."""
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    files.write_text(folder / "eval.json", text)
    (folder / "charts").mkdir(exist_ok=True)
    for task in found["tasks"]:
        chart(found, task, folder / "charts" / task)
    files.write_text(folder / "cases.tsv", cases(found, items, answers, scores))
    files.write_text(folder / "report.html", page(folder, found, items, answers, scores, heard))


def headline(task: dict[str, Any]) -> str:
    """The first metric of a task that could be computed."""
    return next(iter(task["metrics"]))


# ---------------------------------------------------------------------------------------------
# The table


def table(found: dict[str, Any]) -> str:
    """The scores as text, at most 100 columns wide."""
    blocks = [
        "\n".join(_rows(found, names))
        for names in (
            found["systems"][start : start + PER_BLOCK]
            for start in range(0, len(found["systems"]), PER_BLOCK)
        )
    ]
    notes = [
        "score (0 to 100) and its 95 % interval; - lower is better; * differs from diva: p < 0.05,",
        "paired permutation of sentences, Holm-corrected over groups; ! the best of all but text,",
        "and differs from each of them",
    ]
    lines = [*_histograms(found), *_chances(found), *_signatures(found), *_errors(found)]
    lines += _widths(found) if found["limit"] else []
    board = voicebench.table(found.get("voicebench", {}))
    lines = [part for line in lines for part in textwrap.wrap(line, 100, subsequent_indent="  ")]
    return "\n".join(["\n\n".join(blocks), *notes, *lines, *_published(found), *board]).rstrip()


def _rows(found: dict[str, Any], names: list[str]) -> list[str]:
    lines = [" " * NAME + "".join(f" {name[:18]:18}" for name in names).rstrip()]
    for task, part in found["tasks"].items():
        lines.append(f"{task[:80]} ({part['n']})")
        for metric, entries in part["metrics"].items():
            lines.append(_row(f" {metric}{_sign(metric)}", entries, names))
            if metric == headline(part):
                lines += [
                    _row(f"  {group}", entries[metric], names)
                    for group, entries in part["groups"].items()
                    if metric in entries
                ]
    return lines


def _row(name: str, entries: dict[str, dict], names: list[str]) -> str:
    cells = []
    for entry in (entries[name] for name in names):
        star = "!" if entry.get("best") else "*" if entry.get("p_permutation", 1) < ALPHA else " "
        # a word error rate has no upper end: 64 words said for one are 6,400 per cent
        form = ".1f" if entry["high"] < 1000 else ".0f" if entry["high"] < 10_000 else ".0e"
        score, low, high = (f"{entry[key]:{form}}" for key in ("score", "low", "high"))
        cells.append(f" {score:>5}{star} {low + '-' + high:11}")
    return (f"{name[:NAME]:{NAME}}" + "".join(cells)).rstrip()


def _widths(found: dict[str, Any]) -> list[str]:
    """What a draw is worth: 1.96 deviations of a binomial share of half, in points, where no two
    clips say the same sentence. It narrows with the root of the clips."""
    sizes = ", ".join(f"{98 / n**0.5:.1f} from {n:,}" for n in (found["limit"], *DRAWS))
    return [f"a share of right answers is known to +- points, at worst: {sizes} clips"]


def _sign(metric: str) -> str:
    return " -" if METRICS[metric].lower_is_better else ""


def _histograms(found: dict[str, Any]) -> list[str]:
    lines = []
    for task, part in found["tasks"].items():
        for system, counts in part.get("predicted", {}).items():
            said = ", ".join(f"{label} {n}" for label, n in counts.items() if n)
            lines.append(f"{task} as {system} names it: {said}")
    return lines


def _chances(found: dict[str, Any]) -> list[str]:
    """Only for yes or no: with more labels, an always equal answer has no 50 % to hide behind."""
    lines = []
    for task, part in found["tasks"].items():
        if len(part.get("predicted", ())) and len(_labels(part)) == 2:
            p = {s: e["p_chance"] for s, e in part["metrics"].get("accuracy", {}).items()}
            text = ", ".join(f"{system} {value:.2g}" for system, value in p.items())
            lines.append(f"{task}: p against guessing: {text}")
    return lines


def _labels(part: dict[str, Any]) -> list[str]:
    counts = next(iter(part["predicted"].values()))
    return [label for label in counts if label not in NO_LABELS]


def _signatures(found: dict[str, Any]) -> list[str]:
    signed = {
        f"{name}: {text}"
        for part in found["tasks"].values()
        for name, text in part["signatures"].items()
    }
    return sorted(signed)


def _errors(found: dict[str, Any]) -> list[str]:
    lines = []
    if errors := found["errors"]:
        lines.append(f"{len(errors)} clips could not be decoded and count as wrong (see eval.json)")
    for task, part in found["tasks"].items():
        counts = {system: n for system, n in part["errors"].items() if n}
        if counts:
            text = ", ".join(f"{system} {n}" for system, n in counts.items())
            lines.append(f"{task}: without an answer, counted as wrong: {text}")
    return lines


def _published(found: dict[str, Any]) -> list[str]:
    rows = [
        (f"{task} {metric} {group}".rstrip(), scores)
        for task, part in found["tasks"].items()
        for group, entries in part.get("published", {}).items()
        for metric, scores in entries.items()
    ]
    if not rows:
        return []
    heads = " ".join(f"{name:>15}" for name in PUBLISHED_SYSTEMS)
    lines = ["", f"{'read off the published charts':34}{heads}"]
    lines += [
        f"{name[:34]:34}" + " ".join(f"{scores[s]:15.1f}" for s in PUBLISHED_SYSTEMS)
        for name, scores in rows
    ]
    return [*lines, "(pedant there: PANDA, an older classifier; prompt_ignoring: 50 read by hand)"]


# ---------------------------------------------------------------------------------------------
# Charts


def chart(found: dict[str, Any], task: str, file: Path) -> None:
    """Grouped bars of the headline by group, all systems, 95 % intervals, as file.png and .svg."""
    from matplotlib.figure import Figure  # takes a second, which a wrong flag need not wait for

    part = found["tasks"][task]
    metric, groups = headline(part), part["groups"].items()
    places = [(group, entries[metric]) for group, entries in groups if metric in entries]
    places.append(("", part["metrics"][metric]))  # all of them
    published = {
        system: [
            part.get("published", {}).get(group, {}).get(metric, {}).get(system)
            for group, _ in places
        ]
        for system in PUBLISHED_SYSTEMS
    }
    published = {name: some for name, some in published.items() if {*some} != {None}}
    bars = len(found["systems"]) + len(published)
    width, at = 0.8 / bars, np.arange(len(places))
    size = max(6.0, 1.2 * len(places) + 3), 4.2
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    left = iter(at - 0.4 + width * (k + 0.5) for k in range(bars))
    more = itertools.cycle(MORE_COLOURS)
    for name in found["systems"]:
        entries, x = [place[name] for _, place in places], next(left)
        score, low, high = (np.array([e[key] for e in entries]) for key in ("score", "low", "high"))
        reach = np.maximum(0, [score - low, high - score])
        thin, colour = {"linewidth": 0.8}, COLOURS.get(name) or next(more)
        axes.bar(x, score, width, label=_plain(name), color=colour, yerr=reach, error_kw=thin)
        for place, entry in zip(x, entries, strict=True):
            if entry.get("best"):
                axes.annotate("*", (place, entry["high"]), ha="center", fontsize=12)
    for name, values in published.items():
        look = {"color": "white", "edgecolor": next(more), "hatch": "////", "linewidth": 0.6}
        score = [np.nan if value is None else value for value in values]
        axes.bar(next(left), score, width, label=f"{name} (published, read off a chart)", **look)
    whole = "(all)" if "all" in part["groups"] else "all"
    groups = [textwrap.fill(_plain(group), 14) or whole for group, _ in places]
    axes.set_xticks(at, groups, fontsize=8)
    axes.set_ylabel(f"{metric}{_sign(metric) and ' (lower is better)'}")
    axes.set_title(
        f"{_plain(task)}: 95 % intervals; * best of all but text, p < {ALPHA}", fontsize=10
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    columns = 2 if published else 4
    figure.legend(frameon=False, fontsize=8, ncols=columns, loc="outside lower center")
    for ending in ("png", "svg"):
        figure.savefig(file.with_name(f"{file.name}.{ending}"), dpi=120)


def _plain(name: str) -> str:
    """As matplotlib shows it: $ begins no formula, and a name that begins with _ is not hidden."""
    name = name.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name


# ---------------------------------------------------------------------------------------------
# Cases to be judged by hand


def _some(items: list, task: str, most: int) -> list[int]:
    """The numbers of some items of a task."""
    numbers = [i for i, item in enumerate(items) if item.task == task]
    return [numbers[i] for i in sample([items[i].example.group for i in numbers], most)]


def cases(found: dict[str, Any], items: list, answers: dict, scores: dict) -> str:
    """Answers of every system to the same questions, for each task that asks some: does it try to
    answer, or does it repeat the question? The last column is left for the reader's judgement."""
    stream = io.StringIO()
    rows = csv.writer(stream, delimiter="\t", lineterminator="\n")
    rows.writerow("task id system question answer references ignores_prompt judged".split())
    for task, part in found["tasks"].items():
        if "prompt_ignoring" not in part["metrics"]:
            continue
        for i in _some(items, task, CASES):
            example = items[i].example
            for system in found["systems"]:
                answer = answers[system][i]
                known = answer is not None and example.text
                judged = int(scores[system, i]["prompt_ignoring"] > 0) if known else ""
                said = [example.text, "(none)" if answer is None else answer]
                row = [task, example.id, system, *said, " | ".join(example.answers), judged, ""]
                rows.writerow([" ".join(str(cell).split()) for cell in row])
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------
# The page


def page(
    folder: Path, found: dict, items: list, answers: dict, scores: dict, heard: list[dict]
) -> str:
    """One page without anything from elsewhere but the clips and charts that lie on this disk."""
    clips = []
    for task, part in found["tasks"].items():
        metric = headline(part)
        for i in _some(items, task, SHOWN):
            example = items[i].example
            path = os.path.relpath(example.audio, folder)
            values = [round(scores[system, i][metric], 1) for system in found["systems"]]
            perfect = 0 if METRICS[metric].lower_is_better else 100
            said = [
                [answers[system][i], value, value == perfect]
                for system, value in zip(found["systems"], values, strict=True)
            ]
            clips.append(
                {"task": task, "id": example.id, "group": example.group, "text": example.text}
                | {"audio": urllib.parse.quote(path.replace(os.sep, "/")), "said": said}
                | {"prompt": items[i].ask.prompt, "references": example.answers}
                | {key: heard[i].get(key, "") for key in ("transcript", "heard")}
            )
    # "<" ends no script element in this form, whatever a transcript holds
    content = json.dumps({"systems": found["systems"], "clips": clips}, ensure_ascii=False)
    pictures = "".join(
        f'<img src="charts/{urllib.parse.quote(task)}.svg" alt="scores of {html.escape(task)}">'
        for task in found["tasks"]
    )
    parts = {
        "@TITLE@": html.escape(f"Evaluation of {found['model']}"),
        "@TABLE@": html.escape(table(found)),
        "@CHARTS@": pictures,
        "@SHOWN@": str(SHOWN),
        "@CONTENT@": content.replace("<", "\\u003c"),
    }
    # in one pass: nothing that is put in is taken for a mark
    return re.sub("|".join(parts), lambda mark: parts[mark.group()], PAGE)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
         padding: 0 1rem; color: #222; background: #fff; overflow-wrap: anywhere }
  pre { overflow-x: auto; font-size: 12px; line-height: 1.3 }
  img { max-width: 100%; display: block; margin: 1rem 0; background: #fff }
  form { display: flex; flex-wrap: wrap; gap: .8rem; position: sticky; top: 0; padding: .6rem 0;
         background: inherit }
  article { border-top: 1px solid #ccc; padding: .8rem 0 }
  article table { border-collapse: collapse; width: 100% }
  td, th { text-align: left; vertical-align: top; padding: .1rem .8rem .1rem 0 }
  th { width: 7rem; font-weight: 600 }
  td.score { width: 4rem; text-align: right; color: #777 }
  audio { width: 100%; height: 2.2rem; margin: .3rem 0 }
  .small { color: #777; font-size: 13px }
  @media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 }
    article { border-color: #444 } }
</style>
<h1>@TITLE@</h1>
<pre>@TABLE@</pre>
@CHARTS@
<h2>Clips</h2>
<p class="small">At most @SHOWN@ of each task, drawn at random; predictions.jsonl holds all. The
clips are played from where they lay when this was written.</p>
<form>
  <label>Task <select id="task"></select></label>
  <label>Group <select id="group"></select></label>
  <label>Not right by <select id="wrong"></select></label>
  <label>Find <input id="find" type="search" placeholder="words"></label>
  <span id="count" class="small"></span>
</form>
<div id="clips"></div>
<button id="more" type="button">More</button>
<noscript>Without JavaScript only the scores above are shown.</noscript>
<script id="content" type="application/json">@CONTENT@</script>
<script>
const { systems, clips } = JSON.parse(document.getElementById("content").textContent);
const at = (id) => document.getElementById(id);
const STEP = 25;
let shown = STEP;

function make(tag, text, parent, name) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;  // never as HTML
  if (name) node.className = name;
  parent.append(node);
  return node;
}
function options(select, names) {
  select.replaceChildren();
  for (const [value, text] of [["", "any"], ...names]) {
    const option = make("option", text, select);
    option.value = value;
  }
}
const same = (names) => [...new Set(names)].filter(Boolean).sort().map((name) => [name, name]);

function chosen() {
  const words = at("find").value.toLowerCase();
  return clips.filter((clip) =>
    (!at("task").value || clip.task === at("task").value) &&
    (!at("group").value || clip.group === at("group").value) &&
    (at("wrong").value === "" || !clip.said[at("wrong").value][2]) &&
    (!words || JSON.stringify([clip.text, clip.references, clip.said])
      .toLowerCase().includes(words)));
}
function show() {
  const some = chosen();
  at("count").textContent = `${some.length} clips`;
  at("clips").replaceChildren();
  at("more").hidden = some.length <= shown;
  for (const clip of some.slice(0, shown)) {
    const box = make("article", null, at("clips"));
    make("div", [clip.task, clip.group, clip.id].filter(Boolean).join(" · "), box, "small");
    const player = make("audio", null, box);
    player.controls = true;
    player.preload = "none";
    player.src = clip.audio;
    const table = make("table", null, box);
    const row = (name, text, score) => {
      const line = make("tr", null, table);
      make("th", name, line);
      make("td", text, line);
      make("td", score, line, "score");
    };
    row("prompt", clip.prompt ?? "(none)", "");
    row("transcript", clip.text || "(unknown)", "");
    row("Whisper wrote", clip.transcript || "(unknown)", "");
    row("the LLM heard", clip.heard || "(unknown)", "");
    row("reference", clip.references.join(" | "), "");
    clip.said.forEach(([answer, score], k) => row(systems[k], answer ?? "(no answer)", score));
  }
}
function again() { shown = STEP; show(); }
options(at("task"), same(clips.map((clip) => clip.task)));
options(at("group"), same(clips.map((clip) => clip.group)));
options(at("wrong"), systems.map((name, k) => [k, name]));
at("task").onchange = () => {
  const some = clips.filter((clip) => !at("task").value || clip.task === at("task").value);
  options(at("group"), same(some.map((clip) => clip.group)));
  again();
};
for (const id of ["group", "wrong"]) at(id).onchange = again;
at("find").oninput = again;
at("more").onclick = () => { shown += STEP; show(); };
document.querySelector("form").onsubmit = (event) => event.preventDefault();
show();
</script>
</html>
"""
