"""Precompute: the activations of the frozen models, computed once instead of in every step.

Encoder and teacher depend on the clip alone, so they yield the same in every epoch. If all of their
states fit, they are computed before step 0 and kept in host memory: a batch then holds the encoder
states instead of the audio, and the teacher states instead of what the teacher would read.

Axes: B batch, S audio samples, T encoder positions, D width of Whisper, L transcript tokens,
A response tokens, K = A + 1 response states, E width of the LLM.
Reads: sharding.py, connector.py, data.py, teacher_responses.py.   Read next: train.py.
"""

import time
from multiprocessing.pool import AsyncResult, ThreadPool

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

import connector
import data
from data import Batch
from runtime import sharding
from training.teacher_responses import Template

AUTO_LIMIT = 1 << 30  # bytes that `--precompute auto` keeps at most
CLIPS_PER_DEVICE = 16  # of one batch
THREADS = 4  # that decode the next batch
STAGES = ("encoder", "teacher")  # of `cost.flops`, which a step then does not compute


def precomputed_bytes(diva: connector.DiVA, corpus: data.Corpus) -> int:
    """Size of all encoder and teacher states of this corpus."""
    positions = diva.encoder.embed_positions.weight  # [T, D], as large as one clip's states
    num_states = corpus.num_response_tokens + 1
    elements = positions.size + num_states * diva.llm.config.hidden_size
    return len(corpus.ids) * elements * positions.dtype.itemsize


def should_precompute(choice: str, diva: connector.DiVA, corpus: data.Corpus) -> bool:
    """Whether `--precompute` asks for it. Raises ValueError where it is not possible."""
    is_single_process = jax.process_count() == 1
    if choice == "always" and not is_single_process:
        raise ValueError(
            "--precompute always: each of several processes would have to keep all clips. "
            "Expected auto or never."
        )
    fits = precomputed_bytes(diva, corpus) <= AUTO_LIMIT
    return choice == "always" or (choice == "auto" and is_single_process and fits)


def precompute(
    diva: connector.DiVA, corpus: data.Corpus, template: Template, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Batch fields for `corpus.precomputed`: encoder_states [clips, T, D], teacher_states
    [clips, K, E], and weights [clips], which are 0 for clips that cannot be decoded."""
    load = data.samples(corpus)
    num_clips = len(corpus.ids)
    batch_size = CLIPS_PER_DEVICE * mesh.size
    start_time = time.perf_counter()
    results = []
    with ThreadPool(THREADS) as pool:

        def read(start: int) -> AsyncResult:
            return pool.map_async(load, range(start, min(start + batch_size, num_clips)))

        next_rows = read(0)
        for start in range(0, num_clips, batch_size):
            rows = next_rows.get()
            next_rows = read(start + batch_size)  # decoded while the devices compute
            rows += rows[-1:] * (batch_size - len(rows))  # fill the last batch: one shape for all
            fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            batch = sharding.shard_host_batch(Batch(**fields), mesh)
            states = frozen_activations(diva, batch, template)
            results.append((*jax.device_get(states), fields["weights"]))

    encoder_states, teacher_states, weights = (
        np.concatenate(parts)[:num_clips] for parts in zip(*results, strict=True)
    )
    megabytes = (encoder_states.nbytes + teacher_states.nbytes) / 1e6
    seconds = time.perf_counter() - start_time
    print(
        f"precomputed encoder and teacher states of {num_clips:,} clips "
        f"({megabytes:,.0f} MB, {seconds:.0f} s)",
        flush=True,
    )
    return {
        "encoder_states": encoder_states,
        "teacher_states": teacher_states,
        "weights": weights,
    }


@sharding.use_model_mesh
@jax.jit
def frozen_activations(
    diva: connector.DiVA, batch: Batch, template: Template
) -> tuple[Float[Array, "B T D"], Float[Array, "B K E"]]:
    """Encoder states and teacher states of one batch."""
    response = batch.fed_response
    tail = connector.suffix_and_response(template.suffix, response)
    teacher = connector.append_rows(batch.transcript, batch.lengths, tail)
    prefix = diva.llm.embed(template.prefix[None])
    hidden = diva.llm(diva.llm.embed(teacher), "layers", prefix)
    start = batch.lengths + len(template.suffix) - 1
    teacher_states = connector.take_states(hidden, start, num_states=response.shape[1] + 1)
    return diva.encode(batch.audio), teacher_states
