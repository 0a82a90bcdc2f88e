"""Two programs that do the same work, timed beside each other.

Each side lives in a process of its own, so that neither shares threads, allocator or memory with
the other; and they take turns, one run each, so that a noisy machine disturbs both. A figure is the
median of the runs, a ratio the median of the ratios of neighbouring runs.

Pinned to one core (`taskset -c 0 python -m ...`) a process is never faster than its core: there its
own CPU seconds are taken, which other work on that core does not add to.
"""

import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

LARGE = 2048  # rows and columns of the matrices whose product sets the machine's rate
MIB = 2.0**20
CLEAR = Path("/proc/self/clear_refs")
_work: Callable[[], Any]  # of a side, in its process
_before = 0  # bytes that the process held when its libraries were loaded, and nothing else


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes that a process holds: RssAnon, RssFile, and as VmRSS both; VmHWM at most so far, or
    since `CLEAR` was written to. Nothing but on Linux."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if name in ("RssAnon", "RssFile", "VmRSS", "VmHWM")
    }


def _make(make: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    global _work, _before
    _before = memory().get("VmRSS", 0)
    _work = make(*arguments)


def _run() -> Any:
    return _work()


def cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _timed() -> float:
    clock = time.process_time if cores() == 1 else time.perf_counter
    start = clock()
    _work()
    return clock() - start


def products() -> Callable[[], jax.Array]:
    """For a side: one large matrix product in float32, which is what a machine does fastest."""
    square, product = jax.random.normal(jax.random.key(0), (LARGE, LARGE)), jax.jit(jnp.matmul)
    return lambda: product(square, square).block_until_ready()


def rate(seconds: list[float]) -> float:
    """FLOP/s of `products`."""
    return 2 * LARGE**3 / median(seconds)


def _peak() -> int:
    """Bytes held at most during one run, above what the libraries hold without any work."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free, and only kept, is no need of the work
    CLEAR.write_text("5")  # VmHWM becomes what is held now
    _work()
    return memory()["VmHWM"] - _before


class Side:
    """A process in which `make(*arguments)` has prepared the work; it idles while others work."""

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.do(_make, make, arguments)

    def do(self, function: Callable, *arguments: Any) -> Any:
        return self.pool.submit(function, *arguments).result()

    def run(self) -> Any:
        """What the work returns."""
        return self.do(_run)


@contextmanager
def sides(makers: dict[str, tuple]) -> Iterator[dict[str, Side]]:
    """{name: Side(*maker)}, one prepared behind the other; their processes end with the block."""
    made: dict[str, Side] = {}
    try:
        for name, maker in makers.items():
            made[name] = Side(*maker)
        yield made
    finally:
        for side in made.values():
            side.pool.shutdown()


@contextmanager
def process() -> Iterator[Side]:
    """A fresh process, with nothing prepared."""
    with sides({"": (dict,)}) as made:
        yield made[""]


def take_turns(made: dict[str, Side], runs: int, warm: int = 2) -> dict[str, list[float]]:
    """{name: seconds of each run}, all sides in turns, behind `warm` runs that are not counted."""
    result: dict[str, list[float]] = {name: [] for name in made}
    for run in range(-warm, runs):
        for name, side in made.items():
            seconds = side.do(_timed)
            if run >= 0:
                result[name].append(seconds)
    return result


def peak(side: Side) -> int:
    """Bytes that one more run of a side needs at most, weights included. Linux only."""
    return side.do(_peak)


def faster(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast `ours` is: the median over neighbouring runs."""
    return median(other / own for other, own in zip(theirs, ours, strict=True))


def machine(*packages: str) -> str:
    """The processor and the versions, for the line below a table."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    many = "1 core" if cores() == 1 else f"{cores()} cores"
    return f"{many} of {names[0] if names else platform.processor()}; {versions}"


def fresh(file: Path) -> Path:
    """Where what is measured is written, in runs/benchmarks. Who takes its table into README copies
    it to `file`, beside the benchmarks: until then README and what it was made of agree."""
    return file.parents[1] / "runs" / "benchmarks" / file.name


def write(file: Path, measured: Any) -> None:
    """Write what was measured, `fresh`."""
    fresh(file).parent.mkdir(parents=True, exist_ok=True)
    fresh(file).write_text(json.dumps(measured, indent=1) + "\n")


def keep(file: Path, measured: dict[str, Any], table: Callable[[dict], str]) -> None:
    """Write what was measured, and print README's table of it and the machine."""
    write(file, measured)
    print(table(measured) + "\n\n" + measured["machine"])


def keep_each(
    file: Path, measure: Callable[..., dict], wanted: list[tuple], table: Callable[[list], str]
) -> None:
    """Measure, write and print one row after another; then print README's table of them. What was
    stopped goes on behind its last row, what was finished begins anew."""
    known = json.loads(fresh(file).read_text()) if fresh(file).is_file() else []
    known = known if len(known) < len(wanted) else []
    for given in wanted[len(known) :]:
        known.append(measure(*given))
        print(json.dumps(known[-1]), flush=True)
        write(file, known)
    print(table(known))
