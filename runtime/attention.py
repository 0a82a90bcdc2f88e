"""Attention: each position gathers what it needs from the others. The one place where it is summed.

    queries [B, T, H, K], keys and values [B, S, G, K] -> heard [B, T, H, K]

    scores = queries . keys / sqrt(K);  shares = softmax(scores);  heard = shares . values

Axes: B batch, T positions that ask, S positions that are asked, H query heads, G key/value heads
(H / G queries share one), K head width.

On accelerators JAX's own attention does it for all heads at once, on NVIDIA's by cuDNN where that
can: a step of Whisper-large and an 8B Llama takes two thirds of the time. A CPU cannot: for four
clips in Whisper's encoder the scores of all heads are 216 MB in each layer, far from every cache,
and in fresh pages that the system must clear first. Head by head they are 9 MB, in one place that
is used again and again: four times as fast. The backward pass keeps no scores either: it computes
each head again when its turn comes.

Reads: sharding.py.   Read next: cost.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from runtime import sharding

CACHED = 2**22  # elements: scores of all heads that a CPU can keep near
IMPLEMENTATION: str | None = None  # of JAX's own: xla or cudnn; None: as `implementation` says


def attend(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    causal: bool = False,
    before: tuple[Float[Array, "1 P G K"], Float[Array, "1 P G K"]] | None = None,
) -> Float[Array, "B T H K"]:
    """What each position hears; scores and softmax in f32. Causal: of itself and those before, and
    of the keys and values that stand `before` all rows, the same for each."""
    if before is not None:
        past, rows = before[0].shape[1], len(queries)
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(old, (rows, *old.shape[1:])), new], axis=1)
            for old, new in zip(before, (keys, values), strict=True)
        )
        # causal attention wants as many that ask: nothing is done with what the first ones hear
        queries = jnp.pad(queries, ((0, 0), (past, 0), (0, 0), (0, 0)))
        return attend(queries, keys, values, causal)[:, past:]
    scores = queries.shape[0] * queries.shape[2] * queries.shape[1] * keys.shape[1]
    if sharding.platform() == "cpu" and scores > CACHED:
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
    """cudnn for half precision and heads of at most 128, on Ampere or what came after; or xla."""
    if sharding.platform() != "gpu" or queries.dtype.itemsize > 2:
        return "xla"
    major, width = str(jax.devices()[0].compute_capability).split(".")[0], queries.shape[-1]
    new = major.isdigit() and int(major) >= 8  # an AMD's is a name
    return "cudnn" if new and width <= 128 and width % 8 == 0 else "xla"


def attend_one(
    queries: Float[Array, "B H K"],
    keys: Float[Array, "B G S K"],
    values: Float[Array, "B G S K"],
    seen: Bool[Array, "#B S"] | None = None,
) -> Float[Array, "B H K"]:
    """The same for one position, over those of a cache that it has `seen` (None: all). The cache is
    kept head by head: turning it around for each token would cost more than all the rest of it."""
    groups = queries.reshape(*keys.shape[:2], -1, queries.shape[-1]) * queries.shape[-1] ** -0.5
    scores = jnp.einsum("bgmk,bgsk->bgms", groups, keys, preferred_element_type=jnp.float32)
    scores = scores if seen is None else jnp.where(seen[:, None, None], scores, -jnp.inf)
    shares = jax.nn.softmax(scores).astype(values.dtype)
    return jnp.einsum("bgms,bgsk->bgmk", shares, values).reshape(queries.shape)


def by_head(
    causal: bool,
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
) -> Float[Array, "B T H K"]:
    """The same, for one key/value head of one clip at a time."""
    # [M T, S], of the M query heads that share one: the positions up to each query's own
    at = jnp.tile(jnp.arange(queries.shape[1]), queries.shape[2] // keys.shape[2])
    seen = jnp.arange(keys.shape[1]) <= at[:, None] if causal else None

    @jax.checkpoint
    def head(arrays):
        queries, keys, values = (x.astype(jnp.float32) for x in arrays)
        # The axis of 1 tells products with weights, which sharding.py keeps for the backward pass,
        # from these, which it must not keep.
        scores = jnp.einsum("btk,bsk->bts", queries * queries.shape[-1] ** -0.5, keys)
        shares = jax.nn.softmax(scores, where=seen)
        return jnp.einsum("bts,bsk->btk", shares, values)

    def clip(arrays):  # split when its turn comes: its heads are then near
        one = [x[None] for x in arrays]
        heard = jax.lax.map(head, [_split(x, keys.shape[2]) for x in one])
        return _join(heard, one[0])[0]

    heard = jax.lax.map(clip, (queries, keys, values)).astype(queries.dtype)
    return checkpoint_name(heard, sharding.SAVED_NAME)


def _split(x, heads):
    """[B, T, H, K] -> [B G, 1, M T, K]"""
    batch, positions, _, width = x.shape
    x = x.reshape(batch, positions, heads, -1, width).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch * heads, 1, -1, width)


def _join(parts, like):
    """[B G, 1, M T, K] -> [B, T, H, K], the shape of `like`"""
    batch, positions, heads, width = like.shape
    return parts.reshape(batch, heads, positions, width).transpose(0, 2, 1, 3)
