"""What compiling takes: `python -m benchmarks.compiling` (about two minutes on 2 cores).

Traces, lowers and compiles train.py's step for the CPU, from shapes alone: of the toy, and of
diva-8b; each as it is and with every stack of layers twice and four times as deep. A layer is
compiled once, whatever their number: neither the time nor the program grows. Prints README's table;
benchmarks/compiling.json keeps it.
"""

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

import llama
import train
import whisper
from benchmarks import side_by_side
from runtime import cost, sharding

FILE = Path(__file__).with_suffix(".json")
RUNS = 3
DEPTHS = (1, 2, 4)


def deeper(sizes: Any, times: int) -> Any:
    """`sizes` with all its stacks of layers `times` as deep."""
    stacks = [f.name for f in dataclasses.fields(sizes) if f.name.endswith("_layers")]
    return dataclasses.replace(sizes, **{name: times * getattr(sizes, name) for name in stacks})


def lower(preset: str, times: int) -> Any:
    """The step, traced and lowered for one device of this machine."""
    config = dataclasses.replace(train.PRESETS[preset], batch_size=8, dtype="float32")
    asr = deeper(cost.sizes_of(whisper.WhisperConfig, config.whisper), times)
    llm = deeper(cost.sizes_of(llama.LlamaConfig, config.llm), times)
    mesh = sharding.make_mesh(config.batch_size, devices=jax.devices()[:1])
    state = train.abstract_state(config, asr, llm, mesh)
    length = min(cost.TEXT, config.queries or asr.max_target_positions)
    batch = train.abstract_batch(config, asr.window_samples, length, mesh)
    recipe = train.recipe_of(config)
    return train.train_step.lower(*state, batch, np.int32(0), recipe=recipe, mesh=mesh)


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
        config = train.PRESETS[preset]
        asr = deeper(cost.sizes_of(whisper.WhisperConfig, config.whisper), times)
        llm = deeper(cost.sizes_of(llama.LlamaConfig, config.llm), times)
        layers = f"{asr.encoder_layers}, {asr.decoder_layers}, {llm.num_hidden_layers}"
        figures = {name: median(run[name] for run in runs) for name in runs[0]}
        rows.append({"preset": preset, "times": times, "layers": layers, **figures})
    side_by_side.keep(FILE, {"machine": side_by_side.machine("jax"), "rows": rows}, table)


if __name__ == "__main__":
    main()
