"""What compiling takes: `python -m benchmarks.compiling` (about two minutes on 2 cores).

Traces, lowers and compiles train.py's step for the CPU, from shapes alone: of the toy, and of
diva-8b; each as it is and with every stack of layers twice and four times as deep. A layer is
compiled once, whatever their number: neither the time nor the program grows. Prints README's table;
runs/benchmarks/compiling.json keeps it.
"""

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import tyro

import llama
import train
import whisper
from benchmarks import side_by_side
from runtime import sharding
from training import cost, recipe

FILE = Path(__file__).with_suffix(".json")
RUNS = 3
DEPTHS = (1, 2, 4)


def deeper(preset: str, times: int) -> tuple:
    """Configuration, Whisper and Llama of a preset, with all stacks of layers `times` as deep."""
    config = dataclasses.replace(recipe.PRESETS[preset], batch_size=8, dtype="float32")

    def sizes(kind: type, model: str) -> Any:
        of = cost.sizes_of(kind, model)
        stacks = [f.name for f in dataclasses.fields(of) if f.name.endswith("_layers")]
        return dataclasses.replace(of, **{name: times * getattr(of, name) for name in stacks})

    asr, llm = sizes(whisper.WhisperConfig, config.whisper), sizes(llama.LlamaConfig, config.llm)
    return config, asr, llm


def lower(preset: str, times: int) -> Any:
    """The step, traced and lowered for one device of this machine."""
    config, asr, llm = deeper(preset, times)
    mesh = sharding.make_mesh(config.batch_size, devices=jax.devices()[:1])
    state, batch = train.abstract_inputs(config, mesh, asr=asr, llm=llm)
    static = {"recipe": recipe.recipe_of(config), "mesh": mesh}
    return train.train_step.lower(*state, batch, np.int32(0), **static)


def compiled(preset: str, times: int) -> dict[str, float]:
    """Seconds to trace and lower, seconds to compile, and lines of the program before it is."""
    jax.clear_caches()
    began = time.perf_counter()
    lowered = lower(preset, times)
    traced = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    lines = len(lowered.as_text().splitlines())
    return {"trace": traced - began, "compile": done - traced, "lines": lines}


def table(measured: dict[str, Any]) -> str:
    """README's table."""
    lines = [
        "| step | layers of encoder, connector, LLM | trace, s | compile, s | lines of StableHLO |",
        "|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| `{row['preset']}` | {row['layers']} | {row['trace']:.1f} | {row['compile']:.1f} "
        f"| {row['lines']:,} |"
        for row in measured["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    found: dict[tuple[str, int], list] = {}
    for _ in range(RUNS):
        for preset in ("toy", "diva-8b"):
            for times in DEPTHS:
                found.setdefault((preset, times), []).append(compiled(preset, times))
    rows = []
    for (preset, times), runs in found.items():
        _, asr, llm = deeper(preset, times)
        layers = f"{asr.encoder_layers}, {asr.decoder_layers}, {llm.num_hidden_layers}"
        figures = {name: median(run[name] for run in runs) for name in runs[0]}
        rows.append({"preset": preset, "times": times, "layers": layers, **figures})
    side_by_side.keep(FILE, {"machine": side_by_side.machine("jax"), "rows": rows}, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
