"""Models that answer, on several devices: copied to each, or split where they do not fit one.

Eight fake devices, whose room is lowered. What is compiled for a split model never holds a whole
table, nor more than a layer of it. Axes: B clips, L positions, N layers.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import universe

import connector
import demo
import generate
import llama
import weights
import whisper
from evaluation import systems
from runtime import sharding

LLAMA = llama.LlamaConfig(64, 192, 5, 8, 1024, 1e-5, 256, num_key_value_heads=2, eos_token_id=2)
WHISPER = whisper.WhisperConfig(64, 5, 4, 192, 5, 4, 192, 8, 48, 24, 1024, 1, 2)
B, L = 8, 40


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Iterator[None]:
    """Arrays of a layer are large enough to be split; norms are not."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 256)
    with universe.compiled_fast():
        yield


@pytest.fixture
def room(monkeypatch):
    """room(bytes): so much memory has each of the eight."""
    return lambda size: monkeypatch.setattr(sharding, "device_memory_bytes", lambda: float(size))


@functools.cache
def model(kind, config):
    template = weights.abstract(kind.init, config, jax.random.key(0))
    return checks.random_weights(template, 1, 0.3)


def spread(tree, parts: int):
    """Copied to eight devices (1), or split over them (8)."""
    return sharding.shard_params(tree, sharding.make_mesh(8, parts))


def moved(compiled) -> int:
    """Elements of the largest outcome of a collective."""
    found = re.findall(
        r"= (\([^=]*?\)|\S+) (?:all-\w+|reduce-scatter|collective-\w+)\(", compiled.as_text()
    )
    shapes = [dims for shape in found for dims in re.findall(r"\w+\[([\d,]+)\]", shape)]
    return max(int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes)


def lowered(function, tree, *args, **kwargs):
    """`function` (of sharding.use_model_mesh), compiled for arrays that are spread."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function.__wrapped__.lower(tree, *args, **kwargs).compile()


# ------------------------------------------------------------------------------------ which devices


def test_one_device_does_it_where_nothing_is_known_of_its_memory():
    """On a CPU: its devices have one memory and one set of cores."""
    assert sharding.local_mesh(model(llama.Llama, LLAMA), share=True) is None


@pytest.mark.parametrize(
    ("share_of_room", "share", "shape"),
    [
        (0.7, False, None),
        (0.7, True, (1, 8, 1)),
        (0.9, False, (1, 1, 8)),
        (0.9, True, (1, 1, 8)),
    ],
)
def test_a_model_is_copied_where_it_fits_and_split_where_not(room, share_of_room, share, shape):
    llm = model(llama.Llama, LLAMA)
    room(sum(x.nbytes for x in jax.tree.leaves(llm)) / share_of_room)
    mesh = sharding.local_mesh(llm, share)
    assert (mesh and mesh.devices.shape) == shape


# ------------------------------------------------------------------------------- what is computed


def asked():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 1024, (B, L))
    return jnp.asarray(ids), jnp.asarray(rng.integers(1, L, B))


@pytest.mark.parametrize(("parts", "rows"), [(1, B), (8, B), (8, 1)])
def test_answers_on_eight_devices_are_those_on_one(parts, rows):
    """Also of batches that eight cannot share, for which each does the same."""
    llm, (ids, lengths) = model(llama.Llama, LLAMA), asked()
    ids, lengths = ids[:rows], lengths[:rows]
    how = {"max_new_tokens": 12, "stop_ids": (2,)}
    alone = generate.generate(llm, llm.embed(ids), lengths, **how)
    many = spread(llm, parts)
    np.testing.assert_array_equal(generate.generate(many, many.embed(ids), lengths, **how), alone)
    if rows == 1:
        said = list(generate.stream(many, many.embed(ids), lengths, **how))
        assert said == [token for token in alone[0].tolist() if token != 2]
    assert len({*np.asarray(alone).ravel().tolist()}) > 4


@pytest.mark.parametrize(("parts", "rows"), [(1, B), (8, B)])
def test_transcripts_on_eight_devices_are_those_on_one(parts, rows):
    asr = model(whisper.Whisper, WHISPER)
    audio = jax.random.normal(jax.random.key(0), (rows, WHISPER.window_samples)) * 0.1
    how = {"forced": (1, 5), "suppress": (7,), "begin_suppress": (2,), "max_length": 20}
    alone = generate.greedy_decode(asr, audio, **how)
    np.testing.assert_array_equal(generate.greedy_decode(spread(asr, parts), audio, **how), alone)
    assert len({*np.asarray(alone).ravel().tolist()}) > 4


def test_of_a_split_llm_no_device_holds_the_table_or_two_layers():
    """Each holds an eighth. Prefill gathers one array of one layer at a time; for a step no weight
    moves: tokens go to the weights. The memory of each program agrees."""
    llm, (ids, lengths) = spread(model(llama.Llama, LLAMA), 8), asked()
    for x in [x for x in jax.tree.leaves(llm) if x.ndim > 2 or x.size > 1024]:
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // 8}
    whole = sum(x.nbytes for x in jax.tree.leaves(llm))
    table, layer = LLAMA.vocab_size * 64, LLAMA.intermediate_size * 64
    prefill = lowered(generate._prefill, llm, llm.embed(ids), lengths, 12)
    assert moved(prefill) == layer
    hidden, cache = generate._prefill(llm, llm.embed(ids), lengths, 12)
    assert {shard.data.shape[0] for shard in cache[0].addressable_shards} == {B // 8}
    how = (lengths, 0, jax.random.key(0), 0.0, 1.0)
    step = lowered(generate.decode_one_token, llm, hidden, cache, *how)
    assert moved(step) == B * 64 < table / 8
    for program in (prefill, step):
        memory, held = program.memory_analysis(), sum(x.nbytes for x in cache) / 8
        assert memory.argument_size_in_bytes - held < whole / 6


def test_of_a_split_whisper_no_device_holds_the_table_or_two_layers():
    """One compiled loop: the encoder's layers are gathered, and what the decoder hears with; in
    its steps nothing moves that is larger than the logits."""
    asr = spread(model(whisper.Whisper, WHISPER), 8)
    audio = jnp.zeros((B, WHISPER.window_samples))
    how = {"forced": (1, 5), "suppress": (7,), "begin_suppress": (2,), "max_length": 20}
    program = lowered(generate.greedy_decode, asr, audio, **how)
    assert moved(program) == WHISPER.encoder_ffn_dim * 64 == 12_288 < WHISPER.vocab_size * 64
    whole = sum(x.nbytes for x in jax.tree.leaves(asr))
    assert program.memory_analysis().argument_size_in_bytes - audio.nbytes < whole / 6


def test_what_is_heard_is_looked_for_in_a_split_table_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(llama, "SOME", 100)
    llm = model(llama.Llama, LLAMA)
    virtual = 0.3 * jax.random.normal(jax.random.key(0), (B, 24, 64))
    expected, many = connector.nearest_token_ids(llm, virtual), spread(llm, 8)
    np.testing.assert_array_equal(connector.nearest_token_ids(many, virtual), expected)
    assert moved(lowered(connector.nearest_token_ids, many, virtual).compiled) == 100 * 64


# --------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("universe")
    universe.build(root)
    universe.write_clips(root / "clips", 11)
    return root


def told(root: Path) -> tuple[int, bool, dict]:
    """On how many devices, whether split, and all that is said to eleven clips, four at a time."""
    asks = systems.Ask("say it", max_new_tokens=5), systems.Ask(None, ("red", "green", "sun"))
    clips = [str(root / f"clips/{n}.wav") for n in range(11)]
    questions = [systems.Question(asks[n % 2], clip, "dog sun") for n, clip in enumerate(clips)]
    models, found = systems.Models.load(root / "diva"), {}

    def tell(number: int, system: str, *said) -> None:
        found[number, system] = said

    systems.answer(models, questions, [{*systems.SYSTEMS}] * len(clips), {}, 4, tell)
    where = models.connectors["untrained"].projection.weight.sharding
    return models.devices, not where.is_fully_replicated, found


def test_an_evaluation_shares_clips_among_devices_and_splits_what_is_too_large(
    root, room, monkeypatch
):
    """With the same answers, transcripts and words; batches are filled up for eight, one each."""
    shares, plain = [], systems.listen

    def listen(diva, audio):
        states = plain(diva, audio)
        shares.append((len(audio), states.addressable_shards[0].data.shape[0]))
        return states

    monkeypatch.setattr(systems, "listen", listen)
    alone = told(root)
    room(1e9)
    shared = told(root)
    room(1)
    split = told(root)
    assert (alone[:2], shared[:2], split[:2]) == ((1, False), (8, False), (8, True))
    assert alone[2] == shared[2] == split[2] and len(alone[2]) == 44
    assert shares == [(4, 4)] * 3 + [(8, 1)] * 4


def talk(root: Path) -> None:
    demo.main((str(root / "clips/0.wav"),), None, str(root / "diva"), max_new_tokens=4)


@pytest.mark.parametrize(
    "main",
    [
        lambda root: whisper.main(root / "clips/0.wav", str(root / "whisper")),
        lambda root: llama.main("what is it", str(root / "llama"), None, 6),
        lambda root: generate.main("what is it", str(root / "llama"), None, 2),
        lambda root: connector.main(root / "clips/0.wav", str(root / "diva")),
        talk,
    ],
    ids=["whisper", "llama", "generate", "connector", "demo"],
)
def test_a_command_says_the_same_where_its_model_is_split(root, room, capsys, monkeypatch, main):
    """Times and probabilities aside."""
    said, meshes, plain = [], [], sharding.shard_params

    def place(tree, mesh):
        meshes.append(mesh)
        return plain(tree, mesh)

    monkeypatch.setattr(sharding, "shard_params", place)
    for size in (1e9, 1):
        room(size)
        main(root)
        said.append(re.sub(r"[\d.]+ s\b|\d\S*|\(.*\)", "", capsys.readouterr().out).split())
    assert said[0] == said[1] and said[0]
    assert meshes[0] is None and meshes[-1].shape["fsdp"] == 8
