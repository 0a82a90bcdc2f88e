"""Watching: what tells, while it trains, whether a student hears words and answers as its teacher.

    mean_embedding   the alignment of one vector for all words: who is not below it has heard none
    some             a few clips that are not trained on
    scores           of them: KL(teacher || student) over the whole answer, and the words heard

The loss cannot tell: it is a distance, on clips that are trained on, at the answer's first tokens.

Axes: B batch, Q virtual tokens, L text tokens, K states of an answer, E width of the LLM.
Reads: sharding.py, llama.py, connector.py, distill_loss.py, data.py.   Read next: answers.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import connector
import data
import distill_loss
import llama
from runtime import sharding

CLIPS = 64


def mean_embedding(llm: llama.Llama, corpus: data.Corpus, mesh: Mesh) -> float:
    """The alignment of the mean of the transcripts' embeddings with all of them."""
    ids, counts = np.unique(np.concatenate(corpus.ids), return_counts=True)

    def alignment(table: Array) -> Array:
        found, share = distill_loss.as_float32(table[ids]), counts / counts.sum()
        return share @ distill_loss.l2_norm(found - share @ found)

    whole = NamedSharding(mesh, P())
    return float(jax.jit(alignment, out_shardings=whole)(llm.model.embed_tokens.weight))


def some(corpus: data.Corpus, most: int = CLIPS) -> data.Corpus:
    """At most so many of its clips, drawn at random, and always the same ones."""
    chosen = np.random.default_rng(0).permutation(len(corpus.clips))[:most]
    clips, ids = ([rows[i] for i in chosen] for rows in (corpus.clips, corpus.ids))
    return dataclasses.replace(corpus, clips=clips, ids=ids, undecodable={})


def batch(corpus: data.Corpus, mesh: Mesh) -> dict[str, Array]:
    """All of its clips on the devices; some twice where they cannot be shared equally."""
    size = mesh.size * math.ceil(len(corpus.ids) / mesh.size)
    rows = data.batches(corpus, batch_size=size, seed=0, **sharding.process())
    return sharding.shard_host_batch(next(rows), mesh)


def scores(
    llm: llama.Llama,
    out: connector.DiVAOutput,
    by_state: Float[Array, "B K"],
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B"],
) -> dict[str, Float[Array, ""]]:
    """kl: nats, a mean over an answer's tokens, then over clips. heard: the share of the aligned
    virtual tokens to which their own word is the nearest."""
    kl = distill_loss.response("kl", out.student, out.teacher, by_state, llm.output_matrix, None)
    aligned, real = distill_loss.last_tokens(out.virtual, lengths, ids.shape[1])
    right = (connector.nearest_token_ids(llm, aligned) == ids).astype(jnp.float32)
    return {"kl": kl, "heard": distill_loss.weighted_mean(right, real * weights[:, None])}
