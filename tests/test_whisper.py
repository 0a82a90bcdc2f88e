"""Whisper: parity with transformers on fixtures, and the properties that DiVA relies on."""

import json
import shutil
from pathlib import Path

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import universe

import generate
import weights
import whisper

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("whisper-multilingual", "whisper-turbo")


@pytest.mark.parametrize("name", NAMES)
def test_mel_states_logits_and_greedy_tokens_match_transformers(name):
    checks.check_whisper(FIXTURES / name)


@pytest.fixture(scope="module")
def model():
    return whisper.Whisper.load(FIXTURES / NAMES[0])


@pytest.fixture(scope="module")
def audio(model):
    return jax.random.normal(jax.random.key(0), (2, model.config.window_samples)) * 0.1


@universe.compiled_fast()
def test_the_decoder_is_causal(model, audio):
    """The gradient of position 3 is nonzero for input positions 0 to 3 and zero for later ones."""
    states = model.encoder(whisper.log_mel(audio[:1], 80))
    inputs = model.decoder.embed(jnp.arange(7)[None])
    gradient = jax.grad(lambda x: jnp.square(model.decoder(x, states)[0, 3]).sum())(inputs)[0]
    assert list(np.abs(gradient).sum(-1) > 0) == [True] * 4 + [False] * 3


@universe.compiled_fast()
def test_one_clip_alone_equals_the_same_clip_in_a_batch(model, audio):
    rules = generate.decoding_rules(FIXTURES / NAMES[0], model.config, "en")
    both = generate.greedy_decode(model, audio, **rules)
    alone = jnp.concatenate(
        [generate.greedy_decode(model, audio[i : i + 1], **rules) for i in (0, 1)]
    )
    np.testing.assert_array_equal(both, alone)


@universe.compiled_fast()
def test_suppressed_tokens_are_never_chosen(model, audio):
    """Suppressing the tokens of a transcript changes it from its first free position on."""
    rules = dict(forced=(40, 41), suppress=(), begin_suppress=(), max_length=10)
    free = np.asarray(generate.greedy_decode(model, audio, **rules))
    banned = tuple(int(token) for token in np.unique(free[:, 2:4]))
    without = np.asarray(generate.greedy_decode(model, audio, **rules | {"suppress": banned}))
    assert not np.isin(without[:, 2:], banned).any() and (without[:, 2] != free[:, 2]).all()


@universe.compiled_fast()
def test_decoding_with_the_cache_equals_the_forward_pass(model, audio):
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, model.config.vocab_size)
    states = model.encoder(whisper.log_mel(audio, 80))
    whole = model.decoder.logits(model.decoder(model.decoder.embed(ids), states))
    cache = model.decoder.empty_cache(states, 6)
    for position in range(6):
        logits, cache = model.decoder.decode_step(ids[:, position], cache, jnp.asarray(position))
        checks.close(logits, whole[:, position], 1e-5, f"position {position}")


def test_the_language_sets_the_forced_token(model):
    forced = [
        generate.decoding_rules(FIXTURES / NAMES[0], model.config, code)["forced"]
        for code in ("en", "de")
    ]
    assert forced == [(40, 41, 43, 45), (40, 42, 43, 45)]


def test_forced_decoder_ids_of_older_files_are_read(tmp_path, model):
    """English-only checkpoints list forced_decoder_ids and have no language table."""
    rules = {"decoder_start_token_id": 40, "forced_decoder_ids": [[1, 45]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    assert generate.decoding_rules(tmp_path, model.config, "en")["forced"] == (40, 45)


def test_an_unknown_language_is_refused_with_the_supported_ones(model):
    with pytest.raises(ValueError, match=r"generation_config.json: no language 'xx'.* de, en"):
        generate.decoding_rules(FIXTURES / NAMES[0], model.config, "xx")


def test_audio_of_another_window_is_refused(model):
    mel = whisper.log_mel(jnp.zeros((1, 16160)), 80)
    with pytest.raises(ValueError, match=r"got 101 mel frames; expected 100 \(1 s\)"):
        model.encoder(mel)


def test_silence_is_a_floor_and_not_a_nan(model):
    """Digital silence is -10 decades everywhere, (-10 + 4) / 4 = -1.5, and gives finite states."""
    mel = whisper.log_mel(jnp.zeros((1, model.config.window_samples)), 80)
    np.testing.assert_allclose(mel, -1.5, atol=1e-6)  # one rounding of log10 in f32
    assert jnp.isfinite(model.encoder(mel)).all()


def test_another_activation_is_refused(tmp_path):
    shutil.copytree(FIXTURES / NAMES[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"activation_function": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"activation_function is 'relu'; expected 'gelu'"):
        whisper.Whisper.load(tmp_path)


def test_a_missing_tokenizer_is_named():
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing; expected"):
        generate.Transcriber.load(FIXTURES / NAMES[0])


def test_published_sizes_have_the_published_number_of_parameters():
    """Whisper-large-v3 has 1.54 billion, turbo 0.81 (shapes only; nothing is allocated)."""
    large = whisper.WhisperConfig(
        1280, 32, 20, 5120, 32, 20, 5120, 128, 1500, 448, 51866, 50258, 50257
    )
    count = {}
    for layers in (32, 4):
        config = whisper.dataclasses.replace(large, decoder_layers=layers)
        tree = weights.abstract(whisper.Whisper.init, config, jax.random.key(0))
        count[layers] = sum(x.size for x in jax.tree.leaves(tree) if hasattr(x, "size"))
    assert count[32] == pytest.approx(1.543e9, rel=2e-3)
    assert count[4] == pytest.approx(0.809e9, rel=2e-3)
    assert large.window_samples == 480_000
