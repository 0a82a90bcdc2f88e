"""What loading costs the host: `python -m benchmarks.loading` (about a minute, 2.5 GB of disk).

Makes a random checkpoint of the shape of Llama-3.2-1B-Instruct in four files, loads it in a fresh
process over 8 fake CPU devices as train.py does over 8 chips, and watches that process from
outside, every 5 ms. Ends with 1 if the peak is above the bound:

    peak, over what the process held before  <=  the loaded model + 1.5 x its largest tensor

On CPU the devices' memory is the host's, so the model itself is in the peak; beside real chips only
the rest stays on the host. `Anonymous` is what the process allocated; the pages of the checkpoint
that are mapped come on top, though the kernel may drop them whenever it likes. The files were just
written, so they come from the page cache where it has room: MB/s is not that of a cold disk.
"""

import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import llama
import weights
from benchmarks import side_by_side
from runtime import sharding
from training import cost

DEVICES = 8
SHARDS = 4
RUNS = 3
ROOM = 4_000_000_000  # bytes of disk
ALLOWED = 1.5  # of the largest tensor, above the loaded model
CONFIG = cost.PUBLISHED["meta-llama/Llama-3.2-1B-Instruct"]


def shapes(config: llama.LlamaConfig) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape}, layer by layer, as in the published files."""
    template = weights.abstract(llama.Llama.init, config, jax.random.key(0))
    named = [
        (name, leaf.shape[1:] if stacked else leaf.shape)
        for leaf, names, stacked in weights.names_of(template)
        for name in names
    ]

    def layer(item: tuple) -> int:
        return next((int(part) for part in item[0].split(".") if part.isdigit()), -1)

    return dict(sorted(named, key=layer))


def make(folder: Path) -> None:
    """Write the checkpoint, tensor by tensor."""
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    wanted = shapes(CONFIG)
    total = sum(2 * int(np.prod(shape)) for shape in wanted.values())
    shard_of, before = {}, 0
    for name, shape in wanted.items():
        shard_of[name] = before * SHARDS // total
        before += 2 * int(np.prod(shape))
    file_of = {n: f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for n, i in shard_of.items()}
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, names in groupby(wanted, file_of.get):
        write(folder / file, {name: wanted[name] for name in names})


def write(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of random bfloat16 numbers, +-(1/128 to 1/32), with one tensor alive."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
            out.write((bits & 0x80FF | 0x3C00).tobytes())


def load(folder: Path) -> dict[str, Any]:
    """Load the checkpoint over all devices: when, and what the process held before and at most."""
    mesh = sharding.make_mesh(DEVICES)
    place = functools.partial(sharding.shard_params, mesh=mesh)
    jax.block_until_ready(
        place(jnp.ones((DEVICES, sharding.MIN_SHARDED_SIZE)))
    )  # now the devices are up
    before, began = side_by_side.memory(), time.monotonic()
    model = jax.block_until_ready(llama.Llama.load(folder, jnp.bfloat16, place))
    ended, arrays = time.monotonic(), jax.tree.leaves(model)
    return {
        "began": began,
        "ended": ended,
        "before": before,
        "highest": side_by_side.memory()["VmHWM"],
        "model": sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards),
        "largest": max(x.nbytes // len(names) for x, names, _ in weights.names_of(model)),
    }


def elsewhere(function: Callable, folder: Path) -> tuple[Any, list[tuple[float, dict[str, int]]]]:
    """Run `function(folder)` in a new process; its result, and its memory every 5 ms.

    Watched from here: a thread beside it would wait while it holds the interpreter's lock.
    """
    with side_by_side.process() as fresh:
        pid = fresh.do(os.getpid)
        job, samples = fresh.pool.submit(function, folder), []
        while not job.done():
            samples.append((time.monotonic(), side_by_side.memory(pid)))
            time.sleep(0.005)
        return job.result(), samples


def measure(folder: Path) -> dict[str, float]:
    """One load in a process of its own: bytes and seconds."""
    took, samples = elsewhere(load, folder)
    during = [held for now, held in samples if took["began"] <= now <= took["ended"]]
    over = {
        name: max(held[name] for held in during) - took["before"][name]
        for name in ("RssAnon", "RssFile", "VmRSS")
    }
    return {
        "model": took["model"],
        "largest": took["largest"],
        "anonymous": over["RssAnon"],
        "mapped": over["RssFile"],
        "peak": max(over["VmRSS"], took["highest"] - took["before"]["VmRSS"]),
        "seconds": took["ended"] - took["began"],
    }


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that are started
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < ROOM:
        sys.exit(f"{tempfile.gettempdir()}: {free / 1e9:.1f} GB free; expected {ROOM / 1e9:g} GB.")
    with tempfile.TemporaryDirectory(prefix="loading-") as name:
        elsewhere(make, Path(name))
        runs = [measure(Path(name)) for _ in range(RUNS)]
    model, largest = runs[0]["model"], runs[0]["largest"]
    seconds = median(run["seconds"] for run in runs)
    bound, peak = model + ALLOWED * largest, max(run["peak"] for run in runs)
    rows = {
        f"loaded model, on {DEVICES} devices": model,
        "largest tensor": largest,
        f"bound: model + {ALLOWED} x largest tensor": bound,
        "peak, anonymous": max(run["anonymous"] for run in runs),
        "peak, mapped files": max(run["mapped"] for run in runs),
        "peak, both at once": peak,
    }
    print(f"| Llama-3.2-1B's shape, bf16, {RUNS} runs | MB |\n|---|--:|")
    for name, size in rows.items():
        print(f"| {name} | {size / 1e6:,.0f} |")
    print(f"\n{seconds:.1f} s (median), {model / 1e6 / seconds:,.0f} MB/s from the page cache")
    if peak > bound:
        sys.exit(f"the peak is {(peak - bound) / 1e6:,.0f} MB above the bound")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
