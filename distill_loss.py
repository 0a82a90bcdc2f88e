"""The two losses of DiVA, and the lemma that lets the second one skip the vocabulary.

    token alignment        mean over n of |v_{Q-N+n} - t_n|
    response distillation  |h_s - h_t|

v_1..v_Q are the virtual tokens, t_1..t_N the embeddings of the transcript's N tokens. h_s and h_t
are the LLM's final hidden states that predict the response: to the speech (student) and to the
transcript (teacher). Both norms are Euclidean and not squared.

Lemma: if h_s = h_t, the KL divergence of the two next-token distributions is 0, its minimum, and
a step towards h_t never increases it. Each of the lemma's six points is proved above the function
that it is about; tests/test_lemma.py checks all six with numbers.

Axes: B batch, Q query tokens, L padded transcript length, K response states, E width of the LLM,
V vocabulary, C rows of one chunk of the vocabulary. Source: Held et al. 2024, section 3.2.
Reads: weights.py (for the command only).   Read next: data.py.
"""

import functools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int

from runtime import cli
from weights import read_tensor, resolve


def token_alignment(
    virtual: Float[Array, "B Q E"],
    targets: Float[Array, "B L E"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean distance between the last N virtual tokens and the N transcript embeddings.

    The mean is over the real tokens of all clips. `targets` is right-padded to L; a clip has
    `lengths` real tokens and the weight `weights` (0: ignored). The connector is causal, so the
    last virtual tokens attend to all others, and the first Q - N are unconstrained.
    """
    aligned, is_real = last_tokens(virtual, lengths, max_length=targets.shape[1])
    distance = l2_norm(as_float32(aligned) - jax.lax.stop_gradient(targets))
    return weighted_mean(distance, is_real * weights[:, None])


def response_l2(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], weights: Float[Array, "B"]
) -> Float[Array, ""]:
    """Mean of |h_s - h_t|: the paper's loss. Only the student receives a gradient.

    Because the norm is not squared, its gradient has length 1 for every clip: an outlier does not
    dominate the batch, and the gradient does not vanish near the teacher.
    """
    d = as_float32(student) - jax.lax.stop_gradient(teacher)
    return weighted_mean(l2_norm(d), weights)


# ---------------------------------------------------------------------------------------------
# Parts of both losses


def as_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Convert to at least float32, for sums and differences of close values. Keeps float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def safe_sqrt(square: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Square root with value and gradient 0 (not inf, not NaN) at 0 and below."""
    positive = square > 0
    # The inner `where` keeps 1 / sqrt(0) out of the backward pass, where 0 * inf would be NaN.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def l2_norm(x: Float[Array, "*B E"]) -> Float[Array, "*B"]:
    """Euclidean norm over the last axis, with gradient 0 (not NaN) at 0."""
    return safe_sqrt(jnp.square(as_float32(x)).sum(-1))


def weighted_mean(values: Float[Array, "*B"], weights: Float[Array, "*B"]) -> Float[Array, ""]:
    """Weighted mean; 0 if all weights are 0."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def last_tokens(
    virtual: Float[Array, "B Q E"], lengths: Int[Array, "B"], max_length: int
) -> tuple[Float[Array, "B L E"], Bool[Array, "B L"]]:
    """The last `lengths` virtual tokens of each clip, right-padded, and the mask of real ones."""
    num_queries = virtual.shape[1]
    position = jnp.arange(max_length)[None]
    query = jnp.clip(num_queries - lengths[:, None] + position, 0, num_queries - 1)
    aligned = jnp.take_along_axis(virtual, query[..., None], axis=1)
    return aligned, position < lengths[:, None]


def response_weights(
    weights: Float[Array, "B"], lengths: Int[Array, "B"], num_states: int
) -> Float[Array, "B K"]:
    """Divide each clip's weight equally among its first `lengths` response states.

    The weighted mean over states is then a mean over clips, whatever their response lengths.
    """
    is_real = jnp.arange(num_states) < lengths[:, None]
    return jnp.where(is_real, (weights / jnp.maximum(lengths, 1))[:, None], 0.0)


# ---------------------------------------------------------------------------------------------
# The lemma
#
#   O [V, E]  output matrix of the LLM: shared by student and teacher, frozen
#   z = O h   logits;   p = softmax(z);   A(z) = logsumexp(z), whose gradient is softmax(z)
#   d = h_s - h_t, the difference of the two states;   u = O d = z_s - z_t, that of their logits
#   O_c       O minus its mean row
#   Var_q(u)  variance of u_v when the token v is drawn from the distribution q
#
# Proved: points 1 to 6 as written, in exact arithmetic. Only observed: how tight the bounds of
# point 4 are (`python distill_loss.py` measures it), and the float32 errors stated at
# `kl_and_gradient`. False: "a smaller |d| always means a smaller KL". Point 4 only bounds KL, and
# point 3 orders it along one straight line. The paper states point 2; the rest is proved here.

CHUNK = 2048  # rows of the output matrix that the exact KL multiplies with at a time
# Products of bf16 and f32 in full f32, also on devices that round the factors to bf16 by default.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


# Point 1. KL(p_t || p_s) = A(z_s) - A(z_t) - p_t . (z_s - z_t), and it is convex in h_s.
#
# Proof. log p = z - A(z), so KL = p_t . (log p_t - log p_s) = p_t . (z_t - z_s) + A(z_s) - A(z_t),
# because p_t sums to 1. As a function of z_s it is A plus a linear function. A is convex, because
# its Hessian diag(p) - p p^T is a covariance matrix; and z_s is linear in h_s. (grad A = softmax,
# so KL is the gap between A at z_s and the tangent to A at z_t: the Bregman divergence of A.)
#
# Point 2. h_s = h_t gives KL = 0, its minimum. It is the only minimum if and only if O_c has full
# column rank.
#
# Proof. Equal states have equal logits, so KL = 0 by point 1; and KL >= 0, because a convex
# function lies above its tangents. KL = 0 if and only if p_s = p_t, that is, if u is the same for
# all tokens, that is, if O_c d = 0 (subtracting the mean row removes just this constant). So d = 0
# is the only solution if and only if O_c is injective.
@jax.custom_vjp
def kl_divergence(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], output_matrix: Float[Array, "V E"]
) -> Float[Array, "B"]:
    """Exact KL(softmax(O h_t) || softmax(O h_s)) in nats. Only the student receives a gradient."""
    return kl_and_gradient(student, teacher, output_matrix)[0]


# Point 3. grad KL = O^T (p_s - p_t) with respect to h_s, and <grad KL, d> >= KL >= 0: a small step
# against the gradient of |d| does not increase KL, and KL never rises along the straight line from
# h_s to h_t.
#
# Proof. The gradient follows from point 1 and grad A = softmax. KL is convex in h_s, so its value
# at h_t lies above the tangent at h_s: 0 >= KL(h_s) + <grad KL, h_t - h_s>, which is the claim. On
# the line, f(a) = KL(h_t + a d) has the derivative f'(a) = <grad KL(h_t + a d), d>, which is
# >= f(a) / a >= 0 for a > 0 by the same inequality at h_t + a d.
#
# O^T p is the mean row of O under p, E_p[o]. So one loop over the rows yields the values A(z) and
# their gradients E_p[o], and with them KL and grad KL = E_s[o] - E_t[o].
class SoftmaxSums(NamedTuple):
    """Sums over the vocabulary, each weighted by e^(z - maximum) so that nothing overflows."""

    maximum: Float[Array, "B"]  # largest logit so far
    total: Float[Array, "B"]  # sum of the weights: A(z) = maximum + log(total)
    difference: Float[Array, "B"]  # sum of weight * u
    row: Float[Array, "B E"]  # sum of weight * row of O

    def add(
        self, logits: Float[Array, "B C"], u: Float[Array, "B C"], chunk: Float[Array, "C E"]
    ) -> "SoftmaxSums":
        """Add the rows of one chunk. If the maximum grows, the previous sums are scaled down."""
        maximum = jnp.maximum(self.maximum, logits.max(-1))
        rescale = jnp.exp(self.maximum - maximum)
        weight = jnp.exp(logits - maximum[:, None])
        return SoftmaxSums(
            maximum=maximum,
            total=self.total * rescale + weight.sum(-1),
            difference=self.difference * rescale + (weight * u).sum(-1),
            row=self.row * rescale[:, None] + matmul(weight, chunk),
        )


def kl_and_gradient(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], output_matrix: Float[Array, "V E"]
) -> tuple[Float[Array, "B"], Float[Array, "B E"]]:
    """KL in nats and its gradient for the student, in one pass over chunks of the vocabulary.

    This is the loop of FlashAttention with the rows of O as keys and values: at no time do [B, V]
    logits exist. If only KL is used, XLA removes the sums for the gradient.

    Observed error of KL in float32 (E = 64, V = 32,000, logits up to 24): at most 2e-6 nats, or
    2e-6 of a KL above 1, from the rounding of A(z_s) - A(z_t). It is absolute, so a KL of 1e-4 has
    two digits; training and validation see 0.1 to 3 nats. The gradient's relative error is 2e-5 at
    0.1 nats and grows as KL shrinks: 2e-4 at 1e-3, 1e-3 at 1e-5. With equal states both are 0.
    """
    num_rows = output_matrix.shape[0]
    chunk_size = min(CHUNK, num_rows)
    teacher = as_float32(teacher)
    d = as_float32(student) - teacher  # before the product with O: close states, close logits

    def step(sums, index):
        # The last chunk overlaps the previous one if CHUNK does not divide V; a logit of -inf
        # gives the rows that were added before the weight 0.
        first = jnp.minimum(index * chunk_size, num_rows - chunk_size)
        is_new = first + jnp.arange(chunk_size) >= index * chunk_size
        chunk = jax.lax.dynamic_slice_in_dim(output_matrix, first, chunk_size)
        # The barrier keeps XLA from converting the whole matrix to float32 before the loop.
        chunk = as_float32(jax.lax.optimization_barrier(chunk))

        u = matmul(d, chunk.T)
        z_t = jnp.where(is_new, matmul(teacher, chunk.T), -jnp.inf)
        return (sums[0].add(z_t + u, u, chunk), sums[1].add(z_t, u, chunk)), None

    zeros = jnp.zeros_like(d[:, 0])
    empty = SoftmaxSums(zeros - jnp.inf, zeros, difference=zeros, row=jnp.zeros_like(d))
    num_chunks = -(-num_rows // chunk_size)
    (s, t), _ = jax.lax.scan(step, (empty, empty), jnp.arange(num_chunks))

    # Point 1; the maxima are subtracted first, since they are the large terms.
    log_partition_ratio = (s.maximum - t.maximum) + jnp.log(s.total / t.total)  # A(z_s) - A(z_t)
    kl = log_partition_ratio - t.difference / t.total
    gradient = s.row / s.total[:, None] - t.row / t.total[:, None]
    return jnp.maximum(kl, 0.0), gradient  # rounding may leave a KL of 0 at -1e-7


def _kl_forward(student, teacher, output_matrix):
    kl, gradient = kl_and_gradient(student, teacher, output_matrix)
    return kl, (student, gradient)


def _kl_backward(saved, upstream):
    student, gradient = saved
    to_student = (gradient * upstream[:, None]).astype(student.dtype)
    return to_student, None, None  # teacher and output matrix are constants


kl_divergence.defvjp(_kl_forward, _kl_backward)


def response_kl(
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    output_matrix: Float[Array, "V E"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean of the exact KL(p_t || p_s) in nats."""
    return weighted_mean(kl_divergence(student, teacher, output_matrix), weights)


# Point 4. KL <= 1/4 |O_c d|^2 <= 1/4 sigma_max(O_c)^2 |d|^2, and KL <= (max u - min u)^2 / 8.
#
# Proof. By point 1, KL is the remainder of the first-order Taylor expansion of A at z_t, so
# KL = 1/2 u^T (Hessian of A) u = 1/2 Var_q(u), where q = softmax(z) for a z between z_t and z_s.
# The variance of a variable with range r is at most r^2 / 4 (Popoviciu), so KL <= r^2 / 8.
# O_c d is u minus a constant, so it has the same range; and for any two of its entries a and b,
# |a - b| <= sqrt(2) sqrt(a^2 + b^2) <= sqrt(2) |O_c d|. So r^2 / 8 <= |O_c d|^2 / 4. The last step
# is the definition of the largest singular value sigma_max.
def response_gram(
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    gram: Float[Array, "E E"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean of |O_c d| = sqrt(d^T G d), which bounds KL by (|O_c d| / 2)^2. Not in the paper.

    Not squared, for the reasons of `response_l2`. If d is almost in the null space of G, rounding
    can make d^T G d negative; it is then taken as 0.
    """
    d = as_float32(student) - jax.lax.stop_gradient(teacher)
    return weighted_mean(safe_sqrt((matmul(d, gram) * d).sum(-1)), weights)


# Point 5. |O_c d|^2 = d^T G d with the Gram matrix G = O_c^T O_c [E, E]. G does not depend on the
# states, so it is computed once, and the tighter bound of point 4 needs no vocabulary afterwards.
#
# Proof. |O_c d|^2 = (O_c d)^T (O_c d) = d^T (O_c^T O_c) d.
def gram_matrix(output_matrix: Float[Array, "V E"]) -> Float[Array, "E E"]:
    """G = O_c^T O_c in float32. Computed once, before training."""
    centred = as_float32(output_matrix) - as_float32(output_matrix).mean(0)
    return matmul(centred.T, centred)


# Point 6. Cost per state, in multiply-adds: l2 E, gram E^2, KL 2 V E. For Llama-3-8B (E = 4,096,
# V = 128,256) these are 4,096, 16.8 million and 1.05 billion.
#
# Proof. By counting, without terms of lower order: |d|^2 is a sum of E squares; G d is a product
# with [E, E]; and KL needs O h_t and O d, two products with [V, E]. The gradient of KL adds the two
# mean rows, 2 V E more. XLA's own count agrees (tests/test_lemma.py).
def response(
    kind: Literal["l2", "gram", "kl"],
    student: Float[Array, "B K E"],
    teacher: Float[Array, "B K E"],
    weights: Float[Array, "B K"],
    output_matrix: Float[Array, "V E"],
    gram: Float[Array, "E E"] | None,
) -> Float[Array, ""]:
    """Response distillation over K response states per clip, by one of three distances.

    Args:
        kind: "l2" (the paper), "gram" or "kl".
        weights: one for each state, from `response_weights`.
        output_matrix: used by "kl" only.
        gram: `gram_matrix(output_matrix)`, used by "gram" only; otherwise it may be None.
    """
    student = student.reshape(-1, student.shape[-1])
    teacher = teacher.reshape(-1, teacher.shape[-1])
    weights = weights.reshape(-1)
    if kind == "l2":
        return response_l2(student, teacher, weights)
    if kind == "gram":
        return response_gram(student, teacher, gram=gram, weights=weights)
    return response_kl(student, teacher, output_matrix=output_matrix, weights=weights)


# ---------------------------------------------------------------------------------------------
# The command: the lemma as numbers, on the output matrix of a model


def random_states(
    scale: Float[np.ndarray, "E"], pairs: int, noise_scale: float, seed: int = 0
) -> Float[np.ndarray, "2 pairs E"]:
    """Random student and teacher states, as a final RMSNorm with weight `scale` returns them.

    `noise_scale` is the size of the student's noise before the norm, relative to the teacher.
    """
    rng = np.random.default_rng(seed)
    teacher, noise = rng.standard_normal((2, pairs, len(scale)))
    both = np.stack([teacher + noise_scale * noise, teacher])
    both = both / np.sqrt(np.square(both).mean(-1, keepdims=True)) * scale
    return both.astype(np.float32)


def milliseconds(function: Callable, *args: Array, repeats: int = 5) -> float:
    """Median wall time of a compiled call."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def print_bounds(matrix: np.ndarray, gram: Array, scale: np.ndarray, pairs: int) -> None:
    """Print KL and its bounds for states at increasing distances."""
    eigenvalues = np.linalg.eigvalsh(np.asarray(gram))
    sigma2 = float(eigenvalues[-1])
    rank = int((eigenvalues > 1e-6 * sigma2).sum())
    print(f"O_c: rank {rank} of {len(scale)}, sigma_max {np.sqrt(sigma2):.3g}", end="; ")
    print("0 is the only minimum of KL" if rank == len(scale) else "KL has other minima than 0")

    print("\nMean over the pairs, nats (share: the largest KL / bound of any pair)")
    columns = ("|d|", "KL", "<grad, d>", "range^2/8", "gram/4", "sigma^2|d|^2/4")
    print("".join(f"{name:>18}" for name in columns))
    for noise_scale in (0.01, 0.1, 0.3, 1.0, 3.0):
        student, teacher = random_states(scale, pairs, noise_scale)
        d = student - teacher
        kl, gradient = map(np.asarray, jax.jit(kl_and_gradient)(student, teacher, matrix))
        u = d @ matrix.T
        bounds = (
            (gradient * d).sum(-1),
            np.square(np.ptp(u, axis=-1)) / 8,
            np.einsum("be,ef,bf->b", d, np.asarray(gram), d) / 4,
            sigma2 * np.square(d).sum(-1) / 4,
        )
        cells = [f"{b.mean():.3g} ({(kl / b).max():.3f})" for b in bounds]
        distance = np.linalg.norm(d, axis=-1).mean()
        print(f"{distance:18.3g}{kl.mean():18.3g}" + "".join(f"{c:>18}" for c in cells))


def print_path(matrix: np.ndarray, scale: np.ndarray, pairs: int) -> None:
    """Print KL along the straight line from the student to the teacher."""
    student, teacher = random_states(scale, pairs, noise_scale=1.0)
    print("\nDown the proxy's gradient, from student to teacher (point 3: KL may never rise)")
    fractions = np.linspace(0, 1, 11)
    divergence = jax.jit(kl_divergence)
    path = np.stack(
        [divergence(student + a * (teacher - student), teacher, matrix) for a in fractions]
    )
    print(f"{'way done':>10}" + "".join(f"{a:9.0%}" for a in fractions))
    print(f"{'mean KL':>10}" + "".join(f"{kl:9.4f}" for kl in path.mean(-1)))
    rises = int((np.diff(path, axis=0) > 1e-6 * np.maximum(path[0], 1)).sum())
    print(f"{'rises':>10}{rises:9d} in {len(fractions) - 1} steps of {pairs} pairs")


def print_costs(matrix: np.ndarray, gram: Array, scale: np.ndarray, pairs: int) -> None:
    """Print the multiply-adds and the measured time of the three losses."""
    student, teacher = jnp.asarray(random_states(scale, pairs, noise_scale=1.0))
    output_matrix = jnp.asarray(matrix)
    ones = jnp.ones(pairs)
    num_rows, width = matrix.shape
    losses = {
        "l2": (width, response_l2, (teacher, ones)),
        "gram": (width**2, response_gram, (teacher, gram, ones)),
        "kl": (2 * num_rows * width, response_kl, (teacher, output_matrix, ones)),
    }

    print(f"\nCost on {jax.devices()[0].device_kind}, batch of {pairs}")
    print(f"{'loss':>10}{'multiply-adds a state':>24}{'ms':>10}{'ms with gradient':>20}")
    for name, (cost, loss, arguments) in losses.items():
        forward = milliseconds(jax.jit(loss), student, *arguments)
        both = milliseconds(jax.jit(jax.value_and_grad(loss)), student, *arguments)
        print(f"{name:>10}{cost:24,}{forward:10.3f}{both:20.3f}")


def main(model: str = "toy/llama", pairs: int = 64) -> None:
    """Print the lemma as numbers, on the output matrix of a real model.

    Args:
        model: folder of a Llama with its safetensors.
        pairs: how many random pairs of student and teacher states.
    """
    folder = resolve(model)
    name, matrix = read_tensor(folder, ("lm_head.weight", "model.embed_tokens.weight"))
    scale = read_tensor(folder, ("model.norm.weight",))[1]
    gram = jax.jit(gram_matrix)(matrix)
    print(f"{model}: {name}, V = {matrix.shape[0]:,}, E = {matrix.shape[1]:,}")
    print(
        f"{pairs} pairs of random states behind the model's own final RMSNorm (not of real speech)"
    )
    print_bounds(matrix, gram, scale, pairs)
    print_path(matrix, scale, pairs)
    print_costs(matrix, gram, scale, pairs)


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
