"""A full-size step and generation on one GPU: `python -m benchmarks.gpu` (pip install '.[cuda]').

train.py's own step on random weights in the sizes of diva-8b, in bfloat16, with each response loss
and each implementation of attention; and generate.generate at batch 1. The figures are held against
what this very card reaches: the rate of a large matrix product, and of streaming through memory.
Each row runs in a process of its own; the first takes the largest of BATCHES that fits, the others
no more than that. Prints README's tables; runs/benchmarks/gpu.json keeps them. It runs on any
device that JAX has; to try it on a laptop: --asr toy/whisper --llm toy/llama, the toy's sizes.
"""

import dataclasses
import functools
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import data
import generate
import llama
import train
import weights
import whisper
from benchmarks import side_by_side
from runtime import attention, sharding
from training import compilation, cost, recipe

FILE = Path(__file__).with_suffix(".json")
BATCHES = 32, 24, 16, 8, 4
STEPS, WARM = 5, 2
PROMPT, NEW = 32, 256  # tokens
ROWS = ("l2", "xla"), ("l2", "cudnn"), ("kl", "xla"), ("gram", "xla")  # response loss, attention
SIDE = 8192  # of the square matrices


def fastest(function: Any, *arguments: Any, repeats: int = 10) -> float:
    """Seconds of the fastest of some runs: for what the card can do at best."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def limits() -> dict[str, Any]:
    """FLOP/s of a bfloat16 matrix product, and bytes a second read and written, of this card."""
    side = SIDE if jax.default_backend() == "gpu" else 1024
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, 10, lambda _, x: x @ matrix * 0.01, x)

    long = jnp.zeros(16 * side * side, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    return {
        "device": jax.devices()[0].device_kind,
        "flops": 10 * 2 * side**3 / fastest(products, matrix),
        "bandwidth": 2 * long.nbytes / fastest(add, long),
    }


def filled(tree: Any) -> Any:
    """Arrays for the shapes of `tree`: norms 1, other weights random, counters and tokens 0."""

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            array = jnp.zeros(leaf.shape, leaf.dtype)
        elif "norm" in name:
            array = jnp.ones(leaf.shape, leaf.dtype)
        elif name.endswith(".gram"):
            array = jnp.eye(*leaf.shape, dtype=leaf.dtype)
        else:
            key = jax.random.key(zlib.crc32(name.encode()))
            array = 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, tree)


def step(
    whisper_name: str, llm_name: str, loss: str, implementation: str, most: int
) -> dict[str, Any]:
    """Clips a second, FLOP/s and memory of the largest of BATCHES, up to `most`, that fits."""
    attention.IMPLEMENTATION = implementation
    asr = cost.sizes_of(whisper.WhisperConfig, whisper_name)
    llm = cost.sizes_of(llama.LlamaConfig, llm_name)
    device, room = jax.devices()[0], sharding.device_memory_bytes()
    preset = dataclasses.replace(recipe.PRESETS["diva-8b"], response_loss=loss, dtype="bfloat16")
    for size in (size for size in BATCHES if size <= most):
        config = dataclasses.replace(preset, batch_size=size)
        mesh = sharding.make_mesh(size, devices=[device])
        inputs = functools.partial(train.abstract_inputs, config, asr=asr, llm=llm)
        try:
            compiled, remat, _ = train.compile_step(config, [mesh], room, inputs)
            state, shapes = inputs(mesh)
            break
        except ValueError:  # it does not fit
            if size == BATCHES[-1]:
                raise
    rng = np.random.default_rng(0)
    clips = data.Batch(
        transcript=rng.integers(0, llm.vocab_size, shapes.transcript.shape).astype(np.int32),
        lengths=np.full(size, cost.MEAN_TEXT, np.int32),
        weights=np.ones(size, np.float32),
        audio=rng.normal(size=shapes.audio.shape).astype(np.float32),
    )
    params, opt_state, frozen = state
    params, frozen = filled(params), filled(frozen)
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), opt_state)
    batch, times = sharding.shard_host_batch(clips, mesh), []
    for number in range(-WARM, STEPS):
        start = time.perf_counter()
        params, opt_state, metrics = compiled(params, opt_state, frozen, batch, np.int32(0))
        jax.block_until_ready(metrics)
        if number >= 0:
            times.append(time.perf_counter() - start)
    given = asr.max_target_positions, cost.SUFFIX, shapes.transcript.shape[1]
    work = sum(cost.flops(asr, llm, *given, before=cost.PREFIX).values())
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "batch": size,
        "remat": remat,
        "seconds": median(times),
        "flops": work * size / median(times),
        "memory": peak or compilation.bytes_needed(compiled.memory_analysis()),
        "finite": bool(np.asarray(metrics["finite"]).all()),
    }


def generation(llm_name: str) -> dict[str, float]:
    """Tokens a second at batch 1, and the bytes of weights that each must read."""
    config = cost.sizes_of(llama.LlamaConfig, llm_name)
    template = weights.abstract(llama.Llama.init, config, jax.random.key(0), dtype=jnp.bfloat16)
    llm = filled(template)
    embeds = llm.embed(jnp.zeros((1, PROMPT), jnp.int32))
    lengths = jnp.full(1, PROMPT)

    def answer():
        return generate.generate(llm, embeds, lengths, max_new_tokens=NEW, stop_ids=(-1,))

    read = sum(x.nbytes for x in jax.tree.leaves(llm.model.layers)) + llm.output_matrix.nbytes
    return {"tokens": NEW / fastest(answer, repeats=5), "bytes": read}


def alone(function: Callable, *arguments: Any) -> Any:
    """What the function returns, in a process of its own."""
    with side_by_side.process() as fresh:
        return fresh.do(function, *arguments)


def measure(whisper_name: str, llm_name: str) -> dict[str, Any]:
    """All figures; a row that fails says why."""
    found: dict[str, Any] = {"limits": alone(limits), "steps": []}
    most = 0  # what the first row fits: no other row tries more
    for loss, implementation in ROWS:
        row = {"loss": loss, "attention": implementation}
        try:
            tried = most or BATCHES[0]
            row |= alone(step, whisper_name, llm_name, loss, implementation, tried)
            most = most or row["batch"]
        except Exception as error:
            row["error"] = str(error).splitlines()[0]
        found["steps"].append(row)
        print(json.dumps(row), flush=True)
    found["generation"] = alone(generation, llm_name)
    found["machine"] = side_by_side.machine("jax")
    return found


def table(measured: dict[str, Any]) -> str:
    """README's tables; nothing where nothing was measured."""
    if not measured:
        return ""
    limits, made = measured["limits"], measured["generation"]
    lines = [
        "| response loss | attention | clips, recomputes | step, s | clips/s | MFU % | HBM, GiB |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in measured["steps"]:
        cells = (
            [row["error"], "", "", "", ""]
            if "error" in row
            else [
                f"{row['batch']}, {row['remat']}",
                f"{row['seconds']:.2f}",
                f"{row['batch'] / row['seconds']:.1f}",
                f"{100 * row['flops'] / limits['flops']:.0f}",
                f"{row['memory'] / cost.GIB:.1f}",
            ]
        )
        lines.append("| " + " | ".join([row["loss"], row["attention"], *cells]) + " |")
    share = made["tokens"] * made["bytes"] / limits["bandwidth"]
    lines += [
        "",
        "| generation, batch 1 | tokens/s | share of the memory's speed % |",
        "|---|--:|--:|",
        f"| Llama-3-8B, bfloat16 | {made['tokens']:.1f} | {100 * share:.0f} |",
    ]
    return "\n".join(lines)


def main(
    asr: str = "openai/whisper-large-v3", llm: str = "meta-llama/Llama-3.1-8B-Instruct"
) -> None:
    """Measure, keep and print.

    Args:
        asr: sizes of the Whisper: a published one's name, or a folder.
        llm: sizes of the Llama.
    """
    # of the processes that are started: nearly all of the card, and none of it for this one
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    measured = measure(asr, llm)
    if jax.default_backend() == "gpu":
        side_by_side.write(FILE, measured)
    else:
        print("not a GPU: nothing is kept")
    print(table(measured) + "\n\n" + json.dumps(measured["limits"]))


if __name__ == "__main__":
    tyro.cli(main)
