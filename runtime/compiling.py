"""Compiling: the step made for chips that are here, or for a slice of TPUs that is not.

    fit(lower, ...)     -> the compiled step that recomputes as little as fits into memory
    Program(compiled)   -> what it really does: FLOPs, collectives, memory
    for_slice(...)      -> the same step for a slice of TPUs, from shapes alone

`python train.py --preset diva-8b --compile-only v4:4x4x8` prints the report of the last on any
machine with the `tpu` extra, without one TPU at hand.

Reads: cost.py, sharding.py, whisper.py, llama.py, connector.py.   Read next: record.py.
"""

import dataclasses
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

import connector
import llama
import whisper
from runtime import cost, sharding

# ---------------------------------------------------------------------------- as little as fits


def at_once(config: Any, mesh: Mesh) -> int | None:
    """Clips that each device takes at a time; None if that is all of them. Raises ValueError."""
    clips, size = config.batch_size // mesh.size, config.micro_batch
    if size is None or size >= clips:
        return None
    if clips % size:
        raise ValueError(
            f"--micro-batch {size}: expected a divisor of the {clips} clips of each device "
            f"(--batch-size {config.batch_size} on {mesh.size})."
        )
    return size


def fit(
    lower: Callable[[sharding.Recompute], Any], config: Any, mesh: Mesh, room: float, held: Any
) -> tuple[Any, sharding.Recompute]:
    """The compiled step, and what its backward pass recomputes: as little as fits.

    Args:
        lower: the step, lowered with what shall be recomputed.
        config: its batch_size, micro_batch and recompute are asked for.
        room: bytes of memory of one device.
        held: arrays or shapes that the step is given: (trained, optimizer, frozen), batch.

    Raises ValueError if it does not fit.
    """
    ways = ("attention", "layers") if config.recompute == "auto" else (config.recompute,)
    for recompute in ways:
        try:
            compiled = lower(recompute).compile()
        except jax.errors.JaxRuntimeError as error:  # TPUs refuse what they cannot hold
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"(?:Used |temporaries \()([\d.]+)G", str(error))
            needed = float(used[1]) * cost.GIB if used else math.inf
        else:
            needed = bytes_needed(compiled.memory_analysis())
        if needed <= room:
            return compiled, recompute
    clips = config.batch_size // mesh.size
    size = at_once(config, mesh) or clips
    # All but the arguments grows with the clips; sums of gradients are kept beside those of a part.
    fixed, sums = bytes_held(held), 2 * bytes_held(held[0][0])
    most = size * (room - fixed - sums) / (needed - fixed)
    fitting = max((n for n in range(1, size) if clips % n == 0 and n <= most), default=0)
    advice = f"--micro-batch {fitting} might fit, or more devices"
    wanted = cost.gib(needed) if needed < math.inf else "more"
    raise ValueError(
        f"the step needs {wanted} on each device, which holds {cost.gib(room)} "
        f"({size} clips at once on each of {mesh.size}, recomputing {recompute}). Expected it to "
        "fit: "
        + (advice if fitting else "take more devices or a smaller preset")
        + ("; so might --recompute layers." if recompute == "attention" else ".")
    )


def bytes_held(tree: Any) -> int:
    """Of one device, for arrays or shapes that have their places."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def summary(compiled: Any, recompute: sharding.Recompute, flops: float, mesh: Mesh) -> str:
    """What a step takes that was compiled for the devices here: a line for the log."""
    held = cost.gib(bytes_needed(compiled.memory_analysis()))
    return (
        f"{flops / cost.TERA:.3g} TFLOP, {held} on each of {mesh.size} devices, "
        f"backward recomputes {recompute}"
    )


# ------------------------------------------------------------------ for a slice that is not here


def slice_of(name: str) -> list[jax.Device]:
    """The devices of a slice of TPUs that need not be here, such as v4:4x4x8, v5p:4x4x4 or v6e:8x8.

    Raises ValueError for a slice that does not exist, or without libtpu.
    """
    # Only the compiler is wanted: neither this machine's own TPU nor the right to be its only user.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    kind, _, axes = name.partition(":")
    alone = not axes.strip("1x")  # one chip; otherwise a host has four
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1) if alone else (2, 2, 1)}
    if kind in ("v4", "v5p"):  # cores of these are two to a chip and work as one device
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except RuntimeError as error:
        raise ValueError(
            f"--compile-only {name}: no such slice ({str(error).splitlines()[0]}). Expected a TPU "
            "and its chips along each axis, such as v4:4x4x8, v5p:4x4x4, v5e:8x8 or v6e:8x8, and "
            "the compiler: pip install '.[tpu]'."
        ) from error
    if found[0].device_kind not in cost.CHIPS:
        raise ValueError(
            f"--compile-only {name}: the memory and speed of a {found[0].device_kind} are not "
            f"known. Expected one of {', '.join(cost.CHIPS)}: add it to CHIPS in cost.py."
        )
    return found


# ------------------------------------------------------------------------- what the compiler made


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
        self.channels: set[str] = set()
        self._walk(entry, 1)

    def _walk(self, name: str, times: int) -> None:
        for _, shape, kind, operands, rest in self.computations[name]:
            if kind in ("convolution", "dot"):
                count = _convolution if kind == "convolution" else _dot
                self.flops += times * count(shape, *self._shapes(operands), rest)
            base = kind.removesuffix("-start")
            if base in TRAVEL and self._is_new(rest):
                self.collectives[base] += self._collective(kind, shape, operands, rest, times)
            turns = self._turns(rest) if kind == "while" else 1
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", rest):
                self._walk(called, times * turns)

    def _is_new(self, rest: str) -> bool:
        """False for another part of a collective that runs beside products, in several parts."""
        channel = re.search(r"channel_id=(\d+)", rest)
        if channel is None or channel[1] in self.channels:
            return channel is None
        self.channels.add(channel[1])
        return True

    def _shapes(self, operands: str) -> list[str]:
        names = re.findall(r"%([\w.\-]+)", operands)
        return [self.shapes[name] for name in names]

    def _turns(self, rest: str) -> int:
        """How often a loop runs: written beside it, or the constant that its condition compares."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", rest)[1]
        ends = [op for _, _, kind, op, _ in self.computations[condition] if kind == "constant"]
        return max((int(end) for end in ends if end.isdigit()), default=1)

    def _collective(self, kind: str, shape: str, operands: str, rest: str, times: int):
        arrays, given = _arrays(shape), self._shapes(operands)
        if kind == "reduce-scatter":
            arrays = _arrays(" ".join(given))
        elif kind in ("all-gather-start", "collective-permute-start"):  # operands, results, rest
            arrays = arrays[len(given) : 2 * len(given)]
        size = sum(math.prod(dims) * bits / 8 for bits, dims in arrays)
        travel = size * TRAVEL[kind.removesuffix("-start")](_group(rest, self.chips))
        return Collective(times, times * size, times * travel)


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


# -------------------------------------------------------------------------------------- the report


def bytes_needed(memory: Any) -> int:
    """What a compiled program holds on one device at its fullest, arguments included."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def step_times(program: Program, chip: cost.Chip) -> tuple[dict[str, float], float, float]:
    """Seconds that one step takes at least for products, memory and links; at 100 % of peak, where
    all three go on at the same time; and at cost.SHARE of it."""
    sent = sum(c.travel for c in program.collectives.values())
    whole = sum(c.bytes for c in program.collectives.values())
    # At least: what is gathered and what is kept for the backward pass, written and read once each.
    moved = 2 * (whole + program.memory.temp_size_in_bytes)
    bounds = {
        "products": program.flops / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sent / chip.links,
    }
    roof = max(bounds.values())
    return bounds, roof, max(roof, bounds["products"] / cost.SHARE)


def report(
    program: Program,
    parts: dict[str, float],
    padding: float,
    chip: cost.Chip,
    clips: int,
    steps: int,
) -> str:
    """What --compile-only prints.

    Args:
        program: the compiled step.
        parts: FLOPs of one clip by hand, from `flops`.
        padding: those of them that are spent on padded text.
        clips: batch size over all chips.
        steps: of the whole run.
    """
    memory, chips = program.memory, program.chips
    by_hand, compiled = sum(parts.values()), program.flops * chips / clips
    once = program.counted_once * chips / clips
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "of these in place of arguments": -memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    lines = ["memory of one chip"]
    lines += [f"  {name:32}{cost.gib(size):>12}" for name, size in sizes.items()]
    lines += [f"  {'in all':32}{cost.gib(bytes_needed(memory)):>12} of {cost.gib(chip.memory)}"]
    lines += ["", f"{'collectives of one step':34}{'count':>8}{'GB whole':>12}{'GB a chip':>12}"]
    for name, c in sorted(program.collectives.items()):
        lines += [f"  {name:32}{c.count:8}{c.bytes / 1e9:12.3f}{c.travel / 1e9:12.3f}"]
    lines += ["", f"{'work on one clip':34}{'TFLOP':>12}"]
    lines += [f"  {name:32}{count / cost.TERA:12.2f}" for name, count in parts.items()]
    lines += [
        f"  {'by hand':32}{by_hand / cost.TERA:12.2f}",
        f"  {'compiled program':32}{compiled / cost.TERA:12.2f}"
        f"   computed twice {1 - by_hand / compiled:.1%}, padded text {padding / compiled:.1%}",
        f"  {'XLA, each loop counted once':32}{once / cost.TERA:12.2f}",
    ]
    bounds, roof, fair = step_times(program, chip)
    lines += ["", f"{'time of one step, at least':34}{'s':>12}"]
    lines += [f"  {name:32}{seconds:12.3f}" for name, seconds in bounds.items()]
    for share, seconds in ((1, roof), (cost.SHARE, fair)):
        lines += [
            f"  {f'at {100 * share:.0f} % of peak':32}{seconds:12.3f}   {steps} steps in "
            f"{steps * seconds / 60:.0f} min, {clips / seconds:.0f} clips/s"
        ]
    return "\n".join(lines)


class SliceProgram(NamedTuple):
    """The step as it would run on a slice of TPUs."""

    devices: list[jax.Device]
    mesh: Mesh
    recompute: sharding.Recompute
    seconds: float  # that compiling took
    program: Program
    parts: dict[str, float]  # FLOPs of one clip, by hand
    padding: float  # those of them that are spent on padded text


def for_slice(config: Any, abstract_inputs: Callable, compile_step: Callable) -> SliceProgram:
    """train.py's step for the slice that its `--compile-only` names, from shapes alone.

    `abstract_inputs` and `compile_step` are train.py's. Raises ValueError.
    """
    jax.config.update("jax_platforms", "cpu")  # where the compiler runs
    devices = slice_of(config.compile_only)
    mesh = sharding.make_mesh(config.batch_size, config.fsdp, devices)
    asr = connector.hearing(cost.sizes_of(whisper.WhisperConfig, config.whisper), config.window)
    llm = cost.sizes_of(llama.LlamaConfig, config.llm)
    state, batch = abstract_inputs(config, asr, llm, mesh)
    room = cost.CHIPS[devices[0].device_kind].memory
    print(f"compiling for {config.compile_only}: this takes minutes", flush=True)
    began = time.perf_counter()
    compiled, recompute = compile_step(config, mesh, room, state, batch)
    seconds = time.perf_counter() - began
    queries, turn = config.queries or asr.max_target_positions, cost.PREFIX + cost.SUFFIX
    text = batch["ids"].shape[1]
    answer = batch["answers"].shape[1] if "answers" in batch else 0
    parts, short = (
        cost.flops(asr, llm, queries, turn, length, answer)
        for length in (text, min(cost.MEAN_TEXT, text))
    )
    padding = parts["teacher"] - short["teacher"]
    program = Program(compiled, len(devices))
    return SliceProgram(devices, mesh, recompute, seconds, program, parts, padding)


def slice_report(config: Any, found: SliceProgram) -> str:
    """What the step would take on the slice of TPUs that `--compile-only` names."""
    kind, mesh = found.devices[0].device_kind, found.mesh
    return (
        f"{config.preset} on {config.compile_only}: {mesh.size} x {kind}, mesh "
        f"{mesh.shape['data']} data x {mesh.shape['fsdp']} fsdp, {config.batch_size} clips\n"
        f"backward recomputes {found.recompute}; compiled in {found.seconds:.0f} s\n\n"
        + report(
            *(found.program, found.parts, found.padding),
            *(cost.CHIPS[kind], config.batch_size, config.steps),
        )
    )
