"""Setup: everything about a run that can be validated without loading weights.

A run that cannot work is refused here, before anything is compiled or written.

Reads: data.py, connector.py, recipe.py, cost.py, record.py, teacher_responses.py, validation.py.
Read next: train.py.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from etils import epath

import connector
import data
import llama
import weights
import whisper
from training import cost, record, teacher_responses, validation
from training.recipe import Config, recipe_of
from training.teacher_responses import Template


class Preflight(NamedTuple):
    """What is known of a run before its weights are loaded."""

    corpus: data.Corpus
    validation: data.Corpus | None
    chat: llama.Chat
    template: Template
    asr: whisper.WhisperConfig  # with the run's audio window
    llm: llama.LlamaConfig
    # (transcript positions, fed response tokens) -> FLOPs of one clip in each stage of a step
    flops_by_stage: Callable[[int, int], dict[str, float]]


def preflight(config: Config) -> Preflight:
    """Validate everything that needs no weights (data, configs, tokenizer, output folder), then
    record the run's configuration in its folder.

    Raises ValueError or FileNotFoundError.
    """
    clips = data.read_clips(config.data, config.split, config.text_column)
    validation_clips = []
    if config.validation:
        is_manifest = os.path.isfile(config.data)
        validation_clips = data.read_clips(
            config.validation if is_manifest else config.data,
            config.split if is_manifest else config.validation,
            config.text_column,
        )

    # The models' configs, and whether the two fit together.
    asr = weights.read_config(whisper.WhisperConfig, weights.resolve(config.whisper))
    asr = connector.with_window(asr, config.window)
    llm = weights.read_config(llama.LlamaConfig, weights.resolve(config.llm))
    connector.abstract(asr, llm, config.queries, jnp.dtype(config.dtype))
    chat = llama.Chat.load(config.llm)
    num_queries = config.queries or asr.max_target_positions

    # Clips that fit the window and the queries.
    prepare = functools.partial(
        data.prepare,
        encode=chat.encode_batch,
        window_samples=asr.window_samples,
        max_tokens=num_queries,
    )
    corpus = prepare(clips)
    held_out = validation.draw(prepare(validation_clips)) if validation_clips else None

    # The folder: another run's is refused. A resumed run keeps its first template, since some
    # templates contain today's date.
    prefix, suffix = chat.wrap()
    tokens = record.claim_run(
        epath.Path(config.out),
        dataclasses.asdict(recipe_of(config)),
        corpus.digest(),
        {"prefix": prefix, "suffix": suffix},
    )
    template = teacher_responses.make_template(tokens["prefix"], tokens["suffix"])

    def flops_by_stage(text_positions: int, response_tokens: int) -> dict[str, float]:
        return cost.flops(
            asr,
            llm,
            num_queries,
            len(template.suffix),
            text_positions,
            response_tokens,
            before=len(template.prefix),
        )

    return Preflight(corpus, held_out, chat, template, asr, llm, flops_by_stage)
