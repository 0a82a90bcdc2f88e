"""The distillation loss, and the lemma that lets it skip the vocabulary.

    loss = token alignment + response distillation

Token alignment pulls the last N virtual tokens to the embeddings of the transcript's N tokens.
Response distillation pulls the hidden state from which the LLM starts its answer to the speech
(student) to that from which it starts its answer to the transcript (teacher). Exactly, one would
minimise the KL divergence of the two next-token distributions, over V = 128,256 logits; the lemma
says what the distance of the states is worth instead.

Lemma. O [V, E] is the shared, frozen output matrix; z = O h, p = softmax(z), A = logsumexp; O_c is
O minus its mean row; d = h_s - h_t, student minus teacher. Then

1.  KL(p_t || p_s) = A(z_s) - A(z_t) - p_t . (z_s - z_t), and it is convex in h_s.
    Proof. log p = z - A(z), and p_t sums to 1. grad A = softmax, so this is the Bregman divergence
    of A, which is convex (its Hessian diag(p) - p p^T is a covariance); z_s is linear in h_s.
2.  h_s = h_t gives KL = 0, its minimum. Nothing else does, exactly if O_c has full column rank.
    Proof. Equal states, equal logits; and KL >= 0. KL = 0 iff p_s = p_t iff O d is constant over V
    iff O_c d = 0 (centring removes just the constants), so d = 0 is forced iff O_c is injective.
3.  <grad KL, d> >= KL >= 0, with grad KL = O^T (p_s - p_t) for h_s: a step down the distance is
    never a step up in KL, and KL falls monotonically along the straight line from h_s to h_t.
    Proof. A convex function lies above its tangents: 0 = KL(h_t) >= KL(h_s) + <grad KL, h_t - h_s>.
    On the line, f(a) = KL(h_t + a d) has f'(a) = <grad, a d> / a >= f(a) / a >= 0 for a > 0.
4.  KL <= 1/4 |O_c d|^2 <= 1/4 sigma_max(O_c)^2 |d|^2, and KL <= (max O d - min O d)^2 / 8.
    Proof. Taylor's remainder: KL = 1/2 Var_q(O d) for a q = softmax of some z between z_t and z_s.
    The variance of a variable of range r is at most r^2 / 4 (Popoviciu), hence r^2 / 8; and with
    u = O_c d, of the same range, r = u_i - u_j <= sqrt(2) |u|, so that r^2 / 8 <= |u|^2 / 4.
5.  |O_c d|^2 = d^T G d with G = O_c^T O_c [E, E]: computed once, it measures the bound of 4 without
    the vocabulary. This is the `gram` loss, |O_c d|; it is this project's own addition.
6.  Multiply-adds per state: l2 E, gram E^2, KL 2 V E (teacher and student): 4,096 / 16.8 M / 1.05 G
    for Llama-3-8B. The stable KL below passes twice over the vocabulary, and once more backward.

Proved: all six, as written. Observed only: how tight the bounds are. Run this file to see it on a
real output matrix. What the paper claims is the first sentence of 2. What nobody can claim: that a
smaller |d| always means a smaller KL; 4 bounds it, 3 orders it along one line only.

Axes: B batch, Q query tokens, L padded transcript length, K states of an answer, E width of the
LLM, V vocabulary, C rows of one chunk of the vocabulary.
Source: Held et al. 2024, section 3.2 (points 1, 2); the rest is proved here.
Reads: weights.py, to show the lemma on a model's own output matrix.   Read next: data.py.
"""

import functools
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int, PyTree

from runtime import cli
from weights import read_tensor, resolve

CHUNK = 2048  # rows of the output matrix that the exact KL holds at a time
# bf16 rows times f32 states: full f32 products also where the hardware's default is bf16.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def as_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least f32: sums, norms and differences of close states need it. (f64 stays f64.)"""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def safe_sqrt(square: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Square root with value and gradient 0 (not inf, not NaN) at 0 and below."""
    positive = square > 0
    # the inner `where` keeps 1 / sqrt(0) out of the backward pass, where 0 * inf would be NaN
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def l2_norm(x: Float[Array, "*B E"]) -> Float[Array, "*B"]:
    """Euclidean norm over the last axis, with gradient 0 (not NaN) at 0."""
    return safe_sqrt(jnp.square(as_float32(x)).sum(-1))


def weighted_mean(values: Float[Array, "*B"], weights: Float[Array, "*B"]) -> Float[Array, ""]:
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
    aligned, real = last_tokens(virtual, lengths, targets.shape[1])
    distance = l2_norm(as_float32(aligned) - jax.lax.stop_gradient(targets))
    return weighted_mean(distance, real * weights[:, None])


def last_tokens(
    virtual: Float[Array, "B Q E"], lengths: Int[Array, "B"], most: int
) -> tuple[Float[Array, "B L E"], Bool[Array, "B L"]]:
    """The last N virtual tokens of each clip, padded to `most`; and which of them are real."""
    queries, at = virtual.shape[1], jnp.arange(most)[None]  # n, of N
    query = jnp.clip(queries - lengths[:, None] + at, 0, queries - 1)  # Q - N + n
    return jnp.take_along_axis(virtual, query[..., None], axis=1), at < lengths[:, None]


def response_l2(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], weights: Float[Array, "B"]
) -> Float[Array, ""]:
    """The paper's proxy: mean of |h_s - h_t|, not squared."""
    d = as_float32(student) - jax.lax.stop_gradient(teacher)
    return weighted_mean(l2_norm(d), weights)


def gram_matrix(output_matrix: Float[Array, "V E"]) -> Float[Array, "E E"]:
    """G = O_c^T O_c in f32, O_c being O minus its mean row: computed once, before training."""
    centred = as_float32(output_matrix) - as_float32(output_matrix).mean(0)
    return matmul(centred.T, centred)


def response_gram(
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    gram: Float[Array, "E E"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean of |O_c (h_s - h_t)| = sqrt(d^T G d), the distance of the logits up to a constant.

    Not squared, for the reasons of `response_l2`: one far clip does not outweigh the batch, and the
    pull does not fade as the state comes near. By point 4 the KL of a clip is at most (this / 2)^2.
    Rounding of G counts where d is almost in its null space: d^T G d below 0 is taken as 0.
    """
    d = as_float32(student) - jax.lax.stop_gradient(teacher)
    return weighted_mean(safe_sqrt((matmul(d, gram) * d).sum(-1)), weights)


def response_kl(
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    output_matrix: Float[Array, "V E"],
    weights: Float[Array, "B"],
) -> Float[Array, ""]:
    """Mean of the exact KL(p_t || p_s) in nats, with no [B, V] array alive."""
    return weighted_mean(kl_divergence(student, teacher, output_matrix), weights)


def response_weights(
    weights: Float[Array, "B"], counts: Int[Array, "B"], most: int
) -> Float[Array, "B K"]:
    """The weight of each of `most` states of an answer: a clip's, shared equally by those that it
    has, which come first. So a mean over states is one over clips, however long they answer."""
    real = jnp.arange(most) < counts[:, None]
    return jnp.where(real, (weights / jnp.maximum(counts, 1))[:, None], 0.0)


def response(
    kind: Literal["l2", "gram", "kl"],
    student: Float[Array, "B K E"],
    teacher: Float[Array, "B K E"],
    weights: Float[Array, "B K"],
    output_matrix: Float[Array, "V E"],
    gram: Float[Array, "E E"] | None,
) -> Float[Array, ""]:
    """How far the response states are apart, by one of the three; `gram` needs its matrix."""
    student, teacher = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    weights = weights.reshape(-1)
    if kind == "l2":
        return response_l2(student, teacher, weights)
    if kind == "gram":
        return response_gram(student, teacher, gram, weights)
    return response_kl(student, teacher, output_matrix, weights)


# ---------------------------------------------------------------------------------------------
# The exact KL, a chunk of the vocabulary at a time
#
# With u = O d, w = u - E_t[u] (expectations under the teacher), point 1 reads KL = log E_t[e^w].
# A difference of two log-sum-exps would lose a small KL to rounding: terms of size 10 leave 1e-6 in
# f32, and a KL of 1e-6 is all noise. So d is formed before the product with O, and as E_t[w] = 0,
# KL = log1p(E_t[e^w - 1 - w]): all terms are small, none is negative, nothing cancels: the error is
# relative to KL itself. (A rounding error r in E_t[u] enters as r KL: the -w takes the rest back
# out.) Where KL > 1 the log-sum-exp is as good, and cannot overflow. The gradient is
# O^T (p_s - p_t), with p_s - p_t = p_t (e^(w - KL) - 1): again one term.

Fold = Callable[[PyTree, Float[Array, "C E"], Float[Array, "B C"], Float[Array, "B C"]], PyTree]


def fold_chunks(
    output_matrix: Float[Array, "V E"],
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    fold: Fold,
    start: PyTree,
) -> PyTree:
    """Fold `carry = fold(carry, rows, z_t, u)` over CHUNK rows of the output matrix at a time.

    If the chunk does not divide V the last one reaches back, and z_t is -inf on rows seen before.
    """
    rows = output_matrix.shape[0]
    size = min(CHUNK, rows)
    teacher = as_float32(teacher)
    d = as_float32(student) - teacher

    def step(carry, i):
        first = jnp.minimum(i * size, rows - size)
        chunk = jax.lax.dynamic_slice_in_dim(output_matrix, first, size)
        # the barrier keeps XLA from turning the whole matrix to f32 once, before the loop
        chunk = as_float32(jax.lax.optimization_barrier(chunk))
        new = first + jnp.arange(size) >= i * size
        z_t = jnp.where(new, matmul(teacher, chunk.T), -jnp.inf)
        return fold(carry, chunk, z_t, matmul(d, chunk.T)), None

    return jax.lax.scan(step, start, jnp.arange(-(-rows // size)))[0]


def excess(w: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """e^w - 1 - w without cancellation, for w of any size."""
    near = jnp.clip(w, -0.1, 0.1)  # the series' next term is 1e-11 of the first there
    series = 1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6 * (1 + near / 7))))
    return jnp.where(jnp.abs(w) < 0.1, near * near / 2 * series, jnp.expm1(w) - w)


def statistics(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], output_matrix: Float[Array, "V E"]
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """A(z_t), E_t[u] and KL of every pair of states, in two passes over the vocabulary."""
    zeros = jnp.zeros(len(student), jnp.promote_types(student.dtype, jnp.float32))
    low = zeros - jnp.inf

    def first(carry, _, z_t, u):
        top, total, mean = carry
        higher = jnp.maximum(top, z_t.max(-1))
        shrink, p = jnp.exp(top - higher), jnp.exp(z_t - higher[:, None])
        return higher, total * shrink + p.sum(-1), mean * shrink + (p * u).sum(-1)

    top, total, mean = fold_chunks(output_matrix, student, teacher, first, (low, zeros, zeros))
    log_total, mean = top + jnp.log(total), mean / total

    def second(carry, _, z_t, u):
        small, top, total = carry
        log_p, w = z_t - log_total[:, None], u - mean[:, None]
        higher = jnp.maximum(top, (log_p + w).max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(log_p + w - higher[:, None]).sum(-1)
        # where e^w alone could overflow, p may be tiny: the exponents are added first
        far = jnp.exp(log_p + w) - jnp.exp(log_p) * (1 + w)
        near = jnp.exp(log_p) * excess(jnp.minimum(w, 1.0))
        return small + jnp.where(w < 1, near, far).sum(-1), higher, total

    small, top, total = fold_chunks(output_matrix, student, teacher, second, (zeros, low, zeros))
    large = top + jnp.log(total)
    return log_total, mean, jnp.where(large < 1, jnp.log1p(small), large)


@jax.custom_vjp
def kl_divergence(
    student: Float[Array, "B E"], teacher: Float[Array, "B E"], output_matrix: Float[Array, "V E"]
) -> Float[Array, "B"]:
    """KL(softmax(O h_t) || softmax(O h_s)) in nats; its gradient goes to the student alone."""
    return statistics(student, teacher, output_matrix)[2]


def _kl_forward(student, teacher, output_matrix):
    log_total, mean, kl = statistics(student, teacher, output_matrix)
    return kl, (student, teacher, output_matrix, log_total, mean + kl)


def _kl_backward(saved, upstream):
    student, teacher, output_matrix, log_total, shift = saved

    def fold(gradient, rows, z_t, u):
        log_p, ratio = z_t - log_total[:, None], u - shift[:, None]  # log p_t and log(p_s / p_t)
        near = jnp.exp(log_p) * jnp.expm1(jnp.minimum(ratio, 1.0))
        difference = jnp.where(ratio < 1, near, jnp.exp(log_p + ratio) - jnp.exp(log_p))
        return gradient + matmul(difference, rows)

    gradient = fold_chunks(
        output_matrix, student, teacher, fold, jnp.zeros_like(as_float32(student))
    )
    to_student = (gradient * upstream[:, None]).astype(student.dtype)
    return to_student, None, None  # teacher and output matrix are constants


kl_divergence.defvjp(_kl_forward, _kl_backward)


# ---------------------------------------------------------------------------------------------
# The lemma as numbers


def random_states(
    scale: Float[np.ndarray, "E"], pairs: int, apart: float, seed: int = 0
) -> Float[np.ndarray, "2 pairs E"]:
    """Students and teachers that look like the output of a final RMSNorm with weight `scale`.

    `apart` is the size of the noise between the two before the norm, relative to the teacher.
    """
    rng = np.random.default_rng(seed)
    teacher, noise = rng.standard_normal((2, pairs, len(scale)))
    both = np.stack([teacher + apart * noise, teacher])
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
    """KL beside each of its bounds, for states from near to far."""
    eigenvalues = np.linalg.eigvalsh(np.asarray(gram))
    sigma2 = float(eigenvalues[-1])
    rank = int((eigenvalues > 1e-6 * sigma2).sum())
    print(f"O_c: rank {rank} of {len(scale)}, sigma_max {np.sqrt(sigma2):.3g}", end="; ")
    print("0 is the only minimum of KL" if rank == len(scale) else "KL has other minima than 0")
    print("\nMean over the pairs, nats (share: the largest KL / bound of any pair)")
    columns = ("|d|", "KL", "<grad, d>", "range^2/8", "gram/4", "sigma^2|d|^2/4")
    print("".join(f"{name:>18}" for name in columns))
    kl_and_pull = jax.jit(lambda s, t, o: jax.vjp(lambda x: kl_divergence(x, t, o), s))
    for apart in (0.01, 0.1, 0.3, 1.0, 3.0):
        student, teacher = random_states(scale, pairs, apart)
        d = student - teacher
        kl, pull = kl_and_pull(student, teacher, matrix)
        kl, gradient = np.asarray(kl), np.asarray(pull(jnp.ones(pairs))[0])
        logits = d @ matrix.T
        bounds = (
            (gradient * d).sum(-1),
            np.square(np.ptp(logits, axis=-1)) / 8,
            np.einsum("be,ef,bf->b", d, np.asarray(gram), d) / 4,
            sigma2 * np.square(d).sum(-1) / 4,
        )
        cells = [f"{b.mean():.3g} ({(kl / b).max():.3f})" for b in bounds]
        distance = np.linalg.norm(d, axis=-1).mean()
        print(f"{distance:18.3g}{kl.mean():18.3g}" + "".join(f"{c:>18}" for c in cells))


def print_path(matrix: np.ndarray, scale: np.ndarray, pairs: int) -> None:
    """KL while the student walks down the gradient of |d|, straight to the teacher."""
    student, teacher = random_states(scale, pairs, apart=1.0)
    print("\nDown the proxy's gradient, from student to teacher (point 3: KL may never rise)")
    shares = np.linspace(0, 1, 11)  # of the way
    divergence = jax.jit(kl_divergence)
    path = np.stack(
        [divergence(student + a * (teacher - student), teacher, matrix) for a in shares]
    )
    print(f"{'way done':>10}" + "".join(f"{a:9.0%}" for a in shares))
    print(f"{'mean KL':>10}" + "".join(f"{kl:9.4f}" for kl in path.mean(-1)))
    rises = int((np.diff(path, axis=0) > 1e-6 * path[0]).sum())
    print(f"{'rises':>10}{rises:9d} in {len(shares) - 1} steps of {pairs} pairs")


def print_costs(matrix: np.ndarray, gram: Array, scale: np.ndarray, pairs: int) -> None:
    """Multiply-adds and measured time of the three losses."""
    student, teacher = jnp.asarray(random_states(scale, pairs, apart=1.0))
    table, ones = jnp.asarray(matrix), jnp.ones(pairs)
    rows, width = matrix.shape
    losses = {
        "l2": (width, response_l2, (teacher, ones)),
        "gram": (width**2, response_gram, (teacher, gram, ones)),
        "kl": (2 * rows * width, response_kl, (teacher, table, ones)),
    }
    print(f"\nCost on {jax.devices()[0].device_kind}, batch of {pairs}")
    print(f"{'loss':>10}{'multiply-adds a state':>24}{'ms':>10}{'ms with gradient':>20}")
    for name, (cost, loss, rest) in losses.items():
        forward = milliseconds(jax.jit(loss), student, *rest)
        both = milliseconds(jax.jit(jax.value_and_grad(loss)), student, *rest)
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
