"""The page of the demo, in a real browser with a microphone that hears a file.

Needs `pip install '.[browser]'` and a Chromium: the system's own, or that of
`playwright install chromium`.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page, expect, sync_playwright

import demo
from runtime import recording

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
    samples = recording.load(clip_that_says(QUESTION["text"]))
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


@pytest.fixture
def page(browser, address):
    page, wrong = browser.new_page(viewport={"width": 900, "height": 1000}), []
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


def upload(page: Page, file: Path) -> None:
    page.get_by_role("button", name="Upload file").click()
    page.locator("input[type=file]").set_input_files(file)


def test_the_toy_says_that_it_is_a_toy(page):
    expect(page.get_by_text("This is the toy model")).to_be_visible()


def answers(page: Page) -> list[str]:
    """What stands in the conversation, turn by turn: what was heard, and the answer."""
    text = page.get_by_label("chatbot conversation").inner_text()
    return ["\n".join(turn.split("\n")).strip() for turn in text.split("(speech)")[1:]]


def record(page: Page) -> None:
    page.get_by_role("button", name="Record", exact=True).click()
    seconds = soundfile.info(clip_that_says(QUESTION["text"])).duration
    page.wait_for_timeout(1000 * (seconds + 0.8))
    page.get_by_role("button", name="Stop", exact=True).click()


def test_a_question_spoken_into_the_microphone_is_answered(page):
    """The last words that the LLM heard are those of the question, the answer is right, and the
    time to the first token is told."""
    record(page)
    expect(page.get_by_text("first token after")).to_be_visible(timeout=LIMIT)
    (turn,) = answers(page)
    heard, answer = turn.split("\n", 1)
    assert heard.endswith(QUESTION["text"])
    assert answer.strip() == QUESTION["answer"]


def test_a_file_is_answered_under_an_instruction_and_the_conversation_is_kept(page):
    """Until a new one is begun."""
    rows = (TOY / "tasks/translation/dev.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    page.get_by_label("Instruction").fill("Translate the input from English to German.")
    upload(page, (TOY / "tasks/translation" / row["audio"]).resolve())
    expect(page.get_by_text(row["answer"])).to_be_visible(timeout=LIMIT)
    upload(page, clip_that_says(QUESTION["text"]))
    expect(page.get_by_text("(speech)")).to_have_count(2, timeout=LIMIT)
    expect(page.get_by_text(row["answer"])).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_text("(speech)")).to_have_count(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("long.wav", np.sin(np.arange(16000 * 4)), "s of speech; expected at most the model's"),
        ("noise.wav", b"RIFF, but not really", "not audio that can be decoded"),
        ("empty.wav", np.zeros(0), "no samples"),
    ],
)
def test_what_cannot_be_heard_is_said_and_the_page_goes_on(page, tmp_path, name, content, message):
    """The message names the file, and not where it lies on this machine."""
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        soundfile.write(file, content, 16000)
    upload(page, file)
    toast = page.get_by_text(message)
    expect(toast).to_be_visible(timeout=LIMIT)
    assert name in toast.inner_text() and "/" not in toast.inner_text().replace("t/", "")
    page.reload()
    expect(page.get_by_text("Say something")).to_be_visible(timeout=LIMIT)
    record(page)
    expect(page.get_by_text("first token after")).to_be_visible(timeout=LIMIT)


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
    body = {"data": [clip, "", [], None], "fn_index": function, "session_hash": "abc"}
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
