"""Train: distil the text LLM into the connector, from (audio, transcript) pairs alone.

    audio -> log-mel -> encoder -> CONNECTOR -> virtual tokens -> [prefix; virtual; suffix] -> LLM
                        frozen     trained            :                                         :
                                               token alignment              response distillation
                                                      :                                         :
    transcript --------------------------> token embeddings --> [prefix; text; suffix] ------> LLM

    python train.py                                  # the toy universe, minutes on a laptop
    python train.py --preset diva-8b --data cv/en    # the published run
    python train.py --preset diva-8b --compile-only v4:4x4x8    # what it would take, without a TPU
    python train.py --help                           # every field of Config is a flag

The same command on every host of a cluster is one run. One that was interrupted (Ctrl-C, SIGTERM,
power cut) goes on when the command is started again, and ends with the same weights, bit for bit.

Annex: runtime/sharding.py says where arrays live on many devices (FSDP), compilation.py makes the
step that fits into memory, record.py keeps the log and the checkpoints, cost.py counts FLOPs,
teacher_responses.py asks the teacher once for whole answers, validation.py computes KL and
nearest-token accuracy on held-out clips.

Axes: B batch, S audio samples (16 kHz), L text tokens, P prefix, R suffix, Q queries, E LLM width.
Reads: weights.py, whisper.py, llama.py, connector.py, distill_loss.py, data.py.
Read next: eval.py.
"""

import dataclasses
import functools
import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

import connector
import data
import distill_loss
import llama
import whisper
from runtime import cli, files, sharding
from training import compilation, cost, precompute, record, teacher_responses, validation
from training.recipe import Config, Recipe, parse, recipe_of, resume_command
from training.setup import claim

# ---------------------------------------------------------------------------- the loss and the step


class Frozen(NamedTuple):
    """What the step reads and never changes."""

    diva: connector.DiVA  # encoder and LLM; None where the trained arrays belong
    prefix: Int[Array, "*I P"]  # the chat template before the user's words, BOS included
    suffix: Int[Array, "R"]  # the template behind them, up to where the response begins
    pads: Int[Array, "I"] | None  # with --instructions: tokens of each prefix that are padding
    gram: Float[Array, "E E"] | None  # for --response-loss gram


# In the order of the computation, so the first that is not finite is where the trouble began.
PARTS = (
    *("audio", "encoder states", "virtual tokens", "teacher's response state"),
    *("student's response state", "alignment loss", "response loss", "gradient"),
)


def forward(
    params: Any, frozen: Frozen, batch: dict[str, Array], remat: sharding.Remat = "layers"
) -> tuple[connector.DiVAOutput, Float[Array, "B K"]]:
    """What the student makes of a batch, and the teacher; and what each state of an answer counts:
    where the response begins alone, or all that say the batch's answers, if it has any."""
    prefix, pads = teacher_responses.own_prefix(frozen.prefix, frozen.pads, batch)
    given = *(batch[name] for name in ("audio", "ids", "lengths")), prefix, frozen.suffix
    known = batch.get("answers"), pads, batch.get("taught")
    out = eqx.combine(params, frozen.diva)(*given, *known, remat)
    counts = batch.get("states", jnp.ones_like(batch["lengths"]))
    return out, distill_loss.response_weights(batch["weights"], counts, out.student.shape[1])


def loss_fn(
    params: Any,
    frozen: Frozen,
    batch: dict[str, Array],
    recipe: Recipe,
    remat: sharding.Remat = "layers",
    share: tuple[Any, Any] = (1.0, 1.0),
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Bool[Array, "parts"]]]:
    """The two losses of the paper, weighted; with their parts, and what of PARTS is finite.

    `share`: of a larger batch's positions and clips, if `batch` is a part of one.
    """
    out, by_state = forward(params, frozen, batch, remat)
    lengths, weight = batch["lengths"], batch["weights"]
    alignment = distill_loss.token_alignment(out.virtual, out.targets, lengths, weight)
    table = frozen.diva.llm.output_matrix
    response = distill_loss.response(
        *(recipe.response_loss, out.student, out.teacher, by_state, table, frozen.gram)
    )
    alignment, response = share[0] * alignment, share[1] * response
    loss = recipe.align_weight * alignment + recipe.response_weight * response
    parts = (batch["audio"], out.states, out.virtual, out.teacher, out.student, alignment, response)
    finite = jnp.stack([jnp.isfinite(part).all() for part in parts])
    return loss, ({"loss": loss, "alignment": alignment, "response": response}, finite)


def gradients(
    params: Any,
    frozen: Frozen,
    batch: dict[str, Array],
    recipe: Recipe,
    remat: sharding.Remat,
    micro_batch: int | None,
) -> tuple[Any, tuple[dict[str, Array], Bool[Array, "parts"]]]:
    """Gradient of `loss_fn`, and its aux; `micro_batch` clips of each device at a time, if given.

    Alignment is a mean over positions, response one over clips: each part of a batch counts with
    its share of them, so that the parts add up to the whole whatever their lengths and weights.
    """
    gradient = functools.partial(jax.grad(loss_fn, has_aux=True), params, frozen)
    if micro_batch is None:
        return gradient(batch, recipe, remat)

    def counts(batch: dict[str, Array]) -> tuple[Array, Array]:
        return (batch["lengths"] * batch["weights"]).sum(), batch["weights"].sum()

    whole = counts(batch)

    def add(total: Any, part: dict[str, Array]) -> tuple[Any, None]:
        shares = [n / jnp.maximum(of, 1) for n, of in zip(counts(part), whole, strict=True)]
        grads, (metrics, finite) = gradient(part, recipe, remat, tuple(shares))
        sums = jax.tree.map(jnp.add, total[:2], (grads, metrics))
        return (*sums, total[2] & finite), None

    parts = sharding.micro_batches(batch, micro_batch)
    none = {name: jnp.zeros(()) for name in ("loss", "alignment", "response")}
    start = jax.tree.map(jnp.zeros_like, params), none, jnp.ones(len(PARTS) - 1, bool)
    grads, metrics, finite = jax.lax.scan(add, start, parts)[0]
    return grads, (metrics, finite)


def learning_rate(recipe: Recipe, step: int | Array) -> Float[Array, ""]:
    """Linear warm-up to the peak, then half a cosine to 0 at the end of the run."""
    rise = max(1, round(recipe.warmup * recipe.steps))
    share = (step - rise) / max(1, recipe.steps - rise)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
    return recipe.learning_rate * jnp.where(step < rise, (step + 1) / rise, cosine)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with the paper's constants, behind a clip of the global gradient norm."""
    rate = functools.partial(learning_rate, recipe)
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=recipe.weight_decay)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)


@functools.partial(
    jax.jit,
    static_argnames=("recipe", "mesh", "remat", "micro_batch"),
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
    remat: sharding.Remat = "attention",
    micro_batch: int | None = None,
):
    """One step: losses, gradient, update. Returns (params, opt_state, metrics)."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what sharding.constrain looks up
        grads, (metrics, finite) = gradients(params, frozen, batch, recipe, remat, micro_batch)

    def split(tree: Any) -> Any:
        where = sharding.param_shardings(tree, mesh, sharding.TRAINED)
        return jax.lax.with_sharding_constraint(tree, where)

    grads = split(grads)
    updates, opt_state = make_optimizer(recipe).update(grads, opt_state, params)
    # Outputs live exactly where the inputs did: so the next step needs no second compilation.
    params, opt_state = split(optax.apply_updates(params, updates)), split(opt_state)
    grad_norm = optax.tree.norm(grads)
    metrics |= {
        "grad_norm": grad_norm,
        "lr": learning_rate(recipe, step),
        "undecodable": jnp.sum(batch["weights"] == 0).astype(jnp.float32),
        "finite": jnp.append(finite, jnp.isfinite(grad_norm)),
    }
    return params, opt_state, jax.lax.with_sharding_constraint(metrics, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnames="mesh")
def watch(params: Any, frozen: Frozen, batch: dict[str, Array], mesh: Mesh) -> dict[str, Array]:
    """The scores of clips that are not trained on."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        out, by_state = forward(params, frozen, batch)
        given = (batch[name] for name in ("ids", "lengths", "weights"))
        found = validation.scores(frozen.diva.llm, out, by_state, *given)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, P()))


# -------------------------------------------------------------------------------- before step 0


def with_dtype(config: Config, platform: str) -> Config:
    """`config` with --dtype auto decided for the platform (cpu, gpu, tpu) that it runs on."""
    dtype = sharding.compute_dtype(platform) if config.dtype == "auto" else config.dtype
    return dataclasses.replace(config, dtype=dtype)


def state_of(config: Config, diva: connector.DiVA, turn: Any, mesh: Mesh) -> tuple:
    """(trained arrays, optimizer state, Frozen), where they belong: arrays, or shapes if `diva` has
    shapes. `turn`: prefix, suffix and pads of the template."""

    def make(function: Any, x: Any, over: tuple[str, ...]) -> Any:
        found = sharding.shard_params(jax.eval_shape(function, x), mesh, over)
        if isinstance(jax.tree.leaves(x)[0], jax.ShapeDtypeStruct):
            return found
        return jax.jit(function, out_shardings=jax.tree.map(lambda s: s.sharding, found))(x)

    params, frozen = eqx.partition(diva, connector.trainable(diva))
    params = sharding.shard_params(params, mesh, sharding.TRAINED)
    opt_state, gram = make(make_optimizer(recipe_of(config)).init, params, sharding.TRAINED), None
    if config.response_loss == "gram":
        gram = make(distill_loss.gram_matrix, frozen.llm.output_matrix, sharding.FROZEN)
    return params, opt_state, sharding.shard_params(Frozen(frozen, *turn, gram), mesh)


def start_state(config: Config, mesh: Mesh, turn: dict[str, list[int]]) -> tuple:
    """The state before step 0, on the devices: weights loaded, connector and optimizer new."""

    def where(template: Any) -> Any:  # of a Whisper most is trained
        frozen = isinstance(template, llama.Llama)
        return sharding.shard_params(
            template, mesh, sharding.FROZEN if frozen else sharding.TRAINED
        )

    key, dtype = jax.random.key(config.seed), jnp.dtype(config.dtype)
    models = (config.whisper, config.llm, config.queries)
    diva = connector.DiVA.untrained(*models, key, dtype, where, config.window)
    return state_of(config, diva, teacher_responses.template(turn), mesh)


def abstract_inputs(
    config: Config,
    mesh: Mesh,
    asr: whisper.WhisperConfig,
    llm: llama.LlamaConfig,
    turn: Any = None,
    text: int | None = None,
    more: Any = None,
) -> tuple[tuple, dict[str, Any]]:
    """Shapes and shardings of `start_state` and of a batch, from the sizes of the models alone, and
    where known, of the template, of the longest transcript and of what a batch has besides."""
    diva = connector.DiVA.abstract(asr, llm, config.queries, jnp.dtype(config.dtype))
    sizes = (cost.PREFIX, cost.SUFFIX)
    turn = turn or [*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in sizes), None]
    text = text or min(cost.TEXT, config.queries or asr.max_target_positions)
    most, more = teacher_responses.limit(config.response_tokens), dict(more or {})
    if most > 1:
        more |= {"answers": ((most - 1,), np.int32), "states": ((), np.int32)}
    batch = data.batch_shapes(config.batch_size, asr.window_samples, text, **more)
    return state_of(config, diva, turn, mesh), sharding.shard_host_batch(batch, mesh)


def compile_step(
    config: Config, grids: list[Mesh], room: float, inputs: Callable[[Mesh], tuple[tuple, dict]]
) -> tuple[Any, sharding.Remat, Mesh]:
    """The step, compiled for `inputs`, the state and the batch on one of the `grids`, arrays or
    shapes; what it recomputes; and the mesh, chosen by
    `compilation.compile_first_that_fits`. Raises ValueError."""
    inputs = functools.cache(inputs)

    def lower(remat: sharding.Remat, mesh: Mesh) -> Any:
        state, batch = inputs(mesh)
        static = {"recipe": recipe_of(config), "mesh": mesh, "remat": remat}
        size = compilation.micro_batch_size(config, mesh)
        return train_step.lower(*state, batch, np.int32(0), **static, micro_batch=size)

    return compilation.compile_first_that_fits(lower, config, grids, room, inputs)


def compile_for(config: Config) -> compilation.SliceProgram:
    """The step for the slice of TPUs that --compile-only names. Raises ValueError."""
    return compilation.for_slice(with_dtype(config, "tpu"), abstract_inputs, compile_step)


def choose(config: Config, grids: list[Mesh], shapes: Callable) -> tuple[Mesh, Config]:
    """The grid that the step fits on, and what it recomputes there, before there are weights. Every
    process compiles the same shapes for the same room, and so chooses the same."""
    room = sharding.from_process_0(sharding.device_memory_bytes)
    if len(grids) == 1 or room == math.inf:
        return grids[0], config
    _, remat, mesh = compile_step(config, grids, room, shapes)
    return mesh, dataclasses.replace(config, remat=remat)


def start(
    config: Config, grids: list[Mesh]
) -> tuple[data.Corpus, tuple, Any, dict | None, float, Mesh]:
    """All that a run needs: its clips, its state, the compiled step, a batch to be watched or None,
    FLOPs of one clip, and the grid of devices."""
    corpus, others, chat, turn, known, work_on = claim(config)
    mesh, config = choose(config, grids, functools.partial(abstract_inputs, config, **known))
    state = start_state(config, mesh, turn)
    diva, *template, _ = state[2]
    llm, most = diva.llm, teacher_responses.limit(config.response_tokens)
    record.note_baseline(epath.Path(config.out), validation.mean_embedding(llm, corpus, mesh))
    ask = functools.partial(teacher_responses.ask, llm, chat.stop_ids, turn, config, mesh)
    if most > 1:
        corpus.more |= ask(corpus, most)
    watched = None
    if others:
        others.more |= ask(others, teacher_responses.MOST)
        watched = validation.batch(others, mesh)
    answer = corpus.more["answers"].shape[1] if "answers" in corpus.more else 0
    parts = work_on(corpus.max_length, answer)
    if precompute.wanted(config.frozen_states, diva, corpus):
        corpus.more |= precompute.keep(diva, corpus, tuple(template), mesh)
        parts = {name: flops for name, flops in parts.items() if name not in precompute.PARTS}
    more, work = {k: (x.shape[1:], x.dtype) for k, x in corpus.more.items()}, sum(parts.values())
    batch = data.batch_shapes(config.batch_size, corpus.window_samples, corpus.max_length, **more)
    batch = sharding.shard_host_batch(batch, mesh)
    began = time.perf_counter()
    room, inputs = sharding.device_memory_bytes(), (state, batch)
    compiled, remat, _ = compile_step(config, [mesh], room, lambda _: inputs)
    seconds = time.perf_counter() - began
    if jax.process_index() == 0:
        took = compilation.summary(compiled, remat, work * config.batch_size, mesh)
        print(f"compiled the step in {seconds:.1f} s: {took}", flush=True)
    return corpus, state, compiled, watched, work, mesh


# ------------------------------------------------------------------------------------------ the run


def train(config: Config, grids: list[Mesh]) -> tuple[int, str]:
    """Train on from the newest checkpoint; export at the end. Returns the steps done, and what
    asked to stop, if anything did."""
    out = epath.Path(config.out)
    corpus, (params, opt_state, frozen), compiled, watched, work, mesh = start(config, grids)
    manager = record.open_checkpoints(config)
    step = saved = first_step = manager.latest_step() or 0
    if step:
        params, opt_state = record.restore(manager, step, params, opt_state)
        print(f"resuming {out} at step {step} of {config.steps}", flush=True)
    order = {"batch_size": config.batch_size, "seed": config.seed, "start_step": step}
    batches = data.batches(corpus, **order, **sharding.process())
    log = record.Log(config, step, work, PARTS, corpus.undecodable)
    with record.Stop() as stop, record.closing(log, manager):
        while step < min(config.steps, config.until or config.steps) and not stop.before(step):
            began = time.perf_counter()
            batch = sharding.shard_host_batch(next(batches), mesh)
            waited = time.perf_counter() - began
            params, opt_state, metrics = compiled(params, opt_state, frozen, batch, np.int32(step))
            if watched and (not step or (step + 1) % config.watch_every == 0):
                metrics |= watch(params, frozen, watched, mesh)
            log.read()  # step - 1, while the device is busy with this one
            log.hold(step, metrics, waited)
            step += 1
            if config.profile and step - first_step in (10, 13):
                log.read()  # the steps before are done: the trace holds three whole ones
                record.profile(out, step - first_step == 10)
            if step % config.save_every == 0:
                log.settle()  # only a state known to be good is saved
                record.save(manager, saved := step, params, opt_state)
        log.settle()
        if step > saved:
            record.save(manager, step, params, opt_state)
    if step == config.steps:
        export(config, eqx.combine(params, frozen.diva))
    return step, stop.asked


def export(config: Config, diva: connector.DiVA) -> None:
    """Write the finished student in the published layout, from process 0."""
    diva = eqx.tree_at(lambda d: d.connector, diva, sharding.gather_to_host(diva.connector))
    if jax.process_index() == 0:
        save = functools.partial(diva.save, asr_path=config.whisper, llm_path=config.llm)
        record.export(epath.Path(config.out), save, ("config.json", "model.safetensors"))


def run(config: Config) -> None:
    """A whole run: train (on), export, plot, evaluate. What is done is not done again."""
    from evaluation.tasks import read_tasks  # what is asked of a student is the next chapter's

    given, out = config, epath.Path(config.out)
    if files.in_bucket(out):
        record.look_into(out)
    config = with_dtype(config, jax.default_backend())
    grids = sharding.candidate_meshes(config.batch_size, config.fsdp)
    if config.tasks:  # told now, not after a night of training
        sharding.from_process_0(lambda: len(read_tasks([config.tasks])))
    recipe = dataclasses.asdict(recipe_of(config))
    finished = sharding.from_process_0(lambda: record.is_finished(out, recipe))
    speaks = jax.process_index() == 0
    if finished and speaks:
        print(f"{out} is finished ({config.steps} steps); choose another --out to train anew")
    if not finished:
        steps, asked = train(config, grids)
        if steps < config.steps:
            if speaks:
                why = f"stopped at step {steps} of {config.steps} ({asked or '--until'}); saved"
                print(f"{why}. Go on with:\n  {resume_command(given)}", flush=True)
            return
    show(config, out, speaks)


def show(config: Config, out: epath.Path, speaks: bool) -> None:
    """What came out of a finished run, and what its student can do: all processes evaluate."""
    import eval as evaluation  # what is compared, and how, is the next chapter

    if speaks:
        curve = record.plot(out)
        print(f"student   {out / 'model.safetensors'}\nlosses    {curve}, {out / 'metrics.jsonl'}")
    known = sharding.from_process_0((out / "eval.json").exists)
    if known and speaks:
        print(evaluation.report.table(files.read_json(out / "eval.json")))
    elif config.tasks and not known:
        evaluation.evaluate(config.out, [config.tasks])
    if speaks and not files.in_bucket(out):
        print(f"hear as it does: python connector.py CLIP --model {out}")


def main() -> None:
    """The command line."""
    config = parse(sys.argv[1:])
    if config.compile_only:
        print(compilation.slice_report(config, compile_for(config)))
    else:
        sharding.join_cluster()
        run(config)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("weights").setLevel(logging.INFO)
    cli.run(main, "stopped; start the same command again to go on")
