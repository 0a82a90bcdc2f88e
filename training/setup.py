"""Claiming: what a run is about, as far as that can be known and refused without weights.

Reads: everything above it.   Read next: train.py.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath

import connector
import data
import llama
import weights
import whisper
from training import cost, record, teacher_responses, validation
from training.recipe import Config, recipe_of


class Claim(NamedTuple):
    """What a run is about, as far as it is known without weights."""

    corpus: data.Corpus
    watched: data.Corpus | None
    chat: llama.Chat
    turn: dict[str, list[int]]  # prefix and suffix of the template
    known: dict[str, Any]  # sizes of both models, template, texts: for shapes of state and batch
    work: Callable[..., dict[str, float]]  # FLOPs of a clip, of positions of text and of answer


def claim(config: Config) -> Claim:
    """The folder notes what run it is when all is known to be right that can be without weights.
    Raises ValueError."""
    manifest = os.path.isfile(config.data)
    where = (config.watch, config.split) if manifest else (config.data, config.watch)
    clips = data.read_clips(config.data, config.split, config.text_column)
    others = data.read_clips(*where, config.text_column) if config.watch else []
    asr = weights.read_config(whisper.WhisperConfig, weights.resolve(config.whisper))
    asr = connector.with_window(asr, config.window)
    llm = weights.read_config(llama.LlamaConfig, weights.resolve(config.llm))
    connector.DiVA.abstract(asr, llm, config.queries, jnp.dtype(config.dtype))  # do they fit?
    chat, queries = llama.Chat.load(config.llm), config.queries or asr.max_target_positions
    fitting = chat.encode_batch, asr.window_samples, queries
    corpus = data.prepare(clips, *fitting)
    watched = validation.some(data.prepare(others, *fitting)) if others else None
    turn, recipe = (
        teacher_responses.turn(chat, config.instructions),
        dataclasses.asdict(recipe_of(config)),
    )
    turn = record.claim_run(epath.Path(config.out), recipe, corpus.digest(), turn)
    corpus.more |= teacher_responses.draw(turn, len(corpus.ids), config.seed)
    turned = prefix, suffix, pads = teacher_responses.template(turn)
    own = 0 if pads is None else prefix.shape[-1]  # else all clips share it
    flops = functools.partial(cost.flops, before=prefix.shape[-1] - own)
    work = functools.partial(flops, asr, llm, queries, own + len(suffix))
    shapes = {name: (x.shape[1:], x.dtype) for name, x in corpus.more.items()}
    text = corpus.max_length
    known = {"asr": asr, "llm": llm, "turn": turned, "text": text, "more": shapes}
    return Claim(corpus, watched, chat, turn, known, work)
