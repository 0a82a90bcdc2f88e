"""cost.py: FLOPs by hand against a count of every product, and what a compiled program is read as.

The models are tiny, of sizes that all differ, so that one taken for another changes the count.
Hand-written programs are in the text form of HLO, as XLA prints it for CPUs and TPUs.
"""

import dataclasses
import json
import math
import os
import re
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import llama
import train
import weights
import whisper
from runtime import sharding
from training import compilation, cost, hlo, recipe

ASR = whisper.WhisperConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_layers=3,
    decoder_attention_heads=4,
    decoder_ffn_dim=80,
    num_mel_bins=8,
    max_source_positions=25,
    max_target_positions=8,
    vocab_size=24,
    decoder_start_token_id=1,
    eos_token_id=2,
)
LLM = llama.LlamaConfig(
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # 4 heads of 16 are not the width
    vocab_size=40,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
QUERIES, TEXT, TURN = 6, 4, cost.PREFIX + cost.SUFFIX
BATCH, DEVICES, SMALL = 32, 8, 256
WAYS = ("attention", "layers")


def batch_of(config: recipe.Config, asr: whisper.WhisperConfig, mesh) -> data.Batch:
    """Its shapes, with transcripts of TEXT."""
    shapes = data.batch_shapes(
        config.batch_size, max_length=TEXT, window_samples=asr.window_samples
    )
    return sharding.shard_host_batch(shapes, mesh)


def abstract_step(
    batch_size: int, devices: int, fsdp: int | None = None
) -> tuple[recipe.Config, tuple, data.Batch]:
    """A configuration, and shapes of the state and of a batch, on a mesh of so many devices."""
    config = recipe.Config(batch_size=batch_size, dtype="float32", queries=QUERIES)
    mesh = sharding.make_mesh(batch_size, fsdp, jax.devices()[:devices])
    state = train.abstract_inputs(config, mesh, asr=ASR, llm=LLM)[0]
    return config, state, batch_of(config, ASR, mesh)


# ------------------------------------------------------------------------------- products, by hand


def multiply_adds(jaxpr) -> int:
    """Those of all products and convolutions, the body of a loop as often as it turns."""
    total = 0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (v.aval.shape for v in equation.invars)
            out = math.prod(equation.outvars[0].aval.shape)
            if name == "dot_general":
                inner = math.prod(left[axis] for axis in given["dimension_numbers"][0][0])
            else:
                inner = math.prod(right) // right[given["dimension_numbers"].rhs_spec[0]]
            total += out * inner
        assert name not in ("while", "cond"), f"how often a {name} runs is not known"
        times = given["length"] if name == "scan" else 1
        for value in given.values():
            for item in value if isinstance(value, tuple | list) else [value]:
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    total += times * multiply_adds(item)
    return total


def computed_again(
    asr: whisper.WhisperConfig, llm: llama.LlamaConfig, queries: int, way: str, answer: int = 0
) -> float:
    """FLOPs of one clip that the backward pass does again: the forward pass of `way`, less what no
    gradient asks for (frozen weights: the sums of the LLM's attention; the last product)."""
    parts = flops(asr, llm, queries, TEXT, answer)
    q, t, d, positions = queries, asr.max_source_positions, asr.d_model, queries + TURN + answer
    wide = llm.num_attention_heads * llm.head_width
    if way == "attention":
        student = llm.num_hidden_layers * positions**2 * wide
        connector = asr.decoder_layers * 2 * (q * q + q * t) * d
        return 2 * (student + connector)
    down = (
        llm.num_hidden_layers * (positions - cost.PREFIX) * llm.intermediate_size * llm.hidden_size
    )
    fc2 = asr.decoder_layers * q * asr.decoder_ffn_dim * d
    project = q * d * llm.hidden_size  # stands behind the layers
    return parts["student forward"] + parts["connector forward"] - 2 * (down + fc2 + project)


def flops(asr, llm, queries: int, text: int, answer: int = 0) -> dict[str, float]:
    """By hand, where all clips share the head of the template."""
    return cost.flops(asr, llm, queries, cost.SUFFIX, text, answer, cost.PREFIX)


def shared_products(llm: llama.LlamaConfig, way: str) -> float:
    """FLOPs of that head, which each device does once; its keys and values twice, if layers are."""
    wide, narrow = (h * llm.head_width for h in (llm.num_attention_heads, llm.key_value_heads))
    one = 2 * llm.hidden_size * (wide + narrow) + 3 * llm.hidden_size * llm.intermediate_size
    again = 2 * llm.hidden_size * narrow if way == "layers" else 0
    products = cost.PREFIX * (one + again) + 2 * cost.PREFIX**2 * wide
    return 2 * llm.num_hidden_layers * products


def mel_products(asr: whisper.WhisperConfig) -> int:
    """FLOPs of the mel filters, which `cost.flops` leaves out (of 20 TFLOP of diva-8b 0.0002)."""
    frames = asr.max_source_positions * whisper.FRAMES_PER_POSITION
    return 2 * frames * (whisper.N_FFT // 2 + 1) * asr.num_mel_bins


def spectrum_products(asr: whisper.WhisperConfig) -> int:
    """FLOPs of one clip's Fourier transforms, which TPUs do as three real products."""
    frames = asr.max_source_positions * whisper.FRAMES_PER_POSITION
    return 3 * 2 * frames * whisper.N_FFT**2


@pytest.mark.parametrize("answer", [0, 5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asr", [ASR, dataclasses.replace(ASR, d_model=48, decoder_layers=1)])
def test_flops_by_hand_are_every_product_of_the_gradient(asr, way, answer, monkeypatch):
    """Exactly: a walk through the traced gradient of the loss finds the products by hand, those
    that `remat` does again, and the mel filters; with an answer behind the turn too."""
    monkeypatch.setitem(globals(), "ASR", asr)
    config, (params, _, frozen), batch = abstract_step(2, 1)
    if answer:
        batch = batch._replace(response=jax.ShapeDtypeStruct((2, answer), np.int32))
        batch = batch._replace(response_lengths=jax.ShapeDtypeStruct((2,), np.int32))

    def gradient(params, frozen, batch):
        return jax.grad(train.loss_fn, has_aux=True)(
            params, frozen, batch, recipe.recipe_of(config), way
        )

    found = 2 * multiply_adds(jax.make_jaxpr(gradient)(params, frozen, batch).jaxpr)
    by_hand = sum(flops(asr, LLM, QUERIES, TEXT, answer).values())
    by_clip = by_hand + computed_again(asr, LLM, QUERIES, way, answer) + mel_products(asr)
    assert found == 2 * by_clip + shared_products(LLM, way)


def test_flops_of_the_published_sizes():
    """19.3 TFLOP for a clip of diva-8b, of which the LLM takes two thirds; parts add up."""
    asr, llm = (
        cost.PUBLISHED[name]
        for name in ("openai/whisper-large-v3", "meta-llama/Llama-3.1-8B-Instruct")
    )
    parts = flops(asr, llm, 448, cost.TEXT)
    # 2 FLOPs for each parameter and position, forward; attention is 4 % more
    layers = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336)
    assert parts["student forward"] == pytest.approx(2 * layers * 453, rel=0.02)
    assert parts["student forward"] > 2 * layers * 453
    assert sum(parts.values()) == pytest.approx(19.3e12, rel=0.005)


# ------------------------------------------------------------------------------- the sizes, by name


def parameters(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("openai/whisper-large-v3", 1_543_490_560),
        ("openai/whisper-small", 241_734_912),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, count):
    """As the model cards count them; the widths of heads, which do not change it, are 64 or 128."""
    sizes = cost.PUBLISHED[name]
    init = llama.Llama.init if isinstance(sizes, llama.LlamaConfig) else whisper.Whisper.init
    assert parameters(weights.abstract(init, sizes, jax.random.key(0))) == count
    if isinstance(sizes, llama.LlamaConfig):
        assert sizes.head_width == (64 if "1B" in name or "360M" in name else 128)
        assert sizes.hidden_size == sizes.num_attention_heads * sizes.head_width
    else:
        heads = (sizes.encoder_attention_heads, sizes.decoder_attention_heads)
        assert {sizes.d_model // n for n in heads} == {64}
        assert sizes.window_samples == 30 * whisper.SAMPLE_RATE


def test_sizes_of_a_preset_need_no_network(tmp_path, monkeypatch):
    """Those of the presets are known; any other model's are read from its config.json."""
    with monkeypatch.context() as patch:
        patch.setattr(weights, "resolve", lambda path: pytest.fail(f"asked for {path}"))
        for preset, config in recipe.PRESETS.items():
            if preset != "toy":
                asr = cost.sizes_of(whisper.WhisperConfig, config.whisper)
                llm = cost.sizes_of(llama.LlamaConfig, config.llm)
                expected = (768, 49_152) if preset == "small" else (1280, 128_256)
                assert (asr.d_model, llm.vocab_size) == expected
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(LLM)))
    assert cost.sizes_of(llama.LlamaConfig, str(tmp_path)) == LLM
    with pytest.raises(FileNotFoundError, match="neither a folder here nor"):
        cost.sizes_of(llama.LlamaConfig, str(tmp_path / "nothing"))


# -------------------------------------------------------------------------------- slices of TPUs


def refuse(reason: str, asked: list):
    def get_topology_desc(**given):
        asked.append(given)
        raise RuntimeError(reason)

    return get_topology_desc


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("v4:3x3", "INVALID_ARGUMENT: not divisible\nand a stack of frames"),
        ("nonsense", "INVALID_ARGUMENT: Your TPU topology name nonsense is invalid"),
        ("v5e:4x4", "JAX TPU support not installed; cannot generate TPU topology."),
    ],
)
def test_a_slice_that_cannot_be_compiled_for_is_a_message(name, reason, monkeypatch):
    """One line: what was asked for, the compiler's reason, and what to write or install instead."""
    asked = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(compilation.topologies, "get_topology_desc", refuse(reason, asked))
    with pytest.raises(ValueError) as error:
        compilation.slice_of(name)
    message = str(error.value)
    assert message.startswith(f"--compile-only {name}: no such slice ({reason.splitlines()[0]})")
    assert "such as v4:4x4x8" in message and message.endswith("pip install '.[tpu]'.")
    assert "\n" not in message
    # two cores of a v4 or v5p are one device; the others have one
    assert asked[0]["topology_name"] == name
    assert ("chip_config_name" in asked[0]) == name.startswith("v4:")


def test_a_slice_of_chips_without_figures_is_a_message(monkeypatch):
    found = types.SimpleNamespace(devices=[types.SimpleNamespace(device_kind="TPU v3")])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(compilation.topologies, "get_topology_desc", lambda **_: found)
    with pytest.raises(ValueError, match=r"v3:2x2.*of a TPU v3 are not known.*TPU v4, TPU v5 lite"):
        compilation.slice_of("v3:2x2")


# ------------------------------------------------------------------------------ programs, by hand


def memory(**sizes: int) -> types.SimpleNamespace:
    names = ("argument", "output", "alias", "temp", "generated_code")
    return types.SimpleNamespace(**{f"{n}_size_in_bytes": sizes.get(n, 0) for n in names})


def program(text: str, chips: int = 8, once: float = 0.0, **sizes: int) -> hlo.Program:
    """What hlo.Program makes of a compiled program that prints as `text`."""
    compiled = types.SimpleNamespace(
        as_text=lambda: text,
        memory_analysis=lambda: memory(**sizes),
        cost_analysis=lambda: {"flops": once},
    )
    return hlo.Program(compiled, chips)


def entry(*lines: str, chips: int = 8) -> hlo.Program:
    body = "\n".join(f"  {line}" for line in lines)
    return program(
        f"HloModule by_hand\n\nENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n", chips
    )


# A loop of 5 turns (TPU: the constant in its condition) around one of 3 (CPU: written beside it).
LOOPS = """HloModule loops, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%fused (a: f32[4,8], b: f32[8,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %b = f32[8,8]{1,0:T(8,128)} parameter(1)
  ROOT %dot.1 = f32[4,8]{1,0:T(8,128)} dot(%a, %b), lhs_contracting_dims={1}
}

%inner (p.1: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %p.1 = (s32[], f32[4,8]{1,0}, /*index=2*/f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = f32[4,8]{1,0} get-tuple-element(%p.1), index=1
  %w.1 = f32[8,8]{1,0} get-tuple-element(%p.1), index=2
  %y.1 = f32[4,8]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%fused
  ROOT %t.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%i.1, %y.1, %w.1)
}

%inner_goes (p.2: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %p.2 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %far = s32[] constant(1000)
  ROOT %less.2 = pred[] compare(%i.2, %far), direction=LT
}

%outer (p.3: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %p.3 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %w.3 = f32[8,8]{1,0} get-tuple-element(%p.3), index=2
  %g.3 = f32[8,8]{1,0} all-reduce(%w.3), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %loop.3 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%p.3), BESIDE
}

%outer_goes (p.4: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %p.4 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %end = s32[]{:T(128)} constant(5)
  ROOT %less.4 = pred[] compare(%i.4, %end), direction=LT
}

%add (u: f32[], v: f32[]) -> f32[] {
  %u = f32[] parameter(0)
  %v = f32[] parameter(1)
  ROOT %sum = f32[] add(%u, %v)
}

ENTRY %main (p.5: (s32[], f32[4,8], f32[8,8])) -> f32[4,8] {
  %p.5 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %loop.5 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%p.5), condition=%outer_goes, body=%outer
  %x.5 = f32[4,8]{1,0} get-tuple-element(%loop.5), index=1
  %w.5 = f32[8,8]{1,0} get-tuple-element(%loop.5), index=2
  ROOT %y.5 = f32[4,8]{1,0} fusion(%x.5, %w.5), kind=kOutput, calls=%fused
}
""".replace(
    "BESIDE",
    'condition=%inner_goes, body=%inner, backend_config={"known_trip_count":{"n":"3"}}',
)


def test_loops_count_as_often_as_they_turn():
    """5 x 3 products in loops within loops, one behind them; a collective in the outer loop."""
    found = program(LOOPS, once=7.0)
    assert found.flops == (5 * 3 + 1) * 2 * (4 * 8 * 8)
    size = 8.0 * 8 * 4
    assert found.collectives == {"all-reduce": hlo.Collective(5, 5 * size, 5 * size)}  # 2 (2-1)/2
    assert found.counted_once == 7.0


def test_a_loop_that_does_two_parts_at_once_turns_half_as_often():
    """The outer one, where each turn adds 2 to the counter: 0, 2, 4 are below 5. TPUs write so the
    sums of a gradient over chips."""
    text = LOOPS.replace("%loop.3", "%back.3").replace("  ROOT %back.3", "  %back.3")
    after = """
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.3, %two)
  %x.3 = f32[4,8]{1,0} get-tuple-element(%back.3), index=1
  ROOT %t.3 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%next, %x.3, %g.3)
}

%outer_goes"""
    found = program(text.replace("\n}\n\n%outer_goes", after))
    assert found.flops == (3 * 3 + 1) * 2 * (4 * 8 * 8)
    assert found.collectives["all-reduce"].count == 3


def test_a_product_with_batch_axes():
    """[3, 4, 5, 6] by [3, 4, 7, 6] over 6, for each of 3 x 4; and an outer product."""
    lines = (
        "%a = bf16[3,4,5,6]{3,2,1,0} parameter(0)",
        "%b = bf16[3,4,7,6]{3,2,1,0} parameter(1)",
        "%c = f32[3,4,5,7]{3,2,1,0} dot(%a, %b), lhs_batch_dims={0,1}, lhs_contracting_dims={3}, "
        "rhs_batch_dims={0,1}, rhs_contracting_dims={3}",
    )
    assert entry(*lines).flops == 2 * 3 * 4 * 5 * 7 * 6
    # some versions of XLA print the operands' shapes as well
    outer = "%d = f32[5,7]{1,0} dot(f32[5]{0:T(128)} %e, f32[7]{0} %f), lhs_contracting_dims={}"
    assert entry("%e = f32[5]{0} parameter(0)", "%f = f32[7]{0} parameter(1)", outer).flops == 70


# Left, right, window, labels, multiply-adds: products as TPUs write them, then real convolutions.
CONVOLUTIONS = {
    "sums of attention, batch and heads dilated": (
        ((4, 15, 20, 8), (4, 20, 11, 15), "size=4x20 stride=3x19 lhs_dilate=4x20"),
        ("0f1b_01oi->01bf", 4 * 20 * 11 * 8 * 15),
    ),
    "scores of attention": (
        ((4, 11, 20, 8), (4, 15, 20, 8), "size=4x20 stride=3x19 lhs_dilate=4x20"),
        ("0b1f_0o1i->01bf", 4 * 20 * 11 * 15 * 8),
    ),
    "grouped heads: reversed, padded, one more axis": (
        (
            (2, 10, 4, 16, 1),
            (3, 2, 4, 10, 10),
            "size=2x4x3 stride=1x3x1 pad=0_0x0_0x2_2 lhs_dilate=2x4x1 rhs_reversal=0x0x1",
        ),
        ("0f1b2_201oi->01b2f", 2 * 4 * 3 * 16 * 10 * 10),
    ),
    "a projection split into heads": (
        ((2, 9, 24, 1), (20, 6, 24, 1), "size=1x20 pad=0_0x19_19 rhs_reversal=0x1"),
        ("0bf1_1oi0->0b1f", 2 * 9 * 20 * 6 * 24),
    ),
    "a gradient of weights, clips summed": (
        ((4, 9, 12), (4, 9, 7), "size=4"),
        ("0fb_0io->bf0", 12 * 7 * 4 * 9),
    ),
    "size 1": (((4, 9, 12), (7, 12, 1), "size=1"), ("0bf_oi0->0bf", 4 * 9 * 7 * 12)),
    "no window": (((9, 12), (12, 7), None), ("bf_io->bf", 9 * 7 * 12)),
    # of 3 x 50 and 3 x 25 taps, those beyond the ends meet nothing
    "conv1": (((2, 50, 8), (32, 8, 3), "size=3 pad=1_1"), ("b0f_oi0->b0f", 2 * 32 * 8 * 148)),
    "conv2": (
        ((2, 50, 32), (16, 32, 3), "size=3 stride=2 pad=1_1"),
        ("b0f_oi0->b0f", 2 * 16 * 32 * 74),
    ),
    "a stride beyond both ends": (
        ((2, 7, 8), (4, 8, 3), "size=3 stride=3 pad=1_1"),
        ("b0f_oi0->b0f", 2 * 4 * 8 * 7),
    ),
    "holes in the kernel": (
        ((2, 50, 8), (4, 8, 3), "size=3 pad=2_2 rhs_dilate=2"),
        ("b0f_oi0->b0f", 2 * 4 * 8 * 146),
    ),
}


def settings(window: str | None, axes: str) -> dict:
    """A window in the words of jax.lax.conv_general_dilated, which orders axes by the kernel."""
    given = dict(item.split("=") for item in (window or "").split())

    def each(name: str, default: str) -> list[str]:
        values = given[name].split("x") if name in given else [default] * len(axes)
        return [values[int(axis)] for axis in axes]

    return {
        "window_strides": [int(n) for n in each("stride", "1")],
        "lhs_dilation": [int(n) for n in each("lhs_dilate", "1")],
        "rhs_dilation": [int(n) for n in each("rhs_dilate", "1")],
        "padding": [tuple(map(int, pad.split("_"))) for pad in each("pad", "0_0")],
    }


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_counts_where_it_meets_a_real_element(name):
    """By hand; and by XLA: the convolution of ones with ones adds up what it multiplies."""
    (left, right, window), (labels, count) = CONVOLUTIONS[name]
    of_left, of_right, of_out = labels.replace("->", "_").split("_")
    ones = jax.lax.conv_general_dilated(
        jnp.ones(left),
        jnp.ones(right),
        dimension_numbers=(
            of_left.replace("b", "N").replace("f", "C"),
            of_right.replace("o", "O").replace("i", "I"),
            of_out.replace("b", "N").replace("f", "C"),
        ),
        **settings(window, "".join(filter(str.isdigit, of_right))),
    )
    assert ones.sum() == count, "the example itself is wrong"

    def shape(sizes) -> str:
        return f"bf16[{','.join(map(str, sizes))}]"

    found = entry(
        f"%left = {shape(left)}{{0:T(8,128)(2,1)}} parameter(0)",
        f"%right = {shape(right)}{{0:T(8,128)(2,1)}} parameter(1)",
        f"ROOT %out = {shape(ones.shape)}{{0:T(8,128)(2,1)S(3)}} convolution(%left, %right), "
        + (f"window={{{window}}}, " if window else "")
        + f"dim_labels={labels}, operand_precision={{highest,highest}}",
    )
    assert found.flops == 2 * count


GATHER = "%g{n} = bf16[8,16]{{1,0}} all-gather(%p), channel_id={n}, {groups}, dimensions={{0}}"


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),  # 4 groups of 2
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("replica_groups={}", 8),
        ("dimensions={0}", 8),
    ],
)
def test_the_chips_that_take_part_in_a_collective(groups, chips):
    """In each of the forms in which HLO lists them; all of them where none are listed."""
    found = entry("%p = bf16[1,16]{1,0} parameter(0)", GATHER.format(n=1, groups=groups))
    size = 8.0 * 16 * 2
    expected = hlo.Collective(1, size, size * (chips - 1) / chips)
    assert found.collectives == {"all-gather": expected}


def test_every_kind_of_collective():
    """Its bytes are those of the whole arrays; of them travel (n - 1) / n, twice in an all-reduce;
    one that is split in a start and a done is one, and two that share a channel are two."""
    groups = "replica_groups=[2,4]<=[8]"
    found = entry(
        "%p = f32[4,16]{1,0} parameter(0)",
        "%q = bf16[16,16]{1,0} parameter(1)",
        f"%g1 = f32[16,16]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}",
        "%g2 = (f32[4,16]{1,0}, f32[16,16]{1,0:T(8,128)}) all-gather-start(%p), channel_id=2, "
        f"{groups}, dimensions={{0}}",
        "%g3 = f32[16,16]{1,0} all-gather-done(%g2)",
        "%g4 = ((f32[4,16], bf16[16,16]), (f32[16,16], bf16[64,16])) all-gather-start(%p, %q), "
        f"channel_id=3, {groups}, dimensions={{0}}",
        f"%r1 = (f32[4,16], /*index=1*/bf16[16,16]) all-reduce(%p, %q), channel_id=4, {groups}",
        f"%r2 = f32[4,16]{{1,0}} all-reduce-start(%p), channel_id=5, {groups}",
        "%r3 = f32[4,16]{1,0} all-reduce-done(%r2)",
        f"%s1 = bf16[4,16]{{1,0}} reduce-scatter(%q), channel_id=6, {groups}, dimensions={{0}}",
        f"%t1 = (f32[1,16], f32[1,16]) all-to-all(%p, %p), channel_id=7, {groups}",
        "%c1 = (f32[4,16]{1,0}, f32[4,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
        "collective-permute-start(%p), channel_id=8, source_target_pairs={{0,1},{1,0}}",
        "%c2 = f32[4,16]{1,0} collective-permute-done(%c1)",
        *(GATHER.format(n=9, groups=groups).replace("%g9", f"%g9.{one}") for one in range(2)),
        "%add.1 = f32[4,16]{1,0} add(%p, %p)",
    ).collectives
    p, q = 4.0 * 16 * 4, 16.0 * 16 * 2
    gathered = 4 * p + 4 * p + (4 * p + 4 * q) + 2 * (8 * 16 * 2)
    assert dict(found) == {
        "all-gather": hlo.Collective(5, gathered, gathered * 3 / 4),
        "all-reduce": hlo.Collective(2, 2 * p + q, (2 * p + q) * 2 * 3 / 4),
        "reduce-scatter": hlo.Collective(1, q, q * 3 / 4),
        "all-to-all": hlo.Collective(1, p / 2, p / 2 * 3 / 4),
        "collective-permute": hlo.Collective(1, p, p),
    }


def test_traffic_beside_products_is_what_stands_between_start_and_done():
    """Or in one fusion with a product, twice of them in a loop. As long as the shorter of the two
    takes; what has no product beside it, and what has no start, hides nothing."""
    gather = "channel_id={}, replica_groups=[1,8]<=[8], dimensions={{0}}"
    product = "bf16[1000,1000]{{1,0}} dot(%w, %w), lhs_contracting_dims={{1}}"
    lines = f"""HloModule by_hand, is_scheduled=true

%both (p: bf16[125,1000]) -> bf16[1000,1000] {{
  %p.1 = bf16[125,1000]{{1,0}} parameter(0)
  %w = bf16[1000,1000]{{1,0}} all-gather(%p.1), {gather.format(1)}
  ROOT %y.1 = {product.format()}
}}

%sends (p: bf16[125,1000]) -> bf16[1000,1000] {{
  %p.2 = bf16[125,1000]{{1,0}} parameter(0)
  ROOT %g.2 = bf16[1000,1000]{{1,0}} all-gather(%p.2), {gather.format(2)}
}}

%body (p: bf16[125,1000]) -> bf16[125,1000] {{
  %p.3 = bf16[125,1000]{{1,0}} parameter(0)
  %s.3 = ((bf16[125,1000]), bf16[1000,1000]) async-start(%p.3), calls=%sends
  %y.3 = {product.format()}
  %z.3 = {product.format()}
  %d.3 = bf16[1000,1000]{{1,0}} async-done(%s.3), calls=%sends
}}

ENTRY %main (p: bf16[125,1000]) -> bf16[1000,1000] {{
  %p.4 = bf16[125,1000]{{1,0}} parameter(0)
  %s.4 = (bf16[125,1000], bf16[1000,1000]) all-gather-start(%p.4), {gather.format(3)}
  %d.4 = bf16[1000,1000]{{1,0}} all-gather-done(%s.4)
  %y.4 = {product.format()}
  %g.4 = bf16[1000,1000]{{1,0}} all-gather(%p.4), {gather.format(4)}
  %l.4 = bf16[125,1000]{{1,0}} while(%p.4), condition=%no, body=%body, TURNS
  ROOT %f.4 = bf16[1000,1000]{{1,0}} fusion(%p.4), kind=kCustom, calls=%both
}}
"""
    found = program(lines.replace("TURNS", 'backend_config={"known_trip_count":{"n":"2"}}'))
    size, work = 2e6 * 7 / 8, 2e9  # of one gather, of one product
    assert found.sent == (3 + 2) * size and found.flops == (1 + 2 * 2 + 1) * work
    assert found.hidden(1e9, 1e3) == pytest.approx(2 * 4 + 2)  # the links take 1,750 s
    assert found.hidden(1e9, size / 3) == pytest.approx(2 * 3 + 2)
    assert found.hidden(1e3, size) == pytest.approx(2 * 1 + 1)


def test_a_collective_in_parts_is_one_and_goes_on_beside_the_products_between_them():
    """TPUs start it in one fusion, take it further in others that multiply, and end it in a last
    one; two that go on at the same time share it. A sum of which each chip keeps its own part is a
    reduce-scatter."""
    gather = "bf16[1000,1000]{{1,0}} all-gather(%p), channel_id={}, replica_groups=[1,8]<=[8]"
    product = "bf16[1000,1000]{1,0} dot(%w, %w), lhs_contracting_dims={1}"

    def computation(name: str, *lines: str) -> str:
        given = "  %p = bf16[125,1000]{1,0} parameter(0)\n"
        lines = "".join(f"  %{name}.{n} = {line}\n" for n, line in enumerate(lines))
        return f"%{name} (p: bf16[125,1000]) -> bf16[1000,1000] {{\n{given}{lines}}}\n\n"

    def fusion(op: str, called: str) -> str:
        return f"  %{op} = bf16[1000,1000]{{1,0}} fusion(%p), kind=kCustom, calls=%{called}\n"

    summed = "bf16[1000,1000]{1,0} all-reduce(%w), channel_id=1, replica_groups=[1,8]<=[8]"
    lines = "HloModule by_hand, is_scheduled=true\n\n"
    lines += "".join(computation(f"one.{n}", gather.format(n)) for n in range(4))
    lines += computation("async_collective_fusion.1", gather.format(1), product)
    lines += computation("all-reduce-scatter.1", summed)
    lines += "ENTRY %main (p: bf16[125,1000]) -> bf16[1000,1000] {\n"
    lines += "  %p = bf16[125,1000]{1,0} parameter(0)\n  %w = bf16[1000,1000]{1,0} parameter(1)\n"
    lines += fusion("async-collective-start.7", "one.0") + f"  %y.1 = {product}\n"
    lines += fusion("async-collective-start", "one.1")
    lines += fusion("fusion.3", "async_collective_fusion.1") + f"  %y.2 = {product}\n"
    lines += fusion("async-collective-done.7", "one.2") + f"  %y.3 = {product}\n"
    lines += fusion("async-collective-done", "one.3") + fusion("f", "all-reduce-scatter.1") + "}\n"
    found = program(lines)
    size = 2e6
    assert dict(found.collectives) == {
        "all-gather": hlo.Collective(2, 2 * size, 2 * size * 7 / 8),
        "reduce-scatter": hlo.Collective(1, size, size * 7 / 8),
    }
    assert found.flops == 4 * 2e9
    assert sorted(found.beside) == [(1, size * 7 / 8, 2 * 2e9)] * 2


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("pred", 8), ("s8", 8), ("u4", 4), ("f8e4m3fn", 8), ("bf16", 16), ("s32", 32), ("f64", 64)],
)
def test_the_size_of_an_element(kind, bits):
    line = f"%g = {kind}[16]{{0}} all-gather(%p), channel_id=1, dimensions={{0}}"
    found = entry(f"%p = {kind}[2]{{0}} parameter(0)", line)
    assert found.collectives["all-gather"].bytes == 16 * bits / 8


def test_a_compiled_function_is_read_as_what_it_does():
    """A scan over layers that holds a scan of its own, really compiled: products are counted as
    often as they run, where XLA's own analysis counts a loop once."""

    def layer(x, w):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)
        scores = jnp.einsum("bld,bmd->blm", x, x)
        return x + jnp.einsum("blm,bme->ble", jnp.tanh(scores), x), None

    def run(x, stack):
        return jax.lax.scan(layer, x, stack)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 96, 64), (5, 64, 64))]
    found = hlo.Program(jax.jit(run).lower(*shapes).compile(), 1)
    one = 3 * (2 * 96 * 64 * 64) + 2 * (2 * 96 * 96 * 64)
    assert found.flops == 5 * 2 * one
    assert found.counted_once < found.flops / 3 and not found.collectives


# ------------------------------------------------------------------------------------ the real step


@pytest.fixture(scope="module")
def compiled():
    """The tiny step on eight devices, compiled for each way to remat, and with frozen weights
    whole on each; and what it was made of.

    Compile fast, run never: XLA makes the same program and spends less on machine code.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    small, sharding.MIN_SHARDED_SIZE = sharding.MIN_SHARDED_SIZE, SMALL
    jax.config.update("jax_disable_most_optimizations", True)
    programs = {}
    for name, way, fsdp in (("whole", "attention", 1), *((way, way, DEVICES) for way in WAYS)):
        config, state, batch = abstract_step(BATCH, DEVICES, fsdp)
        how = {"recipe": recipe.recipe_of(config), "mesh": sharding.make_mesh(BATCH, fsdp)}
        step = train.train_step.lower(*state, batch, np.int32(0), **how, remat=way)
        programs[name] = step.compile()
    yield state, programs
    jax.config.update("jax_disable_most_optimizations", before)
    sharding.MIN_SHARDED_SIZE = small


def bytes_gathered(diva, small: int, size: int, way: str) -> int:
    """Bytes of weights that one step gathers, `size` bytes for a number: all large arrays but the
    lookup tables; once, but those of the connector's and the LLM's layers forward and backward."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(diva):
        name = jax.tree_util.keystr(path)
        stacked = ".layers." in name
        if math.prod(leaf.shape[stacked:]) < small or "embed_tokens" in name or "lm_head" in name:
            continue
        twice = stacked and not name.startswith(".encoder.")
        if way == "attention" and ("encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name):
            twice = False  # before these stand the frozen states, which take no gradient
        total += math.prod(leaf.shape) * size * (1 + twice)
    return total


@pytest.mark.parametrize("way", WAYS)
def test_the_compiled_step_does_the_products_by_hand_and_no_other(compiled, way):
    """But for those at the ends of the convolutions, which meet nothing."""
    found = hlo.Program(compiled[1][way], DEVICES).flops * DEVICES / BATCH
    by_hand = sum(flops(ASR, LLM, QUERIES, TEXT).values())
    ends = 2 * ASR.d_model * (2 * ASR.num_mel_bins + ASR.d_model)
    by_clip = by_hand + computed_again(ASR, LLM, QUERIES, way) + mel_products(ASR) - ends
    expected = by_clip + shared_products(LLM, way) * DEVICES / BATCH
    assert found == pytest.approx(expected, rel=1e-3)  # XLA may write a tiny product as a sum


@pytest.mark.parametrize("way", WAYS)
def test_in_the_compiled_step_weights_travel_and_clips_do_not(compiled, way):
    """What is gathered are the weights, as often as they are needed, token ids, and the head of the
    template; what goes from all to all are the rows of the token table; what is summed are
    gradients."""
    (params, _, frozen), programs = compiled
    found = hlo.Program(programs[way], DEVICES).collectives
    ids, head = BATCH * (TEXT + cost.SUFFIX + TEXT) * 4, cost.PREFIX * LLM.hidden_size * 4
    expected = bytes_gathered(eqx.combine(params, frozen.diva), SMALL, 4, way) + ids + head
    assert found["all-gather"].bytes == expected  # no clip's frames for a Fourier transform, either
    rows = BATCH * (TURN + TEXT + TURN + TEXT) * LLM.hidden_size * 4  # student's and teacher's turn
    assert found["all-to-all"].bytes <= rows // DEVICES
    unused = (ASR.max_target_positions - QUERIES) * ASR.d_model  # positions that no query stands at
    trained = 4 * (parameters(params) - unused)
    assert trained <= found["all-reduce"].bytes <= 1.01 * trained  # and a few numbers to be logged
    assert found.keys() == {"all-gather", "all-to-all", "all-reduce"}


def test_frozen_weights_that_are_whole_on_each_device_do_not_travel(compiled):
    """Only the trained ones do, and their gradients: no row of a table, no token id."""
    (params, *_), programs = compiled
    found = hlo.Program(programs["whole"], DEVICES)
    gathered = bytes_gathered(params, SMALL, 4, "attention")
    assert found.collectives["all-gather"].bytes == gathered
    assert found.collectives.keys() == {"all-gather", "all-reduce"}
    split = hlo.Program(programs["attention"], DEVICES)
    summed = found.collectives["all-reduce"].travel
    assert summed == split.collectives["all-reduce"].travel
    assert found.sent == gathered * 7 / 8 + summed < 0.8 * split.sent
    assert found.flops == split.flops


# ------------------------------------------------------------------------------------ does it fit


def choose(monkeypatch, programs: dict, config: recipe.Config, room, state=((), (), ())):
    """train.compile_step, with what the compiler makes of each way given: a compiled program, or
    the message with which it refuses."""

    def lower(*_, remat, **__):
        def compile(options):
            if isinstance(programs[remat], str):
                raise jax.errors.JaxRuntimeError(programs[remat])
            return programs[remat]

        return types.SimpleNamespace(compile=compile)

    monkeypatch.setattr(train, "train_step", types.SimpleNamespace(lower=lower))
    mesh = sharding.make_mesh(config.batch_size)
    return train.compile_step(config, [mesh], float(room), lambda _: (state, {}))[:2]


def needing(**sizes: int) -> dict:
    return {
        way: types.SimpleNamespace(memory_analysis=lambda size=size: memory(temp=int(size)))
        for way, size in sizes.items()
    }


def test_as_little_is_recomputed_as_fits(compiled, monkeypatch):
    """Really compiled: attention where that fits, layers where only they do; a wish is obeyed."""
    programs, auto = compiled[1], recipe.Config(batch_size=BATCH)
    needed = {way: compilation.bytes_needed(programs[way].memory_analysis()) for way in WAYS}
    assert needed["layers"] < needed["attention"]
    for room, way in ((needed["attention"], "attention"), (needed["attention"] - 1, "layers")):
        assert choose(monkeypatch, programs, auto, room) == (programs[way], way)
    layers = dataclasses.replace(auto, remat="layers")
    assert choose(monkeypatch, programs, layers, math.inf) == (programs["layers"], "layers")


@pytest.mark.parametrize(
    ("room", "found", "compiled"),
    [
        (14, ("attention", 1), [("attention", 1)]),
        (13, ("attention", 2), [("attention", 1), ("attention", 2)]),
        # what attention takes beside the weights is known from the first: in 2 they would not fit
        (9, ("attention", 4), [("attention", 1), ("attention", 4)]),
        (6.5, ("layers", 2), [("attention", 2), ("layers", 2)]),
        (1.5, None, [("attention", 8), ("layers", 8)]),
        (0.5, None, [("layers", 8)]),  # not even the weights: compiled to say what it takes
    ],
)
def test_frozen_weights_are_whole_where_that_fits(monkeypatch, room, found, compiled):
    """Less work goes before less traffic, and nothing is compiled that is known not to fit: 8 GiB
    of frozen weights, and beside them 6 GiB or 1, whatever the grid."""
    gib, tried, wanted = 2**30, [], recipe.Config(batch_size=64)
    frozen = [jax.ShapeDtypeStruct((4 * gib,), jnp.bfloat16)]

    def inputs(mesh):
        return ((), (), sharding.shard_params(frozen, mesh)), {}

    def lower(*state, remat, mesh, **_):
        tried.append((remat, mesh.shape["fsdp"]))
        size = {"attention": 6, "layers": 1}[remat] * gib + compilation.bytes_held(inputs(mesh))
        return types.SimpleNamespace(compile=lambda _: needing(it=size)["it"])

    monkeypatch.setattr(train, "train_step", types.SimpleNamespace(lower=lower))
    given = wanted, sharding.candidate_meshes(64), float(room * gib), inputs
    if found is None:
        with pytest.raises(ValueError, match=r"needs 2\.00 GiB .* recomputing layers"):
            train.compile_step(*given)
    else:
        _, way, mesh = train.compile_step(*given)
        assert (way, mesh.shape["fsdp"]) == found
    assert tried == compiled


def test_what_does_not_fit_is_a_message(monkeypatch):
    """It names what is needed and what there is, and what would make it fit."""
    config, mesh, gib = recipe.Config(batch_size=64), sharding.make_mesh(64), 2**30
    held = sharding.shard_params(
        [jax.ShapeDtypeStruct((4 * gib,), jnp.bfloat16)], mesh
    )  # 1 GiB on each
    with pytest.raises(ValueError) as error:
        ways = needing(attention=9 * gib, layers=5 * gib)
        choose(monkeypatch, ways, config, 2 * gib, ((), (), held))
    message = str(error.value)
    assert "needs 5.00 GiB on each device, which holds 2.00 GiB" in message
    assert "(8 clips at once on each of 8, recomputing layers)" in message
    # all but the state grows with the clips: 1 of 4 GiB is room for 2 of 8
    assert "Expected it to fit: --micro-batch 2 might fit, or more devices." in message
    # trained arrays: their gradients and the sums of them leave no room for a clip
    with pytest.raises(ValueError, match="fit: take more devices or a smaller preset"):
        choose(monkeypatch, ways, config, 2 * gib, (held, (), ()))
    with pytest.raises(ValueError, match=r"needs 9\.00 GiB.*attention\).*might --remat layers"):
        attention = dataclasses.replace(config, remat="attention")
        choose(monkeypatch, ways, attention, 2 * gib, ((), (), held))


def test_micro_batches_need_less_and_the_one_that_is_named_fits(compiled):
    """Really compiled, for one device: each halving needs less; with room for less than the whole,
    the message names a part that does fit."""
    config, needed = recipe.Config(batch_size=BATCH, dtype="float32", queries=QUERIES), {}
    mesh = sharding.make_mesh(BATCH, devices=jax.devices()[:1])
    state = train.abstract_inputs(config, mesh, asr=ASR, llm=LLM)[0]
    for size in (None, BATCH // 2, BATCH // 4):
        some = dataclasses.replace(config, micro_batch=size)
        inputs = state, batch_of(config, ASR, mesh)
        program, *_ = train.compile_step(some, [mesh], math.inf, lambda _, inputs=inputs: inputs)
        needed[size] = compilation.bytes_needed(program.memory_analysis())
    assert needed[BATCH // 4] < needed[BATCH // 2] < needed[None]
    some = dataclasses.replace(config, remat="attention")
    with pytest.raises(ValueError) as error:
        train.compile_step(some, [mesh], 0.9 * needed[None], lambda _: inputs)
    size = int(re.search(r"--micro-batch (\d+)", str(error.value))[1])
    assert needed[size] <= 0.9 * needed[None]


def test_a_micro_batch_that_does_not_divide_is_refused():
    config = recipe.Config(batch_size=64, micro_batch=3)
    with pytest.raises(
        ValueError, match=r"--micro-batch 3: expected a divisor of the 8 clips of e"
    ):
        compilation.micro_batch_size(config, sharding.make_mesh(64))
    for size, found in ((None, None), (8, None), (16, None), (4, 4)):
        some = dataclasses.replace(config, micro_batch=size)
        assert compilation.micro_batch_size(some, sharding.make_mesh(64)) == found


@pytest.mark.parametrize("room", [2**28, 2**20])
def test_what_no_batch_makes_fit_is_a_message(monkeypatch, room):
    """One clip on each device is too much, or the weights alone are: no batch size is named."""
    config, mesh = recipe.Config(batch_size=16), sharding.make_mesh(16)
    held = sharding.shard_params([jax.ShapeDtypeStruct((2**30,), jnp.bfloat16)], mesh)
    with pytest.raises(ValueError) as error:
        ways = needing(attention=9 * 2**30, layers=2**29)
        choose(monkeypatch, ways, config, room, ((), (), held))
    assert "Expected it to fit: take more devices or a smaller preset." in str(error.value)


def test_the_compilers_own_refusal_is_understood(monkeypatch):
    """TPUs refuse what they cannot hold; any other error of the compiler passes."""
    config, gib = recipe.Config(batch_size=64), 2**30
    full = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 45.50G of 15.75G hbm."
    assert (
        choose(monkeypatch, needing(layers=gib) | {"attention": full}, config, 15.75 * gib)[1]
        == "layers"
    )
    with pytest.raises(ValueError, match=r"the step needs 45\.50 GiB on each device.* 15\.75 GiB"):
        choose(monkeypatch, dict.fromkeys(WAYS, full), config, 15.75 * gib)
    with pytest.raises(ValueError, match="take more devices or a smaller preset"):
        choose(monkeypatch, dict.fromkeys(WAYS, "RESOURCE_EXHAUSTED: no figures"), config, gib)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        choose(monkeypatch, {"attention": "INTERNAL: a bug"}, config, gib)


# -------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(("size", "text"), [(-(2**20), "0.00"), (0, "0.00"), (-(2**30), "-1.00")])
def test_nothing_has_no_sign(size, text):
    assert cost.gib(size) == f"{text} GiB"


def test_bytes_needed():
    """Arguments, outputs that do not take their place, temporaries and the program itself."""
    sizes = memory(argument=1000, output=300, alias=200, temp=50, generated_code=7)
    assert compilation.bytes_needed(sizes) == 1000 + 300 - 200 + 50 + 7


def test_the_report_by_hand():
    """A step of 5 x 10^12 FLOPs and one gather of 8 GB, on 4 chips, 16 clips, 100 steps."""
    text = (
        "HloModule step\n\nENTRY %main (a: bf16[1000,25000]) -> f32[1000,100000] {\n"
        "  %a = bf16[1000,25000]{1,0} parameter(0)\n"
        "  %b = bf16[10000,100000]{1,0} parameter(1)\n"
        "  %w = bf16[40000,100000]{1,0} all-gather(%b), channel_id=1, replica_groups=[1,4]<=[4]\n"
        "  %c = f32[1000,100000]{1,0} dot(%a, %w), lhs_contracting_dims={1}\n}\n"
    )
    gib = 2**30
    sizes = dict(argument=6 * gib, output=2 * gib, alias=1 * gib, temp=4 * gib, generated_code=gib)
    step = program(text, chips=4, once=2e12, **sizes)
    chip = cost.Chip(flops=1e13, memory=16.0 * gib, bandwidth=1e12, links=2e9)
    parts = {"encoder": 0.4e12, "teacher": 0.6e12}  # 1 TFLOP a clip, of 4 on a chip
    report = compilation.report(step, parts, 0.25e12, chip, 16, 100)
    rows = {line[:34].strip(): line[34:].split() for line in report.splitlines() if line}
    assert rows["arguments"] == ["6.00", "GiB"] and rows["outputs"] == ["2.00", "GiB"]
    assert rows["of these in place of arguments"] == ["-1.00", "GiB"]
    assert rows["temporaries"] == ["4.00", "GiB"] and rows["program"] == ["1.00", "GiB"]
    assert rows["in all"] == ["12.00", "GiB", "of", "16.00", "GiB"]
    assert rows["all-gather"] == ["1", "8.000", "6.000"]  # 3 of 4 parts come in
    assert (
        rows["encoder"] == ["0.40"] and rows["teacher"] == ["0.60"] and rows["by hand"] == ["1.00"]
    )
    # 5 TFLOP on each of 4 chips are 1.25 for each of 16 clips: a fifth more than by hand
    assert rows["compiled program"] == (
        ["1.25", "computed", "twice", "20.0%,", "padded", "text", "20.0%"]
    )
    assert rows["XLA, each loop counted once"] == ["0.50"]
    assert rows["products"] == ["0.500"]  # 5 TFLOP at 10 TFLOP/s
    assert rows["memory"] == ["0.025"]  # (8 GB + 4 GiB) written and read at 1 TB/s
    assert rows["links"] == ["3.000"]  # 6 GB at 2 GB/s: the roof
    assert rows["at 100 % of peak"] == ["3.000", *"100 steps in 5 min, 5 clips/s".split()]
    assert rows["at 40 % of peak"] == ["3.000", *"100 steps in 5 min, 5 clips/s".split()]
    said = "3.500 0.000 s of links beside products".split()  # the gather waits, and is waited for
    assert (
        rows["no traffic beside products"] == said[:1]
        and rows["traffic as it is scheduled"] == said
    )
    fast = dataclasses.replace(chip, links=2e11)
    report = compilation.report(step, parts, 0.25e12, fast, 16, 100)
    rows = {line[:34].strip(): line[34:].split() for line in report.splitlines() if line}
    assert rows["links"] == ["0.030"] and rows["at 100 % of peak"][0] == "0.500"
    assert rows["at 40 % of peak"] == ["1.250", *"100 steps in 2 min, 13 clips/s".split()]


def test_peaks_are_of_chips_by_the_names_jax_gives_them():
    """As libtpu and CUDA name them; a chip has more memory bandwidth than links."""
    assert {"TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"} <= cost.CHIPS.keys()
    for chip in cost.CHIPS.values():
        assert chip.flops > 1e14 and chip.memory > 1e10 and chip.bandwidth > chip.links > 1e11
