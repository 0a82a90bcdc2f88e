"""What a step takes on TPUs: `python -m benchmarks.slices` (some fifty minutes on a core).

Compiles the published recipe and a cheaper one for slices of TPUs, without one (pip install
'.[tpu]'), and prints the two tables of training/README.md. What was measured is kept in
runs/benchmarks/slices.json.
"""

from pathlib import Path

import tyro

import train
from benchmarks import side_by_side
from training import compilation, cost, recipe

FILE = Path(__file__).with_suffix(".json")
SLICES = [
    ("diva-8b", "v4:4x4x8"),
    ("diva-8b", "v5p:4x4x4"),
    ("diva-8b", "v5e:8x8"),
    ("diva-8b", "v6e:8x8"),
    ("diva-1b", "v5e:4x4"),
]
# As published; and for clips as Common Voice has them, of 5 s and 14 tokens, and at most 64 tokens.
RECIPES = ("", "--queries 64 --window 10")
WANTED = [(*row, flags) for row in SLICES for flags in RECIPES]
# Dollars a chip-hour: training/README.md says where from.
PRICES = {"v4": 3.22, "v5p": 4.20, "v5e": 1.20, "v6e": 2.70}
HEADINGS = (
    "preset | slice | chips | frozen weights | recomputes | memory, GiB a chip | through links, GB "
    "a chip | of its time beside products, % | TFLOP a clip by hand / compiled | step at 40 % of "
    "peak, s | whole run at 100 % / 40 % of peak"
)
COSTS = (
    "preset | slice | recipe | TFLOP a clip by hand / compiled | memory, GiB a chip | "
    "step at 40 % of peak, s | whole run, min | chip-hours | at list price, $"
)


def measure(preset: str, name: str, flags: str) -> dict:
    config = recipe.parse(["--preset", preset, *flags.split(), "--compile-only", name])
    found = train.compile_for(config)
    chip, program = cost.CHIPS[found.devices[0].device_kind], found.program
    bounds, roof, fair = compilation.step_times(program, chip)
    return {
        "preset": preset,
        "slice": name,
        "flags": flags,
        "chips": len(found.devices),
        "fsdp": found.mesh.shape["fsdp"],
        "remat": found.remat,
        "compile_seconds": round(found.seconds),
        "memory": compilation.bytes_needed(program.memory),
        "room": chip.memory,
        "collectives": {k: vars(c) for k, c in program.collectives.items()},
        "flops": sum(found.parts.values()),
        "flops_compiled": program.flops * len(found.devices) / config.batch_size,
        "bounds": bounds,
        "hidden": program.hidden(chip.flops, chip.links),
        "step_seconds": [roof, fair],
        "steps": config.steps,
    }


def flops(row: dict) -> str:
    return f"{row['flops'] / cost.TERA:.1f} / {row['flops_compiled'] / cost.TERA:.1f}"


def programs(rows: list[dict]) -> str:
    """What the compiler made of a recipe, in Markdown."""
    lines = [f"| {HEADINGS} |", "|---|---|--:|---|---|" + "--:|" * 6]
    for row in rows:
        sent = sum(c["travel"] for c in row["collectives"].values())
        whole, part = (row["steps"] * seconds / 60 for seconds in row["step_seconds"])
        cells = [
            f"`{row['preset']}`",
            f"`{row['slice']}`",
            str(row["chips"]),
            f"in {row['fsdp']} parts" if row["fsdp"] > 1 else "whole",
            row["remat"],
            f"{row['memory'] / cost.GIB:.1f} of {row['room'] / cost.GIB:.0f}",
            f"{sent / 1e9:.1f}",
            f"{100 * row['hidden'] / row['bounds']['links']:.0f}",
            flops(row),
            f"{row['step_seconds'][1]:.2f}",
            f"{whole:.0f} / {part:.0f} min",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(rows: list[dict]) -> str:
    """What a run takes of each slice with each recipe, in Markdown."""
    lines = [f"| {COSTS} |", "|---|---|---|" + "--:|" * 6]
    for row in rows:
        hours = row["steps"] * row["step_seconds"][1] / 3600
        spent = row["chips"] * hours
        cells = [
            f"`{row['preset']}`",
            f"`{row['slice']}`",
            f"`{row['flags']}`" if row["flags"] else "published",
            flops(row),
            f"{row['memory'] / cost.GIB:.1f}",
            f"{row['step_seconds'][1]:.2f}",
            f"{60 * hours:.0f}",
            f"{spent:.0f}",
            f"{spent * PRICES[row['slice'].partition(':')[0]]:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Both tables: the published recipe's programs, and what runs cost."""
    return programs([row for row in rows if not row["flags"]]) + "\n\n" + costs(rows)


def main() -> None:
    side_by_side.keep_each(FILE, measure, WANTED, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
