"""Train: distil the text LLM into the connector, from (audio, transcript) pairs alone.

    audio -> log-mel -> encoder -> CONNECTOR -> virtual tokens -> [prefix; virtual; suffix] -> LLM
                        frozen     trained            :                                         :
                                               token alignment              response distillation
                                                      :                                         :
    transcript --------------------------> token embeddings --> [prefix; text; suffix] ------> LLM

One chapter, read from the top: what a run is made of (Recipe, Config, presets), the loss and the
step, how it is compiled, the loop. Where arrays live on many devices is told in sharding.py, what a
run leaves behind in record.py. The same command on every host of a cluster is one run.

    python train.py                                  # the toy universe, minutes on a laptop
    python train.py --preset diva-8b --data cv/en    # the published run
    python train.py --preset diva-8b --compile-only v4:4x4x8    # what it would take, without a TPU
    python train.py --help                           # every field of Config is a flag

A run that was interrupted (Ctrl-C, SIGTERM, power cut) goes on when the same command is started
again, and ends with the same weights, bit for bit, as if nothing had happened.

Axes: B batch, S audio samples (16 kHz), L text tokens, P prefix, R suffix, Q queries, E LLM width.
Reads: connector.py, distill_loss.py, data.py, sharding.py, cost.py, record.py.
Read next: suites.py.
"""

import argparse
import dataclasses
import functools
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import time
import zlib
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

import connector
import cost
import data
import distill_loss
import eval as evaluation
import llama
import record
import report
import sharding
import weights
import whisper

# ---------------------------------------------------------------------------- what a run is made of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides the weights that come out: two runs with equal recipes end bit-identical."""

    whisper: str = "toy/whisper"
    """Speech model: a folder or a Hugging Face repo id."""
    llm: str = "toy/llama"
    """Text model, teacher and student alike: a folder or a Hugging Face repo id."""
    data: str = "toy/common_voice/en"
    """Clips: a Common Voice folder, a LibriSpeech folder or a JSONL manifest."""
    split: str = "train"
    """Which split of it to train on."""
    queries: int | None = None
    """Virtual tokens per clip; None: as many as the Whisper decoder has positions."""
    steps: int = 4300
    """Optimizer steps of the whole run; warm-up and cosine span them."""
    batch_size: int = 512
    """Clips per step, over all devices."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    warmup: float = 0.01
    """Share of the steps in which the learning rate rises linearly."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on every trained array."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    align_weight: float = 1.0
    """Weight of the token alignment loss."""
    response_weight: float = 1.0
    """Weight of the response distillation loss."""
    response_loss: Literal["l2", "gram", "kl"] = "l2"
    """Distance of the response states: l2 (the paper), gram (a tighter bound of KL), kl (exact)."""
    seed: int = 0
    """Decides the initial queries and the order of the clips."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Frozen weights and compute; auto: bfloat16 on accelerators, float32 on CPU. Trained weights
    and optimizer are float32 always."""


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """A run: its recipe, and what may differ when it is resumed."""

    preset: Literal["toy", "diva-1b", "diva-3b", "diva-8b"] = "toy"
    """Where the defaults of all other flags come from."""
    out: str | None = None
    """Folder of the run; None: runs/PRESET."""
    tasks: str | None = None
    """Folder of the tasks that the finished student is evaluated on; None: no evaluation."""
    until: int | None = None
    """Save and stop after this step; the same command without it goes on."""
    fsdp: int | None = None
    """Devices over which one copy of each large array is split; None: all."""
    recompute: Literal["auto", "attention", "layers"] = "auto"
    """What the backward pass computes again to save memory: attention (about 1 % of the work) or
    whole layers (about a third more); auto: attention if that fits."""
    compile_only: str | None = None
    """Compile the step for a slice of TPUs, such as v4:4x4x8 or v5e:8x8, without one; then report
    memory, FLOPs, collectives and time, and end. Needs the `tpu` extra, no weights and no data."""
    profile: bool = False
    """Write a jax.profiler trace of three steps behind the tenth to OUT/profile."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """How many checkpoints to keep."""
    log_every: int = 20
    """Steps between lines on the console; metrics.jsonl holds every step."""
    max_undecodable: float = 0.01
    """Stop when a larger share of the clips cannot be decoded (of 1,000 at least)."""

    def __post_init__(self):
        least = {"steps": 1, "batch_size": 1, "save_every": 1, "keep": 1, "log_every": 1, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: expected at least {smallest}.")
        if self.tasks and self.out and "://" in self.out:
            raise ValueError(
                f"--tasks {self.tasks}: a student in a bucket is not evaluated. Expected --tasks "
                "None; then copy the run's folder and give it to eval.py."
            )


# The paper's recipe: Common Voice 17 English, 4,300 steps of 512 clips = two epochs.
_PUBLISHED = Config(
    whisper="openai/whisper-large-v3",
    data="cv-corpus-17.0-2024-03-15/en",
    save_every=100,
    log_every=10,
)


def _published(preset: str, llm: str, learning_rate: float) -> Config:
    return dataclasses.replace(_PUBLISHED, preset=preset, llm=llm, learning_rate=learning_rate)


PRESETS: dict[str, Config] = {
    # The tiny LLM's states answer far more steeply to its embeddings than a real one's: at equal
    # weights the gradient of the response would drown that of the words.
    "toy": Config(
        preset="toy",
        tasks="toy/tasks",
        queries=8,
        steps=6000,
        batch_size=16,
        learning_rate=2e-3,
        align_weight=100.0,
        save_every=1000,
        log_every=100,
    ),
    "diva-1b": _published("diva-1b", "meta-llama/Llama-3.2-1B-Instruct", 5e-4),
    "diva-3b": _published("diva-3b", "meta-llama/Llama-3.2-3B-Instruct", 5e-4),
    "diva-8b": _published("diva-8b", "meta-llama/Llama-3.1-8B-Instruct", 5e-5),
}


def parse(args: list[str]) -> Config:
    """The configuration of a command line: a preset, and flags that override its fields."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="toy")
    name = first.parse_known_args(args)[0].preset
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: no such preset; expected one of {', '.join(PRESETS)}.")
    config = tyro.cli(Config, default=PRESETS[name], args=args, prog="train.py")
    return dataclasses.replace(config, out=config.out or f"runs/{name}")


def command(config: Config) -> str:
    """The command line that goes on with this run."""
    default = PRESETS[config.preset]
    flags = ["--preset", config.preset]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("preset", "until", "profile") or value == getattr(default, field.name):
            continue
        flags += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join(["python", "train.py", *flags])


def with_dtype(config: Config, platform: str) -> Config:
    """`config` with --dtype auto decided for the platform (cpu, gpu, tpu) that it runs on."""
    if config.dtype != "auto":
        return config
    dtype = connector.compute_dtype(platform)
    return dataclasses.replace(config, dtype=dtype)


def recipe_of(config: Config) -> Recipe:
    """The part of `config` that decides the weights."""
    return Recipe(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Recipe)})


# ---------------------------------------------------------------------------- the loss and the step


class Frozen(NamedTuple):
    """What the step reads and never changes."""

    diva: connector.DiVA  # encoder and LLM; None where the trained arrays belong
    prefix: Int[Array, "P"]  # the chat template before the user's words, BOS included
    suffix: Int[Array, "R"]  # the template behind them, up to where the response begins
    gram: Float[Array, "E E"] | None  # for --response-loss gram


# In the order of the computation, so the first that is not finite is where the trouble began.
PARTS = (
    "audio",
    "encoder states",
    "virtual tokens",
    "teacher's response state",
    "student's response state",
    "alignment loss",
    "response loss",
    "gradient",
)


def text_turn(
    ids: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    prefix: Int[Array, "P"],
    suffix: Int[Array, "R"],
) -> tuple[Int[Array, "B positions"], Int[Array, "B"]]:
    """The transcript as the user's turn, for the teacher; and where its response begins.

    Each row is [prefix; transcript; suffix; padding]; the state that predicts the response stands
    at the end of the suffix, and the causal mask keeps the padding behind it out of sight.
    """
    before, after = prefix.shape[0], suffix.shape[0]
    position = jnp.arange(before + ids.shape[1] + after)
    start = before + lengths[:, None]  # [B, 1] where the suffix begins
    text = ids[:, jnp.clip(position - before, 0, ids.shape[1] - 1)]
    tail = suffix[jnp.clip(position - start, 0, after - 1)]
    head = prefix[jnp.clip(position, 0, before - 1)]
    row = jnp.where(position < before, head, jnp.where(position < start, text, tail))
    return row, lengths + before + after - 1


def response_distance(
    student: Float[Array, "B E"],
    teacher: Float[Array, "B E"],
    weight: Float[Array, "B"],
    frozen: Frozen,
    kind: str,
) -> Float[Array, ""]:
    """How far the two response states are apart, by --response-loss."""
    if kind == "l2":
        return distill_loss.response_l2(student, teacher, weight)
    if kind == "gram":
        return distill_loss.response_gram(student, teacher, frozen.gram, weight)
    return distill_loss.response_kl(student, teacher, frozen.diva.llm.output_matrix, weight)


def loss_fn(
    params: Any,
    frozen: Frozen,
    batch: dict[str, Array],
    recipe: Recipe,
    recompute: sharding.Recompute = "layers",
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Bool[Array, "parts"]]]:
    """The two losses of the paper, weighted; with their parts, and what of PARTS is finite."""
    diva = eqx.combine(params, frozen.diva)
    ids, lengths, weight = batch["ids"], batch["lengths"], batch["weights"]

    states = diva.listen(batch["audio"])
    virtual = diva.connector(states, recompute)
    alignment = distill_loss.token_alignment(virtual, diva.llm.embed(ids), lengths, weight)

    heard = diva.embed_turn(virtual, frozen.prefix, frozen.suffix)
    text, last = text_turn(ids, lengths, frozen.prefix, frozen.suffix)
    # Side by side, so that each layer is gathered once for both.
    student, teacher = diva.llm((heard, diva.llm.embed(text)), recompute)
    student = student[:, -1]
    teacher = jnp.take_along_axis(teacher, last[:, None, None], axis=1)[:, 0]
    teacher = jax.lax.stop_gradient(teacher)
    response = response_distance(student, teacher, weight, frozen, recipe.response_loss)

    loss = recipe.align_weight * alignment + recipe.response_weight * response
    parts = (batch["audio"], states, virtual, teacher, student, alignment, response)
    finite = jnp.stack([jnp.isfinite(part).all() for part in parts])
    return loss, ({"loss": loss, "alignment": alignment, "response": response}, finite)


def learning_rate(recipe: Recipe, step: int | Array) -> Float[Array, ""]:
    """Linear warm-up to the peak, then half a cosine to 0 at the end of the run."""
    rise = max(1, round(recipe.warmup * recipe.steps))
    share = (step - rise) / max(1, recipe.steps - rise)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
    return recipe.learning_rate * jnp.where(step < rise, (step + 1) / rise, cosine)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with the paper's constants, behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(
            functools.partial(learning_rate, recipe),
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=recipe.weight_decay,
        ),
    )


@functools.partial(
    jax.jit,
    static_argnames=("recipe", "mesh", "recompute"),
    donate_argnames=("params", "opt_state"),
)  # frozen is used again in every step: never donated
def train_step(
    params: Any,
    opt_state: Any,
    frozen: Frozen,
    batch: dict[str, Array],
    step: Int[Array, ""],
    *,
    recipe: Recipe,
    mesh: Mesh,
    recompute: sharding.Recompute = "attention",
):
    """One step: losses, gradient, update. Returns (params, opt_state, metrics)."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what sharding.constrain looks up
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, (metrics, finite) = gradient(params, frozen, batch, recipe, recompute)
    grads = jax.lax.with_sharding_constraint(grads, sharding.shardings(grads, mesh))
    updates, opt_state = make_optimizer(recipe).update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    # Outputs live exactly where the inputs did: so the next step needs no second compilation.
    params = jax.lax.with_sharding_constraint(params, sharding.shardings(params, mesh))
    opt_state = jax.lax.with_sharding_constraint(opt_state, sharding.shardings(opt_state, mesh))
    grad_norm = optax.tree.norm(grads)
    metrics |= {
        "grad_norm": grad_norm,
        "lr": learning_rate(recipe, step),
        "undecodable": jnp.sum(batch["weights"] == 0).astype(jnp.float32),
        "finite": jnp.append(finite, jnp.isfinite(grad_norm)),
    }
    return params, opt_state, jax.lax.with_sharding_constraint(metrics, NamedSharding(mesh, P()))


# ---------------------------------------------------------------------------- from files to devices


def load_corpus(config: Config, chat: llama.Chat, window_samples: int, queries: int) -> data.Corpus:
    """The clips to train on, with their tokens. Raises ValueError if there are none."""

    def encode(texts: list[str]) -> list[list[int]]:
        rows = chat.tokenizer.encode_batch(texts, add_special_tokens=False)  # on all cores
        return [row.ids for row in rows]

    clips = data.read_clips(config.data, config.split)
    return data.prepare(clips, encode, window_samples, max_tokens=queries)


def load_model(config: Config, mesh: Mesh) -> connector.DiVA:
    """The untrained student: trained part in float32, frozen part in the compute dtype."""
    dtype = jnp.dtype(config.dtype)
    where = functools.partial(sharding.place, mesh=mesh)
    asr = whisper.Whisper.load(config.whisper, jnp.float32, where)
    encoder = jax.tree.map(lambda x: x.astype(dtype), asr.encoder)
    asr = eqx.tree_at(lambda w: w.encoder, asr, encoder)
    llm = llama.Llama.load(config.llm, dtype, where)
    key = jax.random.key(config.seed)
    return sharding.place(connector.DiVA.create(asr, llm, config.queries, key), mesh)


def start_state(config: Config, mesh: Mesh, turn: dict) -> tuple[Any, Any, Frozen]:
    """Trained arrays, optimizer state and frozen rest of a run at step 0."""
    diva = load_model(config, mesh)
    params, frozen_diva = eqx.partition(diva, connector.trainable(diva))
    optimizer = make_optimizer(recipe_of(config))
    where = sharding.shardings(jax.eval_shape(optimizer.init, params), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=where)(params)
    gram = None
    if config.response_loss == "gram":
        gram = sharding.place(distill_loss.gram_matrix(diva.llm.output_matrix), mesh)
    template = [np.asarray(turn[side], np.int32) for side in ("prefix", "suffix")]
    return params, opt_state, Frozen(frozen_diva, *sharding.place(template, mesh), gram)


def abstract_state(
    config: Config, asr: whisper.WhisperConfig, llm: llama.LlamaConfig, mesh: Mesh
) -> tuple[Any, Any, Frozen]:
    """The shapes and shardings of `start_state`, from the sizes of the models alone."""
    key, dtype, width = jax.random.key(0), jnp.dtype(config.dtype), llm.hidden_size

    def new_connector() -> connector.Connector:
        decoder = whisper.Whisper.init(asr, key).decoder
        return connector.Connector.init(decoder, width, 1.0, config.queries, key)

    diva = connector.DiVA(
        weights.abstract(lambda: whisper.Whisper.init(asr, key).encoder, dtype=dtype),
        weights.abstract(new_connector),
        weights.abstract(llama.Llama.init, llm, key, dtype=dtype),
        asr.num_mel_bins,
    )
    params, frozen_diva = eqx.partition(diva, connector.trainable(diva))
    opt_state = jax.eval_shape(make_optimizer(recipe_of(config)).init, params)
    template = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (cost.PREFIX, cost.SUFFIX)]
    wants_gram = config.response_loss == "gram"
    gram = jax.ShapeDtypeStruct((width, width), jnp.float32) if wants_gram else None
    return sharding.place((params, opt_state, Frozen(frozen_diva, *template, gram)), mesh)


def abstract_batch(config: Config, window_samples: int, length: int, mesh: Mesh) -> dict[str, Any]:
    """The shapes of one batch, over all processes; `length`: L, of the padded transcripts."""
    where = NamedSharding(mesh, P(sharding.AXES))
    shapes = {
        "audio": ((window_samples,), jnp.float32),
        "ids": ((length,), jnp.int32),
        "lengths": ((), jnp.int32),
        "weights": ((), jnp.float32),
    }
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=where)
        for name, (shape, dtype) in shapes.items()
    }


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """This process's rows of a batch become part of the global, split batch."""
    where = NamedSharding(mesh, P(sharding.AXES))
    return {name: jax.make_array_from_process_local_data(where, x) for name, x in batch.items()}


# ------------------------------------------------------------------------------- the step, compiled


def compile_step(config: Config, mesh: Mesh, room: float, state: tuple, batch: dict) -> tuple:
    """The step, compiled for these arrays or shapes, and what it recomputes: as little as fits.

    Args:
        room: bytes of memory of one device.
        state: trained arrays, optimizer state, frozen rest.

    Raises ValueError if it does not fit.
    """
    ways = ("attention", "layers") if config.recompute == "auto" else (config.recompute,)
    for recompute in ways:
        lowered = train_step.lower(
            *state, batch, np.int32(0), recipe=recipe_of(config), mesh=mesh, recompute=recompute
        )
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:  # TPUs refuse what they cannot hold
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"(?:Used |temporaries \()([\d.]+)G", str(error))
            needed = float(used[1]) * cost.GIB if used else math.inf
        else:
            needed = cost.bytes_needed(compiled.memory_analysis())
        if needed <= room:
            return compiled, recompute
    held = jax.tree.leaves((state, batch))
    fixed = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in held)
    clips = config.batch_size // mesh.size
    # all but the arguments grows with the clips
    fitting = max(0, int(clips * (room - fixed) / (needed - fixed)))
    advice = f"--batch-size {fitting * mesh.size} might fit, or more devices"
    wanted = cost.gib(needed) if needed < math.inf else "more"
    raise ValueError(
        f"the step needs {wanted} on each device, which holds {cost.gib(room)} "
        f"({clips} clips on each of {mesh.size}, recomputing {recompute}). Expected it to fit: "
        + (advice if fitting else "take more devices or a smaller preset")
        + ("; so might --recompute layers." if recompute == "attention" else ".")
    )


class SliceProgram(NamedTuple):
    """The step as it would run on a slice of TPUs."""

    devices: list[jax.Device]
    mesh: Mesh
    recompute: sharding.Recompute
    seconds: float  # that compiling took
    program: cost.Program
    parts: dict[str, float]  # FLOPs of one clip, by hand
    padding: float  # those of them that are spent on padded text


def compile_for(config: Config) -> SliceProgram:
    """The step for the slice that --compile-only names, from shapes alone. Raises ValueError."""
    jax.config.update("jax_platforms", "cpu")  # where the compiler runs
    config, devices = with_dtype(config, "tpu"), cost.slice_of(config.compile_only)
    mesh = sharding.make_mesh(config.batch_size, config.fsdp, devices)
    chip = cost.CHIPS[devices[0].device_kind]
    asr = cost.sizes_of(whisper.WhisperConfig, config.whisper)
    llm = cost.sizes_of(llama.LlamaConfig, config.llm)
    queries = config.queries or asr.max_target_positions
    text = min(cost.TEXT, queries)
    state = abstract_state(config, asr, llm, mesh)
    batch = abstract_batch(config, asr.window_samples, text, mesh)
    began = time.perf_counter()
    compiled, recompute = compile_step(config, mesh, chip.memory, state, batch)
    seconds = time.perf_counter() - began
    turn = cost.PREFIX + cost.SUFFIX
    parts, short = (
        cost.flops(asr, llm, queries, turn, length) for length in (text, min(cost.MEAN_TEXT, text))
    )
    padding = parts["teacher"] - short["teacher"]
    program = cost.Program(compiled, len(devices))
    return SliceProgram(devices, mesh, recompute, seconds, program, parts, padding)


def compile_only(config: Config) -> str:
    """What the step would take on the slice of TPUs that --compile-only names."""
    devices, mesh, recompute, seconds, program, parts, padding = compile_for(config)
    kind = devices[0].device_kind
    return (
        f"{config.preset} on {config.compile_only}: {len(devices)} x {kind}, mesh "
        f"{mesh.shape['data']} data x {mesh.shape['fsdp']} fsdp, {config.batch_size} clips\n"
        f"backward recomputes {recompute}; compiled in {seconds:.0f} s\n\n"
        + cost.report(program, parts, padding, cost.CHIPS[kind], config.batch_size, config.steps)
    )


# ------------------------------------------------------------------------------------------ the run


def train(config: Config, mesh: Mesh, stop: record.Stop) -> int:
    """Train on from the newest checkpoint; export at the end. Returns the steps done."""
    out = epath.Path(config.out)
    chat = llama.Chat.load(config.llm)
    asr = weights.read_config(whisper.WhisperConfig, weights.resolve(config.whisper))
    queries = config.queries or asr.max_target_positions
    corpus = load_corpus(config, chat, asr.window_samples, queries)
    text = "".join(f"{clip.audio}\t{clip.text}\n" for clip in corpus.clips)
    clips = {"clips": len(corpus.clips), "crc32": zlib.crc32(text.encode())}
    first = sharding.from_first(lambda: record.claim(out / "clips.json", clips))
    if clips != first:
        raise ValueError(
            f"{config.data}: {clips} in process {jax.process_index()}, {first} in process 0; "
            "expected the same clips on every host. Copy them anew, or mount one folder everywhere."
        )
    # Some templates write today's date: the run keeps the day on which it began.
    turn = dict(zip(("prefix", "suffix"), chat.wrap(), strict=True))
    turn = sharding.from_first(lambda: record.claim(out / "turn.json", turn, keep=True))

    state = start_state(config, mesh, turn)
    room = float((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf))
    batch = abstract_batch(config, asr.window_samples, corpus.max_length, mesh)
    began = time.perf_counter()
    compiled, recompute = compile_step(config, mesh, room, state, batch)
    llm, positions = state[2].diva.llm.config, len(turn["prefix"] + turn["suffix"])
    work = sum(cost.flops(asr, llm, queries, positions, corpus.max_length).values())
    if jax.process_index() == 0:
        print(
            f"compiled the step in {time.perf_counter() - began:.1f} s: "
            f"{work * config.batch_size / cost.TERA:.3g} TFLOP, "
            f"{cost.gib(cost.bytes_needed(compiled.memory_analysis()))} on each of {mesh.size} "
            f"devices, backward recomputes {recompute}",
            flush=True,
        )

    params, opt_state, frozen = state
    manager = record.open_checkpoints(config)
    step = saved = first_step = manager.latest_step() or 0
    if step:
        params, opt_state = record.restore(manager, step, params, opt_state)
        print(f"resuming {out} at step {step} of {config.steps}", flush=True)
    batches = data.batches(
        corpus,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    log = record.Log(config, step, work, PARTS)
    try:
        while step < min(config.steps, config.until or config.steps) and not stop.before(step):
            began = time.perf_counter()
            batch = to_devices(next(batches), mesh)
            waited = time.perf_counter() - began
            params, opt_state, metrics = compiled(params, opt_state, frozen, batch, np.int32(step))
            log.read()  # step - 1, while the device is busy with this one
            log.hold(step, metrics, waited)
            step += 1
            if config.profile and step - first_step in (10, 13):
                log.read()  # the steps before are done: the trace holds three whole ones
                profile(out, step - first_step == 10)
            if step % config.save_every == 0:
                log.read()  # only a state known to be good is saved
                log.write()
                record.save(manager, saved := step, params, opt_state)
        log.read()
        if step > saved:
            log.write()
            record.save(manager, step, params, opt_state)
    finally:
        log.close()
        with record.writing(manager.directory):
            manager.close()
    if step == config.steps:
        export(config, eqx.combine(params, frozen.diva))
    return step


def profile(out: epath.Path, starts: bool) -> None:
    """Begin to trace what host and devices do, or end it; to be opened with xprof or Perfetto."""
    if starts:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # not each Python call of the threads that read clips
        jax.profiler.start_trace(out / "profile", profiler_options=options)
    else:
        jax.profiler.stop_trace()
        print(f"profile   {out / 'profile'}", flush=True)


def export(config: Config, diva: connector.DiVA) -> None:
    """Write the finished student in the published layout, from process 0."""
    out = epath.Path(config.out)
    trained = sharding.on_host(diva.connector)
    if jax.process_index() > 0:
        return
    diva = eqx.tree_at(lambda d: d.connector, diva, trained)
    with record.writing(out / "model.safetensors"):
        if not record.in_bucket(out):
            diva.save(config.out, config.whisper, config.llm)
            return
        with tempfile.TemporaryDirectory() as folder:  # safetensors writes to local files alone
            diva.save(folder, config.whisper, config.llm)
            for name in ("config.json", "model.safetensors"):
                (epath.Path(folder) / name).copy(out / name, overwrite=True)


def run(config: Config) -> None:
    """A whole run: train (on), export, plot, evaluate. What is done is not done again."""
    given, out = config, epath.Path(config.out)
    if record.in_bucket(out):
        record.look_into(out)
    config = with_dtype(config, jax.default_backend())
    mesh = sharding.make_mesh(config.batch_size, config.fsdp)
    recipe = dataclasses.asdict(recipe_of(config))
    sharding.from_first(lambda: record.claim(out / "train.json", recipe))
    finished = sharding.from_first(lambda: (out / "model.safetensors").exists())
    if not (out / "train.json").exists():
        raise ValueError(
            f"{out}: process {jax.process_index()} does not see what process 0 has written there; "
            "expected one folder for all hosts. Choose a mounted or gs:// folder as --out."
        )
    speaks = jax.process_index() == 0
    if finished and speaks:
        print(f"{out} is finished ({config.steps} steps); choose another --out to train anew")
    if not finished:
        with record.Stop() as stop:
            steps = train(config, mesh, stop)
        if steps < config.steps:
            reason = stop.asked or "--until"
            if speaks:
                print(f"stopped at step {steps} of {config.steps} ({reason}); saved. Go on with:")
                print(f"  {command(given)}", flush=True)
            return
    if not speaks:
        return
    curve = record.plot(out)
    print(f"student   {out / 'model.safetensors'}\nlosses    {curve}, {out / 'metrics.jsonl'}")
    if (out / "eval.json").exists():
        print(report.table(weights.read_json(out / "eval.json")))
    elif config.tasks:
        evaluation.evaluate(config.out, [config.tasks])
    if not record.in_bucket(out):
        print(f"hear as it does: python connector.py CLIP --model {out}")


def main() -> None:
    """The command line. Every error that a user can cause is one line, and exit code 1."""
    try:
        config = parse(sys.argv[1:])
        if config.compile_only:
            print(compile_only(config))
            return
        sharding.join_cluster()
        run(config)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        print(f"error: {record.ALONE.format(reason)}", file=sys.stderr, flush=True)
    else:
        return
    if jax.process_count() > 1:
        os._exit(1)  # the others hear of it at once: an orderly end would wait for them
    sys.exit(1)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("weights").setLevel(logging.INFO)
    main()
