"""The committed comparisons, made anew with the transformers that is installed here."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import checks
import make_fixtures

import connector
import demo
import llama
import whisper
from benchmarks import step
from training import recipe


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


def read_with_torch(folder: Path, whisper_folder: Path, states: torch.Tensor) -> torch.Tensor:
    """Virtual tokens [B, Q, E] from a published checkpoint, as it has been read since it was
    published: a transformers decoder takes everything under connector., strictly, and the
    projection is stored the other way round than torch has it."""
    tensors = load_file(folder / "model.safetensors")
    config = transformers.WhisperConfig.from_pretrained(whisper_folder)
    decoder = transformers.models.whisper.modeling_whisper.WhisperDecoder(config).eval()
    start = "connector."
    own = {name[len(start) :]: x for name, x in tensors.items() if name.startswith(start)}
    decoder.load_state_dict(own, strict=True)
    projection = torch.nn.Linear(*tensors["projection.weight"].shape)
    weight = tensors["projection.weight"].T
    projection.load_state_dict({"weight": weight, "bias": tensors["projection.bias"]}, strict=True)
    queries = tensors["query_tokens"].expand(len(states), -1, -1)
    with torch.no_grad():
        hidden = decoder(inputs_embeds=queries, encoder_hidden_states=states).last_hidden_state
        return projection(hidden)


@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize("name", make_fixtures.WHISPERS)
def test_what_we_export_torch_reads_back(folder, tmp_path, name, queries):
    """The same virtual tokens for the same encoder states, whether with all queries or fewer."""
    llm_folder = folder / next(iter(make_fixtures.LLAMAS))
    asr, llm = whisper.Whisper.load(folder / name), llama.Llama.load(llm_folder)
    diva = connector.create(asr, llm, queries, jax.random.key(1))
    connector.save(diva, tmp_path, str(folder / name), str(llm_folder))
    shape = (2, asr.config.max_source_positions, asr.config.d_model)
    states = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theirs = read_with_torch(tmp_path, folder / name, torch.tensor(states))
    ours = diva.connector(jnp.asarray(states))
    assert ours.shape[1] == (queries or asr.config.max_target_positions)
    checks.close(ours, theirs, 1e-4, "virtual tokens")
    again = connector.load(tmp_path).connector(jnp.asarray(states))
    np.testing.assert_array_equal(again, ours)


def test_a_step_has_the_losses_and_the_gradient_of_pytorchs():
    """The shipped student on four clips: what benchmarks/step.py times does the same work."""
    folder, turn = step.ROOT / "toy" / "diva", llama.Chat.load(step.ROOT / "toy" / "llama").wrap()
    batch = step.make_batch(folder, 4, turn)
    found = step.agreement(folder, batch, recipe.PRESETS["toy"])  # raises if they do not agree
    assert found["tensors"] == 102


@pytest.mark.parametrize("instruction", [None, "Repeat the input."])
def test_transformers_answers_a_written_prompt(tmp_path, instruction):
    """From the embeddings alone, as serving/README.md says: the same tokens as our own answer."""
    assistant = demo.Assistant.load("toy/diva")
    clip = sorted(Path("toy/common_voice/en/clips").glob("toy_en_dev_*.opus"))[3]
    demo.write_prompt(tmp_path / "prompt.safetensors", assistant, str(clip), instruction, False)
    embeds = load_file(tmp_path / "prompt.safetensors")["prompt_embeds"]
    theirs = transformers.LlamaForCausalLM.from_pretrained("toy/llama", dtype=torch.float32)
    ids = theirs.generate(inputs_embeds=embeds[None], max_new_tokens=20, do_sample=False)
    *_, reply = assistant.answer(str(clip), (), instruction, demo.Sampling(max_new_tokens=20))
    assert assistant.chat.decode(ids[0].tolist()).strip() == reply.turn.answer != ""
