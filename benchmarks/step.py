"""A training step beside PyTorch's: `python -m benchmarks.step` (about ten minutes on 2 cores).

Needs `pip install '.[parity]'`. Two programs with the same weights, batch, losses and optimizer, in
float32 on the CPU: train.py's own step; and the same DiVA made of transformers' Whisper and Llama
(benchmarks/peer.py), eager and under torch.compile. First it is shown that both losses and the
gradient of every trained tensor agree; then the sides take turns, and a large matrix product with
them, whose rate theirs is a share of. Prints README's table; runs/benchmarks/step.json keeps it.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import tyro

import connector
import data
import llama
import train
import weights
from benchmarks import side_by_side, sizes
from runtime import files, sharding
from training import cost, recipe, teacher_responses

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
RUNS = {"the toy's": 60, "Whisper-tiny, 60 M LLM": 9}
AGREE = 1e-4  # relative, of a loss and of the gradient of a tensor


def make_batch(folder: Path, size: int, turn: tuple[list[int], list[int]]) -> dict[str, np.ndarray]:
    """Noise, transcripts of random tokens (Common Voice's lengths), and the teacher's rows."""
    rng = np.random.default_rng(0)
    diva = connector.load(folder)
    queries, vocabulary = len(diva.connector.query_tokens), diva.llm.config.vocab_size
    longest = min(cost.TEXT, queries)
    lengths = rng.integers(1, min(2 * cost.MEAN_TEXT, longest), size)
    prefix, suffix = (np.array(part, np.int32) for part in turn)
    batch = {
        "audio": 0.1 * rng.normal(size=(size, diva.window_samples)).astype(np.float32),
        "ids": rng.integers(3, vocabulary, (size, longest)).astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "weights": np.ones(size, np.float32),
    }
    # The teacher's rows [prefix | transcript | suffix | padding], and each one's last position.
    rows = np.zeros((size, len(prefix) + longest + len(suffix)), np.int32)
    for row, ids, length in zip(rows, batch["ids"], lengths, strict=True):
        turn = np.concatenate([prefix, ids[:length], suffix])
        row[: len(turn)] = turn
    last = (len(prefix) + lengths + len(suffix) - 1).astype(np.int32)
    return batch | {"text": rows, "last": last, "prefix": prefix, "suffix": suffix}


# ------------------------------------------------------------------------------------- our own side


def state(folder: Path, batch: dict[str, np.ndarray], config: recipe.Config) -> tuple:
    """Mesh, (trained arrays, optimizer state, frozen rest), and the batch as train.py has it."""
    mesh = sharding.make_mesh(len(batch["ids"]), devices=jax.devices()[:1])
    diva = sharding.shard_params(connector.load(folder), mesh)
    template = teacher_responses.make_template(batch["prefix"], batch["suffix"])
    arrays = data.Batch(
        transcript=batch["ids"],
        lengths=batch["lengths"],
        weights=batch["weights"],
        audio=batch["audio"],
    )
    return mesh, train.place_state(config, diva, template, mesh), arrays


def gradient(folder: Path, batch: dict[str, np.ndarray], config: recipe.Config) -> Callable:
    """The two losses, and their weighted sum's gradient by the tensors' published names."""
    _, (params, _, frozen), batch = state(folder, batch, config)

    def work():
        of_loss = jax.jit(jax.grad(train.loss_fn, has_aux=True), static_argnums=3)
        grads, (metrics, _) = of_loss(params, frozen, batch, recipe.recipe_of(config))
        named = {}
        for leaf, names, stacked in weights.names_of(connector.to_published(grads.connector)):
            named |= {n: np.asarray(leaf[i] if stacked else leaf) for i, n in enumerate(names)}
        return [float(metrics[name]) for name in ("alignment", "response")], named

    return work


def training(folder: Path, batch: dict[str, np.ndarray], config: recipe.Config) -> Callable:
    """A step of training, always on `batch`, as train.py's loop does it; returns the two losses."""
    mesh, (params, opt_state, frozen), batch = state(folder, batch, config)
    step, on_devices = 0, sharding.shard_host_batch(batch, mesh)
    inputs = (params, opt_state, frozen), on_devices
    compiled, *_ = train.compile_step(config, [mesh], math.inf, lambda _: inputs)

    def work():
        nonlocal params, opt_state, step
        on_devices = sharding.shard_host_batch(batch, mesh)
        params, opt_state, metrics = compiled(params, opt_state, frozen, on_devices, np.int32(step))
        step += 1
        return [float(metrics[name]) for name in ("alignment", "response")]

    return work


# ---------------------------------------------------------------------------------- side by side


def agreement(
    folder: Path, batch: dict[str, np.ndarray], config: recipe.Config
) -> dict[str, float]:
    """Relative differences of ours and theirs: the larger loss's, the worst tensor's gradient's.

    Raises AssertionError above AGREE.
    """
    from benchmarks import peer  # torch: imported where it is used, so that the table needs none

    makers = {"ours": (gradient,), "theirs": (peer.gradient,)}
    makers = {name: (*maker, folder, batch, config) for name, maker in makers.items()}
    with side_by_side.sides(makers) as made:
        (ours, our_grads), (theirs, their_grads) = (side.run() for side in made.values())
    assert our_grads.keys() == their_grads.keys(), our_grads.keys() ^ their_grads.keys()

    def apart(a: Any, b: Any) -> float:
        return float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b))

    found = {
        "tensors": len(our_grads),
        "losses": max(apart(a, b) for a, b in zip(ours, theirs, strict=True)),
        "gradients": max(apart(our_grads[name], their_grads[name]) for name in our_grads),
    }
    assert max(found["losses"], found["gradients"]) <= AGREE, found
    return found


def flops(folder: Path, queries: int, batch: dict[str, np.ndarray]) -> float:
    """Of one step, by hand."""
    asr, (_, llm) = connector.encoder_config(folder), connector.references(folder)
    size, text = batch["ids"].shape
    given = asr, cost.sizes_of(llama.LlamaConfig, llm), queries, len(batch["suffix"]), text
    return size * sum(cost.flops(*given, before=len(batch["prefix"])).values())


def measure(
    models: str, preset: str, folder: Path, size: int, turn: tuple[list[int], list[int]]
) -> dict:
    """Agreement, seconds and memory of all sides."""
    from benchmarks import peer

    config = dataclasses.replace(recipe.PRESETS[preset], batch_size=size)
    batch = make_batch(folder, size, turn)
    queries = files.read_json(folder / "config.json")["queries"]
    row: dict[str, Any] = {"models": models, "batch": size, "queries": queries}
    row["agreement"] = agreement(folder, batch, config)
    row["flops"] = flops(folder, queries, batch)
    makers = {
        "here": (training, folder, batch, config),
        "eager": (peer.training, folder, batch, config, False),
        "compiled": (peer.training, folder, batch, config, True),
    }
    with side_by_side.sides(makers | {"products": (side_by_side.products,)}) as made:
        seconds = side_by_side.take_turns(made, RUNS[models])
        peaks = {name: side_by_side.peak(made[name]) for name in makers}
        losses = {name: made[name].run() for name in makers}
    row["rate"] = side_by_side.rate(seconds["products"])
    for name in makers:
        row[name] = {
            "seconds": median(seconds[name]),
            "ratio": side_by_side.faster(seconds["here"], seconds[name]),
            "peak": peaks[name],
            "memory_ratio": peaks["here"] / peaks[name],
            "losses": losses[name],  # after as many steps on the same batch
        }
    return row


def table(measured: dict[str, Any]) -> str:
    """README's table."""
    lines = [
        "| models, batch, queries | | step, ms | share of products' rate | here is faster "
        "| peak memory, MiB | here / it |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    names = {"here": "here", "eager": "PyTorch, eager", "compiled": "PyTorch, torch.compile"}
    for row in measured["rows"]:
        models = f"{row['models']}, {row['batch']}, {row['queries']}"
        for name, shown in names.items():
            side = row[name]
            ours = name == "here"
            cells = [
                models if ours else "",
                shown,
                f"{1e3 * side['seconds']:.0f}",
                f"{row['flops'] / side['seconds'] / row['rate']:.2f}",
                "" if ours else f"{side['ratio']:.2f}",
                f"{side['peak'] / side_by_side.MIB:,.0f}",
                "" if ours else f"{side['memory_ratio']:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = []
    toy = tuple(map(tuple, llama.Chat.load(ROOT / "toy" / "llama").wrap()))
    rows.append(measure("the toy's", "toy", ROOT / "toy" / "diva", 16, toy))
    with tempfile.TemporaryDirectory() as name:
        sizes.write(Path(name), sizes.WHISPER_TINY, sizes.LLAMA_60M)
        turn, folder = ([5] * cost.PREFIX, [6] * cost.SUFFIX), Path(name) / "diva"
        rows.append(measure("Whisper-tiny, 60 M LLM", "diva-1b", folder, 4, turn))
    machine = side_by_side.machine("jax", "torch", "transformers")
    side_by_side.keep(FILE, {"machine": machine, "rows": rows}, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
