"""connector.py: queries that listen become input embeddings; only they learn; files as published.

Models of random weights, so small that every claim is checked on every array. The width of the
Whisper (16) and of the LLM (24) differ, so that no matrix can stand the wrong way round.
Axes: B batch, S audio samples, T encoder positions, Q queries, D and E the two widths.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import checks
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import connector
import llama
import weights
import whisper

D, E, Q, T, WINDOW = 16, 24, 8, 25, 8000
WHISPER = whisper.WhisperConfig(
    d_model=D,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=20,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=28,
    num_mel_bins=12,
    max_source_positions=T,
    max_target_positions=Q,
    vocab_size=18,
    decoder_start_token_id=1,
    eos_token_id=2,
)
LLAMA = llama.LlamaConfig(
    hidden_size=E,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=20,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    eos_token_id=2,
)
PREFIX, SUFFIX = jnp.asarray([1, 5, 3]), jnp.asarray([2, 6])
WORDS = "one two three four five six red green blue dog cat sun moon".split()
VOCABULARY = ["<unk>", "<|bos|>", "<|eot|>", "user", "assistant", "system", "<|gap|>", *WORDS]


def flat(tree) -> dict[str, np.ndarray]:
    """{path: array} of all arrays."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(a, b) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def asr() -> whisper.Whisper:
    return checks.random_weights(
        weights.abstract(whisper.Whisper.init, WHISPER, jax.random.key(0)), 0, 0.3
    )


@pytest.fixture(scope="module")
def llm() -> llama.Llama:
    return checks.random_weights(
        weights.abstract(llama.Llama.init, LLAMA, jax.random.key(0)), 1, 0.3
    )


@pytest.fixture(scope="module")
def diva(asr, llm) -> connector.DiVA:
    """As if trained: the connector's own arrays are not those of its initialisation."""
    fresh = connector.create(asr, llm, None, jax.random.key(0))
    return eqx.tree_at(lambda d: d.connector, fresh, checks.random_weights(fresh.connector, 2, 0.3))


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """Three clips [3, S], the last one so soft that it lies 8 decades of power below the first."""
    noise = np.random.default_rng(3).normal(size=(3, WINDOW))
    return (noise * [[0.5], [0.1], [3e-5]]).astype(np.float32)


@pytest.fixture(scope="module")
def states(diva, audio):
    return jax.jit(connector.DiVA.encode)(diva, jnp.asarray(audio))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile fast, run slowly: the models are tiny."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


virtual_tokens = jax.jit(connector.DiVA.virtual_tokens)
speak = jax.jit(connector.Connector.__call__)


# ------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("queries", [None, 5])
def test_audio_becomes_a_fixed_number_of_vectors_as_wide_as_the_llm(asr, llm, audio, queries):
    """[B, S] -> [B, Q, E]; without a number as many queries as the decoder has positions."""
    diva = connector.create(asr, llm, queries, jax.random.key(0))
    assert diva.window_samples == WINDOW
    assert virtual_tokens(diva, jnp.asarray(audio)).shape == (3, queries or Q, E)


def test_a_fresh_connector_holds_the_arrays_of_the_recognisers_decoder(asr, llm):
    """All of them, as float32 master weights even if the recogniser is kept in half precision; but
    its last norm, which keeps its direction and speaks at variance 1."""
    half = jax.tree.map(lambda x: x.astype(jnp.float16), asr)
    diva = connector.create(half, llm, None, jax.random.key(0))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half.decoder)
    norm, theirs = diva.connector.decoder.layer_norm, wide.layer_norm
    assert float((norm.weight**2 + norm.bias**2).mean()) == pytest.approx(1, rel=1e-5)
    ratio = norm.weight[0] / theirs.weight[0]
    for ours, said in ((norm.weight, theirs.weight), (norm.bias, theirs.bias)):
        np.testing.assert_allclose(ours, said * ratio, rtol=1e-5)
    restored = eqx.tree_at(lambda d: d.layer_norm, diva.connector.decoder, theirs)
    assert_same(restored, wide)
    assert_same(diva.encoder, half.encoder)
    assert_same(diva.llm, llm)
    assert {x.dtype for x in jax.tree.leaves(diva.connector)} == {jnp.dtype(jnp.float32)}


def test_fresh_queries_and_projection_are_random_and_follow_the_key(asr, llm):
    """Queries of deviation 0.02 as in the authors' code, no bias, another key other numbers."""
    one, same, other = (
        connector.create(asr, llm, None, jax.random.key(key)).connector for key in (0, 0, 1)
    )
    assert_same(one, same)
    assert np.abs(one.query_tokens - other.query_tokens).min() > 0
    assert np.abs(one.projection.weight - other.projection.weight).min() > 0
    # 128 numbers: their deviation is off by 1 / sqrt(256) = 6 %, so 25 % is four times that
    assert float(one.query_tokens.std()) == pytest.approx(0.02, rel=0.25)
    assert not np.any(one.projection.bias)


@pytest.mark.parametrize("loudness", [0.02, 1.5])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (9.4, 0.85), (0.1, 3.0)])
def test_fresh_virtual_tokens_are_as_long_as_the_llms_token_embeddings(
    loudness, scale, shift, asr, llm, states
):
    """Whatever that length is, and whatever that of the decoder's states: a published Whisper's
    last norm has weights of rms 9.4 (base) or 11 (tiny.en).

    256 columns of random weights: their rms is off by 1 / sqrt(512) = 4.4 %, so a factor of 1.2 is
    four deviations. Forgetting the norm would be a factor of 3 at least, the width one of 4.
    """
    norm = whisper.LayerNorm(jnp.full(D, scale), jnp.full(D, shift))
    asr = eqx.tree_at(lambda m: m.decoder.layer_norm, asr, norm)
    table = loudness * jax.random.normal(jax.random.key(1), (20, 256))
    llm = eqx.tree_at(lambda m: m.model.embed_tokens.weight, llm, table)
    fresh = connector.create(asr, llm, None, jax.random.key(2)).connector
    virtual = speak(fresh, states)
    ratio = np.sqrt(np.square(virtual).mean() / np.square(table).mean())
    assert 1 / 1.2 < ratio < 1.2


@pytest.mark.parametrize("queries", [0, -1, Q + 1])
def test_a_number_of_queries_that_the_decoder_has_no_positions_for_is_refused(asr, llm, queries):
    with pytest.raises(ValueError, match=rf"queries: got {queries}; expected 1 to {Q}, the pos"):
        connector.create(asr, llm, queries, jax.random.key(0))


# ------------------------------------------------------------------------------------ what is heard


def test_a_virtual_token_depends_on_its_own_and_earlier_queries_alone(diva, states):
    """The gradient of virtual token i by query j is exactly 0 for j > i and not 0 for j <= i.

    So the last virtual token sees all queries: why the transcript is aligned with the last ones.
    """
    direction = jax.random.normal(jax.random.key(0), (E,))

    def tokens(queries):
        module = eqx.tree_at(lambda c: c.query_tokens, diva.connector, queries)
        return module(states[:1])[0] @ direction

    gradients = jax.jit(jax.jacrev(tokens))(diva.connector.query_tokens)  # [Q, Q, D]
    reached = np.abs(gradients).max(-1) > 0
    np.testing.assert_array_equal(reached, np.tri(Q, dtype=bool))


def test_fewer_queries_are_the_first_of_more(diva, states):
    """They stand at the first positions, and what would follow them changes nothing.

    f32 sums of up to 28 products in another order: 1e-5.
    """
    few = eqx.tree_at(lambda c: c.query_tokens, diva.connector, diva.connector.query_tokens[:5])
    np.testing.assert_allclose(
        speak(few, states), speak(diva.connector, states)[:, :5], rtol=1e-5, atol=1e-5
    )


def test_every_virtual_token_hears_the_whole_clip(diva, states):
    """Not causal in the audio: the gradient of each by every encoder position is not 0."""
    direction = jax.random.normal(jax.random.key(0), (E,))
    tokens = jax.jit(jax.jacrev(lambda x: diva.connector(x)[0] @ direction))
    reached = np.abs(tokens(states[:1])[:, 0]).max(-1) > 0  # [Q, T]
    assert reached.shape == (Q, T) and reached.all()


def test_other_sound_gives_other_virtual_tokens(diva, audio):
    """A change in the last tenth of the clip moves every virtual token by over 1 % of its length,
    a thousand times more than f32 rounding could."""
    changed = np.array(audio)
    changed[:, -WINDOW // 10 :] = 0.3 * np.sin(np.arange(WINDOW // 10))
    a, b = (np.asarray(virtual_tokens(diva, jnp.asarray(x))) for x in (audio, changed))
    assert (np.linalg.norm(a - b, axis=-1) > 0.01 * np.linalg.norm(a, axis=-1)).all()


def test_a_clip_alone_gives_what_it_gives_in_a_batch(diva, audio):
    """Beside louder and softer clips too. f32 sums of up to 28 products in another order: 1e-5."""
    together = virtual_tokens(diva, jnp.asarray(audio))
    for row in range(len(audio)):
        alone = virtual_tokens(diva, jnp.asarray(audio[row : row + 1]))
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------- the turn


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_turn_is_prefix_then_virtual_tokens_then_suffix(diva, states, dtype):
    """Position by position, nothing between and nothing scaled, in the dtype of the LLM."""
    llm = jax.tree.map(lambda x: x.astype(dtype), diva.llm)
    virtual = speak(diva.connector, states)
    diva = eqx.tree_at(lambda d: d.llm, diva, llm)
    turn = diva.embed_turn(virtual, PREFIX, SUFFIX)
    p, r = len(PREFIX), len(SUFFIX)
    assert turn.shape == (3, p + Q + r, E) and turn.dtype == dtype
    table = llm.model.embed_tokens.weight
    for row in range(3):
        np.testing.assert_array_equal(turn[row, :p], table[PREFIX])
        np.testing.assert_array_equal(turn[row, p : p + Q], virtual[row].astype(dtype))
        np.testing.assert_array_equal(turn[row, p + Q :], table[SUFFIX])


@pytest.mark.parametrize("some", [4096, 5])
def test_nearest_tokens_are_those_of_a_search_in_float64(monkeypatch, some):
    """Rows of very different lengths, where the largest product is not the smallest distance; all
    at once, or a few at a time, of which the last ones are looked at twice."""
    monkeypatch.setattr(llama, "SOME", some)
    scale = np.geomspace(0.1, 10, len(VOCABULARY))[:, None]
    table = np.random.default_rng(0).normal(size=(len(VOCABULARY), E)) * scale
    virtual = np.random.default_rng(1).normal(size=(3, 50, E)) * np.geomspace(0.1, 8, 50)[:, None]
    table, virtual = table.astype(np.float32), virtual.astype(np.float32)
    distances = np.linalg.norm(virtual[:, :, None].astype(float) - table, axis=-1)
    expected = distances.argmin(-1)
    assert len(np.unique(expected)) > 10
    assert (expected != (virtual @ table.T).argmax(-1)).mean() > 0.3
    found = llama.nearest_tokens(jnp.asarray(virtual), jnp.asarray(table))
    np.testing.assert_array_equal(found, expected)


def test_nearest_tokens_of_a_batch_keep_no_array_of_the_size_of_the_logits():
    """8 clips of 448 queries at 128,256 tokens would be 1.8 GB of distances."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 448, 64), (128_256, 64))]
    compiled = jax.jit(llama.nearest_tokens).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 448 * 128_256 * 4 / 10


# ----------------------------------------------------------------------------------- what is taught


def test_the_connector_is_trained_and_nothing_else(diva):
    """All its arrays less the token table that queries never touch; no encoder and no LLM."""
    mask = connector.trainable(diva)
    assert jax.tree.structure(mask) == jax.tree.structure(diva)
    chosen = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert set(chosen.values()) == {True, False}
    expected = {".connector" + name for name in flat(diva.connector)}
    expected.remove(".connector.decoder.embed_tokens.weight")
    assert {name for name, leaf in chosen.items() if leaf} == expected


def test_the_llms_state_teaches_every_trained_array_through_the_frozen_llm(diva, audio):
    """And every query. A student's pass under no_grad, as in a public replication, teaches none."""
    learned, frozen = eqx.partition(diva, connector.trainable(diva))

    def loss(learned):
        whole = eqx.combine(learned, frozen)
        virtual = whole.virtual_tokens(jnp.asarray(audio[:1]))
        hidden = whole.llm(whole.embed_turn(virtual, PREFIX, SUFFIX))
        return jnp.square(hidden[:, -1] - 1.0).sum()

    gradients = jax.jit(jax.grad(loss))(learned)
    assert len(flat(gradients)) == len(flat(diva.connector)) - 1
    for name, gradient in flat(gradients).items():
        assert np.abs(gradient).max() > 0, f"none for {name}"
    assert (np.abs(gradients.connector.query_tokens).max(-1) > 0).all()


def test_no_gradient_passes_through_listening(diva, audio):
    """Not to the encoder, not to the sound; the connector behind it does get one."""

    def total(diva, audio):
        return jnp.square(diva.virtual_tokens(audio)).sum()

    by_model, by_sound = jax.jit(jax.grad(total, (0, 1)))(diva, jnp.asarray(audio[:1]))
    assert not np.any(by_sound)
    for name, gradient in flat(by_model.encoder).items():
        assert not np.any(gradient), name
    assert np.any(by_model.connector.query_tokens)


# -------------------------------------------------------------------------------------------- files


def write_models(root: Path, asr: whisper.Whisper, llm: llama.Llama) -> None:
    """whisper/ and llama/ in the published layouts, with a tokenizer of words."""
    for name, model, prefix in (("whisper", asr, "model."), ("llama", llm, "")):
        weights.save(model, root / name, prefix=prefix)
        text = json.dumps(dataclasses.asdict(model.config))
        (root / name / "config.json").write_text(text)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<|bos|>", "<|eot|>", "<|gap|>"])
    tokenizer.save(str(root / "llama/tokenizer.json"))
    template = "<|bos|>{{ messages[-1]['content'] }}<|eot|>"
    (root / "llama/tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


@pytest.fixture
def saved(tmp_path, asr, llm, diva) -> Path:
    """A folder with whisper/, llama/ and runs/diva/, which refers to the two."""
    root = tmp_path / "home"
    write_models(root, asr, llm)
    connector.save(diva, root / "runs/diva", str(root / "whisper"), str(root / "llama"))
    return root


def published_names() -> set[str]:
    """Written out from the published checkpoint's listing, not from our modules."""
    names = {"query_tokens", "projection.weight", "projection.bias"}
    names |= {"embed_tokens.weight", "embed_positions.weight"}
    parts = "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm fc1 fc2".split()
    parts += [f"{a}.{p}_proj" for a in ("self_attn", "encoder_attn") for p in ("q", "v", "out")]
    names |= {f"layers.{n}.{p}.{x}" for n in (0, 1) for p in parts for x in ("weight", "bias")}
    keys = ("self_attn.k_proj", "encoder_attn.k_proj")
    names |= {f"layers.{n}.{key}.weight" for n in (0, 1) for key in keys}
    names |= {"layer_norm.weight", "layer_norm.bias"}
    outer = ("query_tokens", "projection")
    return {name if name.startswith(outer) else "connector." + name for name in names}


def test_the_file_has_the_names_and_shapes_of_the_published_checkpoints(saved, diva):
    """The projection as [in, out] and no bias for any k_proj; all else as Whisper stores it."""
    tensors = load_file(saved / "runs/diva/model.safetensors")
    assert tensors.keys() == published_names()
    assert tensors["query_tokens"].shape == (Q, D)
    assert tensors["projection.weight"].shape == (D, E)
    assert tensors["projection.bias"].shape == (E,)
    assert tensors["connector.embed_tokens.weight"].shape == (18, D)
    assert tensors["connector.embed_positions.weight"].shape == (Q, D)
    assert tensors["connector.layers.1.fc1.weight"].shape == (28, D)
    np.testing.assert_array_equal(
        tensors["connector.layers.1.encoder_attn.q_proj.weight"],
        diva.connector.decoder.layers.encoder_attn.q_proj.weight[1],
    )


def test_the_projection_of_a_file_is_read_as_in_out(diva, states, saved):
    """By hand from the file: decoder states @ projection.weight + projection.bias.

    f32 sums of 16 products in another order: 1e-5.
    """
    tensors = load_file(saved / "runs/diva/model.safetensors")
    module = connector.load(saved / "runs/diva").connector
    queries = jnp.broadcast_to(tensors["query_tokens"], (3, Q, D))
    hidden = np.asarray(module.decoder(queries, states))
    expected = hidden @ tensors["projection.weight"] + tensors["projection.bias"]
    np.testing.assert_allclose(speak(module, states), expected, rtol=1e-5, atol=1e-5)


def test_config_json_says_what_the_checkpoint_is(saved):
    config = json.loads((saved / "runs/diva/config.json").read_text())
    assert config["model_type"] == "diva" and config["architectures"] == ["DiVAModel"]
    assert config["vocab_size"] == LLAMA.vocab_size and config["queries"] == Q
    assert config["reference_encoder"] == "../../whisper"
    assert config["reference_decoder"] == "../../llama"


def test_what_is_saved_is_what_is_loaded(saved, diva):
    """Bit for bit: connector, encoder and LLM."""
    assert_same(connector.load(saved / "runs/diva"), diva)


def test_fewer_queries_than_positions_are_saved_and_loaded(saved, asr, llm):
    few = connector.create(asr, llm, 3, jax.random.key(0))
    connector.save(few, saved / "few", str(saved / "whisper"), str(saved / "llama"))
    loaded = connector.load(saved / "few")
    assert_same(loaded, few)
    assert loaded.connector.query_tokens.shape == (3, D)


def test_a_shorter_window_is_kept_with_what_was_trained_on_it(saved):
    """10 of 25 positions: 0.2 s; the first positions, and the model that is read back hears no
    more. What the export says is refused if the Whisper cannot hear so much."""
    paths = str(saved / "whisper"), str(saved / "llama")
    short = connector.load_untrained(*paths, num_queries=None, key=jax.random.key(0), window=0.2)
    assert short.window_samples == 3200
    whole = connector.load_untrained(
        *paths, num_queries=None, key=jax.random.key(0)
    ).encoder.embed_positions
    np.testing.assert_array_equal(short.encoder.embed_positions.weight, whole.weight[:10])
    connector.save(short, saved / "short", *paths)
    loaded = connector.load(saved / "short")
    assert_same(loaded, short)
    assert loaded.virtual_tokens(jnp.zeros((1, 3200))).shape == (1, Q, E)
    file = saved / "short/config.json"
    for positions, wrong in (
        (26, "a window of 0.52 s: expected more than 0 and at most 0.5 s"),
        (-1, "is -1"),
    ):
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"max_source_positions": positions})
        )
        with pytest.raises(ValueError, match=wrong):
            connector.load(saved / "short")


@pytest.mark.parametrize("window", [0.0, 0.001, -1.0, 0.52, 30.0])
def test_a_window_that_this_whisper_cannot_hear_is_refused(window):
    with pytest.raises(ValueError, match=r"at most 0\.5 s"):
        connector.with_window(WHISPER, window)


@pytest.mark.parametrize("how", [shutil.copytree, os.rename])
def test_a_tree_that_is_copied_or_moved_still_finds_its_models(saved, diva, how, tmp_path):
    """References are relative to the checkpoint: not to the working directory, and not absolute."""
    how(saved, tmp_path / "elsewhere")
    shutil.rmtree(saved, ignore_errors=True)
    assert_same(connector.load(tmp_path / "elsewhere/runs/diva"), diva)


def test_paths_given_from_the_working_directory_are_found_from_any(saved, diva, monkeypatch):
    monkeypatch.chdir(saved)
    connector.save(diva, "other", "whisper", "llama")
    monkeypatch.chdir(saved / "runs")
    assert_same(connector.load("../other"), diva)


def test_a_checkpoint_folder_behind_a_link_finds_its_models(saved, diva, tmp_path, monkeypatch):
    """Runs often lie on another disk: `..` leads out of where the folder really is."""
    (tmp_path / "disk/deep").mkdir(parents=True)
    (saved / "scratch").symlink_to(tmp_path / "disk/deep")
    monkeypatch.chdir(saved)
    connector.save(diva, "scratch/diva", "whisper", "llama")
    assert_same(connector.load("scratch/diva"), diva)
    assert_same(connector.load(tmp_path / "disk/deep/diva"), diva)


def test_a_model_that_is_no_folder_here_stays_the_repo_id_that_it_is(saved, diva):
    connector.save(
        diva, saved / "hub", "openai/whisper-large-v3", "meta-llama/Llama-3.2-1B-Instruct"
    )
    expected = ("openai/whisper-large-v3", "meta-llama/Llama-3.2-1B-Instruct")
    assert connector.references(saved / "hub") == expected


def rewrite(folder: Path, change) -> None:
    """The folder's tensors, changed."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def test_a_published_file_with_the_frozen_models_inside_loads(saved, diva):
    """What is under encoder. and decoder. is ignored; without `queries` it is all positions."""
    extra = {
        "encoder.conv1.weight": np.ones((2, 2), np.float32),
        "decoder.model.layers.0.mlp.up_proj.weight": np.ones((3, 3), np.float32),
    }
    rewrite(saved / "runs/diva", lambda tensors: tensors | extra)
    file = saved / "runs/diva/config.json"
    config = json.loads(file.read_text())
    del config["queries"]
    file.write_text(json.dumps(config))
    assert_same(connector.load(saved / "runs/diva"), diva)


@pytest.mark.parametrize("absent", ["model-00004-of-00004.safetensors", "model.safetensors"])
def test_an_index_that_names_more_than_was_published_loads(saved, diva, absent):
    """Only the first shard of the authors' export was published, with the index of all of them:
    first under the shards' own names, later with every entry renamed to the one file."""
    folder = saved / "runs/diva"
    first = "model-00001-of-00004.safetensors" if "-of-" in absent else "model.safetensors"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / first)
    elsewhere = [f"decoder.model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    elsewhere += ["encoder.conv1.weight", "decoder.lm_head.weight"]
    index = dict.fromkeys(tensors, first) | dict.fromkeys(elsewhere, absent)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(connector.load(folder), diva)


def test_an_index_whose_needed_shard_is_absent_is_refused_by_name(saved):
    folder, first = saved / "runs/diva", "model-00001-of-00004.safetensors"
    index = dict.fromkeys(load_file(folder / "model.safetensors"), first)
    (folder / "model.safetensors").rename(folder / first)
    index["projection.bias"] = "model-00002-of-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00004\.safetensors is missing"):
        connector.load(folder)


def test_any_other_extra_tensor_is_refused(saved):
    extra = {"connector.layers.0.encoder_attn.k_proj.bias": np.zeros(D, np.float32)}
    rewrite(saved / "runs/diva", lambda tensors: tensors | extra)
    with pytest.raises(ValueError, match=r"Unexpected: connector\.layers\.0\.encoder_attn\.k_proj"):
        connector.load(saved / "runs/diva")


def test_a_model_loads_in_half_precision_and_computes_in_it(saved, diva, audio):
    """Every array is the rounded one, and so are the virtual tokens, up to bfloat16.

    bfloat16 keeps 8 bits: 0.4 % a rounding, a few dozen of them on the way, so 10 % of the rms.
    """
    loaded = connector.load(saved / "runs/diva", dtype=jnp.bfloat16)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), diva))
    virtual = virtual_tokens(loaded, jnp.asarray(audio))
    assert virtual.dtype == jnp.bfloat16
    expected = np.asarray(virtual_tokens(diva, jnp.asarray(audio)))
    error = np.sqrt(np.square(np.asarray(virtual, np.float32) - expected).mean())
    assert error < 0.1 * np.sqrt(np.square(expected).mean())


def test_a_file_in_half_precision_loads_as_float32(saved, diva):
    rewrite(saved / "runs/diva", lambda t: {k: v.astype(np.float16) for k, v in t.items()})
    loaded = connector.load(saved / "runs/diva").connector
    rounded = jax.tree.map(lambda x: x.astype(jnp.float16), diva.connector)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


# ----------------------------------------------------------------------------- when things go wrong


@pytest.mark.parametrize("value", [None, ["a"], 3], ids=str)
@pytest.mark.parametrize("key", ["reference_encoder", "reference_decoder"])
def test_a_config_without_references_is_refused(saved, key, value):
    file = saved / "runs/diva/config.json"
    config = json.loads(file.read_text())
    del config[key]
    config |= {key: value} if value else {}
    file.write_text(json.dumps(config))
    message = rf"^{re.escape(str(file))}: no {key}; expected the folder or repo"
    with pytest.raises(ValueError, match=message):
        connector.load(saved / "runs/diva")


@pytest.mark.parametrize("value", ["8", 0, 2.5, True], ids=repr)
def test_a_number_of_queries_that_is_none_is_refused_with_its_file(saved, value):
    file = saved / "runs/diva/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"queries": value}))
    message = rf"^{re.escape(str(file))}: queries is {value!r}; expected a whole number"
    with pytest.raises(ValueError, match=message):
        connector.published(file.parent)


def test_a_whisper_is_not_a_diva(saved):
    with pytest.raises(ValueError, match=r"no reference_encoder, reference_decoder; .*a DiVA"):
        connector.references(saved / "whisper")


@pytest.mark.parametrize("name", ["query_tokens", "connector.layers.1.fc2.bias"])
def test_a_missing_tensor_is_named(saved, name):
    rewrite(saved / "runs/diva", lambda t: {k: v for k, v in t.items() if k != name})
    with pytest.raises(ValueError, match=rf"runs/diva: .*Missing: {re.escape(name)}\."):
        connector.load(saved / "runs/diva")


def test_a_projection_that_is_stored_the_other_way_round_is_refused(saved):
    """As torch would store it: the two widths differ, so the mistake shows."""
    rewrite(
        saved / "runs/diva",
        lambda t: t | {"projection.weight": np.ascontiguousarray(t["projection.weight"].T)},
    )
    message = rf"projection.weight has shape \({E}, {D}\); expected \({D}, {E}\)"
    with pytest.raises(ValueError, match=message):
        connector.load(saved / "runs/diva")


# --------------------------------------------------------------------------------- the command line


def test_main_prints_what_the_llm_hears_before_and_after_training(saved, diva, audio, capsys):
    """The words nearest to the last virtual tokens, oldest first; `_` for one without a text."""
    clip, table = saved / "clip.wav", np.asarray(diva.llm.model.embed_tokens.weight)
    soundfile.write(clip, audio[0, :5000], 16000, subtype="FLOAT")
    heard = jnp.pad(audio[:1, :5000], ((0, 0), (0, WINDOW - 5000)))
    asr = whisper.Whisper.load(saved / "whisper")
    fresh = connector.create(asr, diva.llm, Q, jax.random.key(0))
    lines = []
    for name, model in (("before", fresh), ("after", diva)):
        virtual = np.asarray(virtual_tokens(model, heard), float)
        nearest = np.linalg.norm(virtual[0, :, None] - table, axis=-1).argmin(-1)
        words = ["_" if VOCABULARY[i].startswith("<") else VOCABULARY[i] for i in nearest]
        lines.append([name, "training", *words[-6:]])
        assert words[-6:] not in (words[:6], words[:-7:-1]), "any order would do"
    assert "_" in lines[0] and lines[0][2:] != lines[1][2:]
    connector.main(clip, model=str(saved / "runs/diva"), last=6)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == lines
