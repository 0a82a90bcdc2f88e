"""Completions: an assistant for whatever speaks to OpenAI's servers, at /v1/chat/completions.

    user        {"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}, or text
    system      the instruction; text beside a recording is added to it
    assistant   what was answered before

One answer at a time: another is refused with 429, which OpenAI's clients take for "ask again".

Reads: recording.py.   Read next: page.py.
"""

import base64
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

LARGEST = 20 * 2**20  # bytes of a recording
BODY = LARGEST * 4 // 3 + 2**16  # in base64, and something around it
EXPECTED = (
    'expected {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": '
    '{"data": BASE64, "format": "wav"}}]}]}, the last one a user\'s'
)


class Streamed(StreamingResponse):
    """Lets go of what it holds, also if nobody listens to the end."""

    def __init__(self, pieces: AsyncIterator[str], held: contextlib.ExitStack):
        super().__init__(pieces, media_type="text/event-stream")
        self.held = held

    async def __call__(self, *asgi) -> None:
        with self.held:
            await super().__call__(*asgi)


def refusal(status: int, message: str) -> JSONResponse:
    """As OpenAI's servers say it."""
    return JSONResponse({"error": {"message": message, "type": "refused", "code": status}}, status)


def route(assistant: Any, sampling: Any, long: bool) -> Route:
    """Where it is asked."""
    busy = threading.Lock()

    async def complete(request: Request) -> JSONResponse | Streamed:
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > BODY:
                return refusal(413, f"a request of more than {BODY:,} bytes; expected fewer.")
        if not busy.acquire(blocking=False):
            return refusal(429, "another answer is being made; expected one at a time. Ask again.")
        with contextlib.ExitStack() as held:
            held.callback(busy.release)
            try:
                asked, messages, most = parsed(content, sampling.max_new_tokens)
                replies = iterate_in_threadpool(answers(assistant, messages, sampling, most, long))
                reply = await anext(replies)  # errors come before the answer begins
            except ValueError as error:
                return refusal(400, str(error))
            if asked.get("stream"):
                return Streamed(events(reply, replies, asked, most), held.pop_all())
            async for reply in replies:  # noqa: B007  the last one is whole
                pass
            message = {"role": "assistant", "content": reply.text.strip()}
            return JSONResponse(shaped(asked, "", ended(reply, most), message=message))

    return Route("/v1/chat/completions", complete, methods=["POST"])


def parsed(
    content: bytes | bytearray, most: int
) -> tuple[dict, list[tuple[str, str, list[bytes]]], int]:
    """The request, its messages (role, text, recordings), and how many tokens it wants at most."""
    try:
        asked, messages = json.loads(content), []
        for message in asked["messages"]:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            text = "\n".join(part["text"] for part in parts if part["type"] == "text")
            sounds = [part["input_audio"]["data"] for part in parts if part["type"] != "text"]
            sounds = [base64.b64decode(sound, validate=True) for sound in sounds]
            messages.append((message["role"], text, sounds))
        turns = [role for role, *_ in messages if role not in ("system", "developer")]
        if turns != ["user", *["assistant", "user"] * (len(turns) // 2)]:
            raise ValueError(f"the roles are {turns}")
        wanted = asked.get("max_completion_tokens") or asked.get("max_tokens") or most
        return asked, messages, min(max(wanted, 1), most)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}; {EXPECTED}.") from error


def answers(assistant: Any, messages: list, sampling: Any, most: int, long: bool) -> Iterator[Any]:
    """The reply to the last message, again and again while it grows, up to `most` tokens."""
    began, told, turns, said = time.perf_counter(), [], [], None
    for role, text, sounds in messages:
        if role == "assistant":
            turns.append((said, text))
        elif role == "user" and not sounds:
            said = np.asarray(assistant.chat.encode(text), np.int32)
        else:
            told += [text] if text else []
        if sounds:
            said = np.concatenate([heard(assistant, sound, long) for sound in sounds])
    for reply in assistant.reply(said, turns, "\n".join(told) or None, sampling, began):
        yield reply
        if reply.tokens >= most:  # a limit of its own would be compiled anew
            return


def heard(assistant: Any, sound: bytes, long: bool) -> np.ndarray:
    """Virtual tokens of a recording; what is wrong with it is not said by its place."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(sound)
        file.flush()
        try:
            return assistant.listen(file.name, long)
        except ValueError as error:
            raise ValueError(str(error).replace(file.name, "input_audio")) from error


async def events(
    reply: Any, replies: AsyncIterator[Any], asked: dict, most: int
) -> AsyncIterator[str]:
    """An answer as it grows, each piece as soon as it is known."""

    def event(reason: str | None, **delta: str) -> str:
        return f"data: {json.dumps(shaped(asked, '.chunk', reason, delta=delta))}\n\n"

    yield event(None, role="assistant", content=(sent := reply.text))
    async for reply in replies:
        yield event(None, content=reply.text[len(sent) :])
        sent = reply.text
    yield event(ended(reply, most)) + "data: [DONE]\n\n"


def ended(reply: Any, most: int) -> str:
    """Why an answer ends there, in OpenAI's words."""
    return "length" if reply.tokens >= most else "stop"


def shaped(asked: dict, kind: str, reason: str | None = None, **said: dict) -> dict:
    """A piece of an answer, or all of it, as OpenAI's clients read it."""
    choice = {"index": 0, "finish_reason": reason, **said}
    return {
        "id": "chatcmpl-diva",
        "object": f"chat.completion{kind}",
        "created": int(time.time()),
        "model": str(asked.get("model", "diva")),
        "choices": [choice],
    }
