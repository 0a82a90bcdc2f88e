"""The page of the demo, in a real browser with a microphone that hears a file.

Needs `pip install '.[browser]'` and a Chromium: the system's own, or that of
`playwright install chromium`.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import openai
import pytest
import soundfile
from playwright.sync_api import Browser, Page, expect, sync_playwright

import demo
from formats import audio_files
from serving import page as page_module

TOY = Path(demo.__file__).parent / "toy"
CLIPS = TOY / "common_voice/en/clips"
LIMIT = 60_000  # milliseconds; the first answer compiles


def clip_that_says(text: str) -> Path:
    """A clip of the dev split that the shipped student answers rightly."""
    for line in (TOY / "tasks/spoken_qa/dev.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["text"] == text:
            return (TOY / "tasks/spoken_qa" / row["audio"]).resolve()
    raise AssertionError(f"no clip says {text}")


QUESTION = json.loads((TOY / "tasks/spoken_qa/dev.jsonl").read_text().splitlines()[0])


@pytest.fixture(scope="module")
def address():
    """The page of the toy model, as its own command opens it, at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "demo.py", "--serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=TOY.parent)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(240):
        try:
            urllib.request.urlopen(address)
            break
        except urllib.error.URLError:
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def microphone(tmp_path_factory) -> Path:
    """The question, loud and clear, as Chromium's fake microphone wants it."""
    file = tmp_path_factory.mktemp("microphone") / "question.wav"
    samples = audio_files.load(clip_that_says(QUESTION["text"]))
    lead, tail = np.zeros(int(0.3 * 16000)), np.zeros(16000 * 10)
    soundfile.write(file, np.concatenate([lead, samples, tail]), 16000, subtype="PCM_16")
    return file


@pytest.fixture(scope="module")
def browser(microphone):
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        flags = [
            "--no-sandbox",
            "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}%noloop",
        ]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, address: str, **how) -> Iterator[Page]:
    """The page; what goes wrong in it, or is asked of another server, fails the test."""
    page, wrong = browser.new_page(**{"viewport": {"width": 900, "height": 1000}} | how), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: (
            request.url.startswith((address, "blob:", "data:"))
            or wrong.append(f"asks for {request.url}")
        ),
    )
    page.goto(address)
    expect(page.get_by_text("Say something")).to_be_visible(timeout=LIMIT)
    yield page
    assert not wrong
    page.close()


@pytest.fixture(scope="module")
def window(browser, address):
    """Opened once: Gradio's scripts take seconds."""
    with opened(browser, address) as page:
        yield page


@pytest.fixture
def page(window):
    """A new conversation, without an instruction."""
    window.get_by_role("button", name="New conversation").click()
    window.get_by_label("none").check()
    expect(window.get_by_text("(speech)")).to_have_count(0)
    return window


def upload(page: Page, file: Path) -> None:
    page.get_by_role("button", name="Upload file").click()
    page.locator("input[type=file]").set_input_files(file)


def answers(page: Page, count: int, side: int = 0) -> list[tuple[str, str]]:
    """What stands in a conversation when it has so many turns: what was heard, and the answer."""
    expect(page.get_by_role("log").nth(side).get_by_text("(speech)")).to_have_count(
        count, timeout=LIMIT
    )
    expect(page.get_by_text("first token after").nth(side)).to_be_visible(timeout=LIMIT)
    log, said = page.get_by_role("log").nth(side), ""
    while said != (said := log.inner_text()):  # until it grows no more
        page.wait_for_timeout(700)
    turns = said.split("(speech)")[1:]
    pairs = [re.sub(r"\n\d:\d\d$", "", turn.strip()).split("\n") for turn in turns]
    return [(heard, answer) for heard, answer in pairs]


# ------------------------------------------------------------------------------ what it is used for


def test_the_toy_says_that_it_is_a_toy(page):
    expect(page.get_by_text("This is the toy model")).to_be_visible()


def test_a_question_spoken_into_the_microphone_is_answered(page):
    """The LLM heard the question, but for a word (what a browser records is not the clip)."""
    page.get_by_role("button", name="Record", exact=True).click()
    seconds = soundfile.info(clip_that_says(QUESTION["text"])).duration
    page.wait_for_timeout(1000 * (seconds + 0.8))
    page.get_by_role("button", name="Stop", exact=True).click()
    [(heard, answer)] = answers(page, 1)
    wanted = QUESTION["text"].split()
    right = [x == y for x, y in zip(heard.split()[-len(wanted) :], wanted, strict=True)]
    assert sum(right) >= len(wanted) - 1 and answer


def test_without_a_microphone_one_clicks_a_clip(page):
    """There is one of each accent and of each emotion; what was said is drawn beside the answer."""
    with (TOY / "common_voice/en/test.tsv").open(newline="") as file:
        accents = {row["accents"] for row in csv.DictReader(file, delimiter="\t")}
    labels = json.loads((TOY / "tasks/tasks.json").read_text())["emotion"]["labels"]
    offered = page.get_by_role("button", name=re.compile(r" \(.*\)$")).all_inner_texts()
    assert len(accents) == 8
    assert sorted(text.split(" (")[1] for text in offered) == sorted(
        f"{kind})" for kind in [*accents, *labels]
    )
    [joy] = (text for text in offered if text.endswith("(Joy)"))
    page.get_by_role("button", name=joy).click()
    [(heard, answer)] = answers(page, 1)
    assert {*heard.split()} & {*joy.split()} and answer
    drawn = """() => {
        const canvas = document.querySelector("[role=log] .waveform-wrapper > div")
            .shadowRoot?.querySelector("canvas");
        if (!canvas?.width) return 0;
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const heights = new Set();
        for (let x = 0; x < canvas.width; x++) {
            let inked = 0;
            for (let y = 0; y < canvas.height; y++)
                inked += pixels.data[4 * (y * canvas.width + x) + 3] > 0;
            heights.add(inked);
        }
        return heights.size;
    }"""
    page.wait_for_function(f"({drawn})() > 5")


def test_an_instruction_of_the_paper_is_chosen_and_the_conversation_is_kept(page):
    """Until a new one is begun."""
    prompt = json.loads((TOY / "tasks/tasks.json").read_text())["translation"]["prompt"]
    row = json.loads((TOY / "tasks/translation/dev.jsonl").read_text().splitlines()[0])
    page.get_by_label("translation").check()
    expect(page.get_by_label("Instruction (may stay empty)")).to_have_value(prompt)
    upload(page, (TOY / "tasks/translation" / row["audio"]).resolve())
    assert answers(page, 1)[0][1] == row["answer"]
    page.get_by_label("none").check()
    expect(page.get_by_label("Instruction (may stay empty)")).to_have_value("")
    upload(page, clip_that_says(QUESTION["text"]))
    (_, first), (_, second) = answers(page, 2)
    assert first == row["answer"] and QUESTION["answer"] in second
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_text("(speech)")).to_have_count(0)


def test_on_request_the_cascade_answers_beside(page):
    """What Whisper wrote, and the same LLM's answer to it; each with its time to first token."""
    assert page.get_by_role("log").count() == 1
    page.get_by_label("Beside it").check()
    upload(page, clip_that_says(QUESTION["text"]))
    [(heard, answer)] = answers(page, 1)
    [(written, other)] = answers(page, 1, side=1)
    assert written == QUESTION["text"] != heard
    assert QUESTION["answer"] in answer and QUESTION["answer"] in other
    page.get_by_role("button", name="(Joy)").click()
    assert len(answers(page, 2)) == len(answers(page, 2, side=1))
    if file := os.environ.get("DIVA_PAGE"):  # toy/page.png was made so
        page.screenshot(path=file, full_page=True)
    page.get_by_label("Beside it").uncheck()
    expect(page.get_by_role("log")).to_have_count(1)


# ------------------------------------------------------------------------------------- who uses it


def test_a_phone_need_not_be_scrolled_sideways(browser, address):
    """Also with both conversations, which then stand one below the other."""
    with opened(browser, address, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        page.get_by_label("Beside it").check()
        expect(page.get_by_role("log")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        first, second = (page.get_by_role("log").nth(i).bounding_box() for i in range(2))
        assert second["y"] >= first["y"] + first["height"] and first["width"] > 250
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 360)


FOCUSED = """() => {
    const at = document.activeElement, style = getComputedStyle(at);
    const label = at.ariaLabel || at.innerText || at.labels?.[0]?.innerText || "";
    const ring = style.outlineStyle != "none" && parseFloat(style.outlineWidth) >= 2;
    return [at == document.body ? "" : label.trim(), ring];
}"""


def test_the_keyboard_is_enough(page):
    """Everything is reached by Tab, one sees where one is, and Enter or Space does it."""
    seen, wanted = {}, "Record|Upload file|Instruction|none|emotion|Beside it|.*Joy|New conver"
    for _ in range(60):
        page.keyboard.press("Tab")
        label, visible = page.evaluate(FOCUSED)
        seen[label] = visible
    for name in wanted.split("|"):
        assert any(re.match(name, label) for label in seen), (name, seen)
    assert all(visible for label, visible in seen.items() if label), seen

    def go(name: str, key: str) -> None:
        while name not in page.evaluate(FOCUSED)[0]:
            page.keyboard.press("Tab")
        page.keyboard.press(key)

    go("emotion", "Space")
    expect(page.get_by_label("Instruction (may stay empty)")).not_to_have_value("")
    go("(Joy)", "Enter")
    answers(page, 1)
    go("New conversation", "Enter")
    expect(page.get_by_text("(speech)")).to_have_count(0)


CONTRAST = """element => {
    const rgba = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    let behind = element;
    while (behind && (rgba(getComputedStyle(behind).backgroundColor)[3] ?? 1) < 1)
        behind = behind.parentElement;
    const back = light(rgba(getComputedStyle(behind ?? document.body).backgroundColor));
    const text = light(rgba(getComputedStyle(element).color));
    return [back, (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_as_dark_as_one_likes_and_can_be_read(browser, address, scheme):
    """As the system says; text has the contrast of 4.5 that WCAG asks for."""
    with opened(browser, address, color_scheme=scheme) as page:
        page.get_by_role("button", name="(Joy)").click()
        [(heard, answer)] = answers(page, 1)
        for text in (heard, answer, "This is the toy model", "first token", "none", "(Joy)"):
            behind, contrast = page.get_by_text(text).last.evaluate(CONTRAST)
            assert contrast >= 4.5, text
            assert behind < 0.2 if scheme == "dark" else behind > 0.7, text


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("long.wav", np.sin(np.arange(16000 * 4)), "s of speech; expected at most the model's"),
        ("noise.wav", b"RIFF, but not really", "not audio that can be decoded"),
        ("silence.wav", np.zeros(16000), "nothing was heard"),
    ],
)
def test_what_cannot_be_heard_is_said_and_takes_nothing(page, tmp_path, name, content, message):
    """The message names the file, and not where it lies on this machine; the conversation stays,
    and goes on."""
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        soundfile.write(file, content, 16000)
    page.get_by_role("button", name="(Joy)").click()
    before = answers(page, 1)
    upload(page, file)
    toast = page.get_by_text(message)
    expect(toast).to_be_visible(timeout=LIMIT)
    assert name in toast.inner_text() and "/" not in toast.inner_text().replace("t/", "")
    assert answers(page, 1) == before
    page.get_by_role("button", name="(Fear)").click()
    assert answers(page, 2)[:1] == before


def test_a_server_that_is_out_of_reach_takes_nothing(page):
    """When it is back, Gradio loads the page anew."""
    page.get_by_role("button", name="(Joy)").click()
    before = answers(page, 1)
    page.context.set_offline(True)
    page.get_by_role("button", name="(Fear)").click()
    expect(page.get_by_text("Connection to the server was lost").first).to_be_visible(timeout=LIMIT)
    assert answers(page, 1) == before
    with page.expect_navigation(timeout=LIMIT):
        page.context.set_offline(False)
    assert answers(page, 1) == before
    page.get_by_role("button", name="(Anger)").click()
    assert answers(page, 2)[:1] == before
    page.get_by_role("button", name="New conversation").click()
    page.reload()
    expect(page.get_by_text("Say something")).to_be_visible(timeout=LIMIT)
    expect(page.get_by_text("(speech)")).to_have_count(0)


class Broken:
    """An assistant that says a word and then another; or breaks off before it."""

    fails_at = None

    def answer(self, clip, turns, instruction, sampling, long, live, cascade):
        reply = demo.Reply("words", "well")
        yield reply
        if cascade == self.fails_at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        reply.text, reply.turn = "well then", demo.Turn(np.zeros(1, np.int32), "well then")
        yield reply


@pytest.mark.parametrize("fails_at", [False, True])
def test_an_answer_that_breaks_off_leaves_what_was_before(fails_at):
    """DiVA's and the cascade's alike, also on the device; what DiVA had said to its end stays."""
    broken = Broken()
    shown = page_module.Page(broken, None, False)
    token, *_ = shown.resume()
    [*shown.respond("a.wav", "", True, token)]
    before = shown.kept[token]
    broken.fails_at = fails_at
    *_, last = shown.respond("b.wav", "", True, token)
    after = shown.kept[token]
    assert last == (token, *page_module.shown(after))
    assert len(before[0].turns) == len(before[1].turns) == 1
    assert after[1] == before[1] and (after[0] == before[0]) == (not fails_at)
    assert len(after[0].turns) == len(after[0].messages) / 2 == 1 + fails_at


def test_conversations_of_many_tabs_are_forgotten_the_oldest_first():
    shown = page_module.Page(None, None, False)
    tokens = [shown.resume()[0] for _ in range(page_module.TABS + 1)]
    assert [*shown.kept] == tokens[1:] and shown.resume(tokens[0])[0] not in tokens


def status(request: urllib.request.Request | str) -> int:
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["/etc/passwd", str(TOY / "diva/config.json"), "demo.py"])
def test_no_file_of_the_machine_can_be_read(address, path):
    for route in ("gradio_api/file=", "file="):
        assert status(address + route + path) in (403, 404)
        assert status(address + route + "../../../../../../../../.." + path) in (403, 404)


def test_no_path_of_the_machine_is_taken_for_an_upload(address, tmp_path):
    """A request that names a file of this machine gives no answer about it."""
    config = json.loads(urllib.request.urlopen(address + "config").read())
    function = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 4)
    clip = {"path": str(clip_that_says(QUESTION["text"])), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [clip, "", False, ""], "fn_index": function, "session_hash": "abc"}
    request = urllib.request.Request(
        address + "gradio_api/queue/join",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        assert error.code in (400, 403, 404, 422)
        return
    events = urllib.request.urlopen(address + "gradio_api/queue/data?session_hash=abc", timeout=30)
    said = []
    for line in events:
        said.append(line.decode())
        if "process_completed" in said[-1]:
            break
    assert '"success": false' in said[-1].replace('":false', '": false')
    assert QUESTION["answer"] not in "".join(said)


def test_a_file_that_is_too_large_is_refused(address):
    """More than 20 MB."""
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.wav\r\n\r\n"
    body += bytes(21 * 2**20) + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(address + "gradio_api/upload", body, kind)
    assert status(request) == 413


def test_the_same_server_answers_clients_of_openai(address):
    """More of them: test_completions.py."""
    client = openai.OpenAI(base_url=f"{address}v1", api_key="none")
    said = [{"role": "user", "content": "what is two plus five"}]
    reply = client.chat.completions.create(model="diva", messages=said)
    assert "seven" in reply.choices[0].message.content


def test_only_this_machine_is_served(address):
    """The port is open on 127.0.0.1 alone, as the kernel lists it: 0100007F."""
    port = f"{int(address.rstrip('/').rpartition(':')[2]):04X}"
    sockets = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"  # listening
    ]
    assert [s.split(":")[0] for s in sockets if s.endswith(f":{port}")] == ["0100007F"]
