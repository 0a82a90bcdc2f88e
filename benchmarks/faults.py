"""What a run survives: `python -m benchmarks.faults` (about eight minutes on 2 cores).

Kills `python train.py` (SIGKILL, as a power cut would) at twenty random moments, starting it again
each time, and compares the weights that come out with those of a run that nobody disturbed. Each
restart must go on from the newest checkpoint that is whole. Exits 1 if anything differs.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
KILLS = 20
LONGEST = 20.0  # seconds that a killed process lived, at most: from its first import to its export
FLAGS = "--steps 1500 --save-every 10 --log-every 50 --tasks None".split()


def start(out: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "train.py", "--out", str(out), *FLAGS],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest(out: Path) -> int:
    """The step of the newest checkpoint that is whole: Orbax names it so only then."""
    steps = [int(folder.name) for folder in out.glob("checkpoints/*") if folder.name.isdigit()]
    return max(steps, default=0)


def check(output: str, before: int, round_: int) -> None:
    """Did the process go on where it should? (It may have died before it could say so.)"""
    said = re.search(r"resuming .* at step (\d+)", output)
    started = re.search(r"^step (\d+)/", output, re.MULTILINE)
    if "error" in output or (said and int(said[1]) != before) or (before and started and not said):
        print(output)
        raise SystemExit(f"round {round_}: expected to go on at step {before}")


def main() -> None:
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, cache = (Path(folder) / name for name in ("whole", "killed", "cache"))
        process = start(whole, cache)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(output)
        print(f"{'kill':>4}{'after s':>9}{'from step':>11}{'to checkpoint':>15}", flush=True)
        for number in range(1, KILLS + 1):
            before, delay = newest(killed), moments.uniform(0, LONGEST)
            process = start(killed, cache)
            time.sleep(delay)
            process.kill()
            output, _ = process.communicate()
            check(output, before, number)
            print(f"{number:4}{delay:9.1f}{before:11}{newest(killed):15}", flush=True)
        before = newest(killed)
        process = start(killed, cache)
        output, _ = process.communicate()
        check(output, before, KILLS + 1)
        if process.returncode:
            raise SystemExit(output)
        one, other = ((run / "model.safetensors").read_bytes() for run in (whole, killed))
        same = one == other
        rows = (killed / "metrics.jsonl").read_text().count("\n")
    print(f"{KILLS} kills: weights {'bit-identical' if same else 'DIFFER'}, {rows} rows of metrics")
    sys.exit(not same)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
