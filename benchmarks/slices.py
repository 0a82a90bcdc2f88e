"""What a step takes on TPUs: `python -m benchmarks.slices` (about fifteen minutes on 2 cores).

Compiles the published recipe for slices of TPUs, without one (pip install '.[tpu]'), and prints
the table of runtime/README.md. What was measured is kept in runs/benchmarks/slices.json.
"""

from pathlib import Path

import tyro

import train
from benchmarks import side_by_side
from runtime import compiling, cost, recipe

FILE = Path(__file__).with_suffix(".json")
SLICES = [
    ("diva-8b", "v4:4x4x8"),
    ("diva-8b", "v5p:4x4x4"),
    ("diva-8b", "v5e:8x8"),
    ("diva-8b", "v6e:8x8"),
    ("diva-1b", "v5e:4x4"),
]
HEADINGS = (
    "preset | slice | chips | frozen weights | recomputes | memory, GiB a chip | through links, GB "
    "a chip | TFLOP a clip by hand / compiled | step at 40 % of peak, s | whole run at 100 % / "
    "40 % of peak | chip-hours at 40 %"
)


def measure(preset: str, name: str) -> dict:
    config = recipe.parse(["--preset", preset, "--compile-only", name])
    found = train.compile_for(config)
    chip, program = cost.CHIPS[found.devices[0].device_kind], found.program
    bounds, roof, fair = compiling.step_times(program, chip)
    return {
        "preset": preset,
        "slice": name,
        "chips": len(found.devices),
        "fsdp": found.mesh.shape["fsdp"],
        "recompute": found.recompute,
        "compile_seconds": round(found.seconds),
        "memory": compiling.bytes_needed(program.memory),
        "room": chip.memory,
        "collectives": {k: vars(c) for k, c in program.collectives.items()},
        "flops": sum(found.parts.values()),
        "flops_compiled": program.flops * len(found.devices) / config.batch_size,
        "bounds": bounds,
        "hidden": program.hidden(chip.flops, chip.links),
        "step_seconds": [roof, fair],
        "steps": config.steps,
    }


def table(rows: list[dict]) -> str:
    """The table, in Markdown."""
    lines = [f"| {HEADINGS} |", "|---|---|--:|---|---|" + "--:|" * 6]
    for row in rows:
        sent = sum(c["travel"] for c in row["collectives"].values())
        whole, part = (row["steps"] * seconds / 60 for seconds in row["step_seconds"])
        cells = [
            f"`{row['preset']}`",
            f"`{row['slice']}`",
            str(row["chips"]),
            f"in {row['fsdp']} parts" if row["fsdp"] > 1 else "whole",
            row["recompute"],
            f"{row['memory'] / cost.GIB:.1f} of {row['room'] / cost.GIB:.0f}",
            f"{sent / 1e9:.1f}",
            f"{row['flops'] / cost.TERA:.1f} / {row['flops_compiled'] / cost.TERA:.1f}",
            f"{row['step_seconds'][1]:.2f}",
            f"{whole:.0f} / {part:.0f} min",
            f"{row['chips'] * part / 60:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    side_by_side.keep_each(FILE, (measure(*row) for row in SLICES), table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
