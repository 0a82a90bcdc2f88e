"""/v1/chat/completions: OpenAI's own client is answered as demo.py answers; what is wrong is said
in a line of JSON. Needs `pip install '.[browser]'`, and no browser.
"""

import asyncio
import base64
import contextlib
import json
import re
import threading
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from starlette.applications import Starlette

import demo
from runtime import cli
from serving import completions

TOY = Path(demo.__file__).parent / "toy"
REPEAT = {"role": "system", "content": "Repeat the input."}
SAMPLING = demo.Sampling(max_new_tokens=12)


def user(sound: bytes, *more: dict) -> dict:
    data = base64.b64encode(sound).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {"role": "user", "content": [*more, part]}


CLIP = TOY.parent / cli.EXAMPLE
QUESTION = user(CLIP.read_bytes())


@pytest.fixture(scope="module")
def assistant() -> demo.Assistant:
    return demo.Assistant.load(TOY / "diva")


def served(assistant) -> Starlette:
    return Starlette(routes=[completions.route(assistant, SAMPLING, False)])


@pytest.fixture(scope="module")
def toy(assistant) -> Starlette:
    return served(assistant)


def ask(app: Starlette, *bodies: dict) -> list:
    """What OpenAI's client makes of the answers to requests that are sent at once."""

    async def one(client, body):
        reply = await client.chat.completions.create(model="diva", **body)
        return [piece async for piece in reply] if body.get("stream") else reply

    async def all_of_them():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(
                api_key="none", base_url="http://here/v1", http_client=http, max_retries=0
            )
            work = (one(client, body) for body in bodies)
            return await asyncio.gather(*work, return_exceptions=True)

    return asyncio.run(all_of_them())


def answer(assistant, clip: Path, instruction: str | None) -> str:
    *_, reply = assistant.answer(clip, instruction=instruction, sampling=SAMPLING)
    return reply.turn.answer


def test_a_recording_is_answered_whole_and_in_pieces(assistant, toy):
    """As demo.py answers it, under the instruction of the system, or beside the recording."""
    beside = user(CLIP.read_bytes(), {"type": "text", "text": REPEAT["content"]})
    for said, told in (([QUESTION], None), ([REPEAT, QUESTION], REPEAT["content"])):
        [whole] = ask(toy, {"messages": said})
        [pieces] = ask(toy, {"messages": said, "stream": True})
        choice, deltas = whole.choices[0], [piece.choices[0] for piece in pieces]
        assert choice.message.content == answer(assistant, CLIP, told)
        texts = [delta.delta.content or "" for delta in deltas]
        assert "".join(texts).strip() == choice.message.content
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
        assert choice.finish_reason == "stop" and whole.model == "diva"
    assert sum(map(bool, texts)) > 3, "not in pieces"
    [same] = ask(toy, {"messages": [beside]})
    assert same.choices[0].message.content == choice.message.content


def test_an_answer_ends_where_it_is_told_to(assistant, toy):
    [reply] = ask(toy, {"messages": [REPEAT, QUESTION], "max_tokens": 2})
    assert reply.choices[0].finish_reason == "length"
    whole = answer(assistant, CLIP, REPEAT["content"])
    assert whole.startswith(text := reply.choices[0].message.content) and 0 < len(text) < len(whole)


def test_text_is_answered_as_the_llm_answers_it(assistant, toy):
    words = np.asarray(assistant.chat.encode("what is two plus five"), np.int32)
    *_, reply = assistant.reply(words, (), None, SAMPLING, 0.0)
    [said] = ask(toy, {"messages": [{"role": "user", "content": "what is two plus five"}]})
    assert said.choices[0].message.content == reply.turn.answer


class Recorder:
    """An assistant that writes down what it is asked, and may be held up."""

    def __init__(self):
        self.asked, self.go_on, self.chat = [], threading.Event(), self
        self.go_on.set()

    def encode(self, text):
        return [*text.encode()]

    def listen(self, clip, long):
        return np.asarray([*Path(clip).read_bytes()])

    def reply(self, said, turns, instruction, sampling, began):
        self.asked.append((bytes(said.tolist()), turns, instruction))
        self.go_on.wait(10)
        yield demo.Reply("", "yes", 1)


def test_a_conversation_is_put_as_it_was():
    """Earlier turns, spoken and written, with what was answered to each."""
    recorder = Recorder()
    said = [REPEAT, user(b"one"), {"role": "assistant", "content": "first"}]
    said += [{"role": "user", "content": "two"}, {"role": "assistant", "content": "second"}]
    [reply] = ask(served(recorder), {"messages": [*said, user(b"three")]})
    assert reply.choices[0].message.content == "yes"
    [(last, turns, instruction)] = recorder.asked
    before = [(bytes(said.tolist()), text) for said, text in turns]
    assert (last, instruction) == (b"three", REPEAT["content"])
    assert before == [(b"one", "first"), (b"two", "second")]


@pytest.mark.parametrize("stream", [False, True])
def test_one_is_answered_at_a_time(stream):
    """Another is told to come back, and can."""
    recorder = Recorder()
    recorder.go_on.clear()
    threading.Timer(0.5, recorder.go_on.set).start()
    body = {"messages": [QUESTION], "stream": stream}
    app = served(recorder)
    first, second = ask(app, body, body)
    assert isinstance(second, openai.RateLimitError) and "one at a time" in str(second)
    assert not isinstance(first, Exception) and len(recorder.asked) == 1
    [third] = ask(app, body)
    assert not isinstance(third, Exception) and len(recorder.asked) == 2


def test_who_goes_away_leaves_the_place_to_the_next():
    """A stream that nobody reads lets go of what it holds."""
    held, let_go = contextlib.ExitStack(), []
    held.callback(lambda: let_go.append(True))

    async def pieces():
        yield "a"

    async def gone(*_):
        raise OSError("gone")

    with pytest.raises(Exception):  # noqa: B017  Starlette's own, by its version
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        asyncio.run(completions.Streamed(pieces(), held)(scope, gone, gone))
    assert let_go


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], r"the roles are \[\]; expected \{.messages.: "),
        ([{"role": "assistant", "content": "x"}], r"the roles are \['assistant'\]"),
        ([{"role": "user", "content": 5}], "TypeError: .*; expected"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "KeyError: 'input_audio'; exp"),
        ([QUESTION, QUESTION], r"the roles are \['user', 'user'\]"),
        ([user(b"no sound")], "^[^/]*input_audio: not audio that can be decoded"),
        (5, "TypeError"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said(toy, said, message, stream):
    [error] = ask(toy, {"messages": said, "stream": stream})
    assert isinstance(error, openai.BadRequestError)
    assert re.search(message, error.body["message"])


def test_base64_and_json_that_are_none_are_refused_and_so_is_what_is_too_large():
    app = served(Recorder())

    def post(content: bytes) -> tuple[int, str]:
        async def posted():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
                return await http.post("http://here/v1/chat/completions", content=content)

        reply = asyncio.run(posted())
        return reply.status_code, reply.json()["error"]["message"]

    sound = json.dumps({"messages": [user(b"a")]}).replace("YQ==", "!").encode()
    assert b"!" in sound
    for content in (b"", b"{", b"[" * 100_000, b"[]", b"\xff", sound):
        code, message = post(content)
        assert code == 400 and "\n" not in message and "expected {" in message
    code, message = post(bytes(completions.BODY + 1))
    assert code == 413 and f"{completions.BODY:,} bytes" in message
