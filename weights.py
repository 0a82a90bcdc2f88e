"""Weights: safetensors files <-> module trees, strict, lazy and sharded.

The module tree is the key map. A tensor's name in the file is the path of attribute names that
leads to the array, so `decoder.layers.self_attn.q_proj.weight` needs no table of names. Repeated
layers are one module whose arrays carry a leading layer axis [N, ...] (jax.lax.scan runs over it);
in the file each layer is a tensor of its own and the number stands behind `layers`:

    tree   decoder.layers.fc1.weight             [N, 5120, 1280]
    file   decoder.layers.0.fc1.weight           [5120, 1280]
           ...
           decoder.layers.{N-1}.fc1.weight       [5120, 1280]

A template of `jax.ShapeDtypeStruct`s says what is wanted: shape, dtype and, if set, sharding. Each
process reads only the slices that its own devices hold, and one at a time: beside what they hold,
the host needs room for two such slices, not for a model.

Run it to see a model's tree beside its file:  python weights.py toy/diva

Annex: runtime/files.py writes files whole, model_config.py refuses what a model's files ask for and
nothing here computes, sharding.py says which device holds which slice.
Reads: nothing of ours.   Read next: whisper.py.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from formats import model_config
from runtime import cli, files, sharding

Config = TypeVar("Config")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BUFFERS = {  # {end of a tensor's name: reason}, of older files; transformers passes them over too
    "rotary_emb.inv_freq": "computed from rope_theta",
    "position_ids": "0, 1, 2, ...",
    "masked_bias": "computed: the causal mask",
}

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------
# The two modules that every model here is made of


class Linear(eqx.Module):
    """y = x W^T + b. The weight keeps its own dtype; the product runs in the dtype of x."""

    weight: Float[Array, "*N out in"]
    bias: Float[Array, "*N out"] | None = None

    def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        # All positions in one axis: XLA's CPU backend takes five times as long for the gradient of
        # the weight when it sums over two axes. And contracted as they lie, as in `logits`.
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.einsum("bi,oi->bo", rows, self.weight.astype(x.dtype)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.astype(x.dtype)


class Embedding(eqx.Module):
    """One row for each token or position."""

    weight: Float[Array, "rows D"]


def logits(hidden: Float[Array, "*B D"], table: Float[Array, "V D"]) -> Float[Array, "*B V"]:
    """hidden table^T, in f32. Contracted as they lie: for one row, turning a matrix around costs
    JAX 0.12 three times as much on a CPU as the product."""
    table, hidden = table.astype(hidden.dtype), sharding.broadcast_to_param_shards(hidden)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


# ---------------------------------------------------------------------------------------------
# A model's folder


def resolve(path_or_repo: str | Path) -> Path:
    """The local folder of a model: the folder itself, or the download of a Hugging Face repo id.

    Raises FileNotFoundError if it is neither.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} is a file; expected a model folder. Give the folder that holds it."
        )
    try:
        return _download(str(path_or_repo))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{path_or_repo}: neither a folder here nor a Hugging Face repo that could be fetched "
            f"({reason}). Expected a folder with config.json and model.safetensors, or a repo id "
            "such as openai/whisper-tiny (log in with `hf auth login` for gated ones)."
        ) from error


def _download(repo: str) -> Path:
    """One set of a repo's weights: what else stands there (.bin, .pth, fp32) is never read."""
    folder = Path(snapshot_download(repo, allow_patterns=["*.json", "*.jinja", WHOLE]))
    if not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        shards = sorted({*_weight_map(folder).values()})
        if lacking := [name for name in shards if not (folder / name).is_file()]:
            # the folder of a snapshot is called after its commit
            snapshot_download(repo, revision=folder.name, allow_patterns=lacking)
    return folder


def read_config(cls: type[Config], folder: Path) -> Config:
    """Build the frozen dataclass `cls` from the keys of `folder/config.json` that it names.

    Raises ValueError if a field without default is absent, a value cannot be one, or a key asks for
    what `cls.computed` says is not computed here.
    """
    file = folder / "config.json"
    values = files.read_json(file)
    fields = dataclasses.fields(cls)
    absent = [f.name for f in fields if f.name not in values and f.default is dataclasses.MISSING]
    if absent:
        raise ValueError(
            f"{file}: no {', '.join(absent)}; expected every size that {cls.__name__} needs "
            f"(model_type here is {values.get('model_type')!r}). Is this the right model?"
        )
    model_config.refuse(file, values, getattr(cls, "computed", {}))
    try:
        return cls(**model_config.fields_of(cls, values))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# ---------------------------------------------------------------------------------------------
# Tree and file


class Published(NamedTuple):
    """What a model's folder must hold: the tree it becomes, and how its tensors are called there.

    A tensor's name in the file is `prefix` and its path in `template`; `unused` {start of a name:
    reason} are tensors that may be left in the file.
    """

    template: Any
    prefix: str = ""
    unused: dict[str, str] = {}  # noqa: RUF012  (never changed)


def abstract(init: Callable, *args: Any, dtype: Any = None) -> Any:
    """The template of `init(*args)`: shapes without memory, floats in `dtype` (None: as is)."""

    def cast(leaf: Any) -> Any:
        if dtype is None or not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if is_float else leaf.dtype)

    return jax.tree.map(cast, eqx.filter_eval_shape(init, *args))


def names_of(tree: Any, prefix: str = "") -> list[tuple[Any, list[str], bool]]:
    """For every leaf of `tree`: the leaf, its tensor names in a file, and whether it is stacked.

    A stacked leaf (under an attribute called `layers`) has one name for each of its layers.
    """
    result = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
        stacked = "layers" in parts
        numbers = range(leaf.shape[0]) if stacked else [None]
        at = parts.index("layers") + 1 if stacked else 0
        names = [
            prefix + ".".join(parts if n is None else [*parts[:at], str(n), *parts[at:]])
            for n in numbers
        ]
        result.append((leaf, names, stacked))
    return result


def load(template: Any, path: str | Path, prefix: str = "", unused: dict[str, str] | None = None):
    """Read the arrays that `template` asks for from a model folder, in its dtypes and shardings.

    The log says how much this process read, and how fast.

    Args:
        template: tree of `jax.ShapeDtypeStruct`; without a sharding an array goes to device 0.
        path: folder with model.safetensors, or with the shards of model.safetensors.index.json.
        prefix: stands before every name in the file, such as "model.".
        unused: {start of a name: reason} of the tensors that may be left in the file.

    Raises ValueError (missing, unexpected or misshaped tensors, damaged file) or FileNotFoundError.
    """
    folder = Path(path)
    file_of = _tensor_files(folder)
    wanted = names_of(template, prefix)
    needed = {name for _, names, _ in wanted for name in names}
    missing = sorted(needed - file_of.keys())
    extra = sorted(name for name in file_of.keys() - needed if not _reason(name, unused or {}))
    if missing or extra:
        raise ValueError(
            f"{folder}: the tensors are not those of this model. Missing: {_some(missing)}. "
            f"Unexpected: {_some(extra)}. Expected exactly the {len(needed)} tensors that "
            "config.json implies: check that config.json and the weights belong together."
        )
    _check_shards(file_of, needed)
    began, arrays, total = time.perf_counter(), [], 0
    for leaf, names, stacked in wanted:
        array, size = _read(leaf, names, stacked, file_of)
        arrays.append(array)
        total += size
    megabytes, seconds = total / 1e6, time.perf_counter() - began
    log.info(
        "loaded %d tensors, %.0f MB in %.1f s (%.0f MB/s) from %s",
        *(len(needed), megabytes, seconds, megabytes / seconds, folder),
    )
    return jax.tree.unflatten(jax.tree.structure(template), arrays)


def _reason(name: str, unused: dict[str, str]) -> str | None:
    """Why a tensor that has no place in the tree may be left in the file; None if it may not."""
    starts = [why for start, why in unused.items() if name.startswith(start)]
    return next(iter([*starts, *(why for end, why in BUFFERS.items() if name.endswith(end))]), None)


def _check_shards(file_of: dict[str, Path], needed: set[str]) -> None:
    """Raises unless every file is there, whole, and has the needed tensors that it should have."""
    for file in sorted({file_of[name] for name in needed}):
        names = sorted(name for name in needed if file_of[name] == file)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; the index says it holds {_some(names)}. Download this shard."
            )
        if absent := sorted(set(names) - set(_open(file).keys())):
            raise ValueError(
                f"{file}: no {_some(absent)}; the index says it holds them. Expected an index and "
                "shards of one model: download both again."
            )


def _read(
    leaf: jax.ShapeDtypeStruct, names: list[str], stacked: bool, file_of: dict[str, Path]
) -> tuple[jax.Array, int]:
    """The array that `leaf` asks for, from the tensors `names`, and how many bytes were read.

    The files are opened for this array only: what was read of a mapped file counts as this
    process's memory until it is closed.
    """
    handles = {file: _open(file) for file in {file_of[name] for name in names}}
    slices = [handles[file_of[name]].get_slice(name) for name in names]
    expected = tuple(leaf.shape[1:] if stacked else leaf.shape)
    for name, found in zip(names, slices, strict=True):
        if (shape := tuple(found.get_shape())) != expected:
            raise ValueError(model_config.misshaped(file_of[name], name, shape, expected))
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    holders = {}  # a slice of the array, and the devices that hold a copy of it
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        holders.setdefault(str(index), (index, []))[1].append(device)
    total = 0

    def fetch(index: tuple[slice, ...], devices: list[jax.Device]) -> list[jax.Array]:
        nonlocal total
        piece = np.empty(sharding.shard_shape(leaf.shape), leaf.dtype)
        rows, sources = (piece, slices[index[0]]) if stacked else (piece[None], slices)
        within = index[1:] if stacked else index
        for n, source in enumerate(sources):
            rows[n] = found = source[within or ...]
            total += found.nbytes
        # Waits: a piece on its way to its devices still takes room here.
        return jax.block_until_ready([jax.device_put(piece, device) for device in devices])

    parts = [part for one in holders.values() for part in fetch(*one)]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts), total


def read_tensor(folder: Path, names: Sequence[str]) -> tuple[str, np.ndarray]:
    """The first of `names` that a model's folder holds, and its array in f32.

    Raises FileNotFoundError or ValueError.
    """
    file_of = _tensor_files(folder)
    found = next((name for name in names if name in file_of), None)
    if found is None:
        raise ValueError(
            f"{folder}: holds none of {', '.join(names)}; expected the tensors of a Llama. "
            "Give --model a text model's folder."
        )
    _check_shards(file_of, {found})
    return found, np.asarray(_open(file_of[found]).get_tensor(found)).astype(np.float32)


def check_tied(folder: Path, name: str, twin: str) -> None:
    """Raises ValueError if the file holds `name`, which is tied to `twin`, with other numbers.

    Of such a file transformers ties nothing, whatever config.json says.
    """
    file_of = _tensor_files(folder)
    if not {name, twin} <= file_of.keys():
        return
    _check_shards(file_of, {name, twin})
    one, other = (_open(file_of[key]).get_slice(key) for key in (name, twin))
    cuts = [*range(0, one.get_shape()[0], 4096), one.get_shape()[0]]  # a table in pieces
    if one.get_shape() != other.get_shape() or not all(
        np.array_equal(one[a:b], other[a:b]) for a, b in itertools.pairwise(cuts)
    ):
        raise ValueError(
            f"{file_of[name]}: {name} is not {twin}, to which it is tied; expected the same "
            'numbers. Take it out of the file, or let config.json say "tie_word_embeddings": false.'
        )


def save(tree: Any, folder: str | Path, prefix: str = "") -> Path:
    """Write `tree` to `folder/model.safetensors` under its published names; returns the file.

    The file is written beside and then renamed: a crash leaves the old one whole.
    """
    tensors = {}
    for leaf, names, stacked in names_of(tree, prefix):
        array = np.asarray(leaf)
        tensors |= {
            n: np.asarray(array[i] if stacked else array, order="C") for i, n in enumerate(names)
        }
    target = Path(folder) / WHOLE
    with files.atomic_write(target) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors makes files that their owner alone may read
    return target


def _tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: the file that holds it} of a model folder; of both kinds, the single file."""
    if (folder / WHOLE).is_file():
        return dict.fromkeys(_open(folder / WHOLE).keys(), folder / WHOLE)
    if (folder / INDEX).is_file():
        return {name: folder / file for name, file in _weight_map(folder).items()}
    raise FileNotFoundError(
        f"{folder}: neither {WHOLE} nor {INDEX}; expected one of them. Convert other formats "
        "(.bin, .pth) to safetensors first."
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of an index. Raises ValueError."""
    found = files.read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{folder / INDEX}: no weight_map; expected {{tensor name: file name}}.")
    return found


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not a whole safetensors file ({error}); {file.stat().st_size} bytes here. "
            "It is damaged or cut short: download it again."
        ) from error


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


# ---------------------------------------------------------------------------------------------
# The tree beside the file


def describe(published: Published, folder: Path, devices: int) -> list[str]:
    """A line for each array of the tree, one for each tensor that has no place in it, and sums."""
    file_of = _tensor_files(folder)
    stored = {}  # {name: (shape, dtype)}
    for file in sorted({*file_of.values()}):
        opened = _open(file)
        for name in sorted(name for name, holder in file_of.items() if holder == file):
            found = opened.get_slice(name)
            stored[name] = (tuple(found.get_shape()), found.get_dtype())
    mesh = jax.sharding.AbstractMesh((1, 1, devices), sharding.AXES)
    template = published.template
    places = jax.tree.leaves(sharding.param_shardings(template, mesh))
    kinds = f"{'array of the tree':44} {'tensors in the file':24} {'dtype':5}"
    lines = [f"{kinds} {'parameters':>13}  each of {devices} devices holds"]
    total, needed = 0, set()
    for (leaf, names, stacked), place in zip(
        names_of(template, published.prefix), places, strict=True
    ):
        needed |= {*names}
        shape, times = leaf.shape[1:] if stacked else leaf.shape, f"{len(names)} x " * stacked
        found = {stored.get(name, ("missing", "-")) for name in names}
        tensors = f"{times}{list(shape)}"
        if {of for of, _ in found} != {shape}:
            tensors = f"expected {tensors}, found {', '.join(sorted(str(of) for of, _ in found))}"
        name = names[0].removeprefix(published.prefix)
        name = name.replace("layers.0.", "layers.") if stacked else name
        part = list(place.shard_shape(leaf.shape))
        held = f"{part[0]} x {part[1:]}" if stacked else f"{part}"
        total += math.prod(leaf.shape)
        lines.append(
            f"{name:44} {tensors:24} {'/'.join(sorted({kind for _, kind in found})):5} "
            f"{math.prod(leaf.shape):13,}  {held if any(place.spec) else 'all of it'}"
        )
    for name in sorted(stored.keys() - needed):
        reason = _reason(name, published.unused)
        said = f"unused: {reason}" if reason else "unexpected: not a tensor of this model"
        lines.append(f"{name:44} {list(stored[name][0])!s:24} {stored[name][1]:5} {'':13}  {said}")
    lines.append(f"{len(needed)} tensors, {len(places)} arrays, {total:,} parameters")
    return lines


def main(model: Annotated[str, tyro.conf.Positional] = "toy/diva", devices: int = 8) -> None:
    """Print the tree of a model beside its file, and how it would be split over devices.

    Args:
        model: folder or Hugging Face repo id of a Whisper, a Llama or a DiVA.
        devices: how many share each large array.
    """
    import connector  # the models are the next chapters
    import llama
    import whisper

    folder = resolve(model)
    kinds = {
        "whisper": whisper.Whisper.published,
        "llama": llama.Llama.published,
        "diva": connector.published,
    }
    kind = files.read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {kind!r}; expected one of {', '.join(kinds)}."
        )
    print("\n".join(describe(kinds[kind](folder), folder, devices)))


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
