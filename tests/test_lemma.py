"""The lemma of distill_loss.py with numbers: first three tokens by hand, then any size.

The second half has one test for each point of the lemma. It runs the project's own functions in
float64 on random and on difficult inputs, and compares them with numpy code that is written from
the definitions. The oracle for KL uses 80-bit floats where the platform has them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import distill_loss as dl

# ---------------------------------------------------------------------------------------------
# Three tokens by hand
#
# The vocabulary has V = 3 tokens and the states have E = 2 numbers. Student and teacher share the
# output matrix O (MATRIX). The teacher prefers the first token; the student has no preference.

MATRIX = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
TEACHER = np.array([[np.log(2), 0.0]])  # logits (ln 2, 0, 0), p_t = (1/2, 1/4, 1/4)
STUDENT = np.array([[0.0, 0.0]])  # logits (0, 0, 0), p_s = (1/3, 1/3, 1/3)


def test_by_hand_kl_from_its_definition_and_from_point_1():
    """KL = sum of p_t ln(p_t / p_s) = 1/2 ln(3/2) + 2 * 1/4 ln(3/4) = 1/2 ln(9/8) = 0.0589.

    Point 1: A(z_s) = ln 3, A(z_t) = ln 4, and p_t . (z_s - z_t) = 1/2 * (-ln 2).
    """
    definition = 1 / 2 * np.log(3 / 2) + 2 * 1 / 4 * np.log(3 / 4)
    point_1 = np.log(3) - np.log(4) + 1 / 2 * np.log(2)
    assert definition == pytest.approx(0.0589, abs=1e-4)
    assert point_1 == pytest.approx(definition, rel=1e-12)
    assert evaluate(STUDENT, TEACHER, MATRIX).kl == pytest.approx(definition, rel=1e-12)


def test_by_hand_equal_states_and_a_direction_that_changes_no_probability():
    """Point 2. O_c of this O has rank 2 = E, so only the teacher's own state gives KL = 0.

    With a third column of fives, d = (0, 0, 1) adds 5 to every logit: KL = 0 with unequal states.
    """
    assert evaluate(TEACHER, TEACHER, MATRIX).kl == 0
    with_constant = np.concatenate([MATRIX, np.full((3, 1), 5.0)], axis=1)
    teacher = np.array([[np.log(2), 0.0, 0.0]])
    student = np.array([[np.log(2), 0.0, 1.0]])
    assert evaluate(student, teacher, with_constant).kl == pytest.approx(0, abs=1e-14)


def test_by_hand_the_gradient_and_the_descent():
    """Point 3. p_s - p_t = (-1/6, 1/12, 1/12), so grad KL = O^T (p_s - p_t) = (-1/6, 1/12).

    d = (-ln 2, 0), so <grad KL, d> = ln 2 / 6 = 0.1155, above KL = 0.0589.
    """
    result = evaluate(STUDENT, TEACHER, MATRIX)
    np.testing.assert_allclose(result.gradient, [[-1 / 6, 1 / 12]], rtol=1e-12)
    descent = (result.gradient * (STUDENT - TEACHER)).sum()
    assert descent == pytest.approx(np.log(2) / 6, rel=1e-12)
    assert descent >= result.kl


def test_by_hand_the_bounds_and_the_gram_matrix():
    """Points 4 and 5. The mean row is (1/3, 1/3), so G = O^T O - 3 * 1/9 = ((2, -1), (-1, 2)) / 3.

    G has the eigenvalues 1 and 1/3, so sigma_max = 1. With u = O d = (-ln 2, 0, 0):
    KL = 0.0589 <= range^2 / 8 = 0.0601 <= d^T G d / 4 = 0.0801 <= sigma_max^2 |d|^2 / 4 = 0.1201.
    """
    result = evaluate(STUDENT, TEACHER, MATRIX)
    np.testing.assert_allclose(result.gram, [[2 / 3, -1 / 3], [-1 / 3, 2 / 3]], rtol=1e-12)
    assert result.gram_loss == pytest.approx(np.sqrt(2 / 3) * np.log(2), rel=1e-12)
    assert result.l2_loss == pytest.approx(np.log(2), rel=1e-12)
    chain = [
        result.kl[0],
        np.log(2) ** 2 / 8,
        result.gram_loss[0] ** 2 / 4,
        result.l2_loss[0] ** 2 / 4,
    ]
    np.testing.assert_allclose(chain, [0.0589, 0.0601, 0.0801, 0.1201], atol=5e-5)
    assert chain == sorted(chain)


# ---------------------------------------------------------------------------------------------
# The project's functions in float64, and the oracle


class Evaluation(NamedTuple):
    """What the project's functions return for a batch of B pairs of states."""

    kl: np.ndarray  # [B]
    gradient: np.ndarray  # [B, E], of KL with respect to the student
    gram: np.ndarray  # [E, E]
    gram_loss: np.ndarray  # [B]
    l2_loss: np.ndarray  # [B]


@jax.jit
def _evaluate(student, teacher, matrix):
    kl, vjp = jax.vjp(lambda h: dl.kl_divergence(h, teacher, matrix), student)
    gram = dl.gram_matrix(matrix)
    one_clip = jnp.eye(len(student))  # weights that select one clip at a time
    return Evaluation(
        kl=kl,
        gradient=vjp(jnp.ones_like(kl))[0],
        gram=gram,
        gram_loss=jax.vmap(lambda w: dl.response_gram(student, teacher, gram, w))(one_clip),
        l2_loss=jax.vmap(lambda w: dl.response_l2(student, teacher, w))(one_clip),
    )


def evaluate(student, teacher, matrix):
    """The project's functions in float64, with chunks of 16 rows of the output matrix."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(dl, "CHUNK", 16)
        result = Evaluation(*map(np.asarray, _evaluate(student, teacher, matrix)))
    assert all(x.dtype == np.float64 and np.isfinite(x).all() for x in result)
    return result


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def logsumexp(z):
    return z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))


def numpy_kl(student, teacher, matrix):
    """KL(p_t || p_s) from the definition, in long double because small values cancel."""
    student, teacher, matrix = (x.astype(np.longdouble) for x in (student, teacher, matrix))
    log_s = log_softmax(student @ matrix.T)
    log_t = log_softmax(teacher @ matrix.T)
    return (np.exp(log_t) * (log_t - log_s)).sum(-1).astype(float)


def kl_rounding(matrix, *states):
    """Tolerance for KL in float64, absolute: 50 ulp of A(z), which is at most max |z| + ln V.

    KL is a difference of values of that size, so its rounding does not shrink with KL.
    """
    largest = max(np.abs(h @ matrix.T).max() for h in states)
    return 1e-14 * (largest + np.log(len(matrix)))


# ---------------------------------------------------------------------------------------------
# Inputs

BATCH = 4
SHAPES = [(37, 6), (5, 8), (3, 2)]  # V, E: 37 rows are two chunks of 16 and an overlapping third
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
    """(student [4, E], teacher [4, E], matrix [V, E]) in float64, random and of one kind."""
    rng = np.random.default_rng(seed)
    num_rows, width = shape
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
    if kind == "common shift":  # adds the same number to all logits: no probability changes
        matrix += 50 * rng.normal(size=width)
    if kind == "certain teacher":  # almost all probability on one token
        teacher = 20 * matrix[rng.integers(num_rows, size=BATCH)]
    if kind == "bfloat16":  # many equal values and equal logits
        student, teacher, matrix = (
            x.astype(ml_dtypes.bfloat16).astype(float) for x in (student, teacher, matrix)
        )
    return student, teacher, matrix


# No shrinking: an instance is defined by its seed, and a smaller seed is not simpler.
examples = functools.partial(
    settings, max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate]
)
instances = given(st.integers(0, 10**6), st.sampled_from(SHAPES), st.sampled_from(KINDS))


# ---------------------------------------------------------------------------------------------
# The six points


@examples()
@instances
def test_point_1_kl_is_the_bregman_divergence_of_logsumexp_and_convex(seed, shape, kind):
    """KL = A(z_s) - A(z_t) - p_t.(z_s - z_t), and the midpoint lies below the chord."""
    student, teacher, matrix = instance(seed, shape, kind)
    other = teacher + np.random.default_rng(seed).normal(size=teacher.shape)
    atol = kl_rounding(matrix, student, teacher, other)
    kl = evaluate(student, teacher, matrix).kl
    np.testing.assert_allclose(kl, numpy_kl(student, teacher, matrix), rtol=1e-12, atol=atol)

    long_s, long_t, long_o = (x.astype(np.longdouble) for x in (student, teacher, matrix))
    z_s, z_t = long_s @ long_o.T, long_t @ long_o.T
    bregman = logsumexp(z_s) - logsumexp(z_t) - (np.exp(log_softmax(z_t)) * (z_s - z_t)).sum(-1)
    np.testing.assert_allclose(kl, bregman.astype(float), rtol=1e-12, atol=atol)

    middle = evaluate((student + other) / 2, teacher, matrix).kl
    chord = (kl + evaluate(other, teacher, matrix).kl) / 2
    assert (middle <= chord + 2 * atol).all()


@examples()
@instances
def test_point_2_equal_states_are_the_minimum_and_the_only_one_iff_full_column_rank(
    seed, shape, kind
):
    """KL is 0 at equality and along the null space of O_c; elsewhere it is above a positive bound.

    By Taylor, KL = 1/2 Var_q(O d) >= 1/2 min(q) |O_c d|^2 with min(q) >= min(p_t) e^-range(O d).
    """
    _, teacher, matrix = instance(seed, shape, kind)
    assert (evaluate(teacher, teacher, matrix).kl == 0).all()

    centred = matrix - matrix.mean(0)
    _, sigma, directions = np.linalg.svd(centred)
    weakest = directions[-1]  # the unit vector that changes the centred logits least
    full_rank = len(sigma) == shape[1] and sigma[-1] > 1e-10 * sigma[0]
    assert full_rank == (kind != "rank-deficient" and shape[0] > shape[1])

    kl = evaluate(teacher + weakest, teacher, matrix).kl
    atol = kl_rounding(matrix, teacher, teacher + weakest)
    if not full_rank:
        np.testing.assert_allclose(kl, 0.0, atol=atol)
        return
    logits = matrix @ weakest
    smallest = np.exp(log_softmax(teacher @ matrix.T)).min(-1)
    lower_bound = smallest * np.exp(-np.ptp(logits)) * np.square(centred @ weakest).sum() / 2
    assert (kl >= lower_bound - atol).all()
    exact = numpy_kl(teacher + weakest, teacher, matrix)
    if kind == "plain":
        assert (exact > 0).all() and (kl[exact > atol] > 0).all()


@examples()
@instances
def test_point_3_a_step_towards_the_teacher_does_not_increase_kl(seed, shape, kind):
    """grad KL = O^T (p_s - p_t), <grad KL, d> >= KL >= 0; KL falls on the line to the teacher."""
    student, teacher, matrix = instance(seed, shape, kind)
    result = evaluate(student, teacher, matrix)
    atol = kl_rounding(matrix, student, teacher)

    # a logit's rounding is a relative error of its probability, which multiplies a row of O
    p_s, p_t = (np.exp(log_softmax(h @ matrix.T)) for h in (student, teacher))
    gradient_rounding = 10 * atol * np.abs(matrix).max()
    np.testing.assert_allclose(
        result.gradient, (p_s - p_t) @ matrix, rtol=1e-10, atol=gradient_rounding
    )

    d = student - teacher
    descent = (result.gradient * d).sum(-1)
    assert (descent >= result.kl - atol - gradient_rounding * np.abs(d).sum(-1)).all()
    assert (result.kl >= 0).all()

    path = [evaluate(teacher + a * d, teacher, matrix).kl for a in (1, 0.7, 0.3, 0)]
    assert (np.diff(path, axis=0) <= 2 * atol).all()


@examples()
@instances
def test_point_4_kl_is_below_the_gram_the_sigma_and_the_range_bound(seed, shape, kind):
    """KL <= |O_c d|^2 / 4 <= sigma_max^2 |d|^2 / 4 and KL <= range(O d)^2 / 8; and as losses."""
    student, teacher, matrix = instance(seed, shape, kind)
    result = evaluate(student, teacher, matrix)
    atol = kl_rounding(matrix, student, teacher)
    d, centred = student - teacher, matrix - matrix.mean(0)
    assert (result.kl <= np.square(d @ centred.T).sum(-1) / 4 + atol).all()
    assert (result.kl <= np.square(np.ptp(d @ matrix.T, axis=-1)) / 8 + atol).all()

    # the losses are not squared: KL <= (gram / 2)^2 <= (sigma_max l2 / 2)^2
    sigma_max = np.linalg.norm(centred, 2)
    rounding = 1e-7 * np.linalg.norm(matrix) * np.linalg.norm(d, axis=-1)
    assert (np.sqrt(np.maximum(result.kl - atol, 0)) <= result.gram_loss / 2 + rounding).all()
    assert (result.gram_loss <= sigma_max * result.l2_loss * (1 + 1e-9) + rounding).all()


def test_point_4_has_the_best_constant():
    """Two tokens of equal probability, a small step: KL -> range^2 / 8 = |O_c d|^2 / 4."""
    matrix = np.array([[1.0], [-1.0]])
    kl = evaluate(np.full((1, 1), 1e-3), np.zeros((1, 1)), matrix).kl
    assert kl[0] == pytest.approx(0.002**2 / 8, rel=1e-5)


@examples()
@instances
def test_point_5_the_gram_loss_is_the_distance_of_centred_logits(seed, shape, kind):
    """G = O_c^T O_c, and sqrt(d^T G d) = |O_c d|."""
    student, teacher, matrix = instance(seed, shape, kind)
    result = evaluate(student, teacher, matrix)
    d, centred = student - teacher, matrix - matrix.mean(0)
    size = np.linalg.norm(matrix)
    np.testing.assert_allclose(result.gram, centred.T @ centred, rtol=1e-9, atol=1e-13 * size**2)
    np.testing.assert_allclose(result.l2_loss, np.linalg.norm(d, axis=-1), rtol=1e-12)

    # G has a rounding of 1e-16 of its largest entry; the square root turns it into 1e-8 at worst
    atol = 1e-7 * size * np.linalg.norm(d, axis=-1).max()
    expected = np.linalg.norm(d @ centred.T, axis=-1)
    np.testing.assert_allclose(result.gram_loss, expected, rtol=1e-6, atol=atol)


LLAMA_3_8B = {"V": 128_256, "E": 4096}


def test_point_6_the_cost_of_each_loss_is_the_stated_one(monkeypatch):
    """XLA's count of FLOPs (two for a multiply-add): O(E), 2 E^2, 4 V E; with gradient 8 V E."""
    num_rows, width, batch = 2000, 64, 3
    monkeypatch.setattr(dl, "CHUNK", num_rows)  # XLA counts the body of a loop once
    student, ones = jnp.ones((batch, width)), jnp.ones(batch)
    gram, matrix = jnp.ones((width, width)), jnp.ones((num_rows, width))

    def flops(function, *args):
        compiled = jax.jit(function).lower(student, student, *args).compile()
        return compiled.cost_analysis()["flops"] / batch

    assert flops(dl.response_l2, ones) < 10 * width
    assert 2 * width**2 < flops(dl.response_gram, gram, ones) < 2 * width**2 + 10 * width
    product = 2 * num_rows * width
    assert 2 * product < flops(dl.response_kl, matrix, ones) < 2.5 * product
    assert 4 * product < flops(jax.value_and_grad(dl.response_kl), matrix, ones) < 4.5 * product

    assert LLAMA_3_8B["E"] ** 2 == pytest.approx(16.8e6, rel=0.01)
    assert 2 * LLAMA_3_8B["V"] * LLAMA_3_8B["E"] == pytest.approx(1.05e9, rel=0.01)
