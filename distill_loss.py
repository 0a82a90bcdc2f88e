"""The distillation loss, and the lemma that lets it skip the vocabulary.

    loss = token alignment + response distillation

Token alignment pulls the last N virtual tokens to the embeddings of the transcript's N tokens. Response
distillation pulls the hidden state from which the LLM starts its answer to the speech (student) to
that from which it starts its answer to the transcript (teacher). Exactly, one would minimise the KL
divergence of the two next-token distributions, over V = 128,256 logits; the lemma says what the
distance of the states is worth instead.

Lemma. O [V, E] is the shared, frozen output matrix; z = O h, p = softmax(z), A = logsumexp; O_c is O
minus its mean row; d = h_s - h_t, student minus teacher. Then

1.  KL(p_t || p_s) = A(z_s) - A(z_t) - p_t . (z_s - z_t), and it is convex in h_s.
    Proof. log p = z - A(z), and p_t sums to 1. grad A = softmax: this is the Bregman divergence of A,
    which is convex (its Hessian diag(p) - p p^T is a covariance), and z_s is linear in h_s.
2.  h_s = h_t gives KL = 0, its minimum. Nothing else does, exactly if O_c has full column rank.
    Proof. Equal states, equal logits; and KL >= 0. KL = 0 iff p_s = p_t iff O d is constant over V iff
    O_c d = 0 (centring removes just the constants), so d = 0 is forced iff O_c is injective.
3.  <grad KL, d> >= KL >= 0, with grad KL = O^T (p_s - p_t) for h_s: a step down the distance is never a
    step up in KL, and KL falls monotonically along the straight line from h_s to h_t.
    Proof. A convex function lies above its tangents: 0 = KL(h_t) >= KL(h_s) + <grad KL, h_t - h_s>.
    On the line, f(a) = KL(h_t + a d) has f'(a) = <grad, a d> / a >= f(a) / a >= 0 for a > 0.
4.  KL <= 1/4 |O_c d|^2 <= 1/4 sigma_max(O_c)^2 |d|^2, and KL <= (max O d - min O d)^2 / 8.
    Proof. Taylor's remainder: KL = 1/2 Var_q(O d) for a q = softmax between z_t and z_s. The variance
    of a variable of range r is at most r^2 / 4 (Popoviciu); and r = u_i - u_j <= sqrt(2) |u|, for
    u = O_c d which has the same range, so that r^2 / 4 <= |u|^2 / 2.
5.  |O_c d|^2 = d^T G d with G = O_c^T O_c [E, E]: computed once, it measures the bound of 4 without
    the vocabulary. This is the `gram` loss, |O_c d|; it is this project's own addition.
6.  Multiply-adds per state: l2 E, gram E^2, KL 2 V E (teacher and student): 4,096 / 16.8 M / 1.05 G
    for Llama-3-8B.

Observed, not proved: how tight the bounds are. Run this file to see it on a real output matrix.

What the paper claims is the first sentence of 2. What nobody can claim: that a smaller |d| always means
a smaller KL. 4 bounds it; 3 orders it along one line only.

Axes: B batch, Q query tokens, L padded transcript length, E width of the LLM, V vocabulary.
Source: Held et al. 2024, section 3.2 (points 1, 2); the rest is proved here.
Reads: nothing of ours.   Read next: data.py.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 8192  # rows of the output matrix that the exact KL holds at a time


def length(x: Float[Array, "*B E"]) -> Float[Array, "*B"]:
    """Euclidean norm over the last axis in f32, with gradient 0 (not NaN) at 0."""
    square = jnp.square(x.astype(jnp.float32)).sum(-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def weighted_mean(
    values: Float[Array, "*B"], weights: Float[Array, "*B"]
) -> Float[Array, ""]:
    """Mean of the values that count; 0 if none does."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def token_alignment(
    virtual: Float[Array, "B Q E"],
    targets: Float[Array, "B L E"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean over aligned positions of |virtual token - transcript embedding|, not squared.

    A transcript of N tokens is compared with the *last* N of the Q virtual tokens: the decoder is
    causal, so the last ones have seen all the others, and the first Q - N stay free.
    """
    queries = virtual.shape[1]
    at = jnp.arange(targets.shape[1])[None]  # n, of N
    real = at < lengths[:, None]
    query = jnp.clip(queries - lengths[:, None] + at, 0, queries - 1)  # Q - N + n
    aligned = jnp.take_along_axis(virtual, query[..., None], axis=1)
    distance = length(aligned.astype(jnp.float32) - jax.lax.stop_gradient(targets))
    return weighted_mean(distance, real * weights[:, None])


def response_l2(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], weights: Float[Array, "B"]
) -> Float[Array, ""]:
    """The paper's proxy: mean of |h_s - h_t|, not squared."""
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return weighted_mean(length(student - teacher), weights)


def gram_matrix(output_matrix: Float[Array, "V E"]) -> Float[Array, "E E"]:
    """G = O_c^T O_c in f32, O_c being O minus its mean row: computed once, before training."""
    centred = output_matrix.astype(jnp.float32)
    centred = centred - centred.mean(0)
    return jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)


def response_gram(
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    gram: Float[Array, "E E"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean of |O_c (h_s - h_t)| = sqrt(d^T G d), the distance of the logits up to a constant.

    Not squared, like `response_l2`: KL <= (this / 2)^2 by point 4.
    """
    d = student - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    square = jnp.einsum("be,ef,bf->b", d, gram, d, precision=jax.lax.Precision.HIGHEST)
    positive = square > 0
    distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
    return weighted_mean(distance, weights)


def response_kl(
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    output_matrix: Float[Array, "V E"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean of the exact KL(p_t || p_s) in nats, with no [B, V] array alive."""
    return weighted_mean(kl_divergence(student, teacher, output_matrix), weights)


# ---------------------------------------------------------------------------------------------
# The exact KL, a chunk of the vocabulary at a time
#
# With u = O d and w = u - E_t[u] (expectations under the teacher), point 1 reads KL = log E_t[e^w].
# Subtracting two log-sum-exps would lose a small KL to rounding; E_t[w] = 0, so that
# KL = log1p(E_t[e^w - 1 - w]), where every term is small and not negative. If some |w| is large, the
# log-sum-exp is as good and cannot overflow. The gradient is O^T (p_s - p_t), p_s = p_t e^(w - KL).


def _chunks(output_matrix, student, teacher, body, start):
    """Fold `body(carry, rows [C, E], z_t [B, C], u [B, C], real [C])` over chunks of the rows.

    If the chunk does not divide V the last chunk overlaps the one before; `real` marks new rows.
    """
    rows = output_matrix.shape[0]
    size = min(CHUNK, rows)
    d = student.astype(jnp.float32) - teacher.astype(jnp.float32)

    def step(carry, i):
        first = jnp.minimum(i * size, rows - size)
        chunk = jax.lax.dynamic_slice_in_dim(output_matrix, first, size).astype(jnp.float32)
        real = first + jnp.arange(size) >= i * size
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        z = jnp.where(real, product(teacher.astype(jnp.float32), chunk.T), -jnp.inf)
        return body(carry, chunk, z, product(d, chunk.T)), None

    return jax.lax.scan(step, start, jnp.arange(-(-rows // size)))[0]


def _statistics(student, teacher, output_matrix):
    """A(z_t), E_t[u] and KL, each [B], in two passes over the vocabulary."""
    zeros = jnp.zeros(len(student))

    def first(carry, _, z, u):
        top, total, mean = carry
        higher = jnp.maximum(top, z.max(-1))
        shrink, p = jnp.exp(top - higher), jnp.exp(z - higher[:, None])
        return higher, total * shrink + p.sum(-1), mean * shrink + (p * u).sum(-1)

    low = jnp.full(len(student), -jnp.inf)
    top, total, mean = _chunks(output_matrix, student, teacher, first, (low, zeros, zeros))
    log_total, mean = top + jnp.log(total), mean / total

    def second(carry, _, z, u):
        small, largest, top, total = carry
        log_p, w = z - log_total[:, None], u - mean[:, None]
        p, near = jnp.exp(log_p), jnp.clip(w, -1, 1)
        series = jnp.square(near) / 2 * (1 + near / 3 * (1 + near / 4))
        excess = jnp.where(jnp.abs(near) < 0.02, series, jnp.expm1(near) - near)
        higher = jnp.maximum(top, (log_p + w).max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(log_p + w - higher[:, None]).sum(-1)
        far = jnp.where(p > 0, jnp.abs(w), 0).max(-1)
        return small + (p * excess).sum(-1), jnp.maximum(largest, far), higher, total

    small, largest, top, total = _chunks(
        output_matrix, student, teacher, second, (zeros, zeros, low, zeros)
    )
    kl = jnp.where(largest < 1, jnp.log1p(small), jnp.maximum(top + jnp.log(total), 0.0))
    return log_total, mean, kl


@jax.custom_vjp
def kl_divergence(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], output_matrix: Float[Array, "V E"]
) -> Float[Array, "B"]:
    """KL(softmax(O h_t) || softmax(O h_s)) in nats; its gradient goes to the student alone."""
    return _statistics(student, teacher, output_matrix)[2]


def _kl_forward(student, teacher, output_matrix):
    log_total, mean, kl = _statistics(student, teacher, output_matrix)
    return kl, (student, teacher, output_matrix, log_total, mean, kl)


def _kl_backward(saved, upstream):
    student, teacher, output_matrix, log_total, mean, kl = saved

    def body(gradient, chunk, z, u):
        log_p, shift = z - log_total[:, None], u - (mean + kl)[:, None]
        p = jnp.exp(log_p)
        near = p * jnp.expm1(jnp.clip(shift, -1, 1))
        difference = jnp.where(jnp.abs(shift) < 1, near, jnp.exp(log_p + shift) - p)
        return gradient + jnp.matmul(difference, chunk, precision=jax.lax.Precision.HIGHEST)

    start = jnp.zeros(student.shape, jnp.float32)
    gradient = _chunks(output_matrix, student, teacher, body, start) * upstream[:, None]
    return gradient.astype(student.dtype), jnp.zeros_like(teacher), jnp.zeros_like(output_matrix)


kl_divergence.defvjp(_kl_forward, _kl_backward)
