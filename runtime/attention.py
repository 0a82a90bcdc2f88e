"""Softmax attention: the one place where the project computes it.

    queries [B, T, H, K], keys and values [B, S, G, K] -> output [B, T, H, K]

    scores = queries . keys / sqrt(K);  probs = softmax(scores);  output = probs . values

Axes: B batch, T query positions, S key positions, H query heads, G key/value heads (grouped-query
attention: H / G query heads share one), K head width.

On accelerators, JAX's own attention computes all heads at once, on NVIDIA GPUs with cuDNN where it
is supported: a step of Whisper-large and an 8B Llama then takes two thirds of the time. On a CPU
that is slow: for four clips in Whisper's encoder, the scores of all heads are 216 MB per layer,
which fit in no cache and are written to newly allocated pages that the system must clear first.
Computed head by head, the scores are 9 MB in one buffer that is reused, which is four times as
fast. No scores are saved for the backward pass either: it recomputes them, one head at a time.

Reads: sharding.py.   Read next: cost.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from runtime import sharding

MAX_CPU_SCORES = 2**22  # above this number of scores, a CPU computes head by head
IMPLEMENTATION: str | None = None  # "xla" or "cudnn"; None: `implementation` chooses


def attend(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    causal: bool = False,
    prefix_kv: tuple[Float[Array, "1 P G K"], Float[Array, "1 P G K"]] | None = None,
) -> Float[Array, "B T H K"]:
    """Softmax attention; scores and softmax are in f32.

    Args:
        causal: each position attends only to itself and to earlier positions.
        prefix_kv: keys and values of a prefix that is the same for all rows; every position
            attends to it.
    """
    if prefix_kv is not None:
        prefix_length = prefix_kv[0].shape[1]
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(old, (len(queries), *old.shape[1:])), new], axis=1)
            for old, new in zip(prefix_kv, (keys, values), strict=True)
        )

        # Causal attention expects as many queries as keys: pad the queries, then drop the outputs
        # of the padding.
        queries = jnp.pad(queries, ((0, 0), (prefix_length, 0), (0, 0), (0, 0)))
        return attend(queries, keys, values, causal=causal)[:, prefix_length:]

    num_scores = queries.shape[0] * queries.shape[2] * queries.shape[1] * keys.shape[1]
    if sharding.platform() == "cpu" and num_scores > MAX_CPU_SCORES:
        attention = functools.partial(by_head, causal)
        return sharding.shard_map_batch(attention, queries, keys, values)
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        is_causal=causal,
        implementation=IMPLEMENTATION or implementation(queries),
    )


def implementation(queries: Float[Array, "B T H K"]) -> str:
    """Return cudnn (half precision, heads up to 128 wide, NVIDIA Ampere or newer) or xla."""
    if sharding.platform() != "gpu" or queries.dtype.itemsize > 2:
        return "xla"

    head_width = queries.shape[-1]
    major = str(jax.devices()[0].compute_capability).split(".")[0]
    is_ampere_or_newer = major.isdigit() and int(major) >= 8  # AMD reports a name, such as gfx942
    return "cudnn" if is_ampere_or_newer and head_width <= 128 and head_width % 8 == 0 else "xla"


def attend_one(
    queries: Float[Array, "B H K"],
    keys: Float[Array, "B G S K"],
    values: Float[Array, "B G S K"],
    mask: Bool[Array, "#B S"] | None = None,
) -> Float[Array, "B H K"]:
    """Attention of one query position over a KV cache, for decoding.

    The cache has the head axis before the positions: transposing it for each token would cost more
    than the rest of the step.

    Args:
        mask: true for the cache positions to attend to (default: all).
    """
    head_width = queries.shape[-1]
    groups = queries.reshape(*keys.shape[:2], -1, head_width) * head_width**-0.5  # [B, G, M, K]

    scores = jnp.einsum("bgmk,bgsk->bgms", groups, keys, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    probs = jax.nn.softmax(scores).astype(values.dtype)
    return jnp.einsum("bgms,bgsk->bgmk", probs, values).reshape(queries.shape)


def by_head(
    causal: bool,
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
) -> Float[Array, "B T H K"]:
    """The same result as `attend`, computed for one key/value head of one clip at a time."""
    num_kv_heads = keys.shape[2]

    # [M T, S] for the M query heads that share a key/value head: keys up to the query's position.
    query_positions = jnp.tile(jnp.arange(queries.shape[1]), queries.shape[2] // num_kv_heads)
    mask = jnp.arange(keys.shape[1]) <= query_positions[:, None] if causal else None

    @jax.checkpoint
    def attend_head(head_arrays):
        queries, keys, values = (x.astype(jnp.float32) for x in head_arrays)
        # The batch axis of size 1 distinguishes these matmuls from those with weights: the
        # rematerialisation policies in sharding.py save the results of the latter only.
        scores = jnp.einsum("btk,bsk->bts", queries * queries.shape[-1] ** -0.5, keys)
        probs = jax.nn.softmax(scores, where=mask)
        return jnp.einsum("bts,bsk->btk", probs, values)

    def attend_clip(clip_arrays):
        # Split into heads here, clip by clip, so that the heads are still in the CPU's cache.
        batch_of_one = [x[None] for x in clip_arrays]
        heads = [split_heads(x, num_kv_heads) for x in batch_of_one]
        output = jax.lax.map(attend_head, heads)
        return join_heads(output, batch_of_one[0].shape)[0]

    output = jax.lax.map(attend_clip, (queries, keys, values)).astype(queries.dtype)
    return checkpoint_name(output, sharding.SAVED_NAME)


def split_heads(x: Float[Array, "B T H K"], num_kv_heads: int) -> Float[Array, "BG 1 MT K"]:
    """One row for each key/value head, with the positions of its M query heads concatenated."""
    batch, positions, _, head_width = x.shape
    x = x.reshape(batch, positions, num_kv_heads, -1, head_width).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch * num_kv_heads, 1, -1, head_width)


def join_heads(
    heads: Float[Array, "BG 1 MT K"], shape: tuple[int, int, int, int]
) -> Float[Array, "B T H K"]:
    """The inverse of `split_heads`; `shape` is that of the result."""
    batch, positions, num_heads, head_width = shape
    return heads.reshape(batch, num_heads, positions, head_width).transpose(0, 2, 1, 3)
