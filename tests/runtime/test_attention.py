"""attention.py: outputs, gradients and cost of both implementations.

The oracle is attention in float64 numpy, its gradients by central differences.
Axes: B batch, T and S positions, H query heads, G key/value heads, K head width, D = H K.
"""

import functools
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from test_sharding import equations, inside, laid_out

from runtime import attention, sharding
from training import hlo

ROUNDING = 16 * 2.0**-23  # f32: a chain of short sums, exp of scores of about 1
BY_CLIP = P(sharding.AXES)

CASES = {  # B, T, S, H, G, K, causal
    "a head each": (3, 5, 7, 2, 2, 4, False),
    "two queries share a head": (1, 7, 5, 4, 2, 3, False),
    "four share a head": (3, 3, 6, 4, 1, 2, False),
    "causal": (3, 6, 6, 2, 2, 4, True),
    "causal, two share": (1, 6, 6, 4, 2, 3, True),
    "causal, four share": (3, 4, 4, 8, 2, 2, True),
    "causal, fewer keys": (1, 6, 4, 4, 2, 3, True),
    "causal, more keys": (1, 4, 6, 4, 2, 3, True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def instance(case, dtype=jnp.float32, scale=1.0):
    """(queries * scale, keys, values, upstream gradient, causal)."""
    b, t, s, h, g, k, causal = case
    rng = np.random.default_rng(0)
    shapes = (b, t, h, k), (b, s, g, k), (b, s, g, k), (b, t, h, k)
    queries, *others = (rng.normal(size=shape) for shape in shapes)
    return *(jnp.asarray(x, dtype) for x in (queries * scale, *others)), causal


def numpy_attention(queries, keys, values, causal):
    shared = queries.shape[2] // keys.shape[2]
    keys, values = (np.repeat(x, shared, axis=2) for x in (keys, values))
    scores = np.einsum("bthk,bshk->bhts", queries, keys) / np.sqrt(queries.shape[3])
    if causal:
        scores[:, :, np.triu(np.ones(scores.shape[2:], bool), 1)] = -np.inf
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", probs, values)


def numpy_outcome(queries, keys, values, upstream, causal, step=1e-5):
    """(output, gradients for queries, keys and values); gradients element by element."""
    *arrays, upstream = (np.array(x, np.float64) for x in (queries, keys, values, upstream))
    output = numpy_attention(*arrays, causal)
    gradients = [np.empty_like(x) for x in arrays]
    for array, gradient in zip(arrays, gradients, strict=True):
        for at in np.ndindex(array.shape):
            middle, ends = array[at], []
            for array[at] in (middle + step, middle - step):
                ends.append((numpy_attention(*arrays, causal) * upstream).sum())
            array[at] = middle
            gradient[at] = (ends[0] - ends[1]) / (2 * step)
    return output, *gradients


def with_gradients(function):
    """(queries, keys, values, upstream) -> (output, gradients for the first three)."""

    def outcome(*arrays):
        output, pull = jax.vjp(function, *arrays[:3])
        return output, *pull(arrays[3])

    return outcome


@functools.partial(jax.jit, static_argnames="causal")
def by_head_outcome(*arrays, causal):
    return with_gradients(functools.partial(attention.by_head, causal))(*arrays)


def assert_close(got, expected, rounding=ROUNDING, rtol=0.0):
    """Within `rounding` of an array's largest number plus `rtol` of each number."""
    names = ("output", "for queries", "for keys", "for values")[: len(expected)]
    for name, *pair in zip(names, got, expected, strict=True):
        a, b = (np.asarray(x, np.float64) for x in pair)
        atol = rounding * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


# ----------------------------------------------------------------------------------- by head, alone


@cases
def test_by_head_matches_the_definition(case):
    """Output and all three gradients, for a random upstream gradient, match numpy in f64."""
    *arrays, causal = instance(case)
    assert_close(by_head_outcome(*arrays, causal=causal), numpy_outcome(*arrays, causal))


@cases
def test_by_head_matches_jax_attention(case):
    """Same output and gradients: the choice of implementation changes no result."""
    *arrays, causal = instance(case)
    jax_attention = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    expected = jax.jit(with_gradients(jax_attention))(*arrays)
    assert_close(by_head_outcome(*arrays, causal=causal), expected)


@pytest.mark.parametrize("case", [CASES["a head each"], CASES["causal, two share"]])
def test_scores_too_large_for_exp_stay_finite(case):
    """Scores in the hundreds: in f32, exp overflows above 88."""
    *arrays, causal = instance(case, scale=200)
    got = by_head_outcome(*arrays, causal=causal)
    assert all(np.isfinite(x).all() for x in got)
    # Scores up to 1000 are rounded to 2^-15, and the probabilities depend on their differences.
    assert_close(got, numpy_outcome(*arrays, causal), rounding=4 * 2.0**-15)


@cases
def test_bfloat16_is_rounded_once_at_the_end(case):
    """Output and gradients have the dtype of the inputs, and only its rounding error."""
    *arrays, causal = instance(case, jnp.bfloat16)
    got = by_head_outcome(*arrays, causal=causal)
    assert {x.dtype for x in got} == {jnp.bfloat16.dtype}
    assert_close(got, numpy_outcome(*arrays, causal), rtol=2.0**-8)


def test_each_gradient_has_the_dtype_of_its_input():
    """Also if the dtypes differ; the output has that of the queries."""
    *arrays, causal = instance(CASES["a head each"])
    kinds = (jnp.bfloat16, jnp.float32, jnp.float16, jnp.bfloat16)
    mixed = [x.astype(kind) for x, kind in zip(arrays, kinds, strict=True)]
    got = by_head_outcome(*mixed, causal=causal)
    assert [x.dtype for x in got] == [jnp.bfloat16, *kinds[:3]]


# ------------------------------------------------------------------------ choice of implementation


@pytest.fixture
def calls(monkeypatch) -> list:
    """The implementations that `attend` has called, with their options."""
    calls = []
    by_head = attention.by_head
    jax_attention = jax.nn.dot_product_attention

    def record_by_head(causal, *arrays):
        calls.append(("by head", causal))
        return by_head(causal, *arrays)

    def record_jax_attention(*arrays, is_causal, implementation):
        calls.append(("JAX", is_causal, implementation))
        return jax_attention(*arrays, is_causal=is_causal)

    monkeypatch.setattr(attention, "by_head", record_by_head)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record_jax_attention)
    return calls


@pytest.mark.parametrize("case", [CASES["two queries share a head"], CASES["causal"]])
def test_a_cpu_computes_head_by_head_above_the_limit(case, monkeypatch, calls):
    """The scores of all clips and heads count; up to MAX_CPU_SCORES, JAX's attention is used."""
    *arrays, _, causal = instance(case)
    b, t, s, h, *_ = case
    expected = numpy_attention(*(np.asarray(x, np.float64) for x in arrays), causal)
    for limit in (b * h * t * s, b * h * t * s - 1):
        monkeypatch.setattr(attention, "MAX_CPU_SCORES", limit)
        assert_close([attention.attend(*arrays, causal)], [expected])
    assert calls == [("JAX", causal, "xla"), ("by head", causal)]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_an_accelerator_always_uses_jax_attention(platform, monkeypatch, calls):
    """Whatever the number of scores, and with the implementation that is set."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(attention, "MAX_CPU_SCORES", 0)
    queries, keys, values, *_ = instance(CASES["causal"])
    for implementation in ("xla", "cudnn"):
        monkeypatch.setattr(attention, "IMPLEMENTATION", implementation)
        attention.attend(queries, keys, values, causal=True)
    assert calls == [("JAX", True, "xla"), ("JAX", True, "cudnn")]


@pytest.mark.parametrize(
    "platform, capability, dtype, width, expected",
    [
        ("gpu", "9.0", jnp.bfloat16, 64, "cudnn"),
        ("gpu", "8.0", jnp.bfloat16, 128, "cudnn"),
        ("gpu", "12.0", jnp.bfloat16, 128, "cudnn"),
        ("gpu", "7.5", jnp.bfloat16, 64, "xla"),  # too old
        ("gpu", "9.0", jnp.float32, 64, "xla"),
        ("gpu", "9.0", jnp.bfloat16, 256, "xla"),
        ("gpu", "9.0", jnp.bfloat16, 36, "xla"),
        ("gpu", "gfx942", jnp.bfloat16, 64, "xla"),
        ("tpu", None, jnp.bfloat16, 64, "xla"),
    ],
)
def test_cudnn_is_used_where_it_is_supported(
    platform, capability, dtype, width, expected, monkeypatch
):
    """Half precision on NVIDIA GPUs from Ampere on, and supported head widths."""
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    queries = jnp.zeros((1, 4, 2, width), dtype)
    assert attention.implementation(queries) == expected


def abstract_mesh(platform: str | None):
    device = platform and AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    return AbstractMesh((1, 2, 4), sharding.AXES, abstract_device=device)


def test_the_platform_is_that_of_the_named_mesh_or_of_this_process(monkeypatch):
    """The devices of a mesh may be absent; a mesh without devices determines no platform."""
    assert sharding.platform() == "cpu"
    for platform in ("tpu", "gpu"):
        with jax.sharding.use_abstract_mesh(abstract_mesh(platform)):
            assert sharding.platform() == platform
    real = sharding.make_mesh(8)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert sharding.platform() == "tpu"
    with jax.sharding.use_abstract_mesh(abstract_mesh(None)):
        assert sharding.platform() == "tpu"
    with jax.sharding.use_abstract_mesh(real.abstract_mesh):
        assert sharding.platform() == "cpu"


# ----------------------------------------------------------------------------- over several devices


def shard_clips(mesh, arrays):
    """Shard the clips over the devices."""
    return arrays if mesh is None else jax.device_put(arrays, NamedSharding(mesh, BY_CLIP))


@pytest.mark.parametrize(("fsdp", "causal"), [(8, False), (4, True)])
def test_sharded_clips_need_no_communication(fsdp, causal, monkeypatch):
    """Same numbers as on one device, forward and backward, sharded by clip, no collectives."""
    monkeypatch.setattr(attention, "MAX_CPU_SCORES", 0)
    mesh = sharding.make_mesh(8, fsdp)
    *arrays, _ = instance((16, 6, 6, 4, 2, 4, causal))
    split = shard_clips(mesh, arrays)
    function = with_gradients(functools.partial(attention.attend, causal=causal))
    compiled = inside(mesh, function).lower(*split).compile()
    program = hlo.Program(compiled, 8)
    assert not program.collectives and "all-" not in compiled.as_text()
    assert program.flops == 7 * matmul_flops(16, 4, 6, 4) / 8
    got = compiled(*split)
    assert all(laid_out(x, mesh, BY_CLIP) for x in got)
    assert_close(got, by_head_outcome(*arrays, causal=causal))


# -------------------------------------------------------------------------------- within the layers

N, B, T, H, G, K = 2, 8, 128, 4, 2, 2  # long sequences: the scores are the largest array
D = H * K


def matmul_flops(b: int, h: int, t: int, k: int) -> int:
    """FLOPs of one matmul of [t, k] and [k, t] for each head of each clip."""
    return 2 * b * h * t * t * k


class Layer(eqx.Module):
    query: Array  # [N, D, D]
    key: Array  # [N, G K, D]
    value: Array  # [N, G K, D]
    out: Array  # [N, D, D]

    def __call__(self, x):
        queries, keys, values = (
            (x @ w.T).reshape(*x.shape[:2], -1, K) for w in (self.query, self.key, self.value)
        )
        output = attention.attend(queries, keys, values, causal=True)
        return x + output.reshape(x.shape) @ self.out.T


def stack_gradient(remat):
    """(function, arguments): the gradient of a stack of layers for its weights and inputs."""
    rng = np.random.default_rng(0)
    shapes = [(N, rows, D) for rows in (D, G * K, G * K, D)] + [(B, T, D)]
    *matrices, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def loss(layers, x):
        return jnp.square(sharding.run_layers(layers, x, Layer.__call__, remat)).sum()

    return jax.grad(loss, argnums=(0, 1)), (Layer(*matrices), x)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("remat", ["attention", "layers"])
def test_attention_takes_two_matmuls_forward_and_five_backward(remat, split, monkeypatch):
    """The policy "attention" runs the forward pass once. "layers" recomputes both matmuls and the
    three projections before them."""
    monkeypatch.setattr(attention, "MAX_CPU_SCORES", 0)
    mesh = sharding.make_mesh(B) if split else None
    function, (layers, x) = stack_gradient(remat)
    compiled = inside(mesh, function).lower(layers, shard_clips(mesh, x)).compile()
    query_flops, key_flops = (2 * B * T * D * width for width in (D, G * K))
    expected = 7 * matmul_flops(B, H, T, K) + 3 * (2 * query_flops + 2 * key_flops)
    if remat == "layers":
        expected += 2 * matmul_flops(B, H, T, K) + query_flops + 2 * key_flops
    devices = 8 if split else 1
    assert hlo.Program(compiled, devices).flops == N * expected / devices


@pytest.mark.parametrize("remat", ["attention", "layers"])
def test_no_scores_are_saved_for_the_backward_pass(remat, monkeypatch):
    """Forward and backward, no array is larger than the scores of one key/value head of one clip,
    and the compiled program uses less memory than the scores of all heads."""
    one_head = (H // G) * T * T
    all_heads = B * H * T * T

    def measure():
        function, arguments = stack_gradient(remat)
        compiled = jax.jit(function).lower(*arguments).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        equation_list = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        return max(v.aval.size for e in equation_list for v in e.outvars), memory

    elements, memory = measure()
    assert elements >= all_heads and memory >= 4 * all_heads, "JAX's attention makes no scores"
    monkeypatch.setattr(attention, "MAX_CPU_SCORES", 0)
    elements, memory = measure()
    assert elements == one_head and memory < 4 * all_heads
