"""What XLA compiles is what float64 NumPy computes, at sizes at which it changes its ways.

One version of it computed wrong sums over rows (see runtime/__init__.py); it would say nothing.
Here it compiles as it does for users, not in the older way that conftest.py chooses.
"""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import distill_loss
import llama
import whisper
from runtime import attention

AROUND = [size + step for size in (2**14, 2**15, 2**16) for step in (-1, 0, 1)]
rows = pytest.mark.parametrize("rows", AROUND)
OLD = jaxlib.__version__ == "0.10.2"
NEW = {"xla_cpu_use_fusion_emitters": True} if OLD else None
jit = functools.partial(jax.jit, compiler_options=NEW)
FAULT = """
import jax, jax.numpy as jnp, numpy as np, {first}
x = jnp.stack([jnp.arange(32_769.0), *jnp.zeros((2, 32_769))], axis=1)
found = jax.jit(lambda x: jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x))(x)
print(float(found[-1]))
"""


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).normal(size=shape).astype(np.float32)


def close(found, expected: np.ndarray, relative: float = 1e-5) -> None:
    """f32 sums of a few dozen terms of one size: 1e-5 of the largest."""
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert error <= relative * np.abs(expected).max()


@rows
@pytest.mark.parametrize("inner", [3, 24])
def test_a_sum_of_squares_of_a_product(rows, inner):
    """The fault itself: by vmap and by one product, for each row and over all of them."""
    x, matrix = values(rows, inner), values(inner, inner)
    expected = np.square(x.astype(np.float64) @ matrix.astype(np.float64).T).sum(-1)

    def by_row(x, matrix):
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x)

    close(jit(by_row)(x, matrix), expected)
    close(jit(lambda x, m: jnp.square(x @ m.T).sum(-1))(x, matrix), expected)
    whole = np.array([expected.sum()])
    close([jit(lambda x, m: by_row(x, m).sum())(x, matrix)], whole)


@rows
def test_norms(rows):
    """LayerNorm and RMSNorm, behind a product, as in every layer."""
    x, matrix = values(rows, 8), values(8, 8)
    wide = x.astype(np.float64) @ matrix.astype(np.float64).T
    centred = wide - wide.mean(-1, keepdims=True)
    layer = whisper.LayerNorm(jnp.ones(8), jnp.zeros(8))
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
    close(jit(lambda x, m: layer(x @ m.T))(x, matrix), expected, 1e-4)  # of nearly equal values
    root = llama.RMSNorm(jnp.ones(8), 1e-5)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-5)
    close(jit(lambda x, m: root(x @ m.T))(x, matrix), expected)


@rows
def test_distances_and_their_means(rows):
    """Those of token alignment and of the response, l2 and gram; and of the exact KL."""
    student, teacher, matrix = values(rows, 6), values(rows + 1, 6)[:-1], values(9, 6)
    d = student.astype(np.float64) - teacher
    ones = np.ones(rows, np.float32)
    close(
        [jit(distill_loss.response_l2)(student, teacher, ones)],
        [np.linalg.norm(d, axis=-1).mean()],
    )
    gram = jit(distill_loss.gram_matrix)(matrix)
    centred = (matrix - matrix.mean(0)).astype(np.float64)
    expected = np.linalg.norm(d @ centred.T, axis=-1).mean()
    close([jit(distill_loss.response_gram)(student, teacher, gram, ones)], [expected])

    def log_softmax(states):
        z = states.astype(np.float64) @ matrix.astype(np.float64).T
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    close(jit(distill_loss.kl_divergence)(student, teacher, matrix), kl)


@rows
def test_attention(rows):
    """Softmax and its sums, of so many keys and of so many queries, in both of its ways."""
    many, few = values(1, rows, 1, 4), values(1, 3, 1, 4)
    for queries, keys in ((few, many), (many, few)):
        q, k = (x[0, :, 0].astype(np.float64) for x in (queries, keys))
        shares = np.exp(q @ k.T / 2)
        expected = shares / shares.sum(-1, keepdims=True) @ k
        for attend in (attention.attend, lambda *x: attention.by_head(False, *x)):
            close(jit(attend)(queries, keys, keys)[0, :, 0], expected)


@rows
def test_log_mel(rows):
    """Of a recording with so many samples' worth of frames around the size, in hops."""
    samples = 160 * max(2, rows // 64)
    sound = 0.1 * values(1, samples)
    found = np.asarray(jit(whisper.log_mel, static_argnums=1)(sound, 8))
    padded = np.pad(sound[0].astype(np.float64), 200, mode="reflect")
    frames = np.stack([padded[i : i + 400] for i in range(0, samples, 160)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    mel = np.square(np.abs(np.fft.rfft(frames * hann))) @ whisper.mel_filters(8)
    log = np.log10(np.maximum(mel, 1e-10))
    close(found[0], (np.maximum(log, log.max() - 8) + 4) / 4)


@pytest.mark.parametrize("first", ["train", "distill_loss", "weights", "eval"])
def test_every_chapter_brings_the_guard(first, monkeypatch):
    """In a process of its own, with no flags but ours; the fault would say 1,071,645,696."""
    monkeypatch.delenv("XLA_FLAGS")
    root = Path(llama.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", FAULT.format(first=first)], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(32_768.0**2)], done.stderr


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="jaxlib 0.10.2 alone has the fault")
def test_the_fault_is_there_without_the_guard(monkeypatch):
    """Or the guard could go; and who has chosen a flag keeps it."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=reduce")
    code = FAULT.format(first="runtime")
    root = Path(llama.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) != 32_768.0**2
