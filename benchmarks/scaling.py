"""How a step is shared by chips: `python -m benchmarks.scaling` (about ten minutes on 2 cores).

Compiles train.py's step of diva-8b, always with the same 128 clips, for slices of 1, 8, 64 and 128
TPUs, without one (pip install '.[tpu]'), all arrays split over all chips; and reads from each
compiled program what one chip computes, holds and sends. This says nothing of time, only that the
work is divided and not repeated. Prints README's table; runs/benchmarks/scaling.json keeps it.
"""

import math
from pathlib import Path
from typing import Any

import tyro

import train
from benchmarks import side_by_side
from training import compilation, cost, recipe

FILE = Path(__file__).with_suffix(".json")
SLICES = ("v5p:1x1x1", "v5p:2x2x2", "v5p:4x4x4", "v5p:4x4x8")
BATCH = 128


def measure(name: str) -> dict[str, Any]:
    chips = math.prod(int(n) for n in name.partition(":")[2].split("x"))
    # on one chip nothing less fits than recomputing layers: so that is what all of them do
    flags = f"--preset diva-8b --batch-size {BATCH} --remat layers --fsdp {chips}"
    found = train.compile_for(recipe.parse([*flags.split(), "--compile-only", name]))
    program = found.program
    return {
        "slice": name,
        "chips": program.chips,
        "flops": program.flops,
        "memory": compilation.bytes_needed(program.memory),
        "arguments": program.memory.argument_size_in_bytes,
        "sent": program.sent,
        "compile_seconds": round(found.seconds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """README's table."""
    lines = [
        "| slice | chips | TFLOP a chip | of all chips, beside one | HBM a chip, GiB "
        "| of it weights and optimizer | through links, GB a chip |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        share = row["flops"] * row["chips"] / rows[0]["flops"]
        lines.append(
            f"| `{row['slice']}` | {row['chips']} | {row['flops'] / cost.TERA:,.1f} | {share:.3f} "
            f"| {row['memory'] / cost.GIB:.1f} | {row['arguments'] / cost.GIB:.1f} "
            f"| {row['sent'] / 1e9:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    side_by_side.keep_each(FILE, measure, [(name,) for name in SLICES], table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
