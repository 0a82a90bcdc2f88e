"""The page of an evaluation, in a real browser: `pytest tests/browser`.

Needs `pip install '.[browser]'` and a Chromium: the system's own, or that of
`playwright install chromium`.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import soundfile
from playwright.sync_api import Page, sync_playwright

import eval as evaluation

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!-- <script>"
LIMIT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The toy student's report on a few clips, and one with a transcript that is HTML."""
    root = tmp_path_factory.mktemp("report")
    clip = root / "a #1 clip, 100 % ünïcode.wav"
    samples, rate = soundfile.read(ROOT / "toy/common_voice/en/clips/toy_en_test_00001.opus")
    soundfile.write(clip, samples, rate)
    row = {"audio": clip.name, "text": HOSTILE, "answer": HOSTILE, "id": "hostile"}
    (root / "own.jsonl").write_text(json.dumps(row) + "\n")
    task = {"suite": "manifest", "path": "own.jsonl", "prompt": HOSTILE, "metrics": ["f1"]}
    (root / "own.json").write_text(json.dumps({"own": task}))
    tasks = [ROOT / "toy/tasks", root / "own.json"]
    evaluation.evaluate(ROOT / "toy/diva", tasks, limit=LIMIT, out=root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, folder):
    """The page, opened from the disk; whatever goes wrong in it fails the test."""
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda r: r.url.startswith("file:") or wrong.append(f"asks for {r.url}"))
    page.goto((folder / "report.html").as_uri())
    yield page
    assert not wrong
    page.close()


def count(page: Page) -> int:
    return int(page.locator("#count").inner_text().split()[0])


def test_all_clips_are_there_and_more_are_shown_when_asked(page):
    assert count(page) == 4 * LIMIT + 1
    assert page.locator("article").count() == 25
    page.click("#more")
    assert page.locator("article").count() == 50
    for _ in range(3):
        page.click("#more")
    assert page.locator("article").count() == 4 * LIMIT + 1
    assert page.locator("#more").is_hidden()


def test_charts_and_scores_are_shown(page):
    widths = page.eval_on_selector_all("img", "all => all.map(image => image.naturalWidth)")
    assert len(widths) == 5 and min(widths) > 200
    assert "exact_match" in page.locator("pre").inner_text()


def test_clips_are_chosen_by_task_group_mistake_and_words(page, folder):
    """The numbers are those of predictions.jsonl."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").open(encoding="utf-8")]
    lines = [line for line in lines if line["task"] == "spoken_qa" and line["system"] == "cascade"]
    page.select_option("#task", "spoken_qa")
    assert count(page) == len(lines) == LIMIT
    group = lines[0]["group"]
    page.select_option("#group", group)
    assert count(page) == sum(line["group"] == group for line in lines)
    page.select_option("#group", "")
    page.select_option("#wrong", label="cascade")
    wrong = [line for line in lines if line["scores"]["exact_match"] < 100]
    assert count(page) == len(wrong) > 0
    page.select_option("#wrong", "")
    words = " ".join(lines[0]["text"].split()[-2:])
    page.fill("#find", words.upper())
    shown = page.locator("article").all_inner_texts()
    assert 0 < len(shown) < LIMIT and all(words in text for text in shown)
    page.select_option("#task", "repeat")
    page.fill("#find", "")
    assert page.locator("#group option").count() == 1, "groups of another task"
    page.select_option("#wrong", label="text")
    assert count(page) == 0, "no word error is right, though it is 0"


def test_what_is_shown_of_a_clip_is_what_was_asked_and_said(page, folder):
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").open(encoding="utf-8")]
    page.select_option("#task", "translation")
    box = page.locator("article").first
    name = box.locator(".small").inner_text().split(" · ")[-1]
    rows = dict(re.split(r"\t", row, maxsplit=1) for row in box.locator("tr").all_inner_texts())
    some = [line for line in lines if line["task"] == "translation" and line["id"] == name]
    assert rows["prompt"].strip() == some[0]["prompt"]
    assert rows["reference"].strip() == some[0]["references"][0]
    for line in some:
        assert rows[line["system"]].startswith(line["answer"])


@pytest.mark.parametrize("task", ["spoken_qa", "own"])
def test_clips_are_played(page, task):
    """Opus from the corpus, and a file with a difficult name: the sound runs, for as long as the
    file says."""
    page.select_option("#task", task)
    seconds, moved = page.locator("audio").first.evaluate(
        """async player => {
            await player.play();
            await new Promise(done => setTimeout(done, 600));
            return [player.duration, player.currentTime];
        }"""
    )
    assert 0.5 < seconds < 5 and moved > 0.1


def test_a_transcript_is_text_and_never_html(page):
    page.select_option("#task", "own")
    assert page.title() == "Evaluation of " + str(ROOT / "toy/diva")
    assert HOSTILE in page.locator("article").inner_text()
    assert page.locator("article img").count() == 0


def test_a_narrow_screen_need_not_be_scrolled_sideways(browser, folder):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((folder / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
