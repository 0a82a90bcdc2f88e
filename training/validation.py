"""Validation: scores on held-out clips, computed while a run trains.

    mean_embedding_baseline   alignment loss of always predicting the mean embedding: a student that
                              is not below it has learned no words
    draw                      the held-out clips
    scores                    KL(teacher || student) over whole responses, nearest-token accuracy

The training loss cannot show either: it is a distance, on clips that are trained on, at the first
response tokens.

Axes: B batch, Q virtual tokens, L transcript tokens, K response states, E width of the LLM.
Reads: sharding.py, llama.py, connector.py, distill_loss.py, data.py.
Read next: teacher_responses.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import connector
import data
import distill_loss
import llama
from data import Batch
from runtime import sharding

NUM_CLIPS = 64


def mean_embedding_baseline(llm: llama.Llama, corpus: data.Corpus, mesh: Mesh) -> float:
    """Alignment loss of the mean transcript embedding against all transcript embeddings."""
    ids, counts = np.unique(np.concatenate(corpus.ids), return_counts=True)

    def alignment(table: Array) -> Array:
        embeds = distill_loss.as_float32(table[ids])
        frequency = counts / counts.sum()
        mean = frequency @ embeds
        return frequency @ distill_loss.l2_norm(embeds - mean)

    replicated = NamedSharding(mesh, P())
    return float(jax.jit(alignment, out_shardings=replicated)(llm.model.embed_tokens.weight))


def draw(corpus: data.Corpus, num_clips: int = NUM_CLIPS) -> data.Corpus:
    """At most `num_clips` of its clips, drawn at random with a fixed seed."""
    chosen = np.random.default_rng(0).permutation(len(corpus.clips))[:num_clips]
    return dataclasses.replace(
        corpus,
        clips=[corpus.clips[i] for i in chosen],
        ids=[corpus.ids[i] for i in chosen],
        undecodable={},
        precomputed={},
    )


def make_batch(corpus: data.Corpus, mesh: Mesh) -> Batch:
    """All of its clips on the devices; a few twice if they cannot be shared equally."""
    batch_size = mesh.size * math.ceil(len(corpus.ids) / mesh.size)
    batches = data.batches(corpus, batch_size=batch_size, seed=0, **sharding.process())
    return sharding.shard_host_batch(next(batches), mesh)


def scores(
    llm: llama.Llama,
    out: connector.DiVAOutput,
    *,
    batch: Batch,
    state_weights: Float[Array, "B K"],
) -> dict[str, Float[Array, ""]]:
    """kl: nats, a mean over the tokens of each response, then over clips.
    nearest_token_accuracy: fraction of aligned virtual tokens whose nearest token is the right one.
    """
    kl = distill_loss.response(
        kind="kl",
        student=out.student_states,
        teacher=out.teacher_states,
        weights=state_weights,
        output_matrix=llm.output_matrix,
        gram=None,
    )
    aligned, is_aligned = distill_loss.last_tokens(
        out.virtual_tokens, batch.lengths, batch.transcript.shape[1]
    )
    correct = connector.nearest_token_ids(llm, aligned) == batch.transcript
    accuracy = distill_loss.weighted_mean(
        correct.astype(jnp.float32), is_aligned * batch.weights[:, None]
    )
    return {"kl": kl, "nearest_token_accuracy": accuracy}
