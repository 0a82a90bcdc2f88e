"""The step, compiled for slices of TPUs that are not here, by the compiler that runs on them.

Needs the `tpu` extra (libtpu) and no TPU. Run by name, minutes: pytest tests/tpu
"""

import glob
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import test_cost

import runtime
import train
from runtime import sharding
from training import compilation, cost, hlo, recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu here: pip install '.[tpu]'"
)

ROOT = Path(train.__file__).parent
WIDTH = 34  # of the first column of the report


def train_py(*flags: str) -> subprocess.CompletedProcess:
    """`python train.py FLAGS`, as a user starts it: on no fake devices."""
    ours = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_PROCESSES")
    return subprocess.run(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ours},
        capture_output=True,
        text=True,
    )


def test_the_published_step_on_the_published_slice():
    """diva-8b on v4:4x4x8 with 512 clips, compiled from shapes: it fits in 32 GiB a chip, with
    frozen weights whole on each; it does the products by hand and those of attention again; weights
    that are split travel as often as they are needed, gradients once, and next to nothing else
    does, but what replicas sum; some of it beside products."""
    flags = ("--preset", "diva-8b", "--compile-only", "v4:4x4x8")
    done = train_py(*flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    print(done.stdout)
    began = "compiling for v4:4x4x8: this takes minutes\ndiva-8b on v4:4x4x8: 128 x TPU v4, mesh "
    assert done.stdout.startswith(began + "8 replica x 16 data x 1 fsdp, 512 clips\n")
    where = "whole on each of 128 devices"
    assert f"frozen weights {where}, backward recomputes attention" in done.stdout
    rows = {line[:WIDTH].strip(): line[WIDTH:].split() for line in done.stdout.splitlines()}
    assert 0.5 < float(rows["in all"][0]) <= 32

    config = train.with_dtype(recipe.parse(list(flags)), "tpu")
    asr, llm = cost.PUBLISHED[config.whisper], cost.PUBLISHED[config.llm]
    queries = asr.max_target_positions
    by_hand = sum(test_cost.flops(asr, llm, queries, cost.TEXT).values())
    assert float(rows["by hand"][0]) == pytest.approx(by_hand / cost.TERA, abs=0.01)
    again = test_cost.computed_again(asr, llm, queries, "attention")
    mel = test_cost.mel_products(asr) + test_cost.spectrum_products(asr)
    once = test_cost.shared_products(llm, "attention") * 128 / 512
    expected = (by_hand + again + mel + once) / cost.TERA
    assert float(rows["compiled program"][0]) == pytest.approx(expected, rel=1e-3)
    assert expected < 1.02 * by_hand / cost.TERA

    alone, scheduled = (
        float(rows[name][0])
        for name in ("no traffic beside products", "traffic as it is scheduled")
    )
    assert scheduled < alone - 0.005
    # In bfloat16: weights as often as they are gathered, gradients of what is trained once.
    params = train.abstract_inputs(config, sharding.make_mesh(512), asr=asr, llm=llm)[0][0]
    gathered = test_cost.bytes_gathered(params, sharding.MIN_SHARDED_SIZE, 2, "attention")
    gradients = 2 * test_cost.parameters(params)
    whole = {kind: float(rows[kind][1]) * 1e9 for kind in hlo.TRAVEL if kind in rows}
    assert whole.pop("all-gather") == pytest.approx(gathered, rel=0.01)
    # of 5120 rows the compiler makes 5376, in sixteen parts of whole tiles
    assert gradients < whole.pop("reduce-scatter") < 1.06 * gradients
    # a sixteenth of them is summed over the replicas
    assert whole.pop("all-reduce") == pytest.approx(gradients / 16, rel=0.1)
    # All clips' states before one layer of the LLM alone would be 2 GB.
    assert sum(whole.values()) < 0.03 * gradients


def test_a_tiny_step_on_a_small_slice():
    """In seconds: products as TPUs write them are read as what they are, and none is left out."""
    devices, batch_size = compilation.slice_of("v5e:4x4"), 64
    assert len(devices) == 16 and devices[0].device_kind == "TPU v5 lite"
    config = recipe.Config(batch_size=batch_size, dtype="bfloat16", queries=test_cost.QUERIES)
    mesh = sharding.make_mesh(batch_size, devices=devices)
    asr, llm = test_cost.ASR, test_cost.LLM
    state = train.abstract_inputs(config, mesh, asr=asr, llm=llm)[0]
    batch = test_cost.batch_of(config, asr, mesh)
    chip = cost.CHIPS[devices[0].device_kind]
    inputs = state, batch
    compiled, way, _ = train.compile_step(config, [mesh], chip.memory, lambda _: inputs)
    assert way == "attention"
    program = hlo.Program(compiled, len(devices))
    by_hand = sum(test_cost.flops(asr, llm, test_cost.QUERIES, test_cost.TEXT).values())
    again = test_cost.computed_again(asr, llm, test_cost.QUERIES, way)
    mel = test_cost.mel_products(asr) + test_cost.spectrum_products(asr)
    found = program.flops * len(devices) / batch_size
    # the convolutions are cut into pieces that overlap
    once = test_cost.shared_products(llm, way) * len(devices) / batch_size
    assert found == pytest.approx(by_hand + again + mel + once, rel=2e-3)


def test_two_compilers_move_the_same_numbers():
    """diva-8b on 8 chips of v5p and on 8 devices of a CPU, all arrays split: number for number the
    same is gathered, goes from all to all and is summed, and the products are the same. The CPU
    moves bfloat16 as float32; and it sums at once what TPUs sum in a ring, of 9 sends of an
    eighth, while they multiply."""
    flags = "--preset diva-8b --batch-size 128 --remat layers --fsdp 8 --dtype bfloat16"
    config = recipe.parse(flags.split())
    asr, llm = cost.PUBLISHED[config.whisper], cost.PUBLISHED[config.llm]

    def compiled(devices: list) -> tuple[hlo.Program, int]:
        mesh = sharding.make_mesh(config.batch_size, config.fsdp, devices)
        inputs = train.abstract_inputs(config, mesh, asr=asr, llm=llm)
        step, *_ = train.compile_step(config, [mesh], math.inf, lambda _: inputs)
        return hlo.Program(step, len(devices)), test_cost.parameters(inputs[0][0])

    here, trained = compiled(jax.devices()[:8])
    there, _ = compiled(compilation.slice_of("v5p:2x2x2"))
    assert here.flops == pytest.approx(there.flops, rel=0.01)
    ids = 4 * config.batch_size * (cost.TEXT + cost.SUFFIX + cost.TEXT)
    for kind, same in (("all-gather", ids), ("all-to-all", 0)):
        wide, narrow = (p.collectives.pop(kind).bytes - same for p in (here, there))
        assert wide / 4 == pytest.approx(narrow / 2, rel=0.01), kind
    assert here.collectives.pop("all-reduce").bytes == pytest.approx(4 * trained, rel=0.01)
    summed = there.collectives.pop("collective-permute") + there.collectives.pop("all-reduce")
    assert summed.bytes == pytest.approx(2 * trained * 9 / 8, rel=0.01)
    assert not here.collectives and not there.collectives


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("v4:3x3",), "--compile-only v4:3x3: no such slice"),
        (("nonsense",), "--compile-only nonsense: no such slice"),
        (("v3:2x2x1",), "--compile-only v3:2x2x1: the memory and speed of a TPU v3 are not known"),
        (("v5e:4x4", "--batch-size", "24"), "--batch-size 24: cannot be shared equally by 16"),
        (("v5e:2x2", "--batch-size", "512"), "the step needs "),
    ],
)
def test_what_cannot_be_compiled_is_one_line(flags, said):
    """Exit code 1, one line that says what to do, no word of the compiler's own beside it, and
    that compiling takes its time only where it began."""
    done = train_py("--preset", "diva-8b", "--compile-only", *flags)
    began = "compiling for v5e:2x2: this takes minutes\n" if "512" in flags else ""
    assert (done.returncode, done.stdout) == (1, began)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}") and "xpected" in line


@pytest.mark.skipif(any(map(glob.glob, runtime.DEVICES)), reason="there is an accelerator here")
def test_without_an_accelerator_the_cpu_is_taken_without_a_word():
    """libtpu is installed to compile for slices elsewhere: not worth ten lines of warning."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "llama.py", "what is two plus five"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout and not done.stderr
