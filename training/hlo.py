"""HLO: what a compiled step really does, read from the program's text.

    Program(compiled)   -> FLOPs, collectives, memory of one chip

A program is a list of computations, and a computation a list of lines, each an operation:

    %name = shape kind(operands), attributes

TPUs write every product as a convolution. A program for a TPU is scheduled: its lines are in the
order in which a chip starts them. What it sends goes on beside what stands between a line of a
kind -start and its -done, or in one fusion with it; all else waits. Of some the two are fusions,
called async-collective-start and -done, and fusions between them take it a part further.

Reads: nothing of ours.   Read next: compiling.py.
"""

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective of one step, on one chip."""

    count: int = 0
    bytes: float = 0.0  # of the whole arrays that come out (reduce-scatter: that go in)
    travel: float = 0.0  # of them that reach a chip through its links

    def __add__(self, other: "Collective") -> "Collective":
        return Collective(
            self.count + other.count, self.bytes + other.bytes, self.travel + other.travel
        )


# Bytes through a chip's links for each byte of the whole array, when n chips take part.
TRAVEL = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,  # a reduce-scatter and an all-gather
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_BITS = {"pred": 8, "f8": 8, "bf16": 16, "f16": 16}
_SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+)\w*\[([\d,]*)\]")
_OP = re.compile(r"%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)")


class Program:
    """A compiled step: what one chip computes, sends and holds.

    XLA's own cost analysis counts the body of a loop once, however often it runs; here each
    computation counts as often as its callers do, and a loop's as often as it turns.
    """

    def __init__(self, compiled: Any, chips: int):
        self.chips = chips
        self.memory = compiled.memory_analysis()
        self.counted_once = (compiled.cost_analysis() or {}).get("flops", 0.0)
        text = compiled.as_text()
        self.computations, entry = _computations(text)
        ops = [op for lines in self.computations.values() for op in lines]
        self.shapes = {name: shape for name, shape, *_ in ops}
        self.flops, self.collectives = 0.0, defaultdict(Collective)
        self.beside: list[tuple[int, float, float]] = []  # times, bytes that travel, FLOPs
        self._walk(entry, 1)

    def _walk(self, name: str, times: int) -> None:
        going: dict[str, list[float]] = {}  # collectives that were started and are not yet done
        for op, shape, kind, operands, rest in self.computations[name]:
            flops, sent = self.flops, self.sent
            begins = kind.endswith("-start") or op.startswith("async-collective-start")
            ends = kind.endswith("-done") or op.startswith("async-collective-done")
            if kind in ("convolution", "dot"):
                count = _convolution if kind == "convolution" else _dot
                self.flops += times * count(shape, *self._shapes(operands), rest)
            base = kind.removesuffix("-start")
            if base in TRAVEL and not name.startswith("async_collective_fusion"):
                # what is summed and cut at once, each chip its own part, travels half as far
                base = "reduce-scatter" if name.startswith("all-reduce-scatter") else base
                self.collectives[base] += self._collective(base, kind, shape, operands, rest, times)
            turns = self._turns(rest) if kind == "while" else 1
            inside = [] if ends else re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", rest)
            for called in inside:
                self._walk(called, times * turns)
            flops, sent = (self.flops - flops) / times, (self.sent - sent) / times
            for travel_and_flops in going.values():
                travel_and_flops[1] += flops / len(going)  # those that go on share the time
            if begins and sent:
                going[op] = [sent, 0.0]
            elif ends:
                named = [op.replace("-done", "-start")] if kind == "fusion" else _names(operands)
                for begun in named:
                    self._hide(times, *going.pop(begun, (0.0, 0.0)))
            elif kind == "fusion":  # one that computes while it sends
                self._hide(times, sent, flops)

    def _hide(self, times: int, travel: float, flops: float) -> None:
        if travel and flops:
            self.beside.append((times, travel, flops))

    @property
    def sent(self) -> float:
        """Bytes that reach a chip through its links."""
        return sum((c.travel for c in self.collectives.values()), 0.0)

    def hidden(self, flops: float, links: float) -> float:
        """Seconds of the traffic that go on beside products, by the order in which the program
        starts and awaits what it sends; at `flops` and bytes through `links` a second."""
        each = (times * min(sent / links, work / flops) for times, sent, work in self.beside)
        return sum(each, 0.0)

    def _shapes(self, operands: str) -> list[str]:
        return [self.shapes[name] for name in _names(operands)]

    def _turns(self, rest: str) -> int:
        """How often a loop runs: written beside it, or the constant that its condition compares, by
        what each turn adds to the counter."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
            return int(known[1])
        condition, body = (
            self.computations[re.search(rf"{part}=%?([\w.\-]+)", rest)[1]]
            for part in ("condition", "body")
        )
        ends = [op for _, _, kind, op, _ in condition if kind == "constant" and op.isdigit()]
        return math.ceil(max(map(int, ends), default=1) / _step(condition, body))

    def _collective(self, base: str, kind: str, shape: str, operands: str, rest: str, times: int):
        arrays, given = _arrays(shape), self._shapes(operands)
        if base == "reduce-scatter":
            arrays = _arrays(" ".join(given))
        elif kind in ("all-gather-start", "collective-permute-start"):  # operands, results, rest
            arrays = arrays[len(given) : 2 * len(given)]
        size = sum(math.prod(dims) * bits / 8 for bits, dims in arrays)
        travel = size * TRAVEL[base](_group(rest, self.chips))
        return Collective(times, times * size, times * travel)


def _names(operands: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operands)


def _computations(text: str) -> tuple[dict[str, list[tuple]], str]:
    """{computation: [(name, shape, kind, operands, rest of the line)]}, and the entry's name."""
    result, entry, current = {}, "", []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            result[head[2]] = current = []
            entry = head[2] if head[1] else entry
        elif op := _OP.search(re.sub(r"\{[\d,]*:[^{}]*\}|/\*.*?\*/", "", line)):  # no tiling
            current.append(op.groups())
    return result, entry


def _step(condition: list[tuple], body: list[tuple]) -> int:
    """What a loop adds to its counter in each turn: 2 where the compiler has cut a product into the
    pieces of a sum over chips, and does two of them in one turn."""
    places = [rest for _, _, kind, _, rest in condition if kind == "get-tuple-element"]
    if not places or body[-1][2] != "tuple":
        return 1
    given = {name: (kind, re.findall(r"[\w.\-]+", operands)) for name, _, kind, operands, _ in body}
    results = given[body[-1][0]][1]
    kind, added = given[results[int(re.search(r"index=(\d+)", places[0])[1])]]
    numbers = [given[name][1][0] for name in added if given.get(name, "?")[0] == "constant"]
    return int(numbers[0]) if kind == "add" and numbers else 1


def _arrays(shape: str) -> list[tuple[int, list[int]]]:
    """(bits of an element, dimensions) of every array in a printed shape."""
    result = []
    for kind, dims in _SHAPE.findall(shape):
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind))
        result.append((bits, [int(n) for n in dims.split(",") if n]))
    return result


def _group(rest: str, chips: int) -> int:
    """How many chips take part in a collective, from any of HLO's ways to write its groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if shaped := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(shaped[2])
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)(?:'?:\(\d+\)(\d+))?", named[2])  # x:(2)4 is a part of x, of 4
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return chips


def _dot(out: str, left: str, right: str, rest: str) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
    sizes = _arrays(left)[0][1]
    inner = math.prod(sizes[int(axis)] for axis in contracted.split(",") if axis)
    return 2.0 * math.prod(_arrays(out)[0][1]) * inner


def _convolution(out: str, left: str, right: str, rest: str) -> float:
    """Multiply-adds that meet a real element: TPUs write every product as a convolution, and batch
    axes as spatial ones that are dilated so far that only one of many positions counts."""
    (_, out), (_, left), (_, right) = (_arrays(shape)[0] for shape in (out, left, right))
    of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", "".join(re.findall(r"window=\{(.*?)\}", rest))))
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]

    def setting(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    for axis in range(len(of_out) - 2):
        label = str(axis)
        stride, spread, step = (
            int(setting(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(setting("pad", axis, "0_0").split("_")[0])
        places = np.arange(out[of_out.index(label)])[:, None] * stride - low
        places = places + np.arange(right[of_right.index(label)]) * step
        end = (left[of_left.index(label)] - 1) * spread
        total *= ((places >= 0) & (places <= end) & (places % spread == 0)).sum()
    return float(total)
