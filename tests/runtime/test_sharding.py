"""sharding.py: where arrays live, and that a split stack of layers gives what a whole one gives.

Eight fake devices as [data 1, fsdp 8] or [data 2, fsdp 4]. The stack of the tests has a product
with and one without batch axes, a large and a small array. Axes: B batch, L positions, D width.
"""

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

import weights
import whisper
from runtime import sharding
from training import hlo

N, B, D, WIDE = 3, 16, 32, 64  # layers, clips, width, inner width
BY_CLIP = P(sharding.AXES)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Arrays from D * WIDE elements on are split; the others are copied."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", D * WIDE)


class Layer(eqx.Module):
    up: Array  # [N, WIDE, D]
    down: Array  # [N, D, WIDE]
    scale: Array  # [N, D], small

    def __call__(self, x):
        """Attention without weights, then an MLP: two products of each kind."""
        shares = jax.nn.softmax(jnp.einsum("bld,bmd->blm", x, x))
        x = x + jnp.einsum("blm,bmd->bld", shares, x) * self.scale.astype(x.dtype)
        inner = jnp.tanh(x @ self.up.astype(x.dtype).T)
        return x + inner @ self.down.astype(x.dtype).T


class Model(eqx.Module):
    layers: Layer


def random(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.2, shape), jnp.float32)


def random_model() -> Model:
    return Model(Layer(random(N, WIDE, D), random(N, D, WIDE), random(N, D)))


def call_all(layer: Layer, xs: tuple) -> tuple:
    return jax.tree.map(layer, xs)


def inside(mesh, function):
    """`function`, compiled with the mesh named as in train.train_step; None: without one."""
    if mesh is None:
        return jax.jit(function)

    @jax.jit
    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return run


def laid_out(array: Array, mesh, spec: P) -> bool:
    return array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


def subjaxprs(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def equations(jaxpr):
    """Every equation of a jaxpr, of those inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in subjaxprs(equation):
            yield from equations(inner)


# -------------------------------------------------------------------------------- where arrays live


def test_sharding_rules(monkeypatch):
    """Large arrays: split along the largest dividing axis, never along layers; small: copied. What
    is frozen over fsdp, what is trained over all devices."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**14)
    mesh = sharding.make_mesh(8, fsdp=4)

    class Layers(eqx.Module):
        wide: jax.ShapeDtypeStruct
        odd: jax.ShapeDtypeStruct
        norm: jax.ShapeDtypeStruct

    class Model(eqx.Module):
        layers: Layers
        table: jax.ShapeDtypeStruct
        scale: jax.ShapeDtypeStruct

    def shape(*s):
        return jax.ShapeDtypeStruct(s, jnp.float32)

    layers = Layers(shape(1024, 64, 512), shape(32, 513, 128), shape(4096, 128))
    for over in (sharding.FROZEN, sharding.TRAINED):
        where = sharding.param_shardings(Model(layers, shape(1001, 400), shape()), mesh, over)
        specs = jax.tree.map(lambda s: s.spec, where)
        assert specs.layers.wide == P(None, None, over)
        assert specs.layers.odd == P(None, None, over)
        assert specs.layers.norm == specs.scale == P()
        assert specs.table == P(None, over)


def test_grids_go_from_whole_to_split_over_all(monkeypatch):
    """Every divisor, unless one is asked for. Many devices are replicas of what is trained."""
    found = [grid.devices.shape for grid in sharding.candidate_meshes(16)]
    assert found == [(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)]
    assert [grid.devices.shape for grid in sharding.candidate_meshes(16, 4)] == [(1, 2, 4)]
    monkeypatch.setattr(sharding, "MAX_FSDP_DEVICES", 3)
    found = [grid.devices.shape for grid in sharding.candidate_meshes(16)]
    assert found == [(4, 2, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8)]
    with pytest.raises(ValueError, match="--batch-size 12"):
        sharding.candidate_meshes(12)


def test_an_array_is_split_along_its_largest_dividing_axis_or_not_at_all():
    assert sharding.MIN_SHARDED_SIZE == 2048
    assert sharding.partition_spec((64, 256), 8) == P(None, "fsdp")
    assert sharding.partition_spec((256, 64), 8) == P("fsdp")
    assert sharding.partition_spec((257, 64), 8) == P(None, "fsdp"), "257 does not divide"
    assert sharding.partition_spec((256, 64), 8, first=1) == P(None, "fsdp")
    assert (
        sharding.partition_spec((257, 63), 8)
        == sharding.partition_spec((256, 63), 8, first=1)
        == P()
    )
    assert (
        sharding.partition_spec((2048,), 8) == P("fsdp")
        and sharding.partition_spec((2047,), 1) == P()
    )
    assert sharding.partition_spec((), 1) == P()


def test_lookup_tables_are_split_by_columns():
    """In both models, whichever axis is larger: rows stay whole; the other arrays go by size."""
    sizes = whisper.WhisperConfig(
        d_model=64,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
        num_mel_bins=8,
        max_source_positions=1504,
        max_target_positions=448,
        vocab_size=4096,
        decoder_start_token_id=1,
        eos_token_id=2,
    )
    mesh = sharding.make_mesh(8)
    model = weights.abstract(whisper.Whisper.init, sizes, jax.random.key(0))
    where = sharding.param_shardings(model, mesh)
    for table in (
        where.encoder.embed_positions.weight,
        where.decoder.embed_positions.weight,
        where.decoder.embed_tokens.weight,
    ):
        assert table.spec == P(None, "fsdp")
    for stack in (where.encoder.layers, where.decoder.layers):
        assert stack.fc1.weight.spec == P(None, "fsdp") and stack.fc1.bias.spec == P()
        assert stack.fc2.weight.spec == P(None, None, "fsdp")
    assert where.encoder.layer_norm.weight.spec == where.encoder.conv1.weight.spec == P()
    assert where.encoder.conv2.weight.spec == P("fsdp")
    placed = sharding.shard_params(model, mesh)
    assert placed.decoder.embed_tokens.weight.sharding == where.decoder.embed_tokens.weight
    assert placed.decoder.embed_tokens.weight.sharding.shard_shape((4096, 64)) == (4096, 8)


def test_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"--batch-size 12.*8 devices.*multiple of 8, such as 16"):
        sharding.make_mesh(12)
    for fsdp in (3, 16, 0, -8):
        with pytest.raises(ValueError, match=rf"--fsdp {fsdp}.*divisor of the 8 devices"):
            sharding.make_mesh(8, fsdp=fsdp)


# ---------------------------------------------------------------------------------- one array split


@pytest.mark.parametrize(("fsdp", "near"), [(8, 16), (4, 16), (1, 4)])
def test_gathered_is_whole_and_its_gradient_split(monkeypatch, fsdp, near):
    """The value is the array itself, on every device; the gradient lies where the array does."""
    monkeypatch.setattr(sharding, "MAX_FSDP_DEVICES", near)
    mesh = sharding.make_mesh(B, fsdp)
    x, weight = random(B, D), random(D, WIDE, seed=1)
    spec = sharding.partition_spec(weight.shape, min(8, near), over=sharding.TRAINED)
    piece = jax.device_put(weight, NamedSharding(mesh, spec))
    clips = jax.device_put(x, NamedSharding(mesh, BY_CLIP))
    whole = inside(mesh, sharding.all_gather)(piece)
    assert whole.sharding.is_fully_replicated and not piece.sharding.is_fully_replicated
    np.testing.assert_array_equal(whole, weight)

    def loss(weight, x, whole):
        return jnp.square(jnp.tanh(x @ whole(weight))).sum()

    expected = jax.grad(loss)(weight, x, lambda weight: weight)
    split_loss = functools.partial(loss, whole=sharding.all_gather)
    gradient = inside(mesh, jax.grad(split_loss))(piece, clips)
    assert laid_out(gradient, mesh, spec)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)  # sums of 16 in f32


@pytest.mark.parametrize("fsdp", [8, 4])
def test_lookup_finds_the_rows_and_only_they_travel(fsdp):
    """`table[ids]`, bit for bit, each clip's rows on its device; the table stays where it is."""
    mesh = sharding.make_mesh(8, fsdp)
    table, ids = random(4096, 16), np.random.default_rng(1).integers(0, 4096, (8, 5))
    piece = jax.device_put(table, NamedSharding(mesh, P(None, "fsdp")))
    clips = jax.device_put(jnp.asarray(ids), NamedSharding(mesh, BY_CLIP))
    look_up = inside(mesh, sharding.lookup)
    found = look_up(piece, clips)
    assert laid_out(found, mesh, BY_CLIP)
    np.testing.assert_array_equal(found, table[ids])
    np.testing.assert_array_equal(jax.jit(sharding.lookup)(table, ids), table[ids])
    travelled = hlo.Program(look_up.lower(piece, clips).compile(), 8).collectives.values()
    rows = found.nbytes + ids.nbytes
    assert 0 < sum(c.bytes for c in travelled) <= rows < table.nbytes / 50


# --------------------------------------------------------------------------------- stacks of layers


def clips(lengths: tuple[int, ...]) -> tuple:
    """What goes through the layers (one array, or several side by side), and the body for it."""
    xs = tuple(random(B, n, D, seed=n) for n in lengths)
    return (xs, call_all) if len(xs) > 1 else (xs[0], Layer.__call__)


def with_gradient(run):
    """(outcome, gradient for weights and clips) of `run`, by a loss that looks at every number."""

    def loss(model, xs):
        out = run(model, xs)
        return sum((x * random(*x.shape, seed=7)).sum() for x in jax.tree.leaves(out)), out

    def both(model, xs):
        (_, out), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, xs)
        return out, gradient

    return both


@functools.cache
def plain_loop(lengths: tuple[int, ...]):
    xs, body = clips(lengths)

    def loop(model, xs):
        for n in range(N):
            xs = body(jax.tree.map(lambda leaf, n=n: leaf[n], model.layers), xs)
        return xs

    return jax.jit(with_gradient(loop))(random_model(), xs)


@pytest.mark.parametrize("remat", ["attention", "layers"])
@pytest.mark.parametrize(
    ("fsdp", "lengths", "near"),
    [
        *((None, lengths, 16) for lengths in ((11,), (11, 5))),
        *((1, (11,), near) for near in (16, 4)),
        *((fsdp, (11, 5), 16) for fsdp in (8, 4)),
        (2, (11, 5), 4),
    ],
)
def test_run_layers_is_a_loop_over_layers(monkeypatch, fsdp, remat, lengths, near):
    """Values and gradients are those of a plain Python loop, for one array and for two side by
    side; clips stay where they are, and gradients lie where the weights do."""
    monkeypatch.setattr(sharding, "MAX_FSDP_DEVICES", near)
    (xs, body), model = clips(lengths), random_model()
    mesh = fsdp and sharding.make_mesh(B, fsdp)
    if mesh:
        model = sharding.shard_params(model, mesh, sharding.TRAINED)
        xs = jax.device_put(xs, NamedSharding(mesh, BY_CLIP))

    def stack(model, xs):
        return sharding.run_layers(model.layers, xs, body, remat)

    out, gradient = inside(mesh, with_gradient(stack))(model, xs)
    if mesh:
        assert all(laid_out(x, mesh, BY_CLIP) for x in jax.tree.leaves((out, gradient[1])))
        assert laid_out(gradient[0].layers.up, mesh, P(None, sharding.TRAINED))
        assert laid_out(gradient[0].layers.down, mesh, P(None, None, sharding.TRAINED))
    got = jax.tree_util.tree_leaves_with_path((out, gradient))
    for (path, a), b in zip(got, jax.tree.leaves(plain_loop(lengths)), strict=True):
        error, name = np.abs(a - b).max(), jax.tree_util.keystr(path)
        assert error <= 1e-5 * np.abs(b).max(), f"{name}: {error}"  # f32, sums of 16 x 11


def test_clips_are_shared_out_where_they_come_in_one_piece():
    """Copied to all devices before the layers, on one of them each from there on."""
    mesh, model, x = sharding.make_mesh(B), random_model(), random(B, 11, D)

    def stack(model, x):
        return sharding.run_layers(model.layers, x, lambda layer, x: x * layer.scale)

    out = inside(mesh, stack)(model, jax.device_put(x, NamedSharding(mesh, P())))
    assert laid_out(out, mesh, BY_CLIP)
    np.testing.assert_allclose(out, x * model.layers.scale.prod(0), rtol=1e-5)


def gradient_jaxpr(remat: str, dtype=jnp.float32):
    def loss(model, x):
        return sharding.run_layers(model.layers, x, Layer.__call__, remat).sum()

    model, x = random_model(), random(B, 11, D).astype(dtype)
    return jax.make_jaxpr(jax.grad(loss))(model, x).jaxpr


def products(jaxpr) -> Counter:
    """Products of one layer by whether they have batch axes (attention) or not (weights)."""
    dots = (e for e in equations(jaxpr) if e.primitive.name == "dot_general")
    return Counter("attention" if e.params["dimension_numbers"][1][0] else "weights" for e in dots)


@pytest.mark.parametrize(
    ("remat", "again"),
    [
        ("attention", {"attention": 2}),  # the outcomes of products with weights are kept
        ("layers", {"attention": 2, "weights": 1}),  # no gradient asks for the last outcome
    ],
)
def test_the_backward_pass_computes_again_what_it_is_asked_to(remat, again):
    """Forward two products of each kind, backward two for each of them, and those done again."""
    assert products(gradient_jaxpr(remat)) == Counter(attention=6, weights=6) + Counter(again)


@pytest.mark.parametrize("remat", ["attention", "layers"])
def test_nothing_gathered_is_kept_for_the_backward_pass(remat):
    """What the loops write for each layer: inputs and, if asked, products; never a weight."""
    loops = [
        e for e in equations(gradient_jaxpr(remat, jnp.bfloat16)) if "scan" in str(e.primitive)
    ]
    forward, backward = (  # what a loop writes for each layer has an axis more than in its body
        [
            outside.aval
            for outside, inside in zip(loop.outvars, loop.params["jaxpr"].out_avals, strict=True)
            if outside.aval.shape != inside.shape
        ]
        for loop in loops
    )
    kept = {"inputs": (N, B, 11, D)} | ({"up": (N, B, 11, WIDE)} if remat == "attention" else {})
    assert Counter(kept.values()) == Counter(x.shape for x in forward)
    assert {x.dtype for x in forward} == {jnp.bfloat16.dtype}
    assert Counter(x.shape for x in backward) == Counter([(N, WIDE, D), (N, D, WIDE), (N, D)])


@pytest.mark.parametrize(("fsdp", "near"), [(8, 16), (4, 16), (1, 16), (1, 4), (2, 4)])
@pytest.mark.parametrize("remat", ["attention", "layers"])
def test_only_weights_travel_and_twice(monkeypatch, fsdp, near, remat):
    """In the compiled gradient: each trained layer's large arrays are gathered once forward, once
    backward, and so are a frozen one's, unless they are whole; no array of the size of anything
    computed from clips takes part in any collective, though all of those are smaller than the
    weights, and XLA left to itself would send them."""
    monkeypatch.setattr(sharding, "MAX_FSDP_DEVICES", near)
    mesh = sharding.make_mesh(B, fsdp)

    def loss(trained, frozen, x):
        x = sharding.run_layers(trained.layers, x, Layer.__call__, remat)
        return sharding.run_layers(frozen.layers, x, Layer.__call__, remat).sum()

    trained = sharding.shard_params(random_model(), mesh, sharding.TRAINED)
    frozen = sharding.shard_params(random_model(), mesh)
    x = jax.device_put(random(B, 3, D), NamedSharding(mesh, BY_CLIP))
    compiled = inside(mesh, jax.grad(loss)).lower(trained, frozen, x).compile()
    ops = re.findall(
        r"= (\S+|\([^=]*?\)) (all-[\w-]+|reduce-scatter|collective-[\w-]+)\(", compiled.as_text()
    )
    sizes = Counter(
        (kind, int(np.prod([int(n) for n in dims.split(",") if n])))
        for shape, kind in ops
        for dims in re.findall(r"f32\[([\d,]*)\]", shape)
    )
    parts = min(8, near)  # of what is trained
    assert {size for _, size in sizes} <= {D * WIDE, D * WIDE // parts, D}, sizes
    gathers = hlo.Program(compiled, 8).collectives["all-gather"]
    stacks, kinds = trained.layers.up.nbytes + trained.layers.down.nbytes, 1 + (fsdp > 1)
    assert (gathers.count, gathers.bytes) == (kinds * 2 * 2 * N, kinds * 2 * stacks)
    assert gathers.travel == 2 * stacks * ((parts - 1) / parts + (fsdp - 1) / fsdp)


def test_large_arrays_travel_in_the_dtype_of_the_clips():
    """Half as many bytes in bfloat16; the small ones keep their own dtype."""
    layer = jax.tree.map(lambda x: x[0], random_model().layers)
    gathered = sharding.all_gather_params(layer, jnp.bfloat16)
    assert (gathered.up.dtype, gathered.scale.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(gathered.up, layer.up.astype(jnp.bfloat16))


# -------------------------------------------------------------------------------- several processes


def test_one_process_makes_what_it_is_asked_and_its_exceptions_pass():
    value, error = {"any": object()}, KeyError("as it is")
    assert sharding.from_process_0(lambda: value) is value

    def fail():
        raise error

    with pytest.raises(KeyError) as caught:
        sharding.from_process_0(fail)
    assert caught.value is error


def test_one_process_stays_alone(monkeypatch):
    """JAX_NUM_PROCESSES=1 alone, whatever cluster there is: JAX is not even asked."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    sharding.join_cluster()


def test_joining_a_cluster_by_hand(monkeypatch):
    """The numbers of the environment reach JAX; a process alone may be told so by address too."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.append(given))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for count, index in (("4", "3"), ("1", "0")):
        monkeypatch.setenv("JAX_NUM_PROCESSES", count)
        monkeypatch.setenv("JAX_PROCESS_ID", index)
        sharding.join_cluster()
    wait = {"heartbeat_timeout_seconds": sharding.HEARTBEAT}
    assert asked == [
        {"num_processes": 4, "process_id": 3} | wait,
        {"num_processes": 1, "process_id": 0} | wait,
    ]


def test_a_cluster_half_described_is_a_message():
    """JAX itself is asked, in a process of its own: alone where nothing is said; else ValueError
    with what is missing, and what to do. Nothing is connected to."""
    code = (
        "import os\nfrom runtime import sharding\n"
        "for given in ({}, {'NUM_PROCESSES': '2'}, {'COORDINATOR_ADDRESS': '127.0.0.1:1'},\n"
        "              {'COORDINATOR_ADDRESS': '127.0.0.1:1', 'NUM_PROCESSES': '2'}):\n"
        "    os.environ.update({'JAX_' + name: value for name, value in given.items()})\n"
        "    try:\n"
        "        print(sharding.join_cluster())\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "    for name in given:\n"
        "        del os.environ['JAX_' + name]\n"
    )
    root = Path(sharding.__file__).parents[1]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    alone = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}  # on a TPU's host as well
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=kept | alone, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    nothing, *rest = done.stdout.splitlines()
    assert nothing == "None"
    reasons = ("coordinator_address should", "Number of processes must", "The process id of the")
    for line, reason in zip(rest, reasons, strict=True):
        assert line.startswith(f"could not join the other processes ({reason}"), line
        assert "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in line
        assert line.endswith("Set JAX_NUM_PROCESSES=1 to run alone.")
