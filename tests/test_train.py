"""train.py: the step is right, sharded or not; runs survive interruption; errors say what to do.

All tests share one tiny universe in the published layouts, and one recipe, so that the step
compiles once for the whole file. Axes: B batch, L text tokens, E LLM width.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import checks
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
import universe
from etils import epath
from matplotlib.image import imread
from tokenizers import Tokenizer, models, pre_tokenizers

import connector
import data
import distill_loss
import eval as evaluation
import llama
import train
import weights
import whisper
from formats import audio_files
from runtime import cli, files, sharding
from training import cost, precompute, recipe, record, teacher_responses

STEPS, UNTIL = 30, 14
WORDS = ["one", "two", "three", "four", "five", "six", "red", "green", "blue", "dog", "cat"]
SPECIAL = ["<unk>", "<|bos|>", "<|start|>", "<|end|>", "<|eot|>"]
TEMPLATE = (
    "<|bos|>{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
WHISPER = dict(
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=32,
    num_mel_bins=8,
    max_source_positions=25,
    max_target_positions=8,
    vocab_size=24,
    decoder_start_token_id=1,
    eos_token_id=2,
)
LLAMA = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=24,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_theta=10000.0,
    rope_scaling={  # a mapping, and below a list: neither is hashable as it stands
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=[4, 2],
)


def write_json(file: Path, value: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_tokenizer(folder: Path) -> None:
    vocabulary = [*SPECIAL, "user", "assistant", "system", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"chat_template": TEMPLATE, "bos_token": "<|bos|>", "eos_token": "<|eot|>"},
    )


def write_clips(folder: Path, count: int) -> None:
    """A Common Voice folder of short random tones, each with one to four words."""
    rng = np.random.default_rng(0)
    (folder / "clips").mkdir(parents=True)
    rows = ["client_id\tpath\tsentence\taccents"]
    for i in range(count):
        length = int(rng.integers(4000, 8000))
        tone = np.sin(np.arange(length) * rng.uniform(0.05, 1.5)) * rng.uniform(0.1, 0.5)
        soundfile.write(folder / "clips" / f"{i}.wav", tone, 16000)
        words = " ".join(rng.choice(WORDS, rng.integers(1, 5)))
        rows.append(f"v{i % 3}\t{i}.wav\t{words}\tUnited States English")
    (folder / "train.tsv").write_text("\n".join(rows) + "\n")


def random_weights(init, config) -> object:
    """A model at scales that let losses depend on sound and words."""
    return checks.random_weights(weights.abstract(init, config, jax.random.key(0)), 1, 0.2)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """The universe: whisper/, llama/ and cv/ in the published layouts, with random weights."""
    root = tmp_path_factory.mktemp("universe")
    write_json(root / "whisper/config.json", WHISPER)
    write_json(root / "llama/config.json", LLAMA)
    sizes = weights.read_config(whisper.WhisperConfig, root / "whisper")
    weights.save(random_weights(whisper.Whisper.init, sizes), root / "whisper", prefix="model.")
    sizes = weights.read_config(llama.LlamaConfig, root / "llama")
    weights.save(random_weights(llama.Llama.init, sizes), root / "llama")
    write_tokenizer(root / "llama")
    write_tokenizer(root / "whisper")
    write_clips(root / "cv", 8)
    sharding.MIN_SHARDED_SIZE = 64  # so that arrays of this size are split over devices at all
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "True"  # of the processes that tests start
    with universe.compiled_fast():
        yield root
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture(autouse=True)
def in_root(root, monkeypatch) -> None:
    monkeypatch.chdir(root)


def config_of(root: Path, out: Path | str, **changes) -> recipe.Config:
    defaults = dict(
        whisper=str(root / "whisper"),
        llm=str(root / "llama"),
        data="cv",  # relative: a test that spoils clips changes the folder, not the recipe
        steps=STEPS,
        batch_size=8,
        learning_rate=1e-2,
        warmup=0.1,
        dtype="float32",
        out=str(out),
        fsdp=4,
        save_every=10,
        precompute="never",
    )
    return recipe.Config(**defaults | changes)


def clone_data(root: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the clips that a test may spoil; the working directory is where it lies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cv/clips").mkdir(parents=True)
    for file in (root / "cv").rglob("*.*"):
        (tmp_path / "cv" / file.relative_to(root / "cv")).write_bytes(file.read_bytes())
    return tmp_path / "cv"


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def not_compiled(monkeypatch) -> None:
    """For tests of what stands before the step."""
    monkeypatch.setattr(train, "compile_step", lambda _, grids, *__: (None, "attention", grids[0]))
    monkeypatch.setattr(train.compilation, "summary", lambda *_: "not at all")


run_llm = jax.jit(lambda llm, embeds: llm(embeds))


def states_alone(llm: llama.Llama, embeds: jax.Array, count: int) -> np.ndarray:
    """The last states of one sequence, by one program for all lengths: behind it stands noise,
    which no causal state can see."""
    length = embeds.shape[1]
    noise = jax.random.normal(jax.random.key(0), (1, 40 - length, embeds.shape[2]))
    hidden = run_llm(llm, jnp.concatenate([embeds, noise], axis=1))
    return np.asarray(hidden[0, length - count : length])


class Started:
    """A run that stands before its first step, for tests that take the steps themselves."""

    def __init__(self, config: recipe.Config, devices=None):
        self.config, self.recipe = config, recipe.recipe_of(config)
        self.mesh = sharding.make_mesh(config.batch_size, config.fsdp, devices)
        chat = llama.Chat.load(config.llm)
        template = teacher_responses.make_template(*chat.wrap())
        self.params, self.opt_state, self.frozen = train.init_state(config, self.mesh, template)
        corpus = data.prepare(data.read_clips(config.data), chat.encode_batch, 8000, 8)
        self.batches = data.batches(corpus, batch_size=config.batch_size, seed=0)

    def step(self, number: int) -> dict:
        batch = sharding.shard_host_batch(next(self.batches), self.mesh)
        self.params, self.opt_state, metrics = train.train_step(
            self.params,
            self.opt_state,
            self.frozen,
            batch,
            np.int32(number),
            recipe=self.recipe,
            mesh=self.mesh,
        )
        return jax.device_get(metrics)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory) -> Path:
    """The folder of a whole, undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.run(config_of(root, out))
    return out


# --------------------------------------------------------------------------------- the command line


def test_presets_are_the_published_recipe():
    """4,300 steps of 512, 1 % warm-up, AdamW with decay 0.1, clip 1, peak 5e-5 (8B) or 5e-4."""
    models = {
        "diva-1b": ("meta-llama/Llama-3.2-1B-Instruct", 5e-4),
        "diva-3b": ("meta-llama/Llama-3.2-3B-Instruct", 5e-4),
        "diva-8b": ("meta-llama/Llama-3.1-8B-Instruct", 5e-5),
    }
    for name, (llm, rate) in models.items():
        config = recipe.parse(["--preset", name])
        assert (config.llm, config.learning_rate) == (llm, rate)
        assert (config.whisper, config.queries) == ("openai/whisper-large-v3", None)
        assert (config.steps, config.batch_size, config.warmup) == (4300, 512, 0.01)
        assert (config.weight_decay, config.clip) == (0.1, 1.0)
        assert (config.align_weight, config.response_weight) == (1.0, 1.0)
        assert config.response_loss == "l2" and config.out == f"runs/{name}"
    assert recipe.parse([]).preset == "toy" and train.parse([]).out == "runs/toy"


def test_every_field_is_a_flag_with_help(capsys):
    """`--help` lists each field of Config, and each has a sentence of its own."""
    with pytest.raises(SystemExit, match="0"):
        recipe.parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(recipe.Config):
        flag = "--" + field.name.replace("_", "-")
        flag += ", " if field.type == "bool" or field.type is bool else " "
        assert flag in text, f"{flag} is not a flag"
        assert not text.split(flag)[1].split(" (")[0].endswith("}"), f"{flag} has no help"


def test_the_resume_command_gives_the_same_configuration():
    """What is printed after SIGTERM parses to the run that was stopped, without its --until."""
    config = recipe.parse(
        ["--preset", "diva-1b", "--data", "my clips", "--steps", "7", "--until", "3", "--seed", "2"]
    )
    again = recipe.parse(shlex.split(recipe.resume_command(config))[2:])
    assert again == dataclasses.replace(config, until=None)


def test_unknown_preset_and_flag_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "diva-70b"])
    with pytest.raises(SystemExit, match="1"):
        cli.run(train.main)
    error = capsys.readouterr().err
    assert "diva-70b" in error and "diva-8b" in error and "Traceback" not in error
    with pytest.raises(SystemExit, match="2"):
        recipe.parse(["--batchsize", "8"])
    assert "--batchsize" in capsys.readouterr().err


def test_other_models_do_not_get_the_toys_recipe_in_silence():
    """A preset must be named with them; the toy's own models need none, and may be named."""
    for flags in (["--whisper", "openai/whisper-base"], ["--llm=mine/llama", "--data", "cv"]):
        with pytest.raises(ValueError, match=r"without --preset they would get.*rate 0\.002"):
            recipe.parse(flags)
        assert recipe.parse([*flags, "--preset", "small"]).queries == 64
        assert recipe.parse([*flags, "--preset=toy"]).queries == 8
    assert recipe.parse(["--whisper", "toy/whisper"]).preset == "toy"


def test_the_small_preset_is_a_pair_without_a_licence_to_accept():
    small = recipe.parse(["--preset", "small"])
    assert (small.whisper, small.llm) == (
        "openai/whisper-small",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
    )
    assert (small.split, small.window, small.queries) == ("train-clean-100", 16.0, 64)
    assert small.tasks is None and small.align_weight == small.response_weight == 1.0


def test_learning_rate_rises_then_falls_to_zero():
    wanted = recipe.Recipe(steps=1000, learning_rate=2.0, warmup=0.01)
    rate = [float(train.learning_rate(wanted, step)) for step in range(1001)]
    np.testing.assert_allclose(rate[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert rate[10] == 2.0 and abs(rate[505] - 1.0) < 1e-6 and rate[1000] < 1e-6
    assert all(a >= b for a, b in itertools.pairwise(rate[10:]))


def test_the_optimizer_is_adamw_behind_a_clip_of_the_global_norm():
    """Two steps by hand, in float64: a gradient of norm 5 is scaled to 1, one of 0.5 is not."""
    wanted = recipe.Recipe(steps=100, learning_rate=0.1, warmup=0.01, weight_decay=0.1, clip=1.0)
    optimizer, weight = train.make_optimizer(wanted), jnp.asarray([1.0, -2.0])
    state, mean, square, expected = optimizer.init(weight), 0.0, 0.0, np.array([1.0, -2.0])
    for step, gradient in enumerate(([3.0, 4.0], [-0.4, 0.3])):
        updates, state = optimizer.update(jnp.asarray(gradient), state, weight)
        weight = optax.apply_updates(weight, updates)
        clipped = np.array(gradient) / max(1, np.linalg.norm(gradient))
        mean, square = 0.9 * mean + 0.1 * clipped, 0.999 * square + 0.001 * clipped**2
        adam = mean / (1 - 0.9 ** (step + 1))
        adam /= np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        rate = float(train.learning_rate(wanted, step))
        expected = expected - rate * (adam + 0.1 * expected)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)  # f32, a dozen roundings


def test_the_mean_embeddings_alignment_is_known_from_the_start(finished, root):
    """By hand: every token of every transcript against their mean. It lies beside the log."""
    table = np.asarray(llama.Llama.load(root / "llama").model.embed_tokens.weight, np.float64)
    encode = llama.Chat.load(root / "llama").encode
    ids = [i for clip in data.read_clips(root / "cv") for i in encode(clip.text)]
    expected = np.linalg.norm(table[ids] - table[ids].mean(0), axis=-1).mean()
    found = json.loads((finished / "baseline.json").read_text())["alignment"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_shorter_window_leaves_longer_clips_out(root, tmp_path, monkeypatch, caplog):
    """Counted, never cut; and the work of a clip is that of the shorter window."""
    monkeypatch.chdir(root)
    whole, *_, work = train.preflight(config_of(root, tmp_path / "whole"))
    short, *_, less = train.preflight(config_of(root, tmp_path / "short", window=0.4))
    frames = {clip.audio: soundfile.info(clip.audio).frames for clip in whole.clips}
    assert {c.audio for c in short.clips} == {a for a, n in frames.items() if n <= 6400}
    assert short.too_long == len(whole.clips) - len(short.clips) > 0
    assert short.window_samples == 6400 and sum(less(8, 0).values()) < sum(work(8, 0).values())
    mesh = sharding.make_mesh(8)
    template = teacher_responses.make_template([1], [2])
    config = config_of(root, tmp_path / "short", window=0.4)
    _, _, frozen = train.init_state(config, mesh, template)
    assert frozen.diva.window_samples == 6400


# ------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize(("devices", "size"), [(1, 2), (2, 1)])
def test_micro_batches_add_up_to_the_whole_batch(devices, size, root, tmp_path):
    """Losses and gradients, to the order of f32 sums, for transcripts of uneven lengths, a clip of
    weight 0 and a part in which nothing counts. A plain mean over the parts is far from it."""
    start = Started(config_of(root, tmp_path, fsdp=devices), jax.devices()[:devices])
    batch = next(start.batches)
    batch.lengths[:] = [1, 4, 2, 3, 3, 1, 4, 2]
    batch.weights[:] = [1, 1, 1, 1, 1, 0, 0, 0]

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(batch, size):
        with jax.sharding.use_abstract_mesh(start.mesh.abstract_mesh):
            more = start.recipe, "attention", size
            return train.gradients(start.params, start.frozen, batch, *more)

    whole = gradients(sharding.shard_host_batch(batch, start.mesh), None)
    found = gradients(sharding.shard_host_batch(batch, start.mesh), size)
    assert np.all(found[1][1]) and found[1][1].shape == whole[1][1].shape
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        far = np.abs(np.asarray(b, np.float64)).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * far)
    batch.weights[4:] = 0  # the first part alone
    alone = gradients(sharding.shard_host_batch(batch, start.mesh), None)
    assert abs(float(alone[1][0]["alignment"]) / float(whole[1][0]["alignment"]) - 1) > 1e-3


def test_a_part_that_is_not_finite_is_found(root, tmp_path):
    start = Started(config_of(root, tmp_path, fsdp=1, batch_size=4), jax.devices()[:1])
    batch = next(start.batches)
    batch.audio[2] = np.nan
    batch = sharding.shard_host_batch(batch, start.mesh)
    more = start.recipe, "attention", 1
    assert not train.gradients(start.params, start.frozen, batch, *more)[1][1].all()


# -------------------------------------------------------------------------------- where arrays live


def test_eight_devices_give_what_one_gives(root, tmp_path, monkeypatch):
    """Same losses and gradient norms over steps, same weights, up to f32 reduction order: with
    frozen weights whole on each (and two replicas of what is trained), in two copies, and in
    one."""
    config = config_of(root, tmp_path)
    one = Started(dataclasses.replace(config, fsdp=1), jax.devices()[:1])
    expected = [one.step(step) for step in range(3)]
    for fsdp, near in ((1, 4), (4, 16), (8, 16)):
        monkeypatch.setattr(sharding, "MAX_FSDP_DEVICES", near)
        many, trained = Started(dataclasses.replace(config, fsdp=fsdp)), min(8, near)
        for tree, parts in ((many.params, trained), (many.opt_state, trained), (many.frozen, fsdp)):
            shards = [x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(tree)]
            assert {*shards} == {1, parts} and (parts == 1 or shards.count(parts) > 10)
        for step in range(3):
            a, b = many.step(step), expected[step]
            for name in ("loss", "alignment", "response", "grad_norm", "lr"):
                said = f"{name}, step {step}, fsdp {fsdp}"
                np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=said)
        for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
            # Adam divides by the gradient's own size: noise in a tiny one is a share of lr = 1e-2.
            np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("most", [1, 3])
def test_the_grid_is_chosen_from_shapes_that_are_those_of_the_run(
    root, tmp_path, monkeypatch, not_compiled, most
):
    """Before weights are loaded, and only where devices have a known room; then what was chosen is
    compiled with arrays of the same shapes in the same places: from the cache. Of answers the
    longest are reckoned with, since they are not yet known."""
    asked, config = [], config_of(root, tmp_path, fsdp=None, response_tokens=most)

    def compile_step(config, grids, room, inputs):
        asked.append((config.remat, [mesh.shape["fsdp"] for mesh in grids], room))
        mesh = grids[len(asked) == 1 and 2]
        asked.append([(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(inputs(mesh))])
        if len(asked) == 2:  # no arrays yet, but of the template
            assert isinstance(jax.tree.leaves(inputs(mesh)[0][0])[0], jax.ShapeDtypeStruct)
        return None, "layers", mesh

    monkeypatch.setattr(train, "compile_step", compile_step)
    monkeypatch.setattr(sharding, "device_memory_bytes", lambda: 1e9)
    corpus, *_, mesh = train.prepare_run(config, sharding.candidate_meshes(8))
    first, shapes, second, arrays = asked
    assert first == ("auto", [1, 2, 4, 8], 1e9) and second == ("layers", [4], 1e9)
    assert mesh.shape["fsdp"] == 4
    if most == 1:
        assert shapes == arrays
    else:
        shapes, arrays = ([x[1:] for x in found] for found in (shapes, arrays))
        assert shapes == arrays and corpus.precomputed["response"].shape[1] <= most - 1


def test_nothing_is_compiled_where_there_is_no_choice(root, tmp_path, monkeypatch):
    """One device, a grid that was asked for, devices that do not say what they hold."""
    config, one = config_of(root, tmp_path, fsdp=None), jax.devices()[:1]
    many, asked = sharding.candidate_meshes(8), sharding.candidate_meshes(8, 4)
    for room, grids in (
        (1e9, sharding.candidate_meshes(8, None, one)),
        (1e9, asked),
        (math.inf, many),
    ):
        monkeypatch.setattr(sharding, "device_memory_bytes", lambda room=room: room)
        assert train.choose_mesh(config, grids, pytest.fail) == (grids[0], config)
    assert many[0].shape["fsdp"] == 1


# ----------------------------------------------------------------------------------------- the step


def test_frozen_stays_and_every_trained_leaf_moves(root, tmp_path):
    """After 3 steps encoder and LLM are bit-identical, and no trained array is what it was."""
    run = Started(config_of(root, tmp_path))
    frozen, params = jax.device_get((run.frozen, run.params))
    for step in range(3):
        run.step(step)
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(frozen), jax.tree.leaves(run.frozen), strict=True
    ):
        np.testing.assert_array_equal(before, after, err_msg=jax.tree_util.keystr(path))
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(run.params), strict=True
    ):
        assert np.abs(before - after).max() > 0, jax.tree_util.keystr(path)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert not [name for name in names if "encoder.conv" in name or "llm" in name], names
    assert not [name for name in names if "embed_tokens" in name], (
        "decay would eat the unused table"
    )


def test_the_step_reuses_the_memory_of_weights_and_optimizer(root, tmp_path):
    """Donated arrays are gone after the step; the frozen ones, read again by the next, are not."""
    run = Started(config_of(root, tmp_path))
    before = jax.tree.leaves((run.params, run.opt_state))
    run.step(0)
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.frozen))


def test_teacher_is_the_llm_on_the_plain_text_prompt(root, tmp_path):
    """For every transcript length: the LLM's state at the last token of prefix + text + suffix."""
    run = Started(config_of(root, tmp_path, fsdp=1), jax.devices()[:1])
    llm, (prefix, suffix) = run.frozen.diva.llm, run.frozen.template
    ids = np.arange(8, 14, dtype=np.int32)
    lengths = np.arange(1, 7, dtype=np.int32)
    padded = np.where(np.arange(6) < lengths[:, None], ids, 0).astype(np.int32)

    @jax.jit
    def teacher(llm):
        empty = jnp.zeros((len(padded), 0), jnp.int32)
        tail = connector.suffix_and_response(suffix, empty)
        rows = connector.append_rows(jnp.asarray(padded), jnp.asarray(lengths), tail)
        hidden = llm(llm.embed(rows), "layers", llm.embed(prefix[None]))
        start = jnp.asarray(lengths) + len(suffix) - 1
        return connector.take_states(hidden, start, num_states=1)[:, 0]

    states = teacher(llm)
    prompts = [np.concatenate([prefix, ids[:n], suffix]) for n in lengths]
    filler = 13  # another word, as padding: it must not matter
    rows = np.stack([np.pad(p, (0, 40 - len(p)), constant_values=filler) for p in prompts])
    hidden = jax.jit(lambda llm, rows: llm(llm.embed(rows)))(llm, jnp.asarray(rows))
    expected = np.stack([hidden[i, len(p) - 1] for i, p in enumerate(prompts)])
    assert np.abs(np.diff(expected, axis=0)).max() > 0.01
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-4)


def test_teacher_gets_no_gradient(root, tmp_path):
    """Not even where the LLM's token table is asked for its own: the words, which the teacher alone
    reads, get none; the template, which the student reads too, gets some."""
    run = Started(config_of(root, tmp_path, fsdp=1), jax.devices()[:1])
    batch, frozen = jax.tree.map(jnp.asarray, next(run.batches)), run.frozen

    def loss(table):
        diva = eqx.tree_at(lambda d: d.llm.model.embed_tokens.weight, frozen.diva, table)
        return train.loss_fn(run.params, frozen._replace(diva=diva), batch, run.recipe)[0]

    gradient = jax.jit(jax.grad(loss))(frozen.diva.llm.model.embed_tokens.weight)
    words = np.unique(batch.transcript[batch.transcript > 0])
    template = np.unique(np.concatenate(frozen.template))
    assert len(words) > 3 and not np.isin(words, template).any()
    assert np.abs(gradient[words]).max() == 0
    assert np.abs(gradient[template]).max(axis=1).min() > 0


@pytest.mark.parametrize("losses", ["both", "response alone"])
def test_gradient_reaches_every_query_and_trained_array(root, tmp_path, losses):
    """The first query token included: seen in Adam's first moment after one step."""
    run = Started(config_of(root, tmp_path))
    if losses == "response alone":  # without words there is nothing to align
        run.batches = (batch._replace(lengths=0 * batch.lengths) for batch in run.batches)
    metrics = run.step(0)
    assert (metrics["alignment"] == 0) == (losses == "response alone")
    assert metrics["loss"] == metrics["alignment"] + metrics["response"]
    moment = optax.tree.get(run.opt_state, "mu")
    for path, leaf in jax.tree_util.tree_leaves_with_path(moment):
        assert np.abs(leaf).max() > 0, f"none for {jax.tree_util.keystr(path)}"
    assert (np.abs(moment.connector.query_tokens).max(axis=1) > 0).all()


def test_response_loss_chooses_the_distance():
    """l2, gram and kl each give what distill_loss gives; an undecoded clip counts in none, and the
    states of an answer share its clip's weight."""
    rng = np.random.default_rng(0)
    student, teacher, matrix = (
        rng.normal(size=s).astype(np.float32) for s in [(4, 6)] * 2 + [(9, 6)]
    )
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])
    rest = jnp.asarray(matrix), distill_loss.gram_matrix(jnp.asarray(matrix))
    d = (student - teacher)[:3].astype(np.float64)
    centred = matrix - matrix.mean(0)
    p, q = (np.exp(x[:3] @ matrix.T) for x in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = {
        "l2": np.linalg.norm(d, axis=1).mean(),
        "gram": np.linalg.norm(d @ centred.T, axis=1).mean(),
        "kl": (p * np.log(p / q)).sum(1).mean(),
    }
    for kind, value in expected.items():
        for counts in ([1, 1, 1, 1], [3, 1, 2, 3]):  # the same state thrice: the same mean
            states = [jnp.repeat(jnp.asarray(x)[:, None], 3, axis=1) for x in (student, teacher)]
            shared = distill_loss.response_weights(weight, jnp.asarray(counts), 3)
            np.testing.assert_array_equal((shared > 0).sum(1), [*counts[:3], 0])
            found = distill_loss.response(kind, *states, shared, *rest)
            np.testing.assert_allclose(found, value, rtol=1e-4, err_msg=kind)


# ------------------------------------------------------------------------------------ whole answers


TRANSCRIPTS = [8], [9, 10, 11], [12, 8], [9, 10, 11], [13] * 5


def asked(root: Path, out: Path, most: int, stop_ids: tuple[int, ...], fsdp: int = 1) -> tuple:
    """An LLM on `fsdp` devices, some prompts, and what it answers to them."""
    mesh = sharding.make_mesh(fsdp, devices=jax.devices()[:fsdp])
    sizes = weights.read_config(llama.LlamaConfig, root / "llama")
    llm = checks.random_weights(
        weights.abstract(llama.Llama.init, sizes, jax.random.key(0)), 3, 1.0
    )
    llm = sharding.shard_params(llm, mesh)  # one that does not say the same all the time
    prefix, suffix = llama.Chat.load(root / "llama").wrap()
    prompts = [np.array([*prefix, *text, *suffix], np.int32) for text in TRANSCRIPTS]
    found = teacher_responses._generate_cached(
        llm, stop_ids, prompts, config=config_of(root, out), mesh=mesh, max_new_tokens=most
    )
    return llm, prompts, found


def test_the_teacher_answers_as_it_does_when_asked_alone(root, tmp_path, capsys):
    """Token for token, by a loop over the plain forward pass; to the first stop token, or cut."""
    llm, prompts, free = asked(root, tmp_path, 6, (99,))
    assert [len(answer) for answer in free] == [6] * 5
    assert "5 tokens" not in capsys.readouterr().out
    stop = free[0][3]
    _, _, found = asked(root, tmp_path, 6, (stop, 99))
    forward = jax.jit(lambda llm, rows: llm.logits(llm(llm.embed(rows))).argmax(-1))
    for prompt, answer in zip(prompts, found, strict=True):
        expected = []
        while len(expected) < 6 and stop not in expected:
            tokens = np.zeros((1, 40), np.int32)
            tokens[0, : len(prompt) + len(expected)] = [*prompt, *expected]
            expected.append(int(forward(llm, tokens)[0, len(prompt) + len(expected) - 1]))
        assert answer == expected
    assert len(found[0]) == 4 and found[0][-1] == stop, free
    assert max(map(len, found)) == 6  # others were cut: they say so
    told = capsys.readouterr().out
    assert (
        "generating teacher responses for 4 transcripts: " in told
        and "of them truncated at 6" in told
    )


def test_of_an_answer_all_is_fed_but_its_last_token(root, tmp_path, monkeypatch):
    """Which is only predicted, by one state more; shorter answers are padded."""
    corpus = data.Corpus([], [np.array(text, np.int32) for text in TRANSCRIPTS[:3]], 8000, 8)
    monkeypatch.setattr(
        teacher_responses, "_generate_cached", lambda *_, **__: [[7, 4], [4], [9, 8, 7, 6]]
    )
    template = teacher_responses.make_template([1], [2])
    mesh, llm = sharding.make_mesh(8), llama.Llama.load(root / "llama")
    found = teacher_responses.generate_responses(
        llm,
        (4,),
        template,
        corpus=corpus,
        config=config_of(root, tmp_path),
        mesh=mesh,
        max_new_tokens=4,
    )
    assert found["response"].tolist() == [[7, 0, 0], [0, 0, 0], [9, 8, 7]]
    assert found["response_lengths"].tolist() == [2, 1, 4]


@pytest.mark.parametrize("fsdp", [2, 8])
def test_many_devices_answer_as_one_does(root, tmp_path, fsdp):
    one = asked(root, tmp_path / "one", 5, (99,))[2]
    many = asked(root, tmp_path / "many", 5, (99,), fsdp)[2]
    assert one == many


def test_answers_are_asked_once_for_an_llm_a_template_a_limit_and_a_text(
    root, tmp_path, monkeypatch
):
    """What was written is read again; what was not yet, or is of another kind, is asked."""
    monkeypatch.setattr(teacher_responses, "PROMPTS_PER_FILE", 2)
    before = asked(root, tmp_path, 4, (99,))[2]
    written = sorted((tmp_path / "answers").iterdir())
    assert len(written) == 2  # of 4 different transcripts
    written[0].unlink()
    real, parts = teacher_responses._generate_batches, []
    monkeypatch.setattr(
        teacher_responses, "_generate_batches", lambda *a, **k: parts.append(a[2]) or real(*a, **k)
    )
    after = asked(root, tmp_path, 4, (99,))[2]
    assert before == after
    assert len(parts) == 1 and len(parts[0]) == 2
    asked(root, tmp_path, 4, (99,))
    assert len(parts) == 1
    for changes in ({"most": 3}, {"stop_ids": (98,)}):
        asked(root, tmp_path, **{"most": 4, "stop_ids": (99,)} | changes)
    assert len(parts) == 5


def test_every_state_of_an_answer_is_that_of_the_clip_alone(root, tmp_path):
    """Student and teacher, for texts and answers of uneven lengths: behind suffix and answer, with
    nothing padded. And the losses count each clip's answer once, whatever its length."""
    run = Started(config_of(root, tmp_path, fsdp=1), jax.devices()[:1])
    diva = eqx.combine(run.params, run.frozen.diva)
    prefix, suffix = run.frozen.template
    batch = jax.tree.map(jnp.asarray, next(run.batches))
    said = [np.arange(8, 8 + n, dtype=np.int32) for n in (1, 4, 2, 3, 4, 1, 1, 2)]
    batch = batch._replace(response=jnp.stack([jnp.pad(a[:-1], (0, 4 - len(a))) for a in said]))
    batch = batch._replace(response_lengths=jnp.asarray([len(a) for a in said]))
    batch = batch._replace(weights=batch.weights.at[3].set(0.0))
    out = eqx.filter_jit(train.forward)(run.params, run.frozen, batch)
    assert out.student_states.shape[:2] == out.teacher_states.shape[:2] == (8, 4)
    llm, distances = diva.llm, []
    for i, answer in enumerate(map(jnp.asarray, said)):
        words, n = batch.transcript[i, : int(batch.lengths[i])], len(answer)
        text = llm.embed(jnp.concatenate([prefix, words, suffix, answer[:-1]])[None])
        turn = diva.embed_turn(out.virtual_tokens[i : i + 1], prefix, suffix)
        speech = jnp.concatenate([turn, llm.embed(answer[None, :-1])], axis=1)
        teacher, student = (states_alone(llm, x, n) for x in (text, speech))
        np.testing.assert_allclose(out.teacher_states[i, :n], teacher, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out.student_states[i, :n], student, rtol=1e-4, atol=1e-4)
        distances.append(np.linalg.norm(student - teacher, axis=-1).mean())
    metrics = train.loss_fn(run.params, run.frozen, batch, run.recipe)[1][0]
    expected = np.mean([d for i, d in enumerate(distances) if i != 3])
    np.testing.assert_allclose(metrics["response"], expected, rtol=1e-4)


def test_micro_batches_of_answers_add_up_too(root, tmp_path):
    """Answers of uneven lengths in parts of uneven weights."""
    run = Started(config_of(root, tmp_path, fsdp=1), jax.devices()[:1])
    batch = jax.tree.map(jnp.asarray, next(run.batches))
    batch = batch._replace(response=jnp.arange(24).reshape(8, 3) % 12 + 8)
    batch = batch._replace(response_lengths=jnp.asarray([1, 4, 2, 3, 4, 1, 1, 2]))
    batch = batch._replace(weights=batch.weights.at[0].set(0.0))
    given = (run.params, run.frozen, batch, run.recipe, "attention")
    whole, (losses, _) = jax.jit(train.gradients, static_argnums=(3, 4, 5))(*given, None)
    parts, (sums, _) = jax.jit(train.gradients, static_argnums=(3, 4, 5))(*given, 2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), whole, parts)
    for name, value in losses.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)


def test_a_stopped_run_on_responses_resumes_bit_for_bit_from_the_cached_responses(
    root, tmp_path, monkeypatch
):
    """The teacher generates none again, and how many tokens are distilled belongs to the recipe."""
    changes = {"response_tokens": 3, "steps": 4, "save_every": 2, "validation": "train"}
    train.run(config_of(root, tmp_path / "whole", **changes))
    train.run(config_of(root, tmp_path / "cut", until=2, **changes))
    monkeypatch.setattr(teacher_responses, "_generate_batches", None)
    train.run(config_of(root, tmp_path / "cut", **changes))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b
    assert "kl" in rows_of(tmp_path / "whole")[0]
    with pytest.raises(ValueError, match="response_tokens was 3, now 'all'"):
        train.run(config_of(root, tmp_path / "cut", **changes | {"response_tokens": "all"}))


# --------------------------------------------------------------------------- states that are kept


def test_kept_states_are_those_that_every_step_would_compute(root, tmp_path, monkeypatch):
    """With answers, on eight devices: the
    same losses and the same student, to the order of a sum; and a clip that cannot be decoded still
    has weight 0."""
    folder = clone_data(root, tmp_path, monkeypatch)
    (folder / "clips/3.wav").write_bytes(b"no sound")
    changes = {"response_tokens": 3, "max_undecodable": 1.0, "steps": 6}
    rows = {}
    for how in ("never", "always"):
        train.run(config_of(root, tmp_path / how, **changes, precompute=how))
        rows[how] = rows_of(tmp_path / how)
    for one, other in zip(*rows.values(), strict=True):
        assert one["undecodable"] == other["undecodable"] == 1
        for name in ("loss", "alignment", "response", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
    assert rows["always"][0]["loss"] == pytest.approx(rows["never"][0]["loss"], rel=1e-5)


def test_a_run_on_kept_states_reads_no_clip_again_and_goes_on_bit_for_bit(
    root, tmp_path, monkeypatch
):
    changes = {"steps": 6, "save_every": 2, "precompute": "always"}
    real, read = audio_files.load, []
    monkeypatch.setattr(audio_files, "load", lambda *a, **k: read.append(a) or real(*a, **k))
    train.run(config_of(root, tmp_path / "whole", **changes))
    assert len(read) == 8 and rows_of(tmp_path / "whole")[-1]["step"] == 5
    train.run(config_of(root, tmp_path / "cut", until=3, **changes))
    train.run(config_of(root, tmp_path / "cut", **changes))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b


def test_states_are_kept_where_there_is_room(root, tmp_path, monkeypatch, capsys, not_compiled):
    """auto: up to ROOM bytes, which are counted right; a step then does neither part's work."""
    mesh = sharding.make_mesh(8)
    config = config_of(root, tmp_path / "a", precompute="auto", response_tokens=2)
    corpus, state, _, _, work, _ = train.prepare_run(config, [mesh])
    kept = sum(corpus.precomputed[name].nbytes for name in ("encoder_states", "teacher_states"))
    assert kept == precompute.precomputed_bytes(state[2].diva, corpus)
    assert "precomputed encoder and teacher states of 8 clips" in capsys.readouterr().out
    monkeypatch.setattr(precompute, "AUTO_LIMIT", kept - 1)
    config = config_of(root, tmp_path / "b", precompute="auto", response_tokens=2)
    corpus, *_, whole, _ = train.prepare_run(config, [mesh])
    assert "encoder_states" not in corpus.precomputed and whole > work
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="--precompute always: each of several processes"):
        precompute.should_precompute("always", state[2].diva, corpus)
    assert not precompute.should_precompute("auto", state[2].diva, corpus)


# ------------------------------------------------------------------------- clips that are watched


def test_watched_clips_score_what_a_loop_over_them_finds(root, tmp_path, monkeypatch, not_compiled):
    """KL over each answer's tokens, then over clips; and the share of words that are nearest to
    their virtual tokens: in float64, one clip at a time."""
    monkeypatch.setattr(teacher_responses, "MAX_RESPONSE", 4)
    config = config_of(root, tmp_path, fsdp=1, validation="train", queries=6)
    mesh = sharding.make_mesh(8, devices=jax.devices()[:1])
    _, state, _, batch, *_ = train.prepare_run(config, [mesh])
    word = jnp.asarray(state[2].diva.llm.embed(batch.transcript[:1, :1])[0, 0])
    params = eqx.tree_at(  # says one word all the time, and little beside it
        lambda p: (p.connector.projection.weight, p.connector.projection.bias),
        state[0],
        replace_fn=lambda x: word if x.ndim == 1 else 0.01 * x,
    )
    found = train.validate(params, state[2], batch, mesh)
    diva, (prefix, suffix) = eqx.combine(params, state[2].diva), state[2].template
    virtual = eqx.filter_jit(diva.virtual_tokens)(batch.audio)
    kls, right, words = [], 0, 0
    out = np.asarray(diva.llm.output_matrix, np.float64)
    table = np.asarray(diva.llm.model.embed_tokens.weight, np.float64)
    for i, n in enumerate(np.asarray(batch.lengths)):
        said, ids = int(batch.response_lengths[i]), batch.transcript[i, :n]
        answer = batch.response[i, : said - 1]
        text = diva.llm.embed(jnp.concatenate([prefix, ids, suffix, answer])[None])
        speech = [diva.embed_turn(virtual[i : i + 1], prefix, suffix), diva.llm.embed(answer[None])]
        speech = jnp.concatenate(speech, axis=1)
        states = [states_alone(diva.llm, x, said) for x in (text, speech)]
        p, q = (x - np.log(np.exp(x).sum(1, keepdims=True))
                for x in (np.asarray(s, np.float64) @ out.T for s in states))  # fmt: skip
        kls.append((np.exp(p) * (p - q)).sum(1).mean())
        far = np.linalg.norm(np.asarray(virtual)[i, -n:, None] - table, axis=-1)
        right, words = right + int((far.argmin(1) == np.asarray(ids)).sum()), words + int(n)
    assert float(found["kl"]) == pytest.approx(np.mean(kls), rel=1e-4)
    assert 0 < right < words
    assert float(found["nearest_token_accuracy"]) == pytest.approx(right / words, abs=1e-6)


def test_what_is_watched_is_written_drawn_and_changes_nothing(root, finished, tmp_path, capsys):
    """At the first step and every validation_every steps; the student is the same to the bit."""
    train.run(config_of(root, tmp_path, validation="train", validation_every=10))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "kl" in row] == [0, 9, 19, 29]
    assert all(
        row["kl"] > 0 and 0 <= row["nearest_token_accuracy"] <= 1 for row in rows if "kl" in row
    )
    assert rows[29]["kl"] < rows[0]["kl"]
    assert "nearest-token acc " in capsys.readouterr().out
    a, b = ((f / "model.safetensors").read_bytes() for f in (tmp_path, finished))
    assert a == b
    drawn = [imread(f / "loss.png").shape for f in (tmp_path, finished)]
    assert drawn[0][0] > drawn[1][0] and drawn[0][1] == drawn[1][1]


def test_clips_beside_a_manifest_are_watched_by_their_own(root, tmp_path):
    """A manifest has no splits: its other clips are another manifest, never itself."""
    for name, count in (("train", 8), ("dev", 3)):
        lines = [{"audio": f"{root}/cv/clips/{i}.wav", "text": "one two"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = config_of(root, tmp_path / "out", data=str(tmp_path / "train.jsonl"))
    config = dataclasses.replace(config, validation=str(tmp_path / "dev.jsonl"))
    assert len(train.preflight(config).validation.clips) == 3
    with pytest.raises(FileNotFoundError, match="dev: no such file"):
        train.preflight(dataclasses.replace(config, validation="dev"))


@pytest.mark.parametrize(("given", "meant"), [("1", 1), ("16", 16), ("all", "all")])
def test_response_tokens_are_a_number_or_all(given, meant, capsys):
    assert recipe.parse(["--response-tokens", given]).response_tokens == meant
    assert recipe.parse(["--preset", "diva-8b"]).response_tokens == 1
    with pytest.raises(SystemExit, match="2"):
        recipe.parse(["--response-tokens", "0"])
    assert "--response-tokens 0: expected at least 1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ the run


def test_losses_fall_and_the_folder_is_complete(root, finished):
    """Both losses fall on a set small enough to learn; everything promised lies in the folder."""
    rows = rows_of(finished)
    assert [row["step"] for row in rows] == list(range(STEPS))
    names = {"loss", "alignment", "response", "grad_norm", "lr", "undecodable", "data_wait"}
    assert names <= rows[0].keys()
    for name in ("alignment", "response"):
        first, last = (np.mean([row[name] for row in part]) for part in (rows[:4], rows[-4:]))
        assert last < 0.8 * first, f"{name}: {first:.4g} -> {last:.4g}"
    assert (finished / "loss.png").stat().st_size > 10_000
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [20, 30]
    written = json.loads((finished / "config.json").read_text())
    assert written["reference_decoder"].endswith("llama")


def test_the_export_is_the_trained_student(root, finished):
    """Loading the folder gives the connector of the last checkpoint, bit for bit."""
    config = config_of(root, finished)
    run = Started(config)
    manager = record.open_checkpoints(config)
    params, _ = record.restore(manager, STEPS, run.params, run.opt_state)
    manager.close()
    trained = eqx.combine(params, run.frozen.diva).connector
    loaded = connector.load(finished).connector
    loaded, trained, untrained = jax.device_get((loaded, trained, run.params.connector))
    assert np.abs(loaded.query_tokens - untrained.query_tokens).max() > 0.001
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)


def test_resumed_equals_uninterrupted_bit_for_bit(root, finished, tmp_path, capsys):
    """Stop on the way and start again: same losses, same weights."""
    out = tmp_path / "parts"
    train.run(config_of(root, out, until=UNTIL))
    assert len(rows_of(out)) == UNTIL and not (out / "model.safetensors").exists()
    assert "--out" in capsys.readouterr().out
    with (out / "metrics.jsonl").open("a") as stream:  # as after a power cut: lines beyond the save
        stream.write('{"step": 14, "loss": 1}\n{"step": 15, "lo')
    train.run(config_of(root, out, save_every=7, log_every=3))  # neither changes the result
    assert f"resuming {out} at step {UNTIL}" in capsys.readouterr().out
    whole, parts = rows_of(finished), rows_of(out)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    a, b = ((f / "model.safetensors").read_bytes() for f in (out, finished))
    assert a == b


def test_the_log_shows_where_the_time_goes(root, tmp_path, capfd, monkeypatch):
    """Step time, data wait, clips/s and, for a chip whose peak is known, MFU; a trace if asked."""
    chip = cost.Chip(flops=1e9, memory=1e9, bandwidth=1e9, links=1e9)
    monkeypatch.setitem(cost.CHIPS, "cpu", chip)
    train.run(config_of(root, tmp_path, until=15, log_every=5, profile=True))
    output = capfd.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith("step 10/"))
    number = r"(\d+\.\d+)"
    found = re.search(
        rf"grad_norm .*  {number} s, data (\d+) ms  (\d+) clips/s  MFU {number}%  \d+ s",
        line,
    )
    assert found, line
    sizes = weights.read_config(whisper.WhisperConfig, root / "whisper")
    llm = weights.read_config(llama.LlamaConfig, root / "llama")
    turn = files.read_json(tmp_path / "turn.json")
    work = cost.flops(sizes, llm, 8, len(turn["suffix"]), 8, before=len(turn["prefix"]))
    row = rows_of(tmp_path)[9]
    expected = sum(work.values()) * 8 / 8 / chip.flops / row["seconds"]  # 8 clips, 8 devices
    assert row["mfu"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert 0 <= row["data_wait"] < row["seconds"]
    assert f"profile   {tmp_path / 'profile'}" in output
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_bucket_that_cannot_be_read_is_a_message(root, monkeypatch):
    """Whatever its library raises; and a student in a bucket is not evaluated at the end."""

    def no_login(_):
        raise RuntimeError("Anonymous caller\nmore")

    monkeypatch.setattr(type(epath.Path("gs://b")), "exists", no_login)
    with pytest.raises(ValueError, match=r"--out gs://b/run: cannot be read \(Anonymous caller\)"):
        train.run(config_of(root, "gs://b/run"))
    with pytest.raises(ValueError, match="--tasks tasks: a student in a bucket is not evaluated"):
        config_of(root, "gs://b/run", tasks="tasks")


def start_process(config: recipe.Config, **environment: str) -> subprocess.Popen:
    """`python train.py` with the flags of `config`; a pause before each batch, so that a signal
    arrives in the middle of the run on any machine."""
    code = (
        "import time, data, train\n"
        "from runtime import cli, sharding\n"
        "sharding.MIN_SHARDED_SIZE, plain = 64, data.batches\n"
        "def slow(*args, **kwargs):\n"
        "    for batch in plain(*args, **kwargs):\n"
        "        time.sleep(0.1); yield batch\n"
        "data.batches = slow; cli.run(train.main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *shlex.split(recipe.resume_command(config))[2:]],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two_processes(config: recipe.Config) -> list[subprocess.Popen]:
    """The same command twice, as on two hosts with four devices each."""
    address = checks.free_address()
    return [
        start_process(
            config,
            XLA_FLAGS=os.environ["XLA_FLAGS"].replace("count=8", "count=4"),
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in (0, 1)
    ]


def wait_for_rows(out: Path, count: int, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not (out / "metrics.jsonl").is_file() or len(rows_of(out)) < count:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_give_what_one_gives(root, finished, tmp_path):
    """Eight devices in two processes or in one: the same losses, but for the order of f32 sums.

    SIGTERM to one process of them stops both at the same step, saved; one process goes on with
    eight devices, and frozen weights that were whole on each are split: again the losses are those
    of the undisturbed run.
    """
    out = tmp_path / "two"
    processes = start_two_processes(config_of(root, out, fsdp=1))
    wait_for_rows(out, 3, *processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    steps = len(rows_of(out))
    assert 3 <= steps < STEPS
    said = f"stopped at step {steps} of {STEPS} (SIGTERM)"
    assert said in outputs[0] and "step" not in outputs[1].split("SIGTERM caught")[0], outputs
    train.run(config_of(root, out))
    whole, parts = rows_of(finished), rows_of(out)
    for name in ("loss", "alignment", "response", "grad_norm"):
        ours, theirs = ([row[name] for row in rows] for rows in (parts, whole))
        # sums in another order, 1e-7, and 30 steps of training that let it grow
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, err_msg=name)


def test_a_killed_process_ends_the_other_with_a_message(root, tmp_path):
    """In bounded time, not 0, and the checkpoint that was whole stays.

    A step that waits for the dead one fails at once, and train.py says why. A checkpoint that waits
    for it waits for HEARTBEAT; then JAX may be the first to say why, and ends the process itself.
    """
    out = tmp_path / "killed"
    processes = start_two_processes(config_of(root, out, fsdp=1, save_every=5))
    wait_for_rows(out, 5, *processes)
    while not (out / "checkpoints/5").exists():
        time.sleep(0.01)
    processes[1].kill()
    output, _ = processes[0].communicate(timeout=sharding.HEARTBEAT + 60)
    processes[1].communicate()
    ours = "error: another process has gone" in output and "the same command again" in output
    assert processes[0].returncode == 1 if ours else processes[0].returncode != 0, output
    assert ours or "another task died" in output, output
    assert (out / "checkpoints/5").exists()


def test_sigterm_saves_and_the_printed_command_goes_on(root, finished, tmp_path):
    """A preempted process exits 0 with a checkpoint; going on ends at the same weights."""
    out = tmp_path / "preempted"
    process = start_process(config_of(root, out))
    wait_for_rows(out, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    steps = len(rows_of(out))
    assert 3 <= steps < STEPS and f"stopped at step {steps} of {STEPS} (SIGTERM)" in output
    printed = output.strip().splitlines()[-1]
    assert printed.strip() == recipe.resume_command(config_of(root, out))
    train.run(recipe.parse(shlex.split(printed)[2:]))
    a, b = ((f / "model.safetensors").read_bytes() for f in (out, finished))
    assert a == b


def write_tasks(folder: Path, root: Path) -> str:
    """One question to the first clip and one to a clip that is not there; returns the folder."""
    write_json(
        folder / "tasks.json", {"qa": {"suite": "manifest", "path": "qa.jsonl", "metrics": ["f1"]}}
    )
    rows = [
        {"audio": str(root / f"cv/clips/{name}.wav"), "text": "one", "answer": "two"}
        for name in ("0", "nowhere")
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_finished_run_is_not_run_again(root, finished, tmp_path, monkeypatch, capsys):
    """Started again it says so, and evaluates if that is still to do; or shows the table again."""
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    asked = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **_: asked.append(args))
    train.run(config_of(root, finished))
    assert "is finished (30 steps)" in capsys.readouterr().out and not asked
    tasks = write_tasks(tmp_path / "tasks", root)
    train.run(config_of(root, finished, tasks=tasks))
    assert asked == [(str(finished), [tasks])]
    report = finished / "eval.json"
    report.write_text((Path(train.__file__).parent / "toy/diva/eval.json").read_text())
    train.run(config_of(root, finished, tasks=tasks))
    report.unlink()
    assert "spoken_qa" in capsys.readouterr().out and len(asked) == 1


# ----------------------------------------------------------------------------- when things go wrong


def test_another_configuration_is_refused(root, finished, tmp_path):
    """Only what decides the weights is compared, and every difference is named."""
    with pytest.raises(ValueError) as error:
        train.run(config_of(root, finished, seed=3, learning_rate=1.0))
    message = str(error.value)
    assert "seed was 0, now 3" in message and "learning_rate was 0.01, now 1.0" in message
    assert "--out" in message and str(finished) in message


WRONG = {
    "data": ({"data": "typo.json"}, "typo.json: no such file or folder"),
    "split": ({"split": "trian"}, "no split 'trian'"),
    "whisper": ({"whisper": "no/such/whisper"}, "no/such/whisper: neither a folder here"),
    "llm": ({"llm": "no/such/llama"}, "no/such/llama: neither a folder here"),
    "queries": ({"queries": 9}, "queries: got 9; expected 1 to 8"),
    "tasks": ({"tasks": "no/such/tasks"}, "no/such/tasks: no such tasks"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_anything_is_loaded_or_written(
    root, finished, tmp_path, monkeypatch, name
):
    """So the right command begins in the same folder. In one that is finished it is told, too, and
    not that the folder is another run's."""
    monkeypatch.setattr(train, "init_state", lambda *_: pytest.fail("weights were loaded"))
    changes, message = WRONG[name]
    for out in (tmp_path / "out", finished):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            train.run(config_of(root, out, **changes))
    assert not (tmp_path / "out").exists()


def test_missing_audio_of_a_task_is_a_warning(root, tmp_path, caplog, monkeypatch):
    """Before the first step; the run goes on."""
    monkeypatch.setattr(train, "train", lambda *_: (0, "what was asked"))
    train.run(config_of(root, tmp_path / "out", tasks=write_tasks(tmp_path, root)))
    assert "the audio of 1 of 2 clips is missing" in caplog.text and "nowhere.wav" in caplog.text


def test_a_run_that_took_no_step_leaves_its_folder_to_another(root, tmp_path, monkeypatch):
    """Say, one that did not fit into memory: a smaller batch may be tried. From the first step on
    the folder is its own."""
    out = tmp_path / "out"

    def full(*_):
        raise ValueError("does not fit")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="does not fit"):
        patch.setattr(train, "compile_step", full)
        train.run(config_of(root, out, batch_size=16))
    assert files.read_json(out / "train.json")["batch_size"] == 16
    train.run(config_of(root, out, until=1))
    assert files.read_json(out / "train.json")["batch_size"] == 8
    for lost in ("checkpoints", "metrics.jsonl"):  # either alone is of a run
        kept = tmp_path / "kept"
        (out / lost).rename(kept)
        with pytest.raises(ValueError, match="batch_size was 8, now 16"):
            train.run(config_of(root, out, batch_size=16))
        kept.rename(out / lost)


def test_a_run_that_heard_no_clip_saves_and_exports_nothing(root, tmp_path, monkeypatch):
    """The first clips are named; with clips that have been mended the same command begins."""
    folder, out = clone_data(root, tmp_path, monkeypatch), tmp_path / "out"
    good = {file: file.read_bytes() for file in (folder / "clips").iterdir()}
    for file in good:
        file.write_bytes(b"RIFF, but not really")
    config = config_of(root, out, steps=1)
    with pytest.raises(
        ValueError, match=r"cv: none of the first 8 clips .*first are cv/clips/\d\.wav"
    ):
        train.run(config)
    assert not (out / "model.safetensors").exists() and not list((out / "checkpoints").iterdir())
    for file, content in good.items():
        file.write_bytes(content)
    train.run(config)
    assert rows_of(out)[0]["undecodable"] == 0 and (out / "model.safetensors").exists()


def test_ctrl_c_before_the_first_step_says_how_to_go_on(root, tmp_path):
    """While weights are loaded or the step compiles: one line, 130; nothing stands in the way."""
    out = tmp_path / "out"
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    flags = shlex.split(recipe.resume_command(config_of(root, out, fsdp=1, batch_size=8)))[2:]
    process = subprocess.Popen(
        [sys.executable, "-c", code, train.__file__, *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "turn.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error, error
    assert error.strip().splitlines()[-1] == "stopped; start the same command again to go on"
    assert not record.began(epath.Path(out))


def test_the_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), record.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.before(0) and stop.asked == "SIGINT"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_clips_are_refused(root, tmp_path, monkeypatch):
    folder = clone_data(root, tmp_path, monkeypatch)
    train.run(config_of(root, tmp_path / "out", until=1))
    table = folder / "train.tsv"
    table.write_text(table.read_text().replace("one", "two"))
    with pytest.raises(ValueError, match=r"clips\.json.*another run.*crc32 was"):
        train.run(config_of(root, tmp_path / "out"))


def test_not_finite_stops_with_step_and_part(root, tmp_path, monkeypatch):
    """The message names both; the last good checkpoint stays, and the run can go on from it."""
    plain = data.batches

    def poisoned(*args, start_step=0, **kwargs):
        for step, batch in enumerate(plain(*args, start_step=start_step, **kwargs), start_step):
            if step == 12:
                batch = batch._replace(audio=np.full_like(batch.audio, np.nan))
            yield batch

    monkeypatch.setattr(data, "batches", poisoned)
    config = config_of(root, tmp_path / "out")
    with pytest.raises(FloatingPointError, match=r"step 12: the audio is not finite.*last good"):
        train.run(config)
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["10"]
    assert len(rows_of(tmp_path / "out")) == 12
    monkeypatch.setattr(data, "batches", plain)
    train.run(dataclasses.replace(config, until=13))
    assert all(np.isfinite(row["loss"]) for row in rows_of(tmp_path / "out"))


def test_not_finite_at_a_saving_step_is_not_saved(root, tmp_path, monkeypatch):
    """Step 9 goes wrong and step 10 would be saved: the state behind it never reaches the disk."""
    plain = data.batches

    def poisoned(*args, **kwargs):
        for step, batch in enumerate(plain(*args, **kwargs)):
            yield batch._replace(audio=np.full_like(batch.audio, np.inf)) if step == 9 else batch

    monkeypatch.setattr(data, "batches", poisoned)
    with pytest.raises(FloatingPointError, match="step 9: the audio"):
        train.run(config_of(root, tmp_path / "out"))
    assert not list((tmp_path / "out/checkpoints").iterdir())


def test_a_corrupt_clip_among_good_ones(root, tmp_path, monkeypatch, caplog, capfd):
    """The run goes on; the clip has weight 0, is named once, and is counted."""
    folder = clone_data(root, tmp_path, monkeypatch)
    (folder / "clips/5.wav").write_bytes(b"RIFF, but not really")
    with caplog.at_level("WARNING"):
        train.run(config_of(root, tmp_path / "out", until=9))
    captured = capfd.readouterr()
    text = caplog.text + captured.out + captured.err
    assert text.count("clips/5.wav: not audio") == 1, text
    assert sum(row["undecodable"] for row in rows_of(tmp_path / "out")) == 9
    assert all(np.isfinite(row["loss"]) for row in rows_of(tmp_path / "out"))


def test_too_many_corrupt_clips_stop_the_run(root, tmp_path, monkeypatch):
    folder = clone_data(root, tmp_path, monkeypatch)
    (folder / "clips/5.wav").write_bytes(b"RIFF, but not really")
    config = config_of(root, tmp_path / "out", max_undecodable=0.001)
    with pytest.raises(ValueError, match=r"2 of the first \d+ clips could not be decoded.*0.001"):
        train.run(config)


def test_an_empty_set_is_refused(root, tmp_path, monkeypatch):
    folder = clone_data(root, tmp_path, monkeypatch)
    header = (folder / "train.tsv").read_text().splitlines()[0]
    (folder / "train.tsv").write_text(header + "\n")
    with pytest.raises(ValueError, match=r"cv.*no "):
        train.run(config_of(root, tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_a_message(root, tmp_path, capsys, monkeypatch):
    """A place where even root cannot write (below a file): a message and exit code 1."""
    (tmp_path / "file").write_text("")
    config = config_of(root, tmp_path / "file" / "out")
    monkeypatch.setattr(sys, "argv", shlex.split(recipe.resume_command(config))[1:])
    with pytest.raises(SystemExit, match="1"):
        cli.run(train.main)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "file/out: could not be written" in error
    assert "--out" in error and "Traceback" not in error


def test_a_full_disk_keeps_the_older_checkpoint(root, tmp_path):
    """The message says what could not be written; the checkpoint before is whole and goes on."""
    config = config_of(root, tmp_path / "out", until=10)
    train.run(config)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, old[1]))  # no file may grow beyond 8 kB
    try:
        with pytest.raises(OSError, match=r"checkpoints.*could not be written.*Older checkpoints"):
            train.run(dataclasses.replace(config, until=12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    train.run(dataclasses.replace(config, until=11))
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == ["10", "11"]


def test_a_checkpoint_of_another_model_is_refused(root, tmp_path):
    run = Started(config_of(root, tmp_path))
    manager = record.open_checkpoints(config_of(root, tmp_path))
    other = jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), run.params)
    record.save(manager, 4, other, run.opt_state)
    manager.wait_until_finished()
    with pytest.raises(ValueError, match=r"checkpoints/4: not the state of this model"):
        record.restore(manager, 4, run.params, run.opt_state)
    manager.close()
