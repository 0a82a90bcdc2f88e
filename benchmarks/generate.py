"""How fast answers come: `python -m benchmarks.generate` (some ten minutes on 2 cores).

Needs `pip install '.[parity]'`. All in float32, greedy, on the CPU; each figure is the median of
several runs in which the two sides take turns, so that a noisy machine disturbs both.

1. Tokens a second of generate.generate beside transformers' generate with its cache: the same
   random weights of about 100 million parameters, the same tokens (which is checked).
2. Time from a clip to the first token of the answer, DiVA beside the cascade of the same Whisper
   and the same LLM: the toy models on a spoken question; and random weights in the sizes of
   Whisper-base and the LLM above, the transcript being of 13 tokens (Common Voice's mean).
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import connector
import data
import generate
import llama
import whisper

ROOT = Path(__file__).parents[1]
RUNS = 7
PROMPT, NEW = 32, 64  # tokens of each prompt and of each answer
BATCHES = 1, 8
HEARD = 13  # tokens of a transcript
AROUND = 40  # tokens of the chat template and an instruction
LLAMA = dict(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    num_key_value_heads=4, vocab_size=32_000, max_position_embeddings=2048, rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)  # fmt: skip
WHISPER = whisper.WhisperConfig(
    d_model=512,
    encoder_layers=6,
    encoder_attention_heads=8,
    encoder_ffn_dim=2048,
    decoder_layers=6,
    decoder_attention_heads=8,
    decoder_ffn_dim=2048,
    num_mel_bins=80,
    max_source_positions=1500,
    max_target_positions=448,
    vocab_size=51_865,
    decoder_start_token_id=50_258,
    eos_token_id=50_257,
)


def take_turns(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each side; the first run of each, which compiles, is not counted."""
    times = {name: [] for name in sides}
    for run in range(RUNS + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if run:
                times[name].append(time.perf_counter() - start)
    return {name: median(some) for name, some in times.items()}


def generation(llm: llama.Llama, theirs: transformers.LlamaForCausalLM) -> list[dict]:
    """Tokens a second of both, for each batch size."""
    rows = []
    for size in BATCHES:
        ids = np.random.default_rng(size).integers(3, LLAMA["vocab_size"], (size, PROMPT))
        said = {}

        def ours(ids=ids, said=said):
            embeds, lengths = llm.embed(jnp.asarray(ids)), jnp.full(len(ids), ids.shape[1])
            tokens = generate.generate(llm, embeds, lengths, max_new_tokens=NEW, stop_ids=(-1,))
            said["ours"] = np.asarray(tokens)

        def others(ids=ids, said=said):
            prompt = torch.tensor(ids)
            with torch.inference_mode():
                tokens = theirs.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                )
            said["theirs"] = tokens[:, ids.shape[1] :].numpy()

        seconds = take_turns({"ours": ours, "theirs": others})
        same = float((said["ours"] == said["theirs"]).mean())
        rates = {name: size * NEW / value for name, value in seconds.items()}
        rows.append(
            {"batch": size, **rates, "ratio": rates["ours"] / rates["theirs"], "same": same}
        )
    return rows


def first_token(
    diva: connector.DiVA,
    asr: Callable[[jax.Array], list[int]],
    audio: np.ndarray,
    prefix: list[int],
    suffix: list[int],
) -> dict[str, float]:
    """Seconds from a clip [1, S] to the first token of the answer, of DiVA and of the cascade.
    `asr` gives the LLM's ids of the transcript."""
    virtual_tokens = eqx.filter_jit(diva.virtual_tokens)
    embed_turn = eqx.filter_jit(diva.embed_turn)
    before, after = jnp.asarray(prefix), jnp.asarray(suffix)

    def choose(embeds, length):
        tokens = generate.stream(
            diva.llm, embeds, jnp.asarray([length]), max_new_tokens=1, stop_ids=(-1,)
        )
        next(tokens)

    def speech():
        embeds = embed_turn(virtual_tokens(jnp.asarray(audio)), before, after)
        choose(embeds, embeds.shape[1])

    def cascade():
        ids = [*prefix, *asr(jnp.asarray(audio)), *suffix]
        choose(diva.llm.embed(jnp.asarray(generate.padded_row(ids))), len(ids))

    return take_turns({"diva": speech, "cascade": cascade})


def toy() -> dict:
    """The shipped models on a spoken question."""
    diva = connector.DiVA.load(ROOT / "toy/diva")
    asr = generate.Transcriber.load(ROOT / "toy/whisper")
    chat = llama.Chat.load(ROOT / "toy/llama")
    clip = ROOT / "toy/common_voice/en/clips/toy_en_test_00000.opus"
    audio = data.load_window(clip, diva.window_samples)
    seconds = first_token(diva, lambda x: chat.encode(asr(x)[0]), audio, *chat.wrap())
    return {"models": "the toy's", "queries": len(diva.connector.query_tokens), **seconds}


def random(llm: llama.Llama, queries: int) -> dict:
    """Random weights: a transcript ends when it is as long as we say."""
    asr = whisper.Whisper.init(WHISPER, jax.random.key(0))
    diva = connector.DiVA.create(asr, llm, queries, jax.random.key(1))
    forced = (50_258, 50_259, 50_359, 50_363)
    rules = {"forced": forced, "suppress": (50_257,), "begin_suppress": ()}
    rules["max_length"] = len(forced) + HEARD

    def transcribe(audio: jax.Array) -> list[int]:
        tokens = np.asarray(generate.greedy(asr, audio, **rules))[0, len(forced) :]
        return (tokens % LLAMA["vocab_size"]).tolist()

    audio = 0.1 * np.random.default_rng(0).normal(size=(1, WHISPER.window_samples))
    half = [5] * (AROUND // 2)
    seconds = first_token(diva, transcribe, audio.astype(np.float32), half, half)
    return {"models": "Whisper-base, 100 M LLM", "queries": queries, **seconds}


def table(measured: dict[str, list[dict]]) -> str:
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
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**LLAMA, bos_token_id=1, eos_token_id=2)
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.save_pretrained(folder)
        llm = llama.Llama.load(folder)
    measured = {"generation": generation(llm, theirs)}
    measured["first_token"] = [toy(), *(random(llm, queries) for queries in (16, 64, 448))]
    assert all(row["same"] == 1 for row in measured["generation"]), measured
    file = ROOT / "benchmarks" / "generate.json"
    file.write_text(json.dumps(measured, indent=2) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
