"""The lemma, point by point, against independent numpy; and the losses that are built on it.

Points 1 to 5 run the project's own functions in float64 on random and on adversarial instances.
The reference is written from the definitions, in 80-bit floats where the platform has them.
"""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import distill_loss as dl

LLAMA_VOCABULARY = 128_256
BATCH = 4


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def numpy_kl(student, teacher, matrix):
    """KL(p_t || p_s) straight from the definition; long double, as it cancels where KL is small."""
    student, teacher, matrix = (x.astype(np.longdouble) for x in (student, teacher, matrix))
    log_t, log_s = (log_softmax(h @ matrix.T) for h in (teacher, student))
    return (np.exp(log_t) * (log_t - log_s)).sum(-1).astype(float)


def logsumexp(z):
    return z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))


SHAPES = [(37, 6), (5, 8), (3, 2)]  # V, E: with 16 rows a chunk, 37 needs a ragged third one
KINDS = (
    "plain",
    "rank-deficient",
    "huge logits",
    "tiny logits",
    "nearly equal",
    "equal",
    "common shift",
    "certain teacher",
    "bfloat16",
)


def instance(seed, shape, kind="plain"):
    """(student [4, E], teacher [4, E], matrix [V, E]) in f64: random, or hard in a named way."""
    rng = np.random.default_rng(seed)
    rows, width = shape
    matrix = rng.normal(size=shape) * np.exp(rng.normal())
    teacher, student = rng.normal(size=(2, BATCH, width)) * 2
    if kind == "rank-deficient":
        matrix[:, -1] = matrix[:, 0]
    if kind == "huge logits":
        matrix *= 100
    if kind == "tiny logits":
        matrix *= 1e-4
    if kind == "nearly equal":
        student = teacher + 1e-4 * student
    if kind == "equal":
        student = teacher.copy()
    if kind == "common shift":  # every row moved alike changes no distribution
        matrix += 50 * rng.normal(size=width)
    if kind == "certain teacher":  # all the mass on one token, whatever the student thinks
        teacher = 20 * matrix[rng.integers(rows, size=BATCH)]
    if kind == "bfloat16":  # many equal values and equal logits
        student, teacher, matrix = (
            x.astype(ml_dtypes.bfloat16).astype(float) for x in (student, teacher, matrix)
        )
    return student, teacher, matrix


@jax.jit
def _measure(student, teacher, matrix):
    kl, pull = jax.vjp(lambda h: dl.kl_divergence(h, teacher, matrix), student)
    each = jnp.eye(BATCH)  # one clip counts at a time
    gram = dl.gram_matrix(matrix)
    return {
        "kl": kl,
        "gradient": pull(jnp.ones_like(kl))[0],
        "gram": gram,
        "gram loss": jax.vmap(lambda w: dl.response_gram(student, teacher, gram, w))(each),
        "l2": jax.vmap(lambda w: dl.response_l2(student, teacher, w))(each),
    }


def measure(student, teacher, matrix):
    """What the project's functions give in float64, 16 rows of the output matrix at a time."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(dl, "CHUNK", 16)
        found = {k: np.asarray(v) for k, v in _measure(student, teacher, matrix).items()}
    assert all(v.dtype == np.float64 and np.isfinite(v).all() for v in found.values())
    return found


def slack(*states_and_matrix):
    """Rounding of f64 logits of this size, and of the few sums over them."""
    *states, matrix = states_and_matrix
    return 1e-14 * max(np.abs(h @ matrix.T).max() for h in states) + 1e-25


# No shrinking: an instance is one seed and says as much as a smaller seed would.
examples = functools.partial(
    settings, max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate]
)
cases = given(st.integers(0, 10**6), st.sampled_from(SHAPES), st.sampled_from(KINDS))


@examples()
@cases
def test_point_1_kl_is_the_bregman_divergence_of_logsumexp_and_convex(seed, shape, kind):
    """KL = A(z_s) - A(z_t) - p_t.(z_s - z_t), and the midpoint lies below the chord."""
    student, teacher, matrix = instance(seed, shape, kind)
    kl, eps = measure(student, teacher, matrix)["kl"], slack(student, teacher, matrix)
    np.testing.assert_allclose(kl, numpy_kl(student, teacher, matrix), rtol=1e-6, atol=eps)
    long_s, long_t, long_o = (x.astype(np.longdouble) for x in (student, teacher, matrix))
    z_s, z_t = long_s @ long_o.T, long_t @ long_o.T
    bregman = logsumexp(z_s) - logsumexp(z_t) - (np.exp(log_softmax(z_t)) * (z_s - z_t)).sum(-1)
    np.testing.assert_allclose(kl, bregman.astype(float), rtol=1e-6, atol=eps)
    other = teacher + np.random.default_rng(seed).normal(size=teacher.shape)
    middle = measure((student + other) / 2, teacher, matrix)["kl"]
    chord = (kl + measure(other, teacher, matrix)["kl"]) / 2
    assert (middle <= chord + 10 * eps).all()


@examples()
@cases
def test_point_2_equal_states_are_the_minimum_and_the_only_one_iff_full_column_rank(
    seed, shape, kind
):
    """KL is 0 at equality and along the null space of O_c; elsewhere it is above a positive bound.

    By Taylor, KL = 1/2 Var_q(O d) >= 1/2 min(q) |O_c d|^2 with min(q) >= min(p_t) e^-range(O d).
    """
    _, teacher, matrix = instance(seed, shape, kind)
    assert (measure(teacher, teacher, matrix)["kl"] == 0).all()
    centred = matrix - matrix.mean(0)
    _, sigma, directions = np.linalg.svd(centred)
    weakest = directions[-1]  # of all directions the one that moves the logits least
    kl = measure(teacher + weakest, teacher, matrix)["kl"]
    full_rank = len(sigma) == shape[1] and sigma[-1] > 1e-10 * sigma[0]
    assert full_rank == (kind != "rank-deficient" and shape[0] > shape[1])
    if not full_rank:
        np.testing.assert_allclose(kl, 0.0, atol=1e-20 * (1 + np.square(matrix).sum()))
        return
    logits = matrix @ weakest
    p_min = np.exp(log_softmax(teacher @ matrix.T)).min(-1)
    floor = p_min * np.exp(-np.ptp(logits)) * np.square(centred @ weakest).sum() / 2
    assert (kl >= floor * (1 - 1e-6) - slack(teacher, matrix) ** 2).all()
    if kind == "plain":
        assert (kl > 0).all()


@examples()
@cases
def test_point_3_a_step_down_the_distance_is_never_a_step_up_in_kl(seed, shape, kind):
    """grad KL = O^T (p_s - p_t), <grad KL, d> >= KL >= 0; KL falls on the line to the teacher."""
    student, teacher, matrix = instance(seed, shape, kind)
    found, eps = measure(student, teacher, matrix), slack(student, teacher, matrix)
    p_s, p_t = (np.exp(log_softmax(h @ matrix.T)) for h in (student, teacher))
    largest = np.abs(matrix).max()
    np.testing.assert_allclose(
        found["gradient"], (p_s - p_t) @ matrix, rtol=1e-7, atol=100 * eps * largest
    )
    along = (found["gradient"] * (student - teacher)).sum(-1)
    assert (along >= found["kl"] * (1 - 1e-9) - 10 * eps).all()
    assert (found["kl"] >= -eps).all()
    path = [
        measure(teacher + a * (student - teacher), teacher, matrix)["kl"] for a in (1, 0.7, 0.3, 0)
    ]
    assert (np.diff(path, axis=0) <= eps).all()


@examples()
@cases
def test_point_4_kl_is_below_the_gram_the_sigma_and_the_range_bound(seed, shape, kind):
    student, teacher, matrix = instance(seed, shape, kind)
    found, eps = measure(student, teacher, matrix), slack(student, teacher, matrix)
    d, centred = student - teacher, matrix - matrix.mean(0)
    assert (found["kl"] <= np.square(d @ centred.T).sum(-1) / 4 + eps).all()
    assert (found["kl"] <= np.square(np.ptp(d @ matrix.T, axis=-1)) / 8 + eps).all()
    # the losses as they are trained on, not squared: KL <= (gram / 2)^2 <= (sigma l2 / 2)^2
    loss, sigma = found["gram loss"], np.linalg.norm(centred, 2)
    rounding = 1e-7 * np.linalg.norm(matrix) * np.linalg.norm(d, axis=-1)
    assert (np.sqrt(np.maximum(found["kl"] - eps, 0)) <= loss / 2 + rounding).all()
    assert (loss <= sigma * found["l2"] * (1 + 1e-9) + rounding).all()


def test_point_4_is_tight_up_to_the_constant():
    """Two tokens of equal probability, a small step: KL -> range^2 / 8 = |O_c d|^2 / 4."""
    matrix = np.asarray([[1.0], [-1.0]])
    teacher, student = np.zeros((1, 1)), np.full((1, 1), 1e-3)
    with jax.enable_x64(True):
        kl = dl.kl_divergence(*(jnp.asarray(x) for x in (student, teacher, matrix)))
    assert float(kl[0]) == pytest.approx(0.002**2 / 8, rel=1e-5)


@examples()
@cases
def test_point_5_the_gram_loss_is_the_distance_of_centred_logits(seed, shape, kind):
    """G = O_c^T O_c, and sqrt(d^T G d) = |O_c d|."""
    student, teacher, matrix = instance(seed, shape, kind)
    found = measure(student, teacher, matrix)
    d, centred = student - teacher, matrix - matrix.mean(0)
    size = np.linalg.norm(matrix)
    np.testing.assert_allclose(found["gram"], centred.T @ centred, rtol=1e-9, atol=1e-13 * size**2)
    np.testing.assert_allclose(found["l2"], np.linalg.norm(d, axis=-1), rtol=1e-12)
    # G is rounded at 1e-16 of its largest entry, and a square root makes 1e-8 of that at worst
    floor = 1e-7 * size * np.linalg.norm(d, axis=-1).max()
    expected = np.linalg.norm(d @ centred.T, axis=-1)
    np.testing.assert_allclose(found["gram loss"], expected, rtol=1e-6, atol=floor)


def test_point_5_holds_in_float32_at_a_real_width():
    """The f32 gram loss of 4,000 x 128 keeps 1e-5 of |O_c d|."""
    rng = np.random.default_rng(3)
    matrix = (rng.normal(size=(4000, 128)) + 1).astype(np.float32)
    student, teacher = rng.normal(size=(2, 1, 128)).astype(np.float32)
    wide = matrix.astype(float) - matrix.astype(float).mean(0)
    expected = np.linalg.norm(wide @ (student.astype(float) - teacher.astype(float))[0])
    gram = dl.gram_matrix(jnp.asarray(matrix))
    found = dl.response_gram(jnp.asarray(student), jnp.asarray(teacher), gram, jnp.ones(1))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_point_6_the_cost_of_each_loss_is_what_the_docstring_says(monkeypatch):
    """Floating-point operations that XLA counts: O(E), 2 E^2, and 8 V E (two passes of two)."""
    rows, width, batch = 2000, 64, 3
    monkeypatch.setattr(dl, "CHUNK", rows)
    states, ones = jnp.ones((2, batch, width)), jnp.ones(batch)
    gram, matrix = jnp.ones((width, width)), jnp.ones((rows, width))

    def flops(function, *args):
        return jax.jit(function).lower(*states, *args).cost_analysis()["flops"] / batch

    assert flops(dl.response_l2, ones) < 10 * width
    assert 2 * width**2 < flops(dl.response_gram, gram, ones) < 2 * width**2 + 10 * width
    assert 8 * rows * width < flops(dl.response_kl, matrix, ones) < 9 * rows * width
    assert pytest.approx(16.8e6, rel=0.01) == 4096**2
    assert pytest.approx(1.05e9, rel=0.01) == 2 * LLAMA_VOCABULARY * 4096


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
    kl, pull = jax.vjp(lambda h: dl.kl_divergence(h, teacher, matrix), student)
    return kl, pull(jnp.ones_like(kl))[0]


@pytest.mark.parametrize(
    "apart, dtype",
    [(1e-3, jnp.float32), (0.3, jnp.float32), (1.0, jnp.float32), (0.03, jnp.bfloat16)],
    ids=["near", "middle", "far", "bf16"],
)
def test_exact_kl_and_its_gradient_equal_the_float64_reference(vocabulary, apart, dtype):
    """At V = 128,256, no multiple of the chunk, for near and far states: to 1e-6 of KL or of 1.

    A bf16 matrix is exact in f32, so that the same tolerance holds for it.
    """
    matrix, teacher = vocabulary
    assert LLAMA_VOCABULARY % dl.CHUNK
    noise = np.random.default_rng(1).normal(size=teacher.shape).astype(np.float32)
    student = teacher + np.float32(apart) * noise
    kl, gradient = _kl_and_gradient(student, teacher, matrix, dtype)
    matrix = np.asarray(jnp.asarray(matrix, dtype)).astype(float)
    expected = numpy_kl(student, teacher, matrix)
    np.testing.assert_allclose(kl, expected, rtol=0, atol=1e-6 * max(1, expected.max()))
    np.testing.assert_allclose(kl, expected, rtol=1e-5)  # and small ones to their own size
    p_s, p_t = (np.exp(log_softmax(h.astype(float) @ matrix.T)) for h in (student, teacher))
    scale = np.abs((p_s - p_t) @ matrix).max()
    np.testing.assert_allclose(gradient, (p_s - p_t) @ matrix, rtol=0, atol=1e-5 * scale)


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
    """States and matrix in bf16: f32 accumulation gives the KL of these very numbers."""
    rng = np.random.default_rng(2)
    matrix = jnp.asarray(rng.normal(size=(1000, 16)) * scale, jnp.bfloat16)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.bfloat16)
    value, gradient = jax.value_and_grad(dl.response_kl)(student, teacher, matrix, jnp.ones(4))
    assert gradient.dtype == jnp.bfloat16
    assert jnp.isfinite(value) and jnp.isfinite(gradient.astype(jnp.float32)).all()
    wide = [np.asarray(x).astype(float) for x in (student, teacher, matrix)]
    # rel 1e-5: f32 logits of size 3e3 are rounded at 1e-4, of KLs of size 3e3 as well
    assert float(value) == pytest.approx(numpy_kl(*wide).mean(), rel=1e-5)


def test_exact_kl_sees_a_student_that_believes_in_what_the_teacher_excludes():
    """Logits of which the teacher's probability underflows in f32 still count in full."""
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
