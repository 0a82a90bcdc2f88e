"""How fast answers come: `python -m benchmarks.generate` (some ten minutes on 2 cores).

Needs `pip install '.[parity]'`. All in float32, greedy, on the CPU.

1. Tokens a second of generate.generate beside transformers' generate with its cache: the same
   random weights of about 100 million parameters, the same tokens (which is checked).
2. Time from a clip to the first token of the answer, DiVA beside the cascade of the same Whisper
   and the same LLM: the toy models on a spoken question; and random weights in the sizes of
   Whisper-base and the LLM above, the transcript being of 13 tokens (Common Voice's mean).

Prints README's two tables; runs/benchmarks/generate.json keeps them.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import connector
import generate
import llama
import whisper
from benchmarks import side_by_side, sizes
from runtime import command, recording

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
RUNS = 7
PROMPT, NEW = 32, 64  # tokens of each prompt and of each answer
BATCHES = 1, 8
QUERIES = 16, 64, 448
HEARD = 13  # tokens of a transcript
AROUND = 40  # tokens of the chat template and an instruction


def answers(folder: Path, ids: np.ndarray) -> Callable[[], np.ndarray]:
    """For a side: the greedy tokens that follow the prompts `ids` [B, L]."""
    llm, lengths = llama.Llama.load(folder / "llama"), jnp.full(len(ids), ids.shape[1])

    def work():
        embeds = llm.embed(jnp.asarray(ids))
        tokens = generate.generate(llm, embeds, lengths, max_new_tokens=NEW, stop_ids=(-1,))
        return np.asarray(tokens)

    return work


def generation(folder: Path, size: int) -> dict[str, Any]:
    """Tokens a second of both, for one batch size."""
    from benchmarks import peer  # torch: imported where it is used, so that the table needs none

    vocabulary = sizes.LLAMA_100M.vocab_size
    ids = np.random.default_rng(size).integers(3, vocabulary, (size, PROMPT))
    makers = {"ours": (answers, folder, ids), "theirs": (peer.answers, folder, ids, NEW)}
    with side_by_side.sides(makers) as made:
        seconds = side_by_side.take_turns(made, RUNS)
        ours, theirs = (side.run() for side in made.values())
    assert (ours == theirs).all(), f"{(ours == theirs).mean():.0%} of the tokens are the same"
    rates = {name: size * NEW / median(some) for name, some in seconds.items()}
    return {"batch": size, **rates, "ratio": side_by_side.faster(**seconds), "same": 1.0}


def toy() -> tuple:
    """The shipped models and a spoken question: DiVA, what transcribes, a clip [1, S], a turn."""
    diva = connector.DiVA.load(ROOT / "toy/diva")
    asr = generate.Transcriber.load(ROOT / "toy/whisper")
    chat = llama.Chat.load(ROOT / "toy/llama")
    clip = ROOT / command.EXAMPLE
    audio = recording.load_window(clip, diva.window_samples)
    return diva, lambda x: chat.encode(asr(x)[0]), audio, chat.wrap()


def random(folder: Path, queries: int) -> tuple:
    """The same of random weights: a transcript ends when it is as long as we say."""
    asr, llm = whisper.Whisper.load(folder / "whisper"), llama.Llama.load(folder / "llama")
    diva = connector.DiVA.create(asr, llm, queries, jax.random.key(1))
    forced = (50_258, 50_259, 50_359, 50_363)
    rules = {"forced": forced, "suppress": (50_257,), "begin_suppress": ()}
    rules["max_length"] = len(forced) + HEARD

    def transcribe(audio: jax.Array) -> list[int]:
        tokens = np.asarray(generate.greedy(asr, audio, **rules))[0, len(forced) :]
        return (tokens % llm.config.vocab_size).tolist()

    audio = 0.1 * np.random.default_rng(0).normal(size=(1, diva.window_samples))
    return diva, transcribe, audio.astype(np.float32), ([5] * (AROUND // 2),) * 2


def first_token(name: str, make: Callable[..., tuple], *arguments: Any) -> Callable[[], int]:
    """For a side, `diva` or `cascade` of the models made: from a clip to the first token."""
    diva, transcribe, audio, (prefix, suffix) = make(*arguments)
    virtual_tokens = eqx.filter_jit(diva.virtual_tokens)
    embed_turn = eqx.filter_jit(diva.embed_turn)
    before, after = jnp.asarray(prefix), jnp.asarray(suffix)

    def choose(embeds: jax.Array, length: int) -> int:
        lengths = jnp.asarray([length])
        return next(generate.stream(diva.llm, embeds, lengths, max_new_tokens=1, stop_ids=(-1,)))

    def speech() -> int:
        embeds = embed_turn(virtual_tokens(jnp.asarray(audio)), before, after)
        return choose(embeds, embeds.shape[1])

    def cascade() -> int:
        ids = [*prefix, *transcribe(jnp.asarray(audio)), *suffix]
        return choose(diva.llm.embed(jnp.asarray(generate.padded_row(ids))), len(ids))

    return {"diva": speech, "cascade": cascade}[name]


def waiting(models: str, queries: int, *make: Any) -> dict[str, Any]:
    """Seconds from a clip to the first token of the answer, of DiVA and of the cascade."""
    makers = {name: (first_token, name, *make) for name in ("diva", "cascade")}
    with side_by_side.sides(makers) as made:
        seconds = side_by_side.take_turns(made, RUNS)
    medians = {name: median(some) for name, some in seconds.items()}
    return {"models": models, "queries": queries, **medians}


def table(measured: dict[str, Any]) -> str:
    """README's tables, in Markdown."""
    lines = [
        "| batch | here, tokens/s | transformers, tokens/s | ratio |",
        "|--:|--:|--:|--:|",
        *(
            f"| {row['batch']} | {row['ours']:.0f} | {row['theirs']:.0f} | {row['ratio']:.1f} |"
            for row in measured["generation"]
        ),
        "",
        "| models | queries | DiVA, ms | cascade, ms | ratio |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {row['models']} | {row['queries']} | {1e3 * row['diva']:.0f} | "
            f"{1e3 * row['cascade']:.0f} | {row['diva'] / row['cascade']:.2f} |"
            for row in measured["first_token"]
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    measured: dict[str, Any] = {"machine": side_by_side.machine("jax", "torch", "transformers")}
    with tempfile.TemporaryDirectory() as name:
        folder, models = Path(name), "Whisper-base, 100 M LLM"
        sizes.write(folder, sizes.WHISPER_BASE, sizes.LLAMA_100M)
        measured["generation"] = [generation(folder, size) for size in BATCHES]
        rows = [waiting(models, queries, random, folder, queries) for queries in QUERIES]
    measured["first_token"] = [waiting("the toy's", 8, toy), *rows]
    side_by_side.keep(FILE, measured, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
