"""Answers: what the teacher says to every transcript, asked once, before step 0.

From the second response token on, both branches of a step are fed the words before it: those that
the LLM itself, reading the transcript, answers greedily. They depend on nothing that is trained, so
all of them are asked in batches and written down:

    OUT/answers/DIGEST.json    to PART prompts, under a digest of all that decides the answers

Some clips may stand under an instruction, which teacher and student both read: one of a list, the
same one all the time. No human answer is ever needed.

A run that goes on reads them again. Of several processes each answers its share of every batch.

Reads: llama.py, generate.py, data.py, files.py, sharding.py, record.py.   Read next: train.py.
"""

import functools
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Int, Int32

import data
import generate
import llama
from runtime import files, sharding
from training import record

AT_ONCE = 32  # prompts that a device answers together
PART = 1024  # prompts in a file
MOST = 64  # tokens of a whole answer
INSTRUCTED = 0.5  # of the clips, where there are instructions


def limit(response_tokens: int | Literal["all"]) -> int:
    """Tokens of the longest answer, its stop token included."""
    return MOST if response_tokens == "all" else response_tokens


def turn(chat: llama.Chat, instructions: str | None) -> dict[str, Any]:
    """What stands around the user's words: prefix and suffix of the template; and the prefixes
    without an instruction and with each line of a file of them, if one is given.

    Raises ValueError for a file that is missing, or without an instruction.
    """
    found: dict[str, Any] = dict(zip(("prefix", "suffix"), chat.wrap(), strict=True))
    if instructions:
        file = Path(instructions)
        lines = [line.strip() for _, line in files.text_lines(file)] if file.is_file() else []
        if not lines:
            lacks = "no instruction" if file.is_file() else "no such file"
            raise ValueError(f"--instructions {file}: {lacks}; expected one on each line.")
        found["prefixes"] = [found["prefix"], *(chat.wrap(line)[0] for line in lines)]
    return found


def draw(turn: dict[str, Any], clips: int, seed: int) -> dict[str, Int32[np.ndarray, "clips"]]:
    """Which of the prefixes each clip has, for `corpus.more`: half of the time the first."""
    if (last := len(prefixes(turn)) - 1) == 0:
        return {}
    rng = np.random.default_rng((seed, 1))
    under = rng.integers(1, last + 1, clips)
    return {"instruction": np.where(rng.random(clips) < INSTRUCTED, under, 0).astype(np.int32)}


def prefixes(turn: dict[str, Any]) -> list[list[int]]:
    """What stands before the user's words without an instruction, then with each, if any."""
    return turn.get("prefixes", [turn["prefix"]])


def template(turn: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Prefix, suffix, pads as the step reads them: prefixes as long as the longest, the padding at
    their heads; one prefix, and no pads, where there are no instructions."""
    suffix, each = np.asarray(turn["suffix"], np.int32), prefixes(turn)
    if len(each) == 1:
        return np.asarray(each[0], np.int32), suffix, None
    longest = max(map(len, each))
    pads = np.asarray([longest - len(row) for row in each], np.int32)
    rows = [[0] * n + row for n, row in zip(pads, each, strict=True)]
    return np.asarray(rows, np.int32), suffix, pads


def own_prefix(prefix: Any, pads: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Prefix and pads of each clip of a batch; the first of several where it names none."""
    if pads is None:
        return prefix, None
    under = batch.get("instruction", 0 * batch["lengths"])
    return prefix[under], pads[under]


def ask(
    llm: llama.Llama,
    stop_ids: tuple[int, ...],
    turn: dict[str, Any],
    config: Any,
    mesh: Mesh,
    corpus: data.Corpus,
    most: int,
) -> dict[str, Int32[np.ndarray, "clips ..."]]:
    """What `llm` answers to each transcript, at most `most` tokens, for `corpus.more`.

    answers [clips, A] are all tokens but the last, which is only predicted, 0-padded; states
    [clips] is how many say an answer: all its tokens, and the stop token if it came to it.

    Args:
        turn: prefix and suffix of the chat template; with instructions, the prefix of each.
        config: its out, llm and dtype are asked for.
    """
    before, under = prefixes(turn), corpus.more.get("instruction", [0] * len(corpus.ids))
    prompts = [
        np.concatenate([before[i], row, turn["suffix"]]).astype(np.int32)
        for i, row in zip(under, corpus.ids, strict=True)
    ]
    found = _ask_all(llm, stop_ids, prompts, config, mesh, most)
    fed = np.zeros((len(found), max(map(len, found)) - 1), np.int32)
    for row, answer in zip(fed, found, strict=True):
        row[: len(answer) - 1] = answer[:-1]
    return {"answers": fed, "states": np.asarray([*map(len, found)], np.int32)}


def _ask_all(
    llm: llama.Llama,
    stop_ids: tuple[int, ...],
    prompts: list[Int32[np.ndarray, "_"]],
    config: Any,
    mesh: Mesh,
    most: int,
) -> list[list[int]]:
    """The tokens that are answered to each prompt; a stop token, if any, is the last."""
    name, out = f"{config.llm} {config.dtype}", epath.Path(config.out)
    unique = list({row.tobytes(): row.tolist() for row in prompts}.values())
    longest, began, said = max(map(len, unique)), time.perf_counter(), {}
    speaks = jax.process_index() == 0
    if speaks:
        print(f"the teacher answers {len(unique):,} transcripts", end="", flush=True)
    for first in range(0, len(unique), PART):
        part = unique[first : first + PART]
        key = json.dumps([name, stop_ids, most, part]).encode()
        file = out / "answers" / f"{hashlib.sha256(key).hexdigest()[:16]}.json"
        if sharding.from_process_0(file.is_file):
            answers = files.read_json(file)["answers"]
        else:
            answers = _ask_some(llm, part, stop_ids, most, longest, mesh)
            if speaks:
                with record.writing(file):
                    files.write_text(file, json.dumps({"answers": answers}) + "\n")
        said |= zip(map(tuple, part), answers, strict=True)
    found = [said[tuple(row.tolist())] for row in prompts]
    if speaks:
        cut = sum(answer[-1] not in stop_ids for answer in found)
        print(
            f": {time.perf_counter() - began:.0f} s, {np.mean([*map(len, found)]):.1f} tokens each"
            + (f", {cut / len(found):.0%} of them cut at {most}" if cut else "")
        )
    return found


def _ask_some(
    llm: llama.Llama,
    part: list[list[int]],
    stop_ids: tuple[int, ...],
    most: int,
    longest: int,
    mesh: Mesh,
) -> list[list[int]]:
    """The answers to some prompts, in batches of one shape."""
    size = AT_ONCE * mesh.size
    padded = np.zeros((math.ceil(len(part) / size) * size, longest), np.int32)
    lengths = np.ones(len(padded), np.int32)
    for i, row in enumerate(part):
        padded[i, : len(row)], lengths[i] = row, len(row)
    mine = size // jax.process_count()
    answers: list[list[int]] = []
    for first in range(0, len(padded), size):
        own = first + jax.process_index() * mine
        rows = {"ids": padded[own : own + mine], "lengths": lengths[own : own + mine]}
        rows = sharding.shard_host_batch(rows, mesh)
        tokens = _answer(llm, rows["ids"], rows["lengths"], most, stop_ids)
        answers += np.asarray(sharding.gather_to_host(tokens)).tolist()
    ends = ((*row, stop_ids[0]).index(stop_ids[0]) + 1 for row in answers)
    return [row[:end] for row, end in zip(answers[: len(part)], ends, strict=False)]


@sharding.use_model_mesh
@functools.partial(jax.jit, static_argnames=("most", "stop_ids"))
def _answer(
    llm: llama.Llama,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    most: int,
    stop_ids: tuple[int, ...],
) -> Int[Array, "B most"]:
    more = {"max_new_tokens": most, "stop_ids": stop_ids}
    return generate.generate(llm, llm.embed(ids), lengths, **more)
