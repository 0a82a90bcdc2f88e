"""Forward passes beside transformers: `python -m benchmarks.forward` (two minutes on 2 cores).

Needs `pip install '.[parity]'`. Log-mel, Whisper's encoder, and the LLM's prefill (hidden states of
a prompt, and its cache), with random weights in the sizes of Whisper-tiny and a Llama of 60 million
parameters, in float32 on the CPU. The results are compared before anything is timed; the share is
that of a large matrix product's rate, in the same run. Prints README's table;
runs/benchmarks/forward.json keeps it.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import llama
import whisper
from benchmarks import side_by_side, sizes
from training import cost

FILE = Path(__file__).with_suffix(".json")
RUNS = 15
AGREE = 1e-4  # of the largest difference: absolute for log-mel (whose range is 2), else relative
BATCH, PROMPT = 4, 512


def audio() -> np.ndarray:
    """[B, S]: windows of noise."""
    shape = BATCH, sizes.WHISPER_TINY.window_samples
    return 0.1 * np.random.default_rng(0).normal(size=shape).astype(np.float32)


def mel() -> np.ndarray:
    """[B, F, M]"""
    return np.asarray(whisper.log_mel(audio(), sizes.WHISPER_TINY.num_mel_bins))


def embeds() -> np.ndarray:
    """[B, L, E]"""
    shape = BATCH, PROMPT, sizes.LLAMA_60M.hidden_size
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def log_mel(folder: Path) -> Callable[[], np.ndarray]:
    function, clips = jax.jit(whisper.log_mel, static_argnums=1), audio()
    return lambda: np.asarray(function(clips, sizes.WHISPER_TINY.num_mel_bins))


def encoder(folder: Path) -> Callable[[], np.ndarray]:
    model, frames = whisper.Whisper.load(folder / "whisper").encoder, mel()
    function = jax.jit(lambda model, mel: model(mel))
    return lambda: np.asarray(function(model, frames))


def prefill(folder: Path) -> Callable[[], np.ndarray]:
    model, prompt = llama.Llama.load(folder / "llama"), jnp.asarray(embeds())
    lengths = jnp.full(BATCH, PROMPT)
    function = jax.jit(lambda model, *inputs: model.prefill(*inputs, room=0))

    def work():
        hidden, _ = jax.block_until_ready(function(model, prompt, lengths))
        return np.asarray(hidden)

    return work


def measure(name: str, flops: float, makers: dict[str, tuple]) -> dict[str, Any]:
    """How far all sides agree with the first, and their seconds. Raises above AGREE."""
    with side_by_side.sides(makers | {"products": (side_by_side.products,)}) as made:
        results = {side: made[side].run() for side in makers}
        ours, *others = results.values()
        scale = 1.0 if name == "log-mel" else float(np.abs(ours).max())
        apart = max(float(np.abs(ours - other).max()) / scale for other in others)
        assert apart <= AGREE, (name, apart)
        seconds = side_by_side.take_turns(made, RUNS)
    here, rate = seconds.pop("here"), side_by_side.rate(seconds.pop("products"))
    return {
        "name": name,
        "share": flops / median(here) / rate,
        "apart": apart,
        "seconds": median(here),
        "peers": {
            peer: {"seconds": median(theirs), "ratio": side_by_side.faster(here, theirs)}
            for peer, theirs in seconds.items()
        },
    }


def table(measured: dict[str, Any]) -> str:
    """README's table."""
    lines = [
        "| | here, ms | share of products' rate | transformers, ms | here is faster |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in measured["rows"]:
        share = f"{row['share']:.2f}" if row["share"] else ""  # log-mel is no product
        for peer, theirs in row["peers"].items():
            name = f"{row['name']}, {peer}" if len(row["peers"]) > 1 else row["name"]
            lines.append(
                f"| {name} | {1e3 * row['seconds']:.1f} | {share} "
                f"| {1e3 * theirs['seconds']:.1f} | {theirs['ratio']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    from benchmarks import peer  # torch: imported where it is used, so that the table needs none

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes.write(folder, sizes.WHISPER_TINY, sizes.LLAMA_60M)
        sides = {
            "log-mel": {
                "here": (log_mel, folder),
                "in NumPy, as without torch": (peer.log_mel, audio(), False),
                "in torch": (peer.log_mel, audio(), True),
            },
            "encoder": {
                "here": (encoder, folder),
                "transformers": (peer.encoder, folder, mel()),
            },
            "prefill": {
                "here": (prefill, folder),
                "transformers": (peer.prefill, folder, embeds()),
            },
        }
        work = cost.flops(sizes.WHISPER_TINY, sizes.LLAMA_60M, 0, PROMPT, 0)
        flops = {"log-mel": 0, "encoder": work["encoder"], "prefill": work["teacher"]}
        rows = [measure(name, BATCH * flops[name], makers) for name, makers in sides.items()]
    machine = side_by_side.machine("jax", "torch", "transformers")
    side_by_side.keep(FILE, {"machine": machine, "rows": rows}, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
