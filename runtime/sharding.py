"""Sharding: where every array lives, and how a stack of layers runs when no device holds it whole.

    mesh             devices as a grid [replica, data, fsdp]
    batch            split over all axes: every device has its own clips, and they never move
    trained arrays   split over data and fsdp, and so are their gradients and their optimizer
    frozen arrays    split over fsdp: on a grid [., n, 1] whole on every device
    small arrays     copied to every device

A device computes with whole layers on its own clips. So just before a layer runs, its pieces are
gathered from the devices of its replica, in the compute dtype, and behind it they are forgotten;
its gradient is summed over all devices and split again. That is "fully sharded data parallelism",
the same sums as on one device. It pays for what is trained, which takes 16 bytes a weight with its
gradient and its optimizer. What is frozen takes 2, and stands still wherever it fits. Written down
here once, it holds for the encoder, the connector and the LLM. With which collectives, XLA decides:
over a whole slice of 64 chips it would gather by adding up pieces padded with zeros, which is twice
the traffic; so large slices are replicas of MAX_FSDP_DEVICES devices ("hybrid sharding").

Where one token is computed at a time, that is turned around: it goes to the pieces of the weights.

On one device, or where no mesh is named, all of it is nothing at all. On several hosts each
runs the same program as one process, with the devices of all of them in one mesh.

Source: Rajbhandari et al. 2020, "ZeRO", stage 3.
Reads: nothing of ours.   Read next: attention.py.
"""

import functools
import json
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

AXES = ("replica", "data", "fsdp")
FROZEN, TRAINED = AXES[2:], AXES[1:]  # over which axes large arrays are split
REPLICA_AXES = AXES[:2]  # of what is frozen
MAX_FSDP_DEVICES = 16  # over which trained arrays are split; more if the frozen ones are
MAX_PARAM_MEMORY_FRACTION = 0.8  # of a device's memory: the rest is for what is computed
MIN_SHARDED_SIZE = 2**14  # elements (of one layer): arrays below are copied to every device


def make_mesh(batch_size: int, fsdp: int | None = None, devices: Any = None) -> Mesh:
    """All devices as a grid [replica, data, fsdp]. Raises ValueError if batch or fsdp does not fit
    them."""
    devices = jax.devices() if devices is None else devices
    fsdp = len(devices) if fsdp is None else fsdp
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"--fsdp {fsdp}: expected a divisor of the {len(devices)} devices here.")
    if batch_size < 1 or batch_size % len(devices):
        raise ValueError(
            f"--batch-size {batch_size}: cannot be shared equally by {len(devices)} devices; "
            f"expected a multiple of {len(devices)}, such as "
            f"{max(1, round(batch_size / len(devices))) * len(devices)}."
        )
    copies = len(devices) // fsdp
    data = max(
        n
        for n in range(1, copies + 1)
        if copies % n == 0 and (n == 1 or n * fsdp <= MAX_FSDP_DEVICES)
    )
    shape = (copies // data, data, fsdp)
    # jax.make_mesh would refuse the grids for which an axis of a torus has to be cut in two
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def candidate_meshes(batch_size: int, fsdp: int | None = None, devices: Any = None) -> list[Mesh]:
    """The grids that a run may choose from, least traffic first: from frozen arrays whole on every
    device to one copy split over all; with `fsdp` only that one. Raises ValueError."""
    count = make_mesh(batch_size, fsdp, devices).size
    parts = [n for n in range(1, count + 1) if count % n == 0] if fsdp is None else [fsdp]
    return [make_mesh(batch_size, n, devices) for n in parts]


def device_memory_bytes() -> float:
    """Bytes of memory of one device of this process; infinite where it does not say, as on CPUs."""
    return float((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf))


def compute_dtype(platform: str) -> str:
    """Of frozen weights and of the computation: float32 on a CPU, bfloat16 elsewhere."""
    return "float32" if platform == "cpu" else "bfloat16"


def local_mesh(templates: Any, share: bool = False) -> Mesh | None:
    """The devices of this process, for models that answer. None: the first one alone.

    Models that do not fit one device are split over all of them, [1, 1, n]. Of those that do, each
    device has a copy, [1, n, 1], if there are clips to `share`.
    """
    devices, leaves = jax.local_devices(), jax.tree.leaves(templates)
    room = MAX_PARAM_MEMORY_FRACTION * device_memory_bytes()
    fits = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) <= room
    if len(devices) == 1 or room == math.inf or (fits and not share):
        return None
    return make_mesh(len(devices), 1 if fits else len(devices), devices)


# ----------------------------------------------------------------------------------- where it lives


def partition_spec(
    shape: tuple[int, ...], parts: int, first: int = 0, over: tuple[str, ...] = FROZEN
) -> P:
    """How one array is split in `parts`, `over` axes of the mesh: along its largest dividing axis,
    of those from `first` on.

    Not at all, P(), if it is small or no axis divides.
    """
    fitting = [axis for axis in range(first, len(shape)) if shape[axis] % parts == 0]
    if not fitting or np.prod(shape) < MIN_SHARDED_SIZE:
        return P()
    return P(*[None] * max(fitting, key=lambda axis: shape[axis]), over)


def axis_size(mesh: Mesh | AbstractMesh, over: str | tuple[str, ...] | None) -> int:
    """Of an axis that is split over one of the mesh's axes, or over several."""
    return math.prod(
        mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over or ())
    )


def param_shardings(tree: Any, mesh: Mesh | AbstractMesh, over: tuple[str, ...] = FROZEN) -> Any:
    """The rule for every array of a model, or, over TRAINED, its gradients and its optimizer.

    The layer axis of a stack stays whole, since lax.scan runs along it; so do the rows of a lookup
    table: each device looks up its own columns, and only the rows found need to travel.
    """
    parts = axis_size(mesh, over)

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        names = {getattr(key, "name", None) for key in path}
        if "layers" in names:
            inner = partition_spec(leaf.shape[1:], parts, over=over)
            return NamedSharding(mesh, P(None, *inner) if inner else P())
        is_table = bool(names & {"embed_tokens", "embed_positions"})
        return NamedSharding(mesh, partition_spec(leaf.shape, parts, int(is_table), over))

    return jax.tree_util.tree_map_with_path(rule, tree)


def shard_params(tree: Any, mesh: Mesh | None, over: tuple[str, ...] = FROZEN) -> Any:
    """`tree` of arrays, or of shapes still to be loaded, with every leaf where it belongs."""
    if mesh is None:
        return tree

    def put(leaf: Any, where: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return jax.device_put(leaf, where)

    return jax.tree.map(put, tree, param_shardings(tree, mesh, over))


def shard_params_locally(template: Any) -> Any:
    """The template of one model, placed on the devices of this process: `place` of its `load`."""
    return shard_params(template, local_mesh(template))


def shard_host_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows of each array become part of the global, split array; shapes get their
    shardings."""
    rows = NamedSharding(mesh, P(AXES))

    def put(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        return jax.make_array_from_process_local_data(rows, x)

    return jax.tree.map(put, batch)


# ------------------------------------- inside the step, where use_abstract_mesh names the mesh


def use_model_mesh(function: Callable) -> Callable:
    """`function(model, ...)`, compiled with the mesh named over which the model lies, if any."""

    @functools.wraps(function)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        leaf = next(leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array))
        mesh = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf.sharding, "mesh", None)
        if mesh is None:
            return function(model, *args, **kwargs)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(model, *args, **kwargs)

    return run


def constrain(x: Array, where: P) -> Array:
    """`x` laid out as `where` says; an axis that cannot be shared equally is whole. As it is, where
    no mesh is named."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    shared = (n % axis_size(mesh, axes) == 0 for axes, n in zip(where, x.shape, strict=False))
    where = P(*(axis if fits else None for axis, fits in zip(where, shared, strict=True)))
    return jax.lax.with_sharding_constraint(x, where)


def shard_batch(tree: PyTree) -> PyTree:
    """Keep clips, the first axis of every array, split over all devices."""
    return jax.tree.map(lambda x: constrain(x, P(AXES)), tree)


def micro_batches(batch: PyTree, size: int) -> PyTree:
    """[B, ...] -> [parts, clips, ...]: `size` clips of every device in each part; no clip moves to
    another device."""
    devices = max(1, jax.sharding.get_abstract_mesh().size)

    def split(x: Array) -> Array:
        parts = x.reshape(devices, -1, size, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts.reshape(-1, devices * size, *x.shape[1:]), P(None, AXES))

    return jax.tree.map(split, batch)


def broadcast_to_param_shards(x: Array) -> Array:
    """Few positions go to all devices that share a copy of the weights: for one token of each clip
    that is a thousandth of what the weights would be on their way to the clips."""
    return constrain(x, P(REPLICA_AXES))


def gather_to_batch(tree: PyTree) -> PyTree:
    """And what the weights made of them goes back to the clips."""
    # by way of all devices: asked for at once, XLA would send the weights to the clips after all
    return shard_batch(jax.tree.map(broadcast_to_param_shards, tree))


def platform() -> str:
    """cpu, gpu or tpu: of the mesh that is named, which need not be here, else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shard_map_batch(function: Callable[..., PyTree], *arrays: Array) -> PyTree:
    """`function(*arrays)` by each device for its own clips: for what XLA does not split, such as
    FFTs and loops over clips."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(arrays[0]) % mesh.size:
        return function(*arrays)
    return jax.shard_map(function, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES))(*arrays)


@jax.custom_vjp
def all_gather(piece: Array) -> Array:
    """A split array, whole on every device; backward its gradient, of a trained one, is split."""
    return constrain(piece, P())


def _all_gather_forward(piece: Array):
    return all_gather(piece), None


def _all_gather_backward(_: None, gradient: Array):
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else axis_size(mesh, TRAINED)
    return (constrain(gradient, partition_spec(gradient.shape, parts, over=TRAINED)),)


all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def all_gather_params(layer: PyTree, dtype: Any) -> PyTree:
    """All of a layer on every device. Large arrays travel in `dtype`, in which they are used."""

    def whole(x: Array) -> Array:
        return all_gather(x.astype(dtype)) if x.size >= MIN_SHARDED_SIZE else x

    return jax.tree.map(whole, layer)


def all_gather_rows(some: Float[Array, "rows E"]) -> Float[Array, "rows E"]:
    """Some rows of a lookup table, on every device."""
    # said to be split first: else XLA would gather all rows, and cut these out of them
    return all_gather(constrain(some, P(None, "fsdp")))


def lookup(table: Float[Array, "rows E"], ids: Int[Array, "B L"]) -> Float[Array, "B L E"]:
    """`table[ids]`: each device finds all rows in its own columns, then each clip gets its rows."""
    found = table[constrain(ids, P(REPLICA_AXES))]
    return shard_batch(constrain(found, P(REPLICA_AXES, None, "fsdp")))


SAVED_NAME = "kept"  # checkpoint_name of results that cost more to compute again than to keep

# What the backward pass computes again, to save memory; gathered weights are always gathered anew.
Remat = Literal["attention", "layers"]
REMAT_POLICIES = {
    # Products with weights are kept: norms, activations and attention are about 1 % of the work.
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    ),
    # Only the input of each layer is kept: the forward pass is done twice.
    "layers": jax.checkpoint_policies.nothing_saveable,
}


def run_layers(
    layers: PyTree, x: PyTree, body: Callable[[Any, Any], Any], remat: Remat = "layers"
) -> PyTree:
    """`x = body(layer, x)` for every layer of a stack: compiled once, whatever their number.

    `x` may be several arrays (student and teacher): they share each gathered layer.
    """
    dtype = jax.tree.leaves(x)[0].dtype

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[remat], prevent_cse=False)
    def step(x, layer):
        return shard_batch(body(all_gather_params(layer, dtype), x)), None

    return jax.lax.scan(step, shard_batch(x), layers)[0]


# -------------------------------------------------------------------------------- several processes

HEARTBEAT = 30  # seconds without a word from a process, after which the others stop


def join_cluster() -> None:
    """Become one process of several, where a cluster (a TPU pod, SLURM, Open MPI, ...) says so, or
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    JAX_NUM_PROCESSES=1 alone: stay alone, whatever the cluster. To be called before any other use
    of JAX. Raises ValueError.
    """
    count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    by_hand = "JAX_COORDINATOR_ADDRESS" in os.environ
    if count == "1" and not by_hand:
        return
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(index) if index else None,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        if "coordinator_address should be defined" in str(error) and not count:
            return  # no cluster anywhere
        raise ValueError(
            f"could not join the other processes ({error}). Expected a cluster that JAX knows, or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment. "
            "Set JAX_NUM_PROCESSES=1 to run alone."
        ) from error


def process() -> dict[str, int]:
    """Which part of every batch is read here."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def wait_for_all() -> None:
    """Until every process has come here."""
    multihost_utils.sync_global_devices("wait_for_all")


def from_process_0(make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0 (anything that JSON can say), in every process.

    What it raises there is raised everywhere, so that no process waits for one that has gone.
    """
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            said = {"value": make()}
        except (ValueError, OSError) as error:
            said = {"error": str(error)}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    said = json.loads(np.asarray(text).tobytes())
    if "error" in said:
        raise ValueError(said["error"])
    return said["value"]


def gather_to_host(tree: PyTree) -> PyTree:
    """Split arrays, whole in the memory of every host, one at a time."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
