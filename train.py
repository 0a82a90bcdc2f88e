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

Support: runtime/sharding.py shards arrays over devices (FSDP). In training/, setup.py validates a
run, teacher_responses.py and precompute.py compute once what the frozen models yield,
compilation.py compiles a step that fits into memory, validation.py scores held-out clips, record.py
writes metrics and checkpoints, cost.py counts FLOPs.

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
from data import Batch
from runtime import cli, files, sharding
from training import compilation, cost, precompute, record, teacher_responses, validation
from training.recipe import Config, Recipe, parse, recipe_of, resume_command
from training.setup import Preflight, preflight

# ---------------------------------------------------------------------------- the loss and the step


class Frozen(NamedTuple):
    """What the step reads and never changes."""

    diva: connector.DiVA  # encoder and LLM; None where the trained arrays belong
    template: teacher_responses.Template  # token ids around the user's words
    gram: Float[Array, "E E"] | None  # for --response-loss gram


# In the order of the computation: the first that is not finite is where the fault began.
STAGES = (
    "audio",
    "encoder states",
    "virtual tokens",
    "teacher's response state",
    "student's response state",
    "alignment loss",
    "response loss",
    "gradient",
)


def forward(
    params: Any, frozen: Frozen, batch: Batch, remat: sharding.Remat = "layers"
) -> connector.DiVAOutput:
    """Run student and teacher on one batch, with its precomputed states where it has them."""
    diva = eqx.combine(params, frozen.diva)
    return diva(
        transcript=batch.transcript,
        lengths=batch.lengths,
        prefix=frozen.template.prefix,
        suffix=frozen.template.suffix,
        response=batch.fed_response,
        audio=batch.audio,
        encoder_states=batch.encoder_states,
        teacher_states=batch.teacher_states,
        remat=remat,
    )


def state_weights(batch: Batch, num_states: int) -> Float[Array, "B K"]:
    """Each clip's weight, divided equally among the states of its response."""
    lengths = batch.response_lengths
    lengths = jnp.ones_like(batch.lengths) if lengths is None else lengths
    return distill_loss.response_weights(batch.weights, lengths, num_states)


def loss_fn(
    params: Any,
    frozen: Frozen,
    batch: Batch,
    recipe: Recipe,
    remat: sharding.Remat = "layers",
    fraction: tuple[Any, Any] = (1.0, 1.0),
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Bool[Array, "stages"]]]:
    """The paper's two losses, weighted; and as aux the metrics and which STAGES are finite.

    `fraction`: of a micro-batch, its share of the batch's transcript tokens and of its clips.
    """
    out = forward(params, frozen, batch, remat)
    alignment = distill_loss.token_alignment(
        virtual=out.virtual_tokens,
        targets=out.transcript_embeds,
        lengths=batch.lengths,
        weights=batch.weights,
    )
    response = distill_loss.response(
        kind=recipe.response_loss,
        student=out.student_states,
        teacher=out.teacher_states,
        weights=state_weights(batch, num_states=out.student_states.shape[1]),
        output_matrix=frozen.diva.llm.output_matrix,
        gram=frozen.gram,
    )
    alignment, response = fraction[0] * alignment, fraction[1] * response
    loss = recipe.align_weight * alignment + recipe.response_weight * response

    stages = (
        batch.encoder_states if batch.audio is None else batch.audio,
        out.encoder_states,
        out.virtual_tokens,
        out.teacher_states,
        out.student_states,
        alignment,
        response,
    )
    finite = jnp.stack([jnp.isfinite(stage).all() for stage in stages])
    return loss, ({"loss": loss, "alignment": alignment, "response": response}, finite)


def gradients(
    params: Any,
    frozen: Frozen,
    batch: Batch,
    recipe: Recipe,
    remat: sharding.Remat,
    micro_batch: int | None,
) -> tuple[Any, tuple[dict[str, Array], Bool[Array, "stages"]]]:
    """Gradient of `loss_fn`, and its aux; with gradient accumulation if `micro_batch` is given.

    `micro_batch` is the clips per device in each part. Alignment is a mean over tokens, response
    one over clips: each part is weighted by its share of them, so that the parts add up to the
    whole batch whatever their lengths and weights.
    """
    gradient = functools.partial(jax.grad(loss_fn, has_aux=True), params, frozen)
    if micro_batch is None:
        return gradient(batch, recipe, remat)

    def tokens_and_clips(batch: Batch) -> tuple[Array, Array]:
        return (batch.lengths * batch.weights).sum(), batch.weights.sum()

    total_tokens, total_clips = tokens_and_clips(batch)

    def accumulate(sums: Any, part: Batch) -> tuple[Any, None]:
        tokens, clips = tokens_and_clips(part)
        fraction = tokens / jnp.maximum(total_tokens, 1), clips / jnp.maximum(total_clips, 1)
        grads, (metrics, finite) = gradient(part, recipe, remat, fraction)
        grads, metrics = jax.tree.map(jnp.add, sums[:2], (grads, metrics))
        return (grads, metrics, sums[2] & finite), None

    parts = sharding.micro_batches(batch, micro_batch)
    zeros = {name: jnp.zeros(()) for name in ("loss", "alignment", "response")}
    finite = jnp.ones(len(STAGES) - 1, bool)
    start = (jax.tree.map(jnp.zeros_like, params), zeros, finite)
    grads, metrics, finite = jax.lax.scan(accumulate, start, parts)[0]
    return grads, (metrics, finite)


def learning_rate(recipe: Recipe, step: int | Array) -> Float[Array, ""]:
    """Linear warm-up to the peak, then half a cosine to 0 at the end of the run."""
    warmup_steps = max(1, round(recipe.warmup * recipe.steps))
    progress = (step - warmup_steps) / max(1, recipe.steps - warmup_steps)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    warmup = (step + 1) / warmup_steps
    return recipe.learning_rate * jnp.where(step < warmup_steps, warmup, cosine)


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
    batch: Batch,
    step: Int[Array, ""],
    *,
    recipe: Recipe,
    mesh: Mesh,
    remat: sharding.Remat = "attention",
    micro_batch: int | None = None,
):
    """One step: losses, gradient, update. Returns (params, opt_state, metrics)."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # read by sharding.constrain
        grads, (metrics, finite) = gradients(params, frozen, batch, recipe, remat, micro_batch)

    def shard(tree: Any) -> Any:
        shardings = sharding.param_shardings(tree, mesh, sharding.TRAINED)
        return jax.lax.with_sharding_constraint(tree, shardings)

    grads = shard(grads)
    updates, opt_state = make_optimizer(recipe).update(grads, opt_state, params)
    # Outputs have exactly the shardings of the inputs, so that the next step does not recompile.
    params = shard(optax.apply_updates(params, updates))
    opt_state = shard(opt_state)
    grad_norm = optax.tree.norm(grads)
    metrics |= {
        "grad_norm": grad_norm,
        "lr": learning_rate(recipe, step),
        "undecodable": jnp.sum(batch.weights == 0).astype(jnp.float32),
        "finite": jnp.append(finite, jnp.isfinite(grad_norm)),
    }
    return params, opt_state, jax.lax.with_sharding_constraint(metrics, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnames="mesh")
def validate(params: Any, frozen: Frozen, batch: Batch, mesh: Mesh) -> dict[str, Array]:
    """KL and nearest-token accuracy on held-out clips."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        out = forward(params, frozen, batch)
        scores = validation.scores(
            frozen.diva.llm,
            out,
            batch=batch,
            state_weights=state_weights(batch, num_states=out.student_states.shape[1]),
        )
    return jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, P()))


# -------------------------------------------------------------------------------- before step 0


def with_dtype(config: Config, platform: str) -> Config:
    """`config` with --dtype auto decided for the platform (cpu, gpu, tpu) that it runs on."""
    dtype = sharding.compute_dtype(platform) if config.dtype == "auto" else config.dtype
    return dataclasses.replace(config, dtype=dtype)


def place_state(
    config: Config, diva: connector.DiVA, template: teacher_responses.Template, mesh: Mesh
) -> tuple:
    """(params, opt_state, Frozen) with their shardings: arrays, or shapes if `diva` has shapes."""

    def make(function: Any, x: Any, over: tuple[str, ...]) -> Any:
        shapes = sharding.shard_params(jax.eval_shape(function, x), mesh, over)
        if isinstance(jax.tree.leaves(x)[0], jax.ShapeDtypeStruct):
            return shapes
        return jax.jit(function, out_shardings=jax.tree.map(lambda s: s.sharding, shapes))(x)

    params, frozen = eqx.partition(diva, connector.trainable(diva))
    params = sharding.shard_params(params, mesh, sharding.TRAINED)
    opt_state = make(make_optimizer(recipe_of(config)).init, params, sharding.TRAINED)
    gram = None
    if config.response_loss == "gram":
        gram = make(distill_loss.gram_matrix, frozen.llm.output_matrix, sharding.FROZEN)
    return params, opt_state, sharding.shard_params(Frozen(frozen, template, gram), mesh)


def init_state(config: Config, mesh: Mesh, template: teacher_responses.Template) -> tuple:
    """The training state before step 0: published weights, new connector and optimizer."""

    def shard(tree: Any) -> Any:  # most of a Whisper is trained: its decoder
        is_llm = isinstance(tree, llama.Llama)
        return sharding.shard_params(tree, mesh, sharding.FROZEN if is_llm else sharding.TRAINED)

    diva = connector.load_untrained(
        config.whisper,
        config.llm,
        num_queries=config.queries,
        key=jax.random.key(config.seed),
        dtype=jnp.dtype(config.dtype),
        shard=shard,
        window=config.window,
    )
    return place_state(config, diva, template, mesh)


def abstract_inputs(
    config: Config,
    mesh: Mesh,
    *,
    asr: whisper.WhisperConfig,
    llm: llama.LlamaConfig,
    template: teacher_responses.Template | None = None,
    max_length: int | None = None,
) -> tuple[tuple, Batch]:
    """ShapeDtypeStructs (with shardings) of the training state and of a batch, computed from the
    configs without loading weights. `template` and `max_length` default to typical sizes."""
    diva = connector.abstract(asr, llm, config.queries, jnp.dtype(config.dtype))
    if template is None:
        template = teacher_responses.Template(
            prefix=jax.ShapeDtypeStruct((cost.PREFIX,), jnp.int32),
            suffix=jax.ShapeDtypeStruct((cost.SUFFIX,), jnp.int32),
        )
    max_length = max_length or min(cost.TEXT, config.queries or asr.max_target_positions)
    max_response = teacher_responses.max_tokens(config.response_tokens)
    batch = data.batch_shapes(
        config.batch_size,
        max_length=max_length,
        window_samples=asr.window_samples,
        num_response_tokens=max_response - 1 if max_response > 1 else None,
    )
    state = place_state(config, diva, template, mesh)
    return state, sharding.shard_host_batch(batch, mesh)


def compile_step(
    config: Config,
    meshes: list[Mesh],
    memory_budget: float,
    inputs: Callable[[Mesh], tuple[tuple, Batch]],
) -> tuple[Any, sharding.Remat, Mesh]:
    """Compile the step for `inputs` (state and batch, arrays or shapes) on a mesh that it fits.

    Returns the compiled step, what it recomputes, and its mesh, as chosen by
    `compilation.compile_first_that_fits`. Raises ValueError.
    """
    inputs = functools.cache(inputs)

    def lower(remat: sharding.Remat, mesh: Mesh) -> Any:
        state, batch = inputs(mesh)
        return train_step.lower(
            *state,
            batch,
            np.int32(0),
            recipe=recipe_of(config),
            mesh=mesh,
            remat=remat,
            micro_batch=compilation.micro_batch_size(config, mesh),
        )

    return compilation.compile_first_that_fits(lower, config, meshes, memory_budget, inputs)


def compile_for(config: Config) -> compilation.SliceProgram:
    """The step for the TPU slice that --compile-only names. Raises ValueError."""
    return compilation.for_slice(with_dtype(config, "tpu"), abstract_inputs, compile_step)


def choose_mesh(config: Config, meshes: list[Mesh], shapes: Callable) -> tuple[Mesh, Config]:
    """The first mesh that the step fits on, and its rematerialisation, before weights are loaded.

    Every process compiles the same shapes for the same memory, and so chooses the same.
    """
    memory_budget = sharding.from_process_0(sharding.device_memory_bytes)
    if len(meshes) == 1 or memory_budget == math.inf:
        return meshes[0], config
    _, remat, mesh = compile_step(config, meshes, memory_budget, shapes)
    return mesh, dataclasses.replace(config, remat=remat)


class Run(NamedTuple):
    """Everything that the training loop needs."""

    corpus: data.Corpus
    state: tuple  # params, opt_state, Frozen
    train_step: Any  # compiled
    validation_batch: Batch | None
    flops_per_clip: float
    mesh: Mesh


def prepare_run(config: Config, meshes: list[Mesh]) -> Run:
    """Validate, load, precompute and compile: everything before step 0."""
    checked = preflight(config)
    corpus, template = checked.corpus, checked.template
    shapes = functools.partial(
        abstract_inputs,
        config,
        asr=checked.asr,
        llm=checked.llm,
        template=template,
        max_length=corpus.max_length,
    )
    mesh, config = choose_mesh(config, meshes, shapes)
    state = init_state(config, mesh, template)
    diva = state[2].diva
    baseline = validation.mean_embedding_baseline(diva.llm, corpus, mesh)
    record.note_baseline(epath.Path(config.out), baseline)
    add_responses(config, checked, diva.llm, mesh)
    validation_batch = None
    if checked.validation:
        validation_batch = validation.make_batch(checked.validation, mesh)

    # Activations of the frozen models, and the FLOPs that are left for a step.
    flops = checked.flops_by_stage(corpus.max_length, corpus.num_response_tokens)
    if precompute.should_precompute(config.precompute, diva, corpus):
        corpus.precomputed |= precompute.precompute(diva, corpus, template, mesh)
        flops = {stage: n for stage, n in flops.items() if stage not in precompute.STAGES}
    flops_per_clip = sum(flops.values())

    start_time = time.perf_counter()
    batch = sharding.shard_host_batch(corpus.batch_shapes(config.batch_size), mesh)
    memory_budget = sharding.device_memory_bytes()
    compiled, remat, _ = compile_step(config, [mesh], memory_budget, lambda _: (state, batch))
    seconds = time.perf_counter() - start_time
    if jax.process_index() == 0:
        summary = compilation.summary(compiled, remat, flops_per_clip * config.batch_size, mesh)
        print(f"compiled the step in {seconds:.1f} s: {summary}", flush=True)
    return Run(corpus, state, compiled, validation_batch, flops_per_clip, mesh)


def add_responses(config: Config, checked: Preflight, llm: llama.Llama, mesh: Mesh) -> None:
    """Generate the teacher's responses: as long as the recipe distils for the training clips (none
    if it distils only the state before the first token), whole ones for the validation clips."""
    corpora = [
        (checked.corpus, teacher_responses.max_tokens(config.response_tokens)),
        (checked.validation, teacher_responses.MAX_RESPONSE),
    ]
    for corpus, max_new_tokens in corpora:
        if corpus and max_new_tokens > 1:
            corpus.precomputed |= teacher_responses.generate_responses(
                llm,
                checked.chat.stop_ids,
                checked.template,
                corpus=corpus,
                config=config,
                mesh=mesh,
                max_new_tokens=max_new_tokens,
            )


# ------------------------------------------------------------------------------------------ the run


def train(config: Config, meshes: list[Mesh]) -> tuple[int, str]:
    """Train from the newest checkpoint to `config.steps`, and export the finished student.

    Returns the number of steps done, and the name of the signal that asked to stop, if any.
    """
    run = prepare_run(config, meshes)
    params, opt_state, frozen = run.state
    out = epath.Path(config.out)
    checkpoints = record.open_checkpoints(config)

    start_step = checkpoints.latest_step() or 0
    if start_step:
        params, opt_state = record.restore(checkpoints, start_step, params, opt_state)
        print(f"resuming {out} at step {start_step} of {config.steps}", flush=True)

    batches = data.batches(
        run.corpus,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        **sharding.process(),
    )
    log = record.Log(config, start_step, run.flops_per_clip, STAGES, run.corpus.undecodable)
    step = saved_step = start_step
    end_step = min(config.steps, config.until or config.steps)

    with record.Stop() as stop, record.closing(log, checkpoints):
        while step < end_step and not stop.before(step):
            fetch_start = time.perf_counter()
            batch = sharding.shard_host_batch(next(batches), run.mesh)
            data_wait = time.perf_counter() - fetch_start

            # Dispatches the step and returns at once: the device computes while the host goes on.
            params, opt_state, metrics = run.train_step(
                params, opt_state, frozen, batch, np.int32(step)
            )
            is_validated = step == 0 or (step + 1) % config.validation_every == 0
            if run.validation_batch is not None and is_validated:
                metrics |= validate(params, frozen, run.validation_batch, run.mesh)

            log.read()  # the metrics of the previous step: reading this one's would stall
            log.hold(step, metrics, data_wait)
            step += 1

            if config.profile and step - start_step in (10, 13):
                log.read()  # waits, so that the trace holds three whole steps
                record.profile(out, step - start_step == 10)
            if step % config.save_every == 0:
                log.settle()  # raises if the state is not finite: it is then not saved
                record.save(checkpoints, step, params, opt_state)
                saved_step = step

        log.settle()
        if step > saved_step:
            record.save(checkpoints, step, params, opt_state)

    if step == config.steps:
        export(config, eqx.combine(params, frozen.diva))
    return step, stop.asked


def export(config: Config, diva: connector.DiVA) -> None:
    """Write the finished student in the published layout, from process 0."""
    diva = eqx.tree_at(lambda d: d.connector, diva, sharding.gather_to_host(diva.connector))
    if jax.process_index() == 0:
        save = functools.partial(connector.save, diva, asr_path=config.whisper, llm_path=config.llm)
        record.export(epath.Path(config.out), save, ("config.json", "model.safetensors"))


def run(config: Config) -> None:
    """A whole run: train or resume, export, plot, evaluate. Finished parts are not repeated."""
    from evaluation.tasks import read_tasks  # above: only a run that ends in an evaluation needs it

    original_config, out = config, epath.Path(config.out)
    if files.in_bucket(out):
        record.look_into(out)
    config = with_dtype(config, jax.default_backend())
    meshes = sharding.candidate_meshes(config.batch_size, config.fsdp)
    if config.tasks:  # refuse wrong tasks now, not after hours of training
        sharding.from_process_0(lambda: len(read_tasks([config.tasks])))

    recipe = dataclasses.asdict(recipe_of(config))
    is_finished = sharding.from_process_0(lambda: record.is_finished(out, recipe))
    is_main_process = jax.process_index() == 0
    if is_finished and is_main_process:
        print(f"{out} is finished ({config.steps} steps); choose another --out to train anew")
    if not is_finished:
        steps, signal_name = train(config, meshes)
        if steps < config.steps:
            if is_main_process:
                reason = signal_name or "--until"
                print(f"stopped at step {steps} of {config.steps} ({reason}); saved. Resume with:")
                print(f"  {resume_command(original_config)}", flush=True)
            return
    report(config, out, is_main_process)


def report(config: Config, out: epath.Path, is_main_process: bool) -> None:
    """Plot the losses of a finished run and evaluate its student; all processes evaluate."""
    import eval as evaluation  # above: see run

    if is_main_process:
        curve = record.plot(out)
        print(f"student   {out / 'model.safetensors'}\nlosses    {curve}, {out / 'metrics.jsonl'}")
    is_evaluated = sharding.from_process_0((out / "eval.json").exists)
    if is_evaluated and is_main_process:
        print(evaluation.report.table(files.read_json(out / "eval.json")))
    elif config.tasks and not is_evaluated:
        evaluation.evaluate(config.out, [config.tasks])
    if is_main_process and not files.in_bucket(out):
        print(f"nearest tokens of a clip: python connector.py CLIP --model {out}")


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
