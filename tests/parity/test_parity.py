"""The committed comparisons, made anew with the transformers that is installed here."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import checks
import make_fixtures

import llama


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    make_fixtures.make_all(folder)
    return folder


@pytest.mark.parametrize("name", make_fixtures.WHISPERS)
def test_whisper_agrees_with_transformers(folder, name):
    checks.check_whisper(folder / name)


@pytest.mark.parametrize("name", make_fixtures.LLAMAS)
def test_llama_agrees_with_transformers(folder, name):
    checks.check_llama(folder / name)


def test_llama_agrees_with_transformers_at_far_positions(folder):
    """One row of 9,001 tokens: behind the length that the rope scaling is relative to."""
    name = "llama-tied-scaled"
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    ours = llama.Llama.load(folder / name)
    ids = np.random.default_rng(1).integers(4, theirs.config.vocab_size, size=(1, 9001))
    at = [255, 256, 4096, 8191, 8192, 9000]
    with torch.no_grad():
        out = theirs(torch.tensor(ids), output_hidden_states=True)
    hidden = ours(ours.embed(jnp.asarray(ids)))[:, np.array(at)]
    checks.close(hidden, out.hidden_states[-1][:, at], 1e-4, "hidden states")
    checks.close(ours.logits(hidden), out.logits[:, at], 1e-4, "logits")
