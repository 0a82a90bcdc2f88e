"""Keeping: what the frozen networks say of a clip, said once.

Encoder and teacher read the clip alone, so they say the same in every epoch. Where there is room
for all of it, it is computed before step 0 and kept in the memory of the host: a batch then holds
the encoder's states instead of the audio, and the teacher's instead of what it would read.

Axes: B batch, S audio samples, T encoder positions, D width of Whisper, L text tokens, P and R
length of the template's two parts, I prefixes, A answer tokens, K = A + 1, E width of the LLM.
Reads: sharding.py, connector.py, data.py, teacher_responses.py.   Read next: train.py.
"""

import time
from multiprocessing.pool import ThreadPool
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

import connector
import data
from runtime import sharding
from training import teacher_responses

ROOM = 1 << 30  # bytes, for `--frozen-states auto`
AT_ONCE = 16  # clips of a device
THREADS = 4  # that decode the next ones
PARTS = "encoder", "teacher"  # of `cost.flops`, that a step then does not do


def bytes_of(diva: connector.DiVA, corpus: data.Corpus) -> int:
    """What would be kept of this corpus."""
    width, states = diva.llm.config.hidden_size, diva.encoder.embed_positions.weight
    fed = corpus.more["answers"].shape[1] if "answers" in corpus.more else 0
    return len(corpus.ids) * (states.size + (fed + 1) * width) * states.dtype.itemsize


def wanted(how: str, diva: connector.DiVA, corpus: data.Corpus) -> bool:
    """Whether `--frozen-states` asks to keep them. Raises ValueError where that cannot be."""
    alone = jax.process_count() == 1
    if how == "keep" and not alone:
        raise ValueError(
            "--frozen-states keep: each of several processes would have to keep all clips. "
            "Expected auto or compute."
        )
    return how == "keep" or (how == "auto" and alone and bytes_of(diva, corpus) <= ROOM)


def keep(
    diva: connector.DiVA, corpus: data.Corpus, template: tuple[Any, Any, Any], mesh: Mesh
) -> dict[str, np.ndarray]:
    """For `corpus.more`: audio [clips, T, D] are the encoder's states, taught [clips, K, E] the
    teacher's, weights [clips] whether a clip could be decoded."""
    load, clips, began = data.samples(corpus), len(corpus.ids), time.perf_counter()
    size, kept = AT_ONCE * mesh.size, []
    with ThreadPool(THREADS) as pool:

        def read(first: int) -> Any:
            numbers = range(first, min(first + size, clips))
            return pool.map_async(load, numbers)

        ahead = read(0)
        for first in range(0, clips, size):
            rows, ahead = ahead.get(), read(first + size)  # while the devices compute
            rows += rows[-1:] * (size - len(rows))  # the last batch is filled up
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            said = _say(diva, sharding.shard_host_batch(batch, mesh), template)
            kept.append((*jax.device_get(said), batch["weights"]))
    audio, taught, weights = (np.concatenate(part)[:clips] for part in zip(*kept, strict=True))
    size = (audio.nbytes + taught.nbytes) / 1e6
    print(
        f"kept what encoder and teacher say of {clips:,} clips: {size:,.0f} MB, "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return {"audio": audio, "taught": taught, "weights": weights}


@sharding.use_model_mesh
@jax.jit
def _say(
    diva: connector.DiVA, batch: dict[str, Array], template: tuple[Any, Any, Any]
) -> tuple[Float[Array, "B T D"], Float[Array, "B K E"]]:
    prefix, suffix, pads = template
    prefix, pads = teacher_responses.own_prefix(prefix, pads, batch)
    before, prefix = connector.shared(diva.llm, prefix)
    fed = batch.get("answers", batch["ids"][:, :0])
    turn = batch["ids"], batch["lengths"], prefix, suffix, fed, pads
    text, first = connector.text_turn(*turn)
    hidden = diva.llm(diva.llm.embed(text), before=before)
    return diva.encode(batch["audio"]), connector.take_states(hidden, first, fed.shape[1] + 1)
