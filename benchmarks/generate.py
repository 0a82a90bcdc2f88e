"""How fast answers come: `python -m benchmarks.generate` (some ten minutes on 2 cores).

Needs `pip install '.[parity]'`. All in float32, greedy, on the CPU, with published weights: folders
(as `python tests/real/fetch.py` makes them) or Hugging Face repo ids.

1. Tokens a second of generate.generate beside transformers' generate with its cache: the same
   prompts, out of this project's README, and the same tokens (which is checked).
2. Time from a spoken question to the first token of the answer, DiVA beside the cascade of the same
   Whisper and the same LLM: the toy models, and the published ones. A connector takes the same time
   untrained; its window may be short (train.py --window), a Whisper's own is 30 s.

Prints README's two tables; runs/benchmarks/generate.json keeps them.
"""

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
import weights
from benchmarks import side_by_side
from formats import audio_files
from runtime import cli

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
RUNS = 5
PROMPT, NEW = 32, 32  # tokens of each prompt and of each answer
BATCHES = 1, 8
MADE = (64, 6.0), (64, 30.0), (448, 30.0)  # connectors: queries, and seconds of the window


def prompts(llm: Path, size: int) -> np.ndarray:
    """README in so many pieces, as tokens [size, PROMPT]."""
    ids = llama.Chat.load(llm).encode((ROOT / "README.md").read_text(encoding="utf-8"))
    return np.array(ids[: size * PROMPT]).reshape(size, PROMPT)


def answers(path: Path, ids: np.ndarray) -> Callable[[], np.ndarray]:
    """For a side: the greedy tokens that follow the prompts `ids` [B, L]."""
    llm, lengths = llama.Llama.load(path), jnp.full(len(ids), ids.shape[1])

    def work():
        embeds = llm.embed(jnp.asarray(ids))
        tokens = generate.generate(llm, embeds, lengths, max_new_tokens=NEW, stop_ids=(-1,))
        return np.asarray(tokens)

    return work


def generation(llm: Path, size: int) -> dict[str, Any]:
    """Tokens a second of both, for one batch size."""
    from benchmarks import peer  # torch: imported where it is used, so that the table needs none

    ids = prompts(llm, size)
    makers = {"ours": (answers, llm, ids), "theirs": (peer.answers, llm, ids, NEW)}
    with side_by_side.sides(makers) as made:
        seconds = side_by_side.take_turns(made, RUNS)
        ours, theirs = (side.run() for side in made.values())
    assert (ours == theirs).all(), f"{(ours == theirs).mean():.0%} of the tokens are the same"
    rates = {name: size * NEW / median(some) for name, some in seconds.items()}
    return {"batch": size, **rates, "ratio": side_by_side.faster(**seconds), "same": 1.0}


def first_token(
    name: str, asr_path: str, llm_path: str, queries: int, window: float
) -> Callable[[], int]:
    """For a side, `diva` or `cascade` of two models: from a clip to the first token."""
    diva = connector.load_untrained(
        asr_path, llm_path, num_queries=queries, key=jax.random.key(0), window=window
    )
    asr, chat = generate.Transcriber.load(asr_path), llama.Chat.load(llm_path)
    virtual_tokens = eqx.filter_jit(diva.virtual_tokens)
    embed_turn = eqx.filter_jit(diva.embed_turn)
    prefix, suffix = chat.wrap()
    samples = {"diva": diva.window_samples, "cascade": asr.model.config.window_samples}[name]
    audio = audio_files.load_window(ROOT / cli.EXAMPLE, samples)

    def choose(embeds: jax.Array, length: int) -> int:
        lengths = jnp.asarray([length])
        return next(generate.stream(diva.llm, embeds, lengths, max_new_tokens=1, stop_ids=(-1,)))

    def speech() -> int:
        virtual = virtual_tokens(jnp.asarray(audio))
        embeds = embed_turn(virtual, jnp.asarray(prefix), jnp.asarray(suffix))
        return choose(embeds, embeds.shape[1])

    def cascade() -> int:
        ids = [*prefix, *chat.encode(asr(jnp.asarray(audio))[0]), *suffix]
        return choose(diva.llm.embed(jnp.asarray(generate.padded_row(ids))), len(ids))

    return {"diva": speech, "cascade": cascade}[name]


def waiting(models: str, asr: str, llm: str, queries: int, window: float) -> dict[str, Any]:
    """Seconds from a clip to the first token of the answer, of DiVA and of the cascade."""
    makers = {name: (first_token, name, asr, llm, queries, window) for name in ("diva", "cascade")}
    with side_by_side.sides(makers) as made:
        seconds = side_by_side.take_turns(made, RUNS)
    medians = {name: median(some) for name, some in seconds.items()}
    medians["ratio"] = 1 / side_by_side.faster(seconds["diva"], seconds["cascade"])
    return {"models": models, "queries": queries, "window": window, **medians}


def table(measured: dict[str, Any]) -> str:
    """README's tables, in Markdown."""
    lines = [
        "| batch | here, tokens/s | transformers, tokens/s | ratio |",
        "|--:|--:|--:|--:|",
        *(
            f"| {row['batch']} | {row['ours']:.0f} | {row['theirs']:.0f} | {row['ratio']:.2f} |"
            for row in measured["generation"]
        ),
        "",
        "| models | queries | window, s | DiVA, ms | cascade, ms | ratio |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row['models']} | {row['queries']} | {row['window']} | {1e3 * row['diva']:.0f} | "
            f"{1e3 * row['cascade']:.0f} | {row['ratio']:.2f} |"
            for row in measured["first_token"]
        ),
    ]
    return "\n".join(lines)


def main(
    whisper: str = "openai/whisper-base", llm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
) -> None:
    """Print README's tables, of these models beside the toy's."""
    toy = [str(ROOT / "toy" / name) for name in ("whisper", "llama")]
    pair = [weights.resolve(path) for path in (whisper, llm)]
    names = ", ".join(path.rpartition("/")[2] for path in (whisper, llm))
    measured: dict[str, Any] = {"machine": side_by_side.machine("jax", "torch", "transformers")}
    measured["generation"] = [generation(pair[1], size) for size in BATCHES]
    rows = [waiting(names, *map(str, pair), *made) for made in MADE]
    measured["first_token"] = [waiting("the toy's", *toy, 8, 1.6), *rows]
    side_by_side.keep(FILE, measured, table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
