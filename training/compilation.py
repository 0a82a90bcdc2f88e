"""Compiling: the step made for chips that are here, or for a slice of TPUs that is not.

    compile_first_that_fits(lower, ...)    -> the compiled step, on the first mesh it fits
    for_slice(...)     -> the same step for a slice of TPUs, from shapes alone
    report(...)        -> what that takes: memory, collectives, FLOPs, time

`python train.py --preset diva-8b --compile-only v4:4x4x8` prints the report of the last on any
machine with the `tpu` extra, without one TPU at hand.

Reads: hlo.py, cost.py, sharding.py, whisper.py, llama.py, connector.py.   Read next: record.py.
"""

import functools
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

import connector
import llama
import whisper
from runtime import sharding
from training import cost
from training.hlo import Program

# Of XLA's compilers, by platform. Without this v4 awaits each gather where it starts; see LOG.md.
OPTIONS = {"tpu": {"xla_enable_async_all_gather": True}}

# ---------------------------------------------------------------------------- as little as fits


def micro_batch_size(config: Any, mesh: Mesh) -> int | None:
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


def compile_first_that_fits(
    lower: Callable[[sharding.Remat, Mesh], Any],
    config: Any,
    grids: list[Mesh],
    room: float,
    inputs: Callable[[Mesh], Any],
) -> tuple[Any, sharding.Remat, Mesh]:
    """The compiled step, what its backward pass recomputes, and its grid: the first that fits of

        attention, frozen weights whole on each device; split over 2, ... over all
        layers, frozen weights whole on each device; split over 2, ... over all

    Traffic goes on beside products, but work adds to work: layers done twice are a third more.

    Args:
        lower: the step, lowered with what shall be recomputed, for a grid.
        config: its batch_size, micro_batch and remat are asked for.
        grids: from which to choose, least traffic first.
        room: bytes of memory of one device.
        inputs: what the step is given on a grid: (trained, optimizer, frozen), batch.

    Raises ValueError if none fits.
    """
    ways = ("attention", "layers") if config.remat == "auto" else (config.remat,)
    for remat in ways:
        beside = 0.0  # what the step takes beside its arguments: on every grid nearly the same
        for mesh in grids:
            fixed = bytes_held(held := inputs(mesh))
            last = remat == ways[-1] and mesh is grids[-1]
            if fixed + beside > room and not last:
                continue
            compiled, needed = _try(lower(remat, mesh), mesh.devices.flat[0].platform)
            if compiled is not None and needed <= room:
                return compiled, remat, mesh
            beside = needed - fixed if needed < math.inf else 0.0
    raise ValueError(_too_large(config, mesh, remat, room, needed, held))


def _try(lowered: Any, platform: str) -> tuple[Any, float]:
    """The compiled program, if it could be, and the bytes that it takes of each device."""
    try:
        compiled = lowered.compile(OPTIONS.get(platform))
    except jax.errors.JaxRuntimeError as error:  # TPUs refuse what they cannot hold
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"(?:Used |temporaries \()([\d.]+)G", str(error))
        return None, float(used[1]) * cost.GIB if used else math.inf
    return compiled, float(bytes_needed(compiled.memory_analysis()))


def _too_large(
    config: Any, mesh: Mesh, remat: sharding.Remat, room: float, needed: float, held: Any
) -> str:
    """What is said where nothing fits, of the way that needs least."""
    clips = config.batch_size // mesh.size
    size = micro_batch_size(config, mesh) or clips
    # All but the arguments grows with the clips; sums of gradients are kept beside those of a part.
    fixed, sums = bytes_held(held), 2 * bytes_held(held[0][0])
    most = size * (room - fixed - sums) / (needed - fixed)
    fitting = max((n for n in range(1, size) if clips % n == 0 and n <= most), default=0)
    advice = f"--micro-batch {fitting} might fit, or more devices"
    wanted = cost.gib(needed) if needed < math.inf else "more"
    return (
        f"the step needs {wanted} on each device, which holds {cost.gib(room)} "
        f"({size} clips at once on each of {mesh.size}, recomputing {remat}). Expected it to "
        "fit: "
        + (advice if fitting else "take more devices or a smaller preset")
        + ("; so might --remat layers." if remat == "attention" else ".")
    )


def bytes_held(tree: Any) -> int:
    """Of one device, for arrays or shapes that have their places."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def frozen_on(mesh: Mesh) -> str:
    """Where the frozen weights are, for people."""
    parts = mesh.shape["fsdp"]
    return f"split over {parts}" if parts > 1 else f"whole on each of {mesh.size} devices"


def summary(compiled: Any, remat: sharding.Remat, flops: float, mesh: Mesh) -> str:
    """What a step takes that was compiled for the devices here: a line for the log."""
    held = cost.gib(bytes_needed(compiled.memory_analysis()))
    where = f", frozen weights {frozen_on(mesh)}" if mesh.size > 1 else ""
    return (
        f"{flops / cost.TERA:.3g} TFLOP, {held} on each of {mesh.size} devices{where}, "
        f"backward recomputes {remat}"
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
    whole = sum(c.bytes for c in program.collectives.values())
    # At least: what is gathered and what is kept for the backward pass, written and read once each.
    moved = 2 * (whole + program.memory.temp_size_in_bytes)
    bounds = {
        "products": program.flops / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": program.sent / chip.links,
    }
    roof = max(bounds.values())
    return bounds, roof, max(roof, bounds["products"] / cost.SHARE)


def with_traffic(program: Program, chip: cost.Chip) -> tuple[float, float]:
    """Seconds of one step at 100 % of peak where no traffic goes on beside products; and where that
    does which the schedule puts there."""
    bounds = step_times(program, chip)[0]
    alone = max(bounds["products"], bounds["memory"]) + bounds["links"]
    return alone, alone - program.hidden(chip.flops, chip.links)


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
    return "\n".join([*lines, "", *_times(program, chip, clips, steps)])


def _times(program: Program, chip: cost.Chip, clips: int, steps: int) -> list[str]:
    """The report's part on time."""
    bounds, roof, fair = step_times(program, chip)
    lines = [f"{'time of one step, at least':34}{'s':>12}"]
    lines += [f"  {name:32}{seconds:12.3f}" for name, seconds in bounds.items()]
    for share, seconds in ((1, roof), (cost.SHARE, fair)):
        lines += [
            f"  {f'at {100 * share:.0f} % of peak':32}{seconds:12.3f}   {steps} steps in "
            f"{steps * seconds / 60:.0f} min, {clips / seconds:.0f} clips/s"
        ]
    alone, scheduled = with_traffic(program, chip)
    return [
        *lines,
        f"  {'no traffic beside products':32}{alone:12.3f}",
        f"  {'traffic as it is scheduled':32}{scheduled:12.3f}   "
        f"{alone - scheduled:.3f} s of links beside products",
    ]


class SliceProgram(NamedTuple):
    """The step as it would run on a slice of TPUs."""

    devices: list[jax.Device]
    mesh: Mesh
    remat: sharding.Remat
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
    grids = sharding.candidate_meshes(config.batch_size, config.fsdp, devices)
    asr = connector.with_window(cost.sizes_of(whisper.WhisperConfig, config.whisper), config.window)
    llm = cost.sizes_of(llama.LlamaConfig, config.llm)
    inputs = functools.partial(abstract_inputs, config, asr=asr, llm=llm)
    room = cost.CHIPS[devices[0].device_kind].memory
    print(f"compiling for {config.compile_only}: this takes minutes", flush=True)
    began = time.perf_counter()
    compiled, remat, mesh = compile_step(config, grids, room, inputs)
    seconds = time.perf_counter() - began
    batch = inputs(mesh)[1]
    queries = config.queries or asr.max_target_positions
    text = batch.transcript.shape[1]
    answer = batch.response.shape[1] if batch.response is not None else 0
    parts, short = (
        cost.flops(asr, llm, queries, cost.SUFFIX, length, answer, cost.PREFIX)
        for length in (text, min(cost.MEAN_TEXT, text))
    )
    padding = parts["teacher"] - short["teacher"]
    program = Program(compiled, len(devices))
    return SliceProgram(devices, mesh, remat, seconds, program, parts, padding)


def slice_report(config: Any, found: SliceProgram) -> str:
    """What the step would take on the slice of TPUs that `--compile-only` names."""
    kind, mesh = found.devices[0].device_kind, found.mesh
    grid = " x ".join(f"{n} {axis}" for axis, n in mesh.shape.items())
    return (
        f"{config.preset} on {config.compile_only}: {mesh.size} x {kind}, mesh {grid}, "
        f"{config.batch_size} clips\n"
        f"frozen weights {frozen_on(mesh)}, backward recomputes {found.remat}; "
        f"compiled in {found.seconds:.0f} s\n\n"
        + report(
            *(found.program, found.parts, found.padding),
            *(cost.CHIPS[kind], config.batch_size, config.steps),
        )
    )
