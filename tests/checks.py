"""Helpers for several tests: random weights, and comparisons with outputs of transformers.

The comparisons run on the committed fixtures (without torch; see make_fixtures.py) and, with
transformers installed, in tests/parity.
"""

import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import generate
import llama
import whisper


def close(got, expected, relative: float, what: str) -> None:
    """Assert that the largest error is at most `relative` times the largest value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    error, scale = np.abs(got - expected).max(), np.abs(expected).max()
    assert error <= relative * scale, f"{what}: error {error:.3g} on values up to {scale:.3g}"


def random_weights(template, seed: int, scale: float):
    """Random arrays of these shapes; choose `scale` so that every array affects the output."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return jnp.asarray(rng.normal(center, scale, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, template)


def check_whisper(folder: Path) -> None:
    """Mel to 1e-4 absolute; states and logits to 1e-4 relative in f32; same greedy tokens."""
    expected = load_file(folder / "expected.safetensors")
    model = whisper.Whisper.load(folder)
    audio, ids = jnp.asarray(expected["audio"]), jnp.asarray(expected["ids"])
    mel = whisper.log_mel(audio, model.config.num_mel_bins)
    published = expected["mel"].transpose(0, 2, 1)  # transformers has [B, M, F]
    assert np.abs(mel - published).max() <= 1e-4
    states = model.encoder(jnp.asarray(published))
    close(states, expected["states"], 1e-4, "encoder states")
    hidden = model.decoder(model.decoder.embed(ids), jnp.asarray(expected["states"]))
    close(hidden, expected["hidden"], 1e-4, "decoder states")
    close(model.decoder.logits(hidden), expected["logits"], 1e-4, "logits")
    rules = generate.decoding_rules(folder, model.config, "en")
    tokens = np.asarray(generate.greedy_decode(model, audio, **rules))[:, len(rules["forced"]) :]
    np.testing.assert_array_equal(tokens, expected["tokens"][:, : tokens.shape[1]])
    end = model.config.eos_token_id
    assert (expected["tokens"][:, tokens.shape[1] :] == end).all()


def check_llama(folder: Path) -> None:
    """States and logits to 1e-4 relative in f32, small and large positions; same greedy tokens."""
    expected = load_file(folder / "expected.safetensors")
    model = llama.Llama.load(folder)
    ids, at = jnp.asarray(expected["ids"]), expected["at"]
    hidden = model(model.embed(ids))[:, at]
    close(hidden, expected["hidden"], 1e-4, "hidden states")
    close(model.logits(hidden), expected["logits"], 1e-4, "logits")
    angles = np.asarray(model.angles(jnp.asarray(expected["far"])))
    half = angles.shape[-1]
    # Both sides compute angles in f32, where 9,000 rad has an error of 5e-4 rad.
    assert np.abs(np.cos(angles) - expected["far_cos"][..., :half]).max() <= 1e-3
    assert np.abs(np.sin(angles) - expected["far_sin"][..., :half]).max() <= 1e-3
    tokens = generate.generate(
        model, model.embed(ids[:1, :9]), jnp.asarray([9]), max_new_tokens=20, stop_ids=(3,)
    )
    generated = expected["generated"]
    np.testing.assert_array_equal(tokens[:, : generated.shape[1]], generated)


def free_address() -> str:
    """A free local address for the coordinator of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
