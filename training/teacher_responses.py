"""Teacher responses: the teacher's greedy response to every transcript, generated before step 0.

From the second response token on, student and teacher are fed the tokens before it (teacher
forcing): those that the LLM itself generates greedily for the transcript. They depend on nothing
that is trained, so they are generated once, in batches, and cached:

    OUT/answers/DIGEST.json    responses to PROMPTS_PER_FILE prompts; the digest covers everything
                               that decides them, so that a resumed run reads them again

Of several processes, each generates its share of every batch.

Reads: llama.py, generate.py, data.py, files.py, sharding.py, record.py.   Read next: train.py.
"""

import functools
import hashlib
import json
import math
import time
from typing import Any, Literal, NamedTuple

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

PROMPTS_PER_DEVICE = 32  # of one batch
PROMPTS_PER_FILE = 1024
MAX_RESPONSE = 64  # tokens of a whole response


class Template(NamedTuple):
    """Token ids of the chat template around the user's words."""

    prefix: Int[Any, "P"]  # BOS included
    suffix: Int[Any, "R"]  # up to the position that predicts the first response token


def make_template(prefix: list[int], suffix: list[int]) -> Template:
    """A Template of int32 arrays."""
    return Template(np.asarray(prefix, np.int32), np.asarray(suffix, np.int32))


def max_tokens(response_tokens: int | Literal["all"]) -> int:
    """Tokens of the longest response, its stop token included."""
    return MAX_RESPONSE if response_tokens == "all" else response_tokens


def generate_responses(
    llm: llama.Llama,
    stop_ids: tuple[int, ...],
    template: Template,
    *,
    corpus: data.Corpus,
    config: Any,
    mesh: Mesh,
    max_new_tokens: int,
) -> dict[str, Int32[np.ndarray, "clips ..."]]:
    """Batch fields for `corpus.precomputed`: response and response_lengths.

    response [clips, A] has all tokens but the last, which is only predicted, padded with 0.
    response_lengths [clips] counts the states that predict the response: one for each of its
    tokens, the stop token included if it was reached.
    """
    prompts = [
        np.concatenate([template.prefix, tokens, template.suffix]).astype(np.int32)
        for tokens in corpus.ids
    ]
    responses = _generate_cached(
        llm, stop_ids, prompts, config=config, mesh=mesh, max_new_tokens=max_new_tokens
    )
    lengths = np.asarray([len(response) for response in responses], np.int32)
    fed = np.zeros((len(responses), lengths.max() - 1), np.int32)
    for row, response in zip(fed, responses, strict=True):
        row[: len(response) - 1] = response[:-1]
    return {"response": fed, "response_lengths": lengths}


def _generate_cached(
    llm: llama.Llama,
    stop_ids: tuple[int, ...],
    prompts: list[Int32[np.ndarray, "_"]],
    *,
    config: Any,
    mesh: Mesh,
    max_new_tokens: int,
) -> list[list[int]]:
    """The response tokens to each prompt, from the run's cache where it has them; a stop token, if
    any, is the last."""
    model = f"{config.llm} {config.dtype}"
    unique = list({row.tobytes(): row.tolist() for row in prompts}.values())
    longest = max(len(prompt) for prompt in unique)
    start_time = time.perf_counter()
    is_main_process = jax.process_index() == 0
    if is_main_process:
        print(f"generating teacher responses for {len(unique):,} transcripts", end="", flush=True)

    response_to = {}
    for start in range(0, len(unique), PROMPTS_PER_FILE):
        part = unique[start : start + PROMPTS_PER_FILE]
        key = json.dumps([model, stop_ids, max_new_tokens, part]).encode()
        name = f"{hashlib.sha256(key).hexdigest()[:16]}.json"
        file = epath.Path(config.out) / "answers" / name
        if sharding.from_process_0(file.is_file):
            responses = files.read_json(file)["answers"]
        else:
            responses = _generate_batches(
                llm,
                stop_ids,
                part,
                mesh=mesh,
                longest_prompt=longest,
                max_new_tokens=max_new_tokens,
            )
            if is_main_process:
                with record.writing(file):
                    files.write_text(file, json.dumps({"answers": responses}) + "\n")
        response_to |= zip(map(tuple, part), responses, strict=True)

    responses = [response_to[tuple(prompt.tolist())] for prompt in prompts]
    if is_main_process:
        mean_length = np.mean([len(response) for response in responses])
        truncated = np.mean([response[-1] not in stop_ids for response in responses])
        print(
            f": {time.perf_counter() - start_time:.0f} s, {mean_length:.1f} tokens on average"
            + (f", {truncated:.0%} of them truncated at {max_new_tokens}" if truncated else "")
        )
    return responses


def _generate_batches(
    llm: llama.Llama,
    stop_ids: tuple[int, ...],
    prompts: list[list[int]],
    *,
    mesh: Mesh,
    longest_prompt: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """The responses to some prompts, in batches of one shape."""
    batch_size = PROMPTS_PER_DEVICE * mesh.size
    rows = math.ceil(len(prompts) / batch_size) * batch_size
    padded = np.zeros((rows, longest_prompt), np.int32)
    lengths = np.ones(rows, np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)

    process_rows = batch_size // jax.process_count()
    responses: list[list[int]] = []
    for start in range(0, rows, batch_size):
        first = start + jax.process_index() * process_rows
        part = slice(first, first + process_rows)
        ids, prompt_lengths = sharding.shard_host_batch((padded[part], lengths[part]), mesh)
        tokens = _generate(
            llm, ids, prompt_lengths, max_new_tokens=max_new_tokens, stop_ids=stop_ids
        )
        responses += np.asarray(sharding.gather_to_host(tokens)).tolist()

    # `generate` pads with the first stop id: each response ends with its first stop token.
    ends = ((*row, stop_ids[0]).index(stop_ids[0]) + 1 for row in responses)
    return [row[:end] for row, end in zip(responses[: len(prompts)], ends, strict=False)]


@sharding.use_model_mesh
@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))
def _generate(
    llm: llama.Llama,
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> Int[Array, "B new"]:
    """Greedy responses to right-padded prompts."""
    return generate.generate(
        llm, llm.embed(ids), lengths, max_new_tokens=max_new_tokens, stop_ids=stop_ids
    )
