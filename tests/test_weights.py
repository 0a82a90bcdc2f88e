"""weights.py: names, dtypes, shards and slices are right; what does not belong is refused.

Files are written with safetensors itself, not with weights.save, wherever loading is the claim.
"""

import errno
import json
import re
import weakref
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import llama
import weights
import whisper

FIXTURES = Path(__file__).parent / "fixtures"
LAYERS = 12  # more than 10: in the order of the names, layer 10 stands before layer 2
WHISPER = dict(
    d_model=4,
    encoder_layers=LAYERS,
    encoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=6,
    num_mel_bins=8,
    max_source_positions=10,
    max_target_positions=5,
    vocab_size=9,
    decoder_start_token_id=1,
    eos_token_id=2,
)
LLAMA = dict(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=10,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    model_type="llama",
)
BF16 = np.dtype(ml_dtypes.bfloat16)


def shape(*sizes, dtype=jnp.float32, sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def random_model(init, config) -> object:
    """Random numpy arrays in the shapes of a model."""
    rng = np.random.default_rng(0)
    template = weights.abstract(init, config, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), template)


def write_json(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_llama(folder: Path, **changes) -> llama.Llama:
    """A model folder with config.json; `changes` make the config differ from the weights."""
    write_json(folder / "config.json", LLAMA)
    tree = random_model(llama.Llama.init, weights.read_config(llama.LlamaConfig, folder))
    weights.save(tree, folder)
    write_json(folder / "config.json", LLAMA | changes)
    return tree


def same(a, b) -> None:
    """Same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), jax.tree_util.keystr(path)
        assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def refused(kind: type[Exception], action, *parts: object) -> str:
    """`action` raises `kind`, and the message holds every part; it is more than a bare fact."""
    with pytest.raises(kind) as error:
        action()
    message = str(error.value)
    for part in parts:
        assert str(part) in message, f"{part!s} is not in: {message}"
    return message


# ------------------------------------------------------------------------------- names and bits


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_llama_loads_back_bit_for_bit(tmp_path, tied):
    write_json(tmp_path / "config.json", LLAMA | {"tie_word_embeddings": tied})
    config = weights.read_config(llama.LlamaConfig, tmp_path)
    tree = random_model(llama.Llama.init, config)
    file = weights.save(tree, tmp_path)
    assert file == tmp_path / "model.safetensors"
    assert ("lm_head.weight" in load_file(file)) == (not tied)
    same(llama.Llama.load(tmp_path), tree)


def test_a_saved_whisper_loads_back_bit_for_bit(tmp_path):
    write_json(tmp_path / "config.json", WHISPER)
    config = weights.read_config(whisper.WhisperConfig, tmp_path)
    tree = random_model(whisper.Whisper.init, config)
    weights.save(tree, tmp_path, prefix="model.")
    same(whisper.Whisper.load(tmp_path), tree)


def test_the_names_in_a_llama_file_are_exactly_the_published_ones(tmp_path):
    """The list is written out here; arrays keep the published orientation [out, in]."""
    tree = write_llama(tmp_path)
    layer = (
        "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
    ).split()
    expected = {f"model.layers.{n}.{part}.weight" for n in range(LAYERS) for part in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected
    assert found["model.layers.10.mlp.down_proj.weight"].shape == (8, 12)
    np.testing.assert_array_equal(
        found["model.layers.10.mlp.down_proj.weight"], tree.model.layers.mlp.down_proj.weight[10]
    )


def test_the_names_in_a_whisper_file_are_exactly_the_published_ones(tmp_path):
    """They are those that transformers wrote into the committed file; some stand here in full."""
    folder = FIXTURES / "whisper-multilingual"
    config = weights.read_config(whisper.WhisperConfig, folder)
    file = weights.save(random_model(whisper.Whisper.init, config), tmp_path, prefix="model.")
    written, published = load_file(file), load_file(folder / "model.safetensors")
    assert len(published) > 50
    assert {n: x.shape for n, x in written.items()} == {n: x.shape for n, x in published.items()}
    width = config.d_model
    for name, size in {
        "model.encoder.conv1.weight": (width, config.num_mel_bins, 3),
        "model.encoder.embed_positions.weight": (config.max_source_positions, width),
        "model.encoder.layers.1.self_attn_layer_norm.bias": (width,),
        "model.decoder.layers.0.self_attn.q_proj.weight": (width, width),
        "model.decoder.layers.1.encoder_attn.v_proj.bias": (width,),
        "model.decoder.layers.0.fc1.weight": (config.decoder_ffn_dim, width),
        "model.decoder.layer_norm.weight": (width,),
    }.items():
        assert written[name].shape == size, name
    assert "model.decoder.layers.0.self_attn.k_proj.bias" not in written


def test_layers_are_stacked_in_the_order_of_their_numbers(tmp_path):
    """Layer n of the file, filled with n, is row n of the array, though names sort otherwise."""
    file = {f"layers.{n}.w": np.full((2, 3), n, np.float32) for n in range(LAYERS)}
    assert sorted(file)[1] == "layers.1.w" and sorted(file)[2] == "layers.10.w"
    save_file(file, tmp_path / "model.safetensors")
    loaded = weights.load({"layers": {"w": shape(LAYERS, 2, 3)}}, tmp_path)["layers"]["w"]
    expected = np.broadcast_to(np.arange(LAYERS)[:, None, None], (LAYERS, 2, 3))
    np.testing.assert_array_equal(loaded, expected)


SIZES = st.lists(st.integers(1, 3), max_size=3)
DTYPES = st.sampled_from([np.float32, np.float16, BF16, np.int32])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    arrays=st.dictionaries(st.sampled_from("abc"), st.tuples(SIZES, DTYPES)),
    layers=st.dictionaries(st.sampled_from("abc"), st.tuples(SIZES, DTYPES)),
    count=st.integers(1, 11),
    prefix=st.sampled_from(["", "model."]),
)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, arrays, layers, count, prefix):
    """Any tree of any shapes (scalars too) and dtypes, every bit pattern (NaN too)."""
    rng = np.random.default_rng(0)

    def draw(size, dtype) -> np.ndarray:
        raw = rng.integers(0, 256, (*size, np.dtype(dtype).itemsize), np.uint8)
        return raw.view(dtype).reshape(size)

    tree = {name: draw(size, dtype) for name, (size, dtype) in arrays.items()}
    tree["layers"] = {name: draw([count, *size], dtype) for name, (size, dtype) in layers.items()}
    folder = tmp_path_factory.mktemp("tree")
    weights.save(tree, folder, prefix)
    template = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), tree)
    same(weights.load(template, folder, prefix), tree)


def test_what_devices_share_is_saved_as_one_array(tmp_path):
    """A tree split over 8 devices gives the same bytes as the same tree on one."""
    tree = {"layers": {"w": np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)}}
    split = NamedSharding(Mesh(np.asarray(jax.devices()), "x"), P(None, "x"))
    parts = jax.device_put(tree, split)
    assert len(parts["layers"]["w"].addressable_shards[3].data[0]) == 2
    a, b = weights.save(parts, tmp_path / "parts"), weights.save(tree, tmp_path / "whole")
    assert a.read_bytes() == b.read_bytes()


def test_the_header_says_what_transformers_asks_for(tmp_path):
    file = weights.save({"w": np.zeros(2)}, tmp_path / "new" / "folder")
    with safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


# --------------------------------------------------------------------------------------- dtypes


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the 16 bits of the nearest bfloat16, ties to even, by integer arithmetic."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("wanted", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("stored", [np.dtype(np.float16), BF16, np.dtype(np.float32)], ids=str)
def test_files_of_every_float_type_load_into_f32_and_bf16(tmp_path, stored, wanted):
    """To f32 exactly (every fp16 and bf16 number is an f32 number), to bf16 rounded to nearest."""
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    values[0, 0] = [1.00390625, 1.01171875, -0.0, 2.0**-14, 65280.0]  # two ties, and extremes
    values[0, 0, 4] = 65504 if stored == np.float16 else 3e38
    if stored == BF16:  # the file holds the upper 16 bits of an f32
        bits = bf16_bits(values)
        in_file, exact = bits.view(BF16), (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        in_file = values.astype(stored)
        exact = in_file.astype(np.float32)
    save_file(
        {"whole": in_file[0]} | {f"layers.{n}.w": in_file[n] for n in range(3)},
        tmp_path / "model.safetensors",
    )
    template = {
        "whole": shape(4, 5, dtype=wanted),
        "layers": {"w": shape(3, 4, 5, dtype=wanted)},
    }
    loaded = jax.device_get(weights.load(template, tmp_path))
    for got, expected in ((loaded["whole"], exact[0]), (loaded["layers"]["w"], exact)):
        assert got.dtype == wanted
        bits = got.view(np.uint16 if wanted == BF16 else np.uint32)
        want = bf16_bits(expected) if wanted == BF16 else expected.view(np.uint32)
        np.testing.assert_array_equal(bits, want)


def test_a_template_costs_no_memory_and_casts_only_floats():
    def init():
        return {"big": jnp.zeros((10**7, 10**6)), "ids": jnp.zeros(3, jnp.int32)}  # 40 TB

    plain, cast = weights.abstract(init), weights.abstract(init, dtype=jnp.bfloat16)
    assert plain == {"big": shape(10**7, 10**6), "ids": shape(3, dtype=jnp.int32)}
    assert cast["big"].dtype == jnp.bfloat16 and cast["ids"].dtype == jnp.int32


# ------------------------------------------------------------------------ shards, slices, devices


def into_shards(folder: Path, out: Path, count: int) -> dict[str, str]:
    """Deal the tensors of a single file to several, as the hub does for large models."""
    tensors = load_file(folder / "model.safetensors")
    file_of = {
        name: f"model-{i % count + 1:05}-of-{count:05}.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    out.mkdir()
    for file in set(file_of.values()):
        save_file({n: t for n, t in tensors.items() if file_of[n] == file}, out / file)
    index = {"metadata": {"total_size": 1}, "weight_map": file_of}
    write_json(out / "model.safetensors.index.json", index)
    return file_of


def test_several_shards_equal_the_single_file(tmp_path):
    """Also where the layers of one array lie in different files."""
    tree = write_llama(tmp_path / "single")
    file_of = into_shards(tmp_path / "single", tmp_path / "shards", 4)
    norms = {file_of[f"model.layers.{n}.input_layernorm.weight"] for n in range(LAYERS)}
    assert len(norms) == len(set(file_of.values())) == 4
    write_json(tmp_path / "shards/config.json", LLAMA)
    same(llama.Llama.load(tmp_path / "shards"), tree)


class Watched:
    """An open file that notes every slice that is read: (tensor, elements)."""

    def __init__(self, file, reads: list[tuple[str, int]]):
        self.file, self.reads = file, reads
        self.keys = file.keys

    def get_slice(self, name: str) -> "WatchedSlice":
        return WatchedSlice(name, self.file.get_slice(name), self.reads)

    def get_tensor(self, name: str):
        pytest.fail(f"{name} was read whole")


class WatchedSlice:
    def __init__(self, name: str, found, reads: list[tuple[str, int]]):
        self.name, self.found, self.reads = name, found, reads
        self.get_shape = found.get_shape

    def __getitem__(self, index):
        piece = self.found[index]
        self.reads.append((self.name, np.size(piece)))
        return piece


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    reads = []
    plain = weights._open
    monkeypatch.setattr(weights, "_open", lambda file: Watched(plain(file), reads))
    return reads


SPLITS = {  # name of the array: (shape, specification, largest share that one read may have)
    "rows": ((16, 5), P("x"), 1 / 8),
    "columns": ((3, 8), P(None, "x"), 1 / 8),
    "copied": ((4, 6), P(), 1),
    "layers.rows": ((LAYERS, 8, 3), P(None, "x"), 1 / 8),
    "layers.columns": ((LAYERS, 2, 24), P(None, None, "x"), 1 / 8),
    "layers.norm": ((LAYERS, 5), P(), 1),
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_device_holds_its_slice_and_only_slices_are_read(tmp_path, reads, name):
    """An array split in 8 is read in eighths, each element once, and never as a whole."""
    assert len(jax.devices()) == 8
    size, spec, share = SPLITS[name]
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), "x"), spec)
    values = np.arange(np.prod(size), dtype=np.float32).reshape(size)
    stacked = name.startswith("layers.")
    parts = name.split(".")
    file = {f"layers.{n}.{parts[1]}": values[n] for n in range(LAYERS)} if stacked else {}
    save_file(file or {name: values}, tmp_path / "model.safetensors")
    template = shape(*size, sharding=sharding)
    loaded = weights.load(
        {"layers": {parts[1]: template}} if stacked else {name: template}, tmp_path
    )
    array = jax.tree.leaves(loaded)[0]
    assert array.sharding == sharding and len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
        assert shard.data.size == values.size * share
    tensor = values[0].size if stacked else values.size
    assert max(elements for _, elements in reads) == tensor * share
    assert sum(elements for _, elements in reads) == values.size


@pytest.mark.parametrize("parts", [4, 1])
def test_an_array_split_in_4_or_whole_and_copied_is_read_once(tmp_path, reads, parts):
    """The mesh of training: (data, fsdp); the copies over `data` hold the same."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(-1, parts), ("data", "fsdp"))
    values = np.arange(64, dtype=np.float32).reshape(16, 4)
    save_file({"w": values}, tmp_path / "model.safetensors")
    sharding = NamedSharding(mesh, P("fsdp"))
    array = weights.load({"w": shape(16, 4, sharding=sharding)}, tmp_path)["w"]
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
        assert shard.data.shape == (16 // parts, 4)
    assert [elements for _, elements in reads] == [64 // parts] * parts, "once, for all who hold it"


def test_a_device_that_holds_some_layers_reads_no_other(tmp_path, reads):
    """Split along the layer axis, each of 8 devices reads its 2 of 16 layers."""
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), "x"), P("x"))
    values = np.arange(96, dtype=np.float32).reshape(16, 6)
    save_file({f"layers.{n}.w": values[n] for n in range(16)}, tmp_path / "model.safetensors")
    template = {"layers": {"w": shape(16, 6, sharding=sharding)}}
    array = weights.load(template, tmp_path)["layers"]["w"]
    np.testing.assert_array_equal(array, values)
    assert sorted(reads) == sorted((f"layers.{n}.w", 6) for n in range(16))


def test_a_slice_goes_to_its_device_before_the_next_is_read(tmp_path, reads, monkeypatch):
    """So the host holds one of the 8 at a time, and not the array that they make together."""
    save_file(
        {f"layers.{n}.w": np.ones((8, 3), np.float32) for n in range(2)}
        | {"whole": np.ones((16, 2), np.float32)},
        tmp_path / "model.safetensors",
    )
    put = jax.device_put

    def note(piece, device):
        reads.append((device.id, piece.size))
        return put(piece, device)

    monkeypatch.setattr(jax, "device_put", note)
    mesh = Mesh(np.asarray(jax.devices()), "x")
    template = {
        "layers": {"w": shape(2, 8, 3, sharding=NamedSharding(mesh, P(None, "x")))},
        "whole": shape(16, 2, sharding=NamedSharding(mesh, P("x"))),
    }
    weights.load(template, tmp_path)
    layers = [step for n in range(8) for step in [("layers.0.w", 3), ("layers.1.w", 3), (n, 6)]]
    whole = [step for n in range(8) for step in [("whole", 4), (n, 4)]]
    assert reads == layers + whole


def test_files_are_open_for_one_array_at_a_time(tmp_path, monkeypatch):
    """Closing unmaps them: what was read no longer counts as memory of this process."""
    values = {f"layers.{n}.{name}": np.ones(2, np.float32) for n in range(4) for name in "ab"}
    save_file(values, tmp_path / "model.safetensors")
    into_shards(tmp_path, tmp_path / "shards", 8)
    plain, opened, still_open = weights._open, [], []

    def watched(file: Path) -> Watched:
        still_open.append(sum(ref() is not None for ref in opened))
        opened.append(weakref.ref(handle := Watched(plain(file), [])))
        return handle

    monkeypatch.setattr(weights, "_open", watched)
    weights.load({"layers": {"a": shape(4, 2), "b": shape(4, 2)}}, tmp_path / "shards")
    assert still_open == [0] * 8 + [0, 1, 2, 3] * 2, "8 are checked; then 4 hold a, and 4 hold b"


def test_the_log_says_how_much_was_read_and_how_fast(tmp_path, caplog):
    """What is in the files, in their own dtype: each slice once, though 8 devices hold a copy."""
    caplog.set_level("INFO", "weights")
    tensors = {f"layers.{n}.w": np.ones((8, 50_000), np.float16) for n in range(2)}
    save_file(tensors | {"b": np.ones(400_000, np.float32)}, tmp_path / "model.safetensors")
    mesh = Mesh(np.asarray(jax.devices()), "x")
    template = {
        "b": shape(400_000, sharding=NamedSharding(mesh, P())),
        "layers": {"w": shape(2, 8, 50_000, sharding=NamedSharding(mesh, P(None, "x")))},
    }
    weights.load(template, tmp_path)
    [said] = [record.getMessage() for record in caplog.records]
    found = re.fullmatch(r"loaded 3 tensors, 3 MB in (\S+) s \((\d+) MB/s\) from (.*)", said)
    assert found and found[3] == str(tmp_path) and float(found[2]) > 0, said


def test_without_a_sharding_an_array_goes_to_the_first_device(tmp_path):
    save_file({"w": np.ones(8, np.float32)}, tmp_path / "model.safetensors")
    assert weights.load({"w": shape(8)}, tmp_path)["w"].devices() == {jax.devices()[0]}


# ----------------------------------------------------------------------------- what is refused


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    template = {"a": shape(2), "layers": {"w": shape(7, 3)}, "z": shape(1)}
    message = refused(
        ValueError,
        partial(weights.load, template, tmp_path, prefix="model."),
        f"{tmp_path}: the tensors are not those of this model",
        "Missing: model.a, model.layers.0.w, model.layers.1.w",
        "and 4 more",
        "Unexpected: a.",
        "exactly the 9 tensors",
        "check that config.json and the weights belong together",
    )
    assert "model.z" not in message, "a list of hundreds of names is no message"


def test_an_unexpected_tensor_is_named(tmp_path):
    save_file({n: np.ones(2, np.float32) for n in ("a", "b.bias")}, tmp_path / "model.safetensors")
    refused(
        ValueError,
        partial(weights.load, {"a": shape(2)}, tmp_path),
        f"{tmp_path}: ",
        "Missing: none. Unexpected: b.bias.",
        "exactly the 1 tensors",
        "config.json",
    )


@pytest.mark.parametrize("found", [(3, 2), (2, 4), (6,), (2, 3, 1)])
def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path, found):
    """A transposed, wider, flat or deeper one, alone or as one layer of many."""
    tensors = {f"layers.{n}.w": np.ones((2, 3), np.float32) for n in range(LAYERS)}
    save_file(
        tensors | {"a": np.ones(found, np.float32)},
        tmp_path / "model.safetensors",
    )
    template = {"a": shape(2, 3), "layers": {"w": shape(LAYERS, 2, 3)}}
    say = (f"has shape {found}; expected (2, 3) from config.json. Check that the two belong",)
    load = partial(weights.load, template, tmp_path)
    refused(ValueError, load, f"{tmp_path / 'model.safetensors'}: a ", *say)
    tensors |= {"a": tensors["layers.0.w"], "layers.10.w": np.ones(found, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    refused(ValueError, load, f"{tmp_path / 'model.safetensors'}: layers.10.w ", *say)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"num_hidden_layers": 13},
            ["Missing: model.layers.12.input_layernorm.weight,", "4 more. Unexpected: none"],
        ),
        (
            {"num_hidden_layers": 11},
            ["Missing: none. Unexpected: model.layers.11.input_layernorm.weight,"],
        ),
        (
            {"intermediate_size": 16},
            ["model.layers.0.mlp.gate_proj.weight has shape (12, 8); expected (16, 8)"],
        ),
        (
            {"num_key_value_heads": 4},
            ["model.layers.0.self_attn.k_proj.weight has shape (4, 8); expected (8, 8)"],
        ),
        ({"vocab_size": 11}, ["model.embed_tokens.weight has shape (10, 8); expected (11, 8)"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_another_model_is_refused(tmp_path, changes, parts):
    """More or fewer layers, other widths: the message names the first tensors that differ."""
    write_llama(tmp_path, **changes)
    load = partial(llama.Llama.load, tmp_path)
    refused(ValueError, load, tmp_path, *parts, "config.json", "belong together")


def test_an_output_matrix_that_config_does_not_tie_must_be_there(tmp_path):
    """A tied model may carry a copy, not other numbers: transformers would use these, in spite of
    config.json. An untied one without them is refused."""
    tree = write_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    refused(
        ValueError,
        partial(llama.Llama.load, tmp_path),
        f"{tmp_path / 'model.safetensors'}: lm_head.weight is not model.embed_tokens.weight",
        '"tie_word_embeddings": false',
    )
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = llama.Llama.load(tmp_path)
    assert loaded.lm_head is None
    same(loaded.output_matrix, tree.model.embed_tokens.weight)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    same(llama.Llama.load(tmp_path).output_matrix, tree.model.embed_tokens.weight)
    write_json(tmp_path / "config.json", LLAMA)
    refused(ValueError, partial(llama.Llama.load, tmp_path), "Missing: lm_head.weight. Unexpected")


def test_only_tensors_declared_unused_may_be_left_in_the_file(tmp_path):
    """By the start of the name; one that is declared and wanted is read all the same."""
    tensors = {
        n: np.full(2, i, np.float32) for i, n in enumerate(("a", "old.a", "old.b", "gold.a"))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    load = partial(weights.load, path=tmp_path, unused={"old.": "of an older version"})
    refused(ValueError, partial(load, {"a": shape(2)}), "Unexpected: gold.a.")
    loaded = load({"a": shape(2), "gold": {"a": shape(2)}, "old": {"b": shape(2)}})
    assert [float(x[0]) for x in jax.tree.leaves(loaded)] == [0, 3, 2]


# ------------------------------------------------------------------------------- damaged files


def simple(folder: Path) -> bytes:
    """A whole file with the tensors a and b; returns its bytes."""
    folder.mkdir(exist_ok=True)
    tensors = {n: np.arange(6, dtype=np.float32).reshape(2, 3) for n in ("a", "b")}
    save_file(tensors, folder / "model.safetensors")
    return (folder / "model.safetensors").read_bytes()


AB = {"a": shape(2, 3), "b": shape(2, 3)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_refused(tmp_path_factory, share):
    """In the length, the header or the data: never fewer numbers, never a library's traceback."""
    folder = tmp_path_factory.mktemp("cut")
    whole = simple(folder)
    size = int(share * len(whole))
    (folder / "model.safetensors").write_bytes(whole[:size])
    refused(
        ValueError,
        partial(weights.load, AB, folder),
        f"{folder / 'model.safetensors'}: not a whole safetensors file",
        f"{size} bytes here",
        "cut short: download it again",
    )


def test_another_format_under_the_name_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(200))
    refused(ValueError, partial(weights.load, AB, tmp_path), "not a whole safetensors file")


def test_an_absent_file_says_what_is_expected(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(
        FileNotFoundError,
        partial(weights.load, AB, tmp_path),
        f"{tmp_path}: neither model.safetensors nor model.safetensors.index.json",
        "expected one of them. Convert other formats (.bin, .pth) to safetensors",
    )


def test_an_absent_shard_is_named_with_what_it_holds(tmp_path):
    simple(tmp_path / "whole")
    into_shards(tmp_path / "whole", tmp_path / "shards", 2)
    shard = tmp_path / "shards/model-00002-of-00002.safetensors"
    shard.unlink()
    refused(
        FileNotFoundError,
        partial(weights.load, AB, shard.parent),
        f"{shard} is missing; the index says it holds b. Download this shard",
    )
    rest = weights.load({"a": shape(2, 3)}, shard.parent, unused={"b": "of an older version"})
    np.testing.assert_array_equal(rest["a"], np.arange(6).reshape(2, 3))


def test_a_shard_without_a_tensor_of_the_index_is_refused(tmp_path):
    """An index and shards of different downloads."""
    simple(tmp_path / "whole")
    file_of = into_shards(tmp_path / "whole", tmp_path / "shards", 2)
    shard = tmp_path / "shards" / file_of["b"]
    save_file({"c": np.ones(2, np.float32)}, shard)
    refused(
        ValueError,
        partial(weights.load, AB, shard.parent),
        f"{shard}: no b; the index says it holds",
        "download both again",
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a", "b"]}, {"weight_map": None}], ids=str)
def test_an_index_without_a_weight_map_is_refused(tmp_path, index):
    file = tmp_path / "model.safetensors.index.json"
    write_json(file, index)
    load = partial(weights.load, AB, tmp_path)
    refused(ValueError, load, f"{file}: no weight_map; expected {{tensor name: file name}}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"weight_map":\n {"a": ', "not valid JSON (Expecting value: line 2 column 8"),
        (b"", "not valid JSON (Expecting value: line 1 column 1"),
        (b'{"a": "\xff"}', "not valid JSON ('utf-8' codec can't decode byte 0xff in position 7"),
        (b"[1, 2]", "holds a list; expected a JSON object"),
    ],
    ids=["cut", "empty", "latin", "list"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json_is_refused_with_file_and_place(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    load = partial(weights.load, AB)
    action = load if "index" in name else partial(weights.read_config, llama.LlamaConfig)
    advice = "Download the file again" if "not valid" in reason else "expected"
    refused(ValueError, partial(action, tmp_path), f"{tmp_path / name}: {reason}", advice)


def test_an_absent_config_is_refused(tmp_path):
    file = tmp_path / "config.json"
    read = partial(weights.read_config, llama.LlamaConfig, tmp_path)
    refused(FileNotFoundError, read, f"{file} is missing; expected", "Download it into this folder")


def test_a_config_without_a_needed_key_is_refused(tmp_path):
    """Every absent key at once, the class that needs them, and the model type that is there."""
    rest = {k: v for k, v in LLAMA.items() if k not in ("hidden_size", "rms_norm_eps")}
    write_json(tmp_path / "config.json", rest | {"model_type": "bert"})
    refused(
        ValueError,
        partial(llama.Llama.load, tmp_path),
        f"{tmp_path / 'config.json'}: no hidden_size, rms_norm_eps; expected every size that "
        "LlamaConfig needs (model_type here is 'bert'). Is this the right model?",
    )


def test_a_config_keeps_its_values_and_may_say_more(tmp_path):
    write_json(tmp_path / "config.json", LLAMA | {"torch_dtype": "bfloat16", "hidden_size": 24})
    config = weights.read_config(llama.LlamaConfig, tmp_path)
    for name, value in (LLAMA | {"hidden_size": 24}).items():
        assert getattr(config, name, value) == value, name
    assert config.head_dim is None and config.rope_scaling is None, "absent ones have defaults"


# ------------------------------------------------------------------------ where a model comes from


def test_a_path_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(
        ValueError,
        partial(weights.resolve, file),
        f"{file} is a file; expected a model folder. Give the folder that holds it",
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("Cannot find the requested files.\nMore."), "requested files."),
        (HFValidationError("Repo id must be in the form 'name'"), "Repo id must be"),
        (ConnectionError("Network is unreachable"), "Network is unreachable"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_repo_that_cannot_be_fetched_is_refused(monkeypatch, error, reason):
    """The message has one line of the reason, and what a path may be; errors may have no text."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(weights, "snapshot_download", fail)
    message = refused(
        FileNotFoundError,
        partial(weights.resolve, "nobody/nothing"),
        "nobody/nothing: neither a folder here nor a Hugging Face repo",
        reason,
        "a folder with config.json and model.safetensors, or a repo id such as openai/whisper-tiny",
        "`hf auth login`",
    )
    assert "\n" not in message


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
DUPLICATES = """pytorch_model.bin flax_model.msgpack model.fp32-00001-of-00002.safetensors
    model.safetensors.index.fp32.json original/consolidated.00.pth README.md""".split()


class Hub:
    """A repo with these files: a stand-in for snapshot_download that notes what it was asked."""

    def __init__(self, folder: Path, repo: list[str]):
        self.folder, self.repo, self.asked = folder / "snapshots" / "c0ffee", repo, []

    def __call__(self, repo: str, allow_patterns: list[str], revision: str = "main") -> str:
        self.asked.append((repo, revision))
        for name in self.repo:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                map_ = {f"tensor.{i}": shard for i, shard in enumerate(SHARDS)}
                content = {"weight_map": map_} if name.endswith("index.json") else {}
                write_json(self.folder / name, content)
        return str(self.folder)


@pytest.mark.parametrize(
    ("weights_there", "taken"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors.index.json", *SHARDS], ["model.safetensors.index.json", *SHARDS]),
        (["model.safetensors.index.json", "model.safetensors", *SHARDS], ["model.safetensors"]),
        (["model.safetensors.index.json", SHARDS[0]], ["model.safetensors.index.json", SHARDS[0]]),
        ([], []),
    ],
    ids=["one", "shards", "both", "some", "none"],
)
def test_of_a_repo_one_set_of_weights_is_fetched(tmp_path, monkeypatch, weights_there, taken):
    """The single file, or else the shards that its index names, of the same commit; no duplicate in
    another precision or format."""
    small = ["config.json", "tokenizer.json", "chat_template.jinja"]
    hub = Hub(tmp_path, [*small, *weights_there, *DUPLICATES])
    monkeypatch.setattr(weights, "snapshot_download", hub)
    assert weights.resolve("openai/whisper-tiny") == hub.folder
    found = {p.name for p in hub.folder.iterdir() if ".safetensors" in p.name}
    assert found - {"model.safetensors.index.fp32.json"} == {*taken} | (
        {"model.safetensors.index.json"} & {*weights_there}
    )
    assert {*small} <= {p.name for p in hub.folder.iterdir()}
    sharded = "model.safetensors.index.json" in taken
    commits = ["main", "c0ffee"] if sharded else ["main"]
    assert hub.asked == [("openai/whisper-tiny", commit) for commit in commits]


def test_what_is_already_fetched_is_not_asked_for_again(tmp_path, monkeypatch):
    hub = Hub(tmp_path, ["model.safetensors.index.json", *SHARDS])
    monkeypatch.setattr(weights, "snapshot_download", hub)
    weights.resolve("a/b"), weights.resolve("a/b")
    assert [revision for _, revision in hub.asked] == ["main", "c0ffee", "main"]
    assert weights.resolve(tmp_path) == tmp_path and len(hub.asked) == 3, "a folder is itself"


def test_of_a_single_file_and_an_index_the_file_is_read(tmp_path):
    """As transformers does: an index that was left behind names what is no longer so."""
    simple(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": SHARDS[0]}})
    np.testing.assert_array_equal(weights.load(AB, tmp_path)["b"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "name",
    ["layers.3.self_attn.rotary_emb.inv_freq", "embeddings.position_ids", "h.0.attn.masked_bias"],
)
def test_buffers_of_older_files_are_passed_over(tmp_path, name):
    """They are computed; any other tensor is still unexpected."""
    simple(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    weights.load(AB, tmp_path)
    save_file(tensors | {f"{name}.c": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    refused(ValueError, partial(weights.load, AB, tmp_path), f"Unexpected: {name}.c.")


# ------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")], ids=repr
)
def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch, error):
    """Half of the new file is written when it stops; the next save goes through."""
    old, new = ({"w": np.full(1000, i, np.float32)} for i in (1, 2))
    file = weights.save(old, tmp_path)
    before = file.read_bytes()
    plain = weights.save_file

    def stops(tensors, path, metadata):
        plain(tensors, path, metadata=metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:2000])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", stops)
        with pytest.raises(type(error)):
            weights.save(new, tmp_path)
    assert file.read_bytes() == before
    same(weights.load({"w": shape(1000)}, tmp_path), old)
    weights.save(new, tmp_path)
    same(weights.load({"w": shape(1000)}, tmp_path), new)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# ------------------------------------------------------------------------------------- the command


def test_the_command_prints_tree_and_file_side_by_side(tmp_path, capsys):
    """A line for each array: tensors, dtype, parameters, its part on a device; what has no place in
    the tree, what is lacking, and sums."""
    folder = tmp_path / "llama"
    tree = write_llama(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors | {"extra": np.zeros(3, np.float32)}, file)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"model_type": "llama"})
    weights.main(str(folder), devices=4)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    shape = list(tree.model.layers.mlp.up_proj.weight.shape)
    up = lines["model.layers.mlp.up_proj.weight"]
    assert f"{shape[0]} x {shape[1:]}" in up and "F32" in up and f"{np.prod(shape):,}" in up
    assert "missing" in lines["model.norm.weight"]
    assert "unexpected: not a tensor of this model" in lines["extra"]
    count = sum(x.size for x in jax.tree.leaves(tree))
    assert any(line.endswith(f"{count:,} parameters") for line in lines.values())
    write_json(folder / "config.json", config | {"model_type": "bert"})
    with pytest.raises(ValueError, match="model_type 'bert'; expected one of whisper, llama, diva"):
        weights.main(str(folder))
