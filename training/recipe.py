"""Recipe: what a run is told, every field a flag of train.py.

    Recipe      models, clips, steps, rate, losses: equal recipes end in equal weights
    Config      a recipe, and what may differ when it is resumed
    PRESETS     the toy universe; a pair without a licence to accept; the published runs

Source: Held et al. 2024, section 4 and its published code.
Reads: cli.py, files.py.   Read next: cost.py.
"""

import dataclasses
import functools
from typing import Literal

from runtime import cli, files


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides the weights that come out: two runs with equal recipes end bit-identical."""

    whisper: str = "toy/whisper"  # Speech model: a folder or a Hugging Face repo id.
    llm: str = "toy/llama"  # Text model, teacher and student alike: a folder or a repo id.
    # Clips: Common Voice, LibriSpeech, JSONL, or parquet: a folder, or OWNER/NAME[/CONFIG] (Hub).
    data: str = "toy/common_voice/en"
    split: str = "train"  # Which split of it to train on.
    text_column: str | None = None  # Where parquet has the transcripts; None: text, sentence, ...
    # Virtual tokens per clip; None: as many as the Whisper decoder has positions.
    queries: int | None = None
    # Audio window in seconds, if shorter than the Whisper's; longer clips are left out.
    window: float | None = None
    steps: int = 4300  # Optimizer steps of the whole run; warm-up and cosine span them.
    batch_size: int = 512  # Clips per step, over all devices.
    learning_rate: float = 5e-5  # Peak learning rate.
    warmup: float = 0.01  # Fraction of the steps with linear warm-up.
    weight_decay: float = 0.1  # AdamW's decoupled weight decay, on every trained array.
    clip: float = 1.0  # Gradient clipping: largest global norm.
    align_weight: float = 1.0  # Weight of the token alignment loss.
    response_weight: float = 1.0  # Weight of the response distillation loss.
    # Distance of the response states: l2 (the paper), gram (a tighter bound of KL), kl (exact).
    response_loss: Literal["l2", "gram", "kl"] = "l2"
    # Hidden states of the teacher's response that are distilled: 1 (the paper), the one that
    # predicts the first token; K, those of the first K tokens; all: up to its end, at most 64.
    response_tokens: int | Literal["all"] = 1
    # Precompute the frozen activations (encoder and teacher states) once and keep them in host
    # memory, or compute them in every step; auto: precompute if they take at most 1 GB.
    precompute: Literal["auto", "always", "never"] = "auto"
    seed: int = 0  # Decides the initial queries and the order of the clips.
    # Frozen weights and compute; auto: bfloat16 on accelerators, float32 on CPU. Trained weights
    # and optimizer are float32 always.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """A run: its recipe, and what may differ when it is resumed."""

    # Where the defaults of all other flags come from.
    preset: Literal["toy", "small", "diva-1b", "diva-3b", "diva-8b"] = "toy"
    out: str | None = None  # Folder of the run; None: runs/PRESET.
    # Folder of the tasks that the finished student is evaluated on; None: no evaluation.
    tasks: str | None = None
    # Split whose first 64 clips (drawn by a fixed seed) are the validation set; where --data is a
    # file, another such file. Logs KL and nearest-token accuracy; None: no validation.
    validation: str | None = None
    validation_every: int = 100  # Steps between two validations.
    until: int | None = None  # Save and stop after this step; without it the command goes on.
    # Devices over which one copy of the frozen weights is split; 1: whole on each; None: as few as
    # memory allows. What is trained, and its optimizer, is split over 16 at most, or over as many.
    fsdp: int | None = None
    # Rematerialisation in the backward pass to save memory: attention (about 1 % more FLOPs) or
    # whole layers (about a third more); auto: attention if that fits.
    remat: Literal["auto", "attention", "layers"] = "auto"
    # Gradient accumulation: clips per device in each part of a batch; None: the whole batch.
    micro_batch: int | None = None
    # Compile the step for a slice of TPUs, such as v4:4x4x8 or v5e:8x8, without one; then report
    # memory, FLOPs, collectives and time, and end. Needs the `tpu` extra, no weights and no data.
    compile_only: str | None = None
    profile: bool = False  # Write a trace of three steps behind the tenth to OUT/profile.
    save_every: int = 500  # Steps between checkpoints.
    keep: int = 2  # How many checkpoints to keep.
    log_every: int = 20  # Steps between lines on the console; metrics.jsonl holds every step.
    # Stop when a larger share of the clips cannot be decoded (of 1,000 at least).
    max_undecodable: float = 0.01

    def __post_init__(self):
        cli.at_least(
            self,
            steps=1,
            batch_size=1,
            validation_every=1,
            save_every=1,
            keep=1,
            log_every=1,
            seed=0,
        )
        if self.response_tokens != "all":
            cli.at_least(self, response_tokens=1)
        if self.micro_batch is not None:
            cli.at_least(self, micro_batch=1)
        if self.tasks and self.out and files.in_bucket(self.out):
            raise ValueError(
                f"--tasks {self.tasks}: a student in a bucket is not evaluated. Expected --tasks "
                "None; then copy the run's folder and give it to eval.py."
            )


# The paper's recipe: Common Voice 17 English, 4,300 steps of 512 clips = two epochs.
_published = functools.partial(
    Config,
    whisper="openai/whisper-large-v3",
    data="cv-corpus-17.0-2024-03-15/en",
    save_every=100,
    log_every=10,
)
_LLAMA_3 = "meta-llama/Llama-3.{}-Instruct"

PRESETS: dict[str, Config] = {
    # The tiny LLM's states answer far more steeply to its embeddings than a real one's: at equal
    # weights the gradient of the response would drown that of the words.
    "toy": Config(
        preset="toy",
        tasks="toy/tasks",
        validation="dev",
        queries=8,
        steps=6000,
        batch_size=16,
        learning_rate=2e-3,
        align_weight=100.0,
        response_weight=3.0,
        response_tokens=4,
        save_every=1000,
        log_every=100,
    ),
    # A pair without a licence to accept, for hours on one GPU of 24 GB. LibriSpeech's sentences are
    # at most 17 s and some 60 tokens. Twenty epochs of 26,000 clips must do what two of the paper's
    # million did: hence smaller batches, more steps, the small LLMs' rate, a warm-up of 170 steps.
    "small": Config(
        preset="small",
        whisper="openai/whisper-small",
        llm="HuggingFaceTB/SmolLM2-360M-Instruct",
        data="LibriSpeech",
        split="train-clean-100",
        queries=64,
        window=16.0,
        batch_size=64,
        micro_batch=16,
        learning_rate=5e-4,
        warmup=0.02,
        steps=8600,
    ),
    "diva-1b": _published(preset="diva-1b", llm=_LLAMA_3.format("2-1B"), learning_rate=5e-4),
    "diva-3b": _published(preset="diva-3b", llm=_LLAMA_3.format("2-3B"), learning_rate=5e-4),
    "diva-8b": _published(preset="diva-8b", llm=_LLAMA_3.format("1-8B"), learning_rate=5e-5),
}


def parse(args: list[str]) -> Config:
    """The configuration of a command line: a preset, and flags that override its fields.

    Raises ValueError for models that would get the toy's recipe without a word said.
    """
    config, toy = cli.parse(PRESETS, args, "train.py"), PRESETS["toy"]
    silent = not any(arg.split("=")[0] == "--preset" for arg in args)
    if silent and (config.whisper, config.llm) != (toy.whisper, toy.llm):
        raise ValueError(
            f"--whisper {config.whisper} --llm {config.llm}: without --preset they would get the "
            f"recipe that fits the toy's models ({toy.queries} queries, rate {toy.learning_rate}, "
            f"alignment x {toy.align_weight:g}). Expected one of --preset {', '.join(PRESETS)}."
        )
    return dataclasses.replace(config, out=config.out or f"runs/{config.preset}")


def resume_command(config: Config) -> str:
    """The command line that goes on with this run."""
    return cli.line(PRESETS, config, "train.py", without=("until", "profile"))


def recipe_of(config: Config) -> Recipe:
    """The part of `config` that decides the weights."""
    return Recipe(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Recipe)})
