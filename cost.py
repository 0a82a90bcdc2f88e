"""Cost: what one training step takes. FLOPs by hand, what the compiler made of it, and the chip.

    flops(sizes)        -> products of one clip, part by part, each line beside the layer it counts
    Program(compiled)   -> what the compiled step really does: FLOPs, collectives, memory
    CHIPS               -> peak FLOP/s, memory and links of the chips it may run on

`python train.py --preset diva-8b --compile-only v4:4x4x8` brings the three together on any machine
with the `tpu` extra: XLA compiles for a slice of TPUs from shapes alone, without one TPU at hand.

1 product = 1 multiply-add = 2 FLOPs. Peaks are those of dense bfloat16.

Axes: F mel frames, T encoder positions, Q queries, D width of Whisper, E width of the LLM.
Reads: whisper.py, llama.py, weights.py.   Read next: record.py.
"""

import dataclasses
import math
import os
import re
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

import llama
import weights
import whisper

# ---------------------------------------------------------------------------------------- the chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, by its maker's figures."""

    flops: float  # dense bfloat16, a second
    memory: float  # bytes of HBM
    bandwidth: float  # bytes of HBM a second
    links: float  # bytes a second that all its links to other chips bring in together


GIB, TERA = 2.0**30, 1e12
CHIPS = {  # by jax.Device.device_kind
    "TPU v4": Chip(275 * TERA, 32 * GIB, 1.2 * TERA, 0.3 * TERA),
    "TPU v5 lite": Chip(197 * TERA, 16 * GIB, 0.82 * TERA, 0.2 * TERA),
    "TPU v5": Chip(459 * TERA, 95 * GIB, 2.77 * TERA, 0.6 * TERA),
    "TPU v6 lite": Chip(918 * TERA, 32 * GIB, 1.64 * TERA, 0.4 * TERA),
    "NVIDIA A100-SXM4-40GB": Chip(312 * TERA, 40 * GIB, 1.56 * TERA, 0.3 * TERA),
    "NVIDIA A100-SXM4-80GB": Chip(312 * TERA, 80 * GIB, 2.04 * TERA, 0.3 * TERA),
    "NVIDIA H100 80GB HBM3": Chip(989 * TERA, 80 * GIB, 3.35 * TERA, 0.45 * TERA),
    "NVIDIA H200": Chip(989 * TERA, 141e9, 4.8 * TERA, 0.45 * TERA),
}
SHARE = 0.4  # of peak: what a well-fed transformer of this size reaches in practice


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
    if found[0].device_kind not in CHIPS:
        raise ValueError(
            f"--compile-only {name}: the memory and speed of a {found[0].device_kind} are not "
            f"known. Expected one of {', '.join(CHIPS)}: add it to CHIPS in cost.py."
        )
    return found


# Sizes of the presets' models, under the names of their config.json: enough to compile for a slice.
_LLAMA_3 = dict(
    vocab_size=128_256,
    rms_norm_eps=1e-5,
    max_position_embeddings=131_072,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
)
PUBLISHED = {
    "openai/whisper-large-v3": whisper.WhisperConfig(
        d_model=1280,
        encoder_layers=32,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_layers=32,
        decoder_attention_heads=20,
        decoder_ffn_dim=5120,
        num_mel_bins=128,
        max_source_positions=1500,
        max_target_positions=448,
        vocab_size=51_866,
        decoder_start_token_id=50_258,
        eos_token_id=50_257,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": llama.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
        **_LLAMA_3 | dict(head_dim=64),
    ),
    "meta-llama/Llama-3.2-3B-Instruct": llama.LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
        **_LLAMA_3,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": llama.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        **_LLAMA_3,
    ),
}


def sizes_of(cls: type, path_or_repo: str) -> Any:
    """The sizes of a preset's model, or those in the config.json of a folder or another repo."""
    if path_or_repo in PUBLISHED:
        return PUBLISHED[path_or_repo]
    return weights.read_config(cls, weights.resolve(path_or_repo))


# A user's turn of Llama 3.1 and 3.2 with its dated system header; Common Voice's longest English
# transcripts. Used where there is no tokenizer and no corpus to ask.
PREFIX, SUFFIX, TEXT = 31, 5, 64
MEAN_TEXT = 14  # tokens of its average transcript

# ------------------------------------------------------------------------------- products, by hand


def flops(
    asr: whisper.WhisperConfig, llm: llama.LlamaConfig, queries: int, turn: int, text: int
) -> dict[str, float]:
    """FLOPs of one clip in one training step: nothing computed twice, gradients where needed.

    Args:
        queries: Q, virtual tokens.
        turn: positions of the template around the user's words, P + R.
        text: positions that the transcript is padded to, L.
    """
    d, t, q = asr.d_model, asr.max_source_positions, queries
    frames = t * whisper.FRAMES_PER_POSITION
    conv = 3 * d * (frames * asr.num_mel_bins + t * d)  # kernel 3; the second has stride 2
    heard = 4 * t * d * d + 2 * t * t * d + 2 * t * d * asr.encoder_ffn_dim
    encoder = conv + asr.encoder_layers * heard  # q k v out; scores and sums; fc1 and fc2

    # Behind y = x W the backward pass takes a product for x and, if W is trained, one for W.
    by_queries = 4 * q * d * d + 2 * q * d * d + 2 * q * d * asr.decoder_ffn_dim
    by_states = 2 * t * d * d  # keys and values of the cross-attention: no gradient to the states
    attention = 2 * q * q * d + 2 * q * t * d
    project = q * d * llm.hidden_size
    layers = asr.decoder_layers
    forward = layers * (by_queries + by_states + attention) + project
    backward = layers * (2 * by_queries + by_states + 2 * attention) + 2 * project

    wide, narrow = (h * llm.head_width for h in (llm.num_attention_heads, llm.key_value_heads))
    one = 2 * llm.hidden_size * (wide + narrow) + 3 * llm.hidden_size * llm.intermediate_size

    def through(positions: int) -> int:  # the LLM, forward
        return llm.num_hidden_layers * (positions * one + 2 * positions**2 * wide)

    products = {
        "encoder": encoder,
        "connector forward": forward,
        "connector backward": backward,
        "student forward": through(queries + turn),
        "student backward": through(queries + turn),  # frozen: for x alone; attention below
        "teacher": through(turn + text),
    }
    # The backward pass of attention takes two products for each of its two.
    products["student backward"] += llm.num_hidden_layers * 2 * (queries + turn) ** 2 * wide
    return {name: 2.0 * count for name, count in products.items()}


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


def gib(size: float | int) -> str:
    """Bytes, for people."""
    return f"{size / GIB:.2f} GiB"


def bytes_needed(memory: Any) -> int:
    """What a compiled program holds on one device at its fullest, arguments included."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def step_times(program: Program, chip: Chip) -> tuple[dict[str, float], float, float]:
    """Seconds that one step takes at least for products, memory and links; at 100 % of peak, where
    all three go on at the same time; and at SHARE of it."""
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
    return bounds, roof, max(roof, bounds["products"] / SHARE)


def report(
    program: Program, parts: dict[str, float], padding: float, chip: Chip, clips: int, steps: int
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
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "of these in place of arguments": -memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    lines = ["memory of one chip"]
    lines += [f"  {name:32}{gib(size):>12}" for name, size in sizes.items()]
    lines += [f"  {'in all':32}{gib(bytes_needed(memory)):>12} of {gib(chip.memory)}"]
    lines += ["", f"{'collectives of one step':34}{'count':>8}{'GB whole':>12}{'GB a chip':>12}"]
    for name, c in sorted(program.collectives.items()):
        lines += [f"  {name:32}{c.count:8}{c.bytes / 1e9:12.3f}{c.travel / 1e9:12.3f}"]
    lines += ["", f"{'work on one clip':34}{'TFLOP':>12}"]
    lines += [f"  {name:32}{count / TERA:12.2f}" for name, count in parts.items()]
    lines += [
        f"  {'by hand':32}{by_hand / TERA:12.2f}",
        f"  {'compiled program':32}{compiled / TERA:12.2f}"
        f"   computed twice {1 - by_hand / compiled:.1%}, padded text {padding / compiled:.1%}",
        f"  {'XLA, each loop counted once':32}{program.counted_once * chips / clips / TERA:12.2f}",
    ]
    bounds, roof, fair = step_times(program, chip)
    lines += ["", f"{'time of one step, at least':34}{'s':>12}"]
    lines += [f"  {name:32}{seconds:12.3f}" for name, seconds in bounds.items()]
    for share, seconds in ((1, roof), (SHARE, fair)):
        lines += [
            f"  {f'at {100 * share:.0f} % of peak':32}{seconds:12.3f}   {steps} steps in "
            f"{steps * seconds / 60:.0f} min, {clips / seconds:.0f} clips/s"
        ]
    return "\n".join(lines)
