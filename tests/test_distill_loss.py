"""The losses of distill_loss.py in float32 and bfloat16: values, weights, gradients, memory.

Values and gradients are compared with float64 numpy. The lemma has its own file, test_lemma.py.
"""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_lemma import log_softmax, numpy_kl

import distill_loss as dl

LLAMA_VOCABULARY = 128_256


# ---------------------------------------------------------------------------------------------
# The exact KL at full size


@pytest.fixture(scope="module")
def vocabulary():
    """A Llama-sized vocabulary over a small width, float32."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(LLAMA_VOCABULARY, 48)).astype(np.float32) * np.float32(0.3)
    teacher = rng.normal(size=(3, 48)).astype(np.float32) * 2
    return matrix, teacher


@functools.partial(jax.jit, static_argnums=3)
def _kl_and_gradient(student, teacher, matrix, dtype):
    matrix = matrix.astype(dtype)
    kl, vjp = jax.vjp(lambda h: dl.kl_divergence(h, teacher, matrix), student)
    return kl, vjp(jnp.ones_like(kl))[0]


@pytest.mark.parametrize("num_rows", [32_000, LLAMA_VOCABULARY])
@pytest.mark.parametrize(
    "noise_scale, dtype",
    [
        (1e-3, jnp.float32),
        (0.03, jnp.float32),
        (0.3, jnp.float32),
        (1.0, jnp.float32),
        (0.03, jnp.bfloat16),
    ],
)
def test_exact_kl_and_its_gradient_equal_the_float64_reference(
    vocabulary, num_rows, noise_scale, dtype
):
    """For close and distant states; V is no multiple of the chunk size.

    KL: 3e-6 nats absolute, or 3e-6 relative above 1 nat. KL is a difference of two A(z) of about
    15 (half an ulp: 5e-7), so a small KL has the same absolute error. Measured: 1e-6.
    Gradient: a difference of two mean rows, each with an error of about 1e-6 of its largest entry.
    A bf16 matrix is exact in float32, so it has the same tolerances.
    """
    matrix, teacher = vocabulary
    matrix = matrix[:num_rows]
    assert num_rows % dl.CHUNK
    noise = np.random.default_rng(1).normal(size=teacher.shape).astype(np.float32)
    student = teacher + np.float32(noise_scale) * noise
    kl, gradient = _kl_and_gradient(student, teacher, matrix, dtype)

    exact_matrix = np.asarray(jnp.asarray(matrix, dtype)).astype(float)
    expected = numpy_kl(student, teacher, exact_matrix)
    assert (np.abs(kl - expected) <= 3e-6 * np.maximum(1, expected)).all()

    p_s, p_t = (np.exp(log_softmax(h.astype(float) @ exact_matrix.T)) for h in (student, teacher))
    atol = 3e-6 * np.abs(p_t @ exact_matrix).max()
    np.testing.assert_allclose(gradient, (p_s - p_t) @ exact_matrix, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_exact_kl_keeps_no_array_of_the_size_of_the_logits(vocabulary, dtype):
    """Forward and backward hold less than a third of a [B, V] float32 array.

    In bf16 XLA's CPU backend, which computes in f32 alone, also keeps one f32 copy of the matrix.
    """
    matrix, _ = vocabulary
    rows = 64
    states = jax.ShapeDtypeStruct((rows, matrix.shape[1]), jnp.float32)
    table = jax.ShapeDtypeStruct(matrix.shape, dtype)

    def chunked(student, teacher, matrix):
        return dl.response_kl(student, teacher, matrix, jnp.ones(rows))

    def plain(student, teacher, matrix):
        log_t, log_s = (jax.nn.log_softmax(h @ matrix.T) for h in (teacher, student))
        return (jnp.exp(log_t) * (log_t - log_s)).sum(-1).mean()

    def peak(loss):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(states, states, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = rows * LLAMA_VOCABULARY * 4
    copy = 4 * matrix.size if dtype == jnp.bfloat16 else 0
    assert peak(chunked) - copy < 0.33 * logits < logits < peak(plain) - copy


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_exact_kl_is_finite_for_huge_and_tiny_logits_in_bfloat16(scale):
    """States and matrix in bf16: accumulation in float32 gives the KL of the rounded inputs."""
    rng = np.random.default_rng(2)
    matrix = jnp.asarray(rng.normal(size=(1000, 16)) * scale, jnp.bfloat16)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.bfloat16)
    value, gradient = jax.value_and_grad(dl.response_kl)(student, teacher, matrix, jnp.ones(4))
    assert gradient.dtype == jnp.bfloat16
    assert jnp.isfinite(value) and jnp.isfinite(gradient.astype(jnp.float32)).all()
    exact = numpy_kl(*(np.asarray(x).astype(float) for x in (student, teacher, matrix))).mean()
    # abs 3e-6: rounding of A(z), about ln 1000; rel 1e-5: logits and KL of 3e3 are rounded at 1e-4
    assert float(value) == pytest.approx(exact, rel=1e-5, abs=3e-6)


def test_exact_kl_counts_tokens_that_the_teacher_excludes():
    """The teacher's probability of the last token underflows in float32; its logit still counts."""
    matrix = jnp.eye(3)
    teacher, student = jnp.asarray([[0.0, 0.0, -200.0]]), jnp.asarray([[0.0, 0.0, 100.0]])
    value, gradient = jax.value_and_grad(dl.response_kl)(student, teacher, matrix, jnp.ones(1))
    assert float(value) == pytest.approx(100 - np.log(2), rel=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, -0.5, 1.0]], atol=1e-6)


def test_exact_kl_is_the_same_when_the_vocabulary_is_spread_over_devices(monkeypatch):
    monkeypatch.setattr(dl, "CHUNK", 96)
    states, matrix = jax.random.normal(jax.random.key(8), (2, 8, 16)), _matrix(1000, 16)
    expected = jax.jit(jax.value_and_grad(dl.response_kl))(*states, matrix, jnp.ones(8))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    arrays = (jax.device_put(x, split) for x in (*states, matrix, jnp.ones(8)))
    found = jax.jit(jax.value_and_grad(dl.response_kl))(*arrays)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


# ---------------------------------------------------------------------------------------------
# The losses as they are trained on


LOSSES = {
    "l2": dl.response_l2,
    "gram": lambda s, t, w: dl.response_gram(s, t, dl.gram_matrix(_matrix()), w),
    "kl": lambda s, t, w: dl.response_kl(s, t, _matrix(), w),
}


def _matrix(rows=50, width=8):
    return jax.random.normal(jax.random.key(0), (rows, width))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_at_equality_is_zero_and_finite(name, dtype):
    """Also when only one pair of the batch is equal, and the others are not."""
    states = jax.random.normal(jax.random.key(1), (3, 8), dtype)
    value, gradient = jax.value_and_grad(LOSSES[name])(states, states, jnp.ones(3))
    assert float(value) == 0 and (gradient == 0).all()
    moved = states.at[1:].add(1)
    gradient = jax.grad(LOSSES[name])(moved, states, jnp.ones(3))
    assert jnp.isfinite(gradient).all()
    assert (gradient[0] == 0).all() and (jnp.abs(gradient[1:]).sum(-1) > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient_and_the_student_does(name):
    student, teacher = jax.random.normal(jax.random.key(2), (2, 3, 8))
    to_student, to_teacher = jax.grad(LOSSES[name], argnums=(0, 1))(student, teacher, jnp.ones(3))
    assert (to_teacher == 0).all()
    assert (jnp.abs(to_student).sum(-1) > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_clip_of_weight_0_does_not_count(name):
    """Nor does it get a gradient; and a batch of such clips alone gives 0, not NaN."""
    student, teacher = jax.random.normal(jax.random.key(3), (2, 3, 8))
    expected = LOSSES[name](student[:2], teacher[:2], jnp.ones(2))
    weights = jnp.asarray([1.0, 1.0, 0.0])
    value, gradient = jax.value_and_grad(LOSSES[name])(student, teacher, weights)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert (gradient[2] == 0).all()
    value, gradient = jax.value_and_grad(LOSSES[name])(student, teacher, jnp.zeros(3))
    assert float(value) == 0.0 and (gradient == 0).all()


def test_the_gram_loss_is_accurate_in_float32():
    """Of a 4,000 x 128 matrix with a large mean row: 1e-5 relative to |O_c d|."""
    rng = np.random.default_rng(3)
    matrix = (rng.normal(size=(4000, 128)) + 1).astype(np.float32)
    student, teacher = rng.normal(size=(2, 1, 128)).astype(np.float32)
    centred = matrix.astype(float) - matrix.astype(float).mean(0)
    expected = np.linalg.norm(centred @ (student.astype(float) - teacher.astype(float))[0])
    gram = dl.gram_matrix(jnp.asarray(matrix))
    loss = dl.response_gram(jnp.asarray(student), jnp.asarray(teacher), gram, jnp.ones(1))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_response_l2_is_the_mean_distance_not_squared():
    student, teacher = jnp.asarray([[3.0, 4.0], [0.0, 1.0]]), jnp.zeros((2, 2))
    assert float(dl.response_l2(student, teacher, jnp.ones(2))) == pytest.approx(3.0)


def numpy_alignment(virtual, targets, lengths):
    """The definition, spelt out: the last N virtual tokens against the transcript's N."""
    distances = [
        np.linalg.norm(virtual[b, len(virtual[b]) - n + i] - targets[b, i])
        for b, n in enumerate(lengths)
        for i in range(n)
    ]
    return np.mean(distances)


def test_alignment_compares_the_last_n_positions_for_every_length():
    """Every length from 1 to Q; the published five-token shift of targets gives another value."""
    rng = np.random.default_rng(4)
    queries, prefix = 9, 5
    virtual = rng.normal(size=(2, queries, 4)).astype(np.float32)
    targets = rng.normal(size=(2, queries, 4)).astype(np.float32)
    template = rng.normal(size=(2, prefix, 4)).astype(np.float32)
    shifted = np.concatenate([template, targets], 1)[:, :queries]  # what the first release aligned
    loss = jax.jit(dl.token_alignment)
    for length in range(1, queries + 1):
        lengths = np.asarray([length, max(1, queries - length)])
        expected = numpy_alignment(virtual, targets, lengths)
        assert float(loss(virtual, targets, lengths, np.ones(2))) == pytest.approx(
            expected, rel=1e-5
        )
        published = numpy_alignment(virtual, shifted, lengths)
        assert abs(published - expected) > 1e-3


def test_alignment_pulls_each_query_to_its_own_token():
    """At every length the gradient of query Q - N + n points away from token n, others get none."""
    queries, width = 6, 5
    virtual, targets = np.asarray(jax.random.normal(jax.random.key(7), (2, 1, queries, width)))
    gradient = jax.jit(jax.grad(dl.token_alignment))
    for n in range(1, queries + 1):
        found = gradient(virtual, targets, np.asarray([n]), np.ones(1))[0]
        apart = virtual[0, queries - n :] - targets[0, :n]
        expected = np.zeros((queries, width), np.float32)
        expected[queries - n :] = apart / np.linalg.norm(apart, axis=-1, keepdims=True) / n
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_alignment_ignores_padding_and_clips_of_weight_0():
    """Padding beyond a transcript changes nothing; nor does a clip of weight 0."""
    virtual, targets = jax.random.normal(jax.random.key(5), (2, 2, 6, 4))
    lengths, weights = jnp.asarray([2, 4]), jnp.ones(2)
    garbage = targets.at[0, 2:].set(1e9)
    assert dl.token_alignment(virtual, garbage, lengths, weights) == dl.token_alignment(
        virtual, targets, lengths, weights
    )
    weights = jnp.asarray([0.0, 1.0])
    value, gradient = jax.value_and_grad(dl.token_alignment)(virtual, targets, lengths, weights)
    alone = dl.token_alignment(virtual[1:], targets[1:], lengths[1:], jnp.ones(1))
    assert float(value) == pytest.approx(float(alone), rel=1e-6)
    assert (gradient[0] == 0).all() and (gradient[1, 2:] != 0).any()


def test_alignment_is_zero_with_zero_gradient_at_its_target_and_without_clips():
    targets = jax.random.normal(jax.random.key(6), (1, 3, 4))
    virtual = jnp.concatenate([jnp.ones((1, 2, 4)), targets], 1)
    arrays = virtual, targets, jnp.asarray([3])
    loss = jax.value_and_grad(dl.token_alignment)
    for weights in (jnp.ones(1), jnp.zeros(1)):
        value, gradient = loss(*arrays, weights)
        assert float(value) == 0.0 and (gradient == 0).all()
    moved = virtual.at[:, -1].add(1)  # one position equal no longer, the others still
    value, gradient = loss(moved, *arrays[1:], jnp.ones(1))
    assert jnp.isfinite(gradient).all() and (gradient[:, :-1] == 0).all()
    value, gradient = loss(moved, *arrays[1:], jnp.zeros(1))
    assert float(value) == 0.0 and (gradient == 0).all()


def test_losses_do_not_take_targets_as_variables():
    """The transcript's embeddings are constants: no gradient flows into the LLM's table."""
    virtual, targets = jax.random.normal(jax.random.key(9), (2, 2, 4, 3))
    arrays = virtual, targets, jnp.asarray([2, 3]), jnp.ones(2)
    assert (jax.grad(dl.token_alignment, argnums=1)(*arrays) == 0).all()


# ---------------------------------------------------------------------------------------------
# python distill_loss.py


def test_the_command_prints_the_lemma_on_a_folder_of_shards(tmp_path, capsys):
    """A tied bf16 model in two shards: every bound holds in the printed table, KL never rises."""
    rng = np.random.default_rng(0)
    names = {"model.embed_tokens.weight": (90, 16), "model.norm.weight": (16,)}
    for number, (name, shape) in enumerate(names.items()):
        array = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
        save_file({name: array}, tmp_path / f"{number}.safetensors")
    index = {"weight_map": {name: f"{i}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    dl.main(str(tmp_path), pairs=8)
    lines = capsys.readouterr().out.splitlines()
    assert "model.embed_tokens.weight, V = 90, E = 16" in lines[0]
    assert "rank 16 of 16" in lines[2] and "only minimum" in lines[2]
    shares = [
        float(cell[1:-1])
        for line in lines
        for cell in line.split()
        if cell[0] == "(" and cell[1:2].isdigit()
    ]
    shares = [share for share in shares if share]
    assert len(shares) >= 15 and max(shares) <= 1
    assert any(line.split()[:2] == ["rises", "0"] for line in lines)
    assert [line.split()[0] for line in lines[-3:]] == ["l2", "gram", "kl"]


def test_the_command_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        dl.main(str(tmp_path))
    save_file({"decoder": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds none of lm_head.weight.*expected.*--model"):
        dl.main(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        dl.main(str(tmp_path))
