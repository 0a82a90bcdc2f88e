"""Record: what a run writes down, so that it can be watched, stopped and resumed.

    metrics.jsonl, loss.png     of every step its losses, its time, and what it made of the chips
    checkpoints/STEP            trained arrays and optimizer: whole or absent (Orbax)
    train.json, clips.json ...  what run this is: another one is refused
    SIGTERM, Ctrl-C             a wish to stop, heard between two steps

A folder may lie on a disk or in a bucket (gs://...). Of several processes the first one writes, but
for checkpoints, to which each adds its part; all of them read, and stop together.

Reads: cost.py, files.py, sharding.py.   Read next: evaluation/suites.py.
"""

import contextlib
import io
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array
from safetensors import SafetensorError
from tqdm import tqdm

from runtime import cli, files, sharding
from training import cost

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs each error it also raises

# ---------------------------------------------------------------------------------------- the files


def look_into(bucket: epath.Path) -> None:
    """Raises ValueError if a folder in a bucket cannot be read, before anything else is done."""
    try:
        bucket.exists()
    except Exception as error:  # gcsfs, its transport and its login have no common ancestor
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--out {bucket}: cannot be read ({reason}). Expected a bucket that this machine may "
            "write to: pip install '.[gcs]', and log in with `gcloud auth application-default "
            "login` (TPU VMs are logged in)."
        ) from error


@contextlib.contextmanager
def writing(where: Any) -> Iterator[None]:
    """Turn what a full or read-only disk raises (tensorstore: a bare ValueError) into a message."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1]
        if jax.process_count() > 1 and "barrier" in reason:  # where all wait for all
            raise OSError(cli.ALONE.format(reason)) from error
        raise OSError(
            f"{where}: could not be written ({reason}). Older checkpoints are whole. Free some "
            "space or permit writing, then start the same command again; or choose another --out."
        ) from error


@contextlib.contextmanager
def closing(log: "Log", manager: ocp.CheckpointManager) -> Iterator[None]:
    """However the run ends: its log is written, and what began to be saved is saved."""
    try:
        yield
    finally:
        log.close()
        with writing(manager.directory):
            manager.close()


# ------------------------------------------------------------------------------------------ the log


class Log:
    """Reads the metrics of each step one step late, so that reading never stalls the device.

    Every process reads, since each must stop when the run goes wrong; the first one also writes.
    """

    def __init__(
        self,
        config: Any,
        start: int,
        work: float,
        parts: tuple[str, ...],
        undecodable: dict[str, str],
    ):
        """`work`: FLOPs of one clip, by hand; `parts`: what the step's `finite` speaks of;
        `undecodable`: {clip: reason}, which grows while clips are read."""
        self.config, self.parts, self.undecodable, self.pending = config, parts, undecodable, None
        self.seen = self.lost = 0  # clips since this start; those of them without usable audio
        self.heard = start > 0  # no checkpoint is written before a clip was
        self.file = epath.Path(config.out) / "metrics.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        # line i is step i; what follows the checkpoint will be done again
        self.lines, self.changed = lines[:start], len(lines) > start
        self.writes = jax.process_index() == 0
        hidden = not self.writes or not sys.stderr.isatty()
        self.bar = tqdm(total=config.steps, initial=start, disable=hidden)
        self.began = self.last = time.perf_counter()
        self.first = start
        chip = cost.CHIPS.get(jax.devices()[0].device_kind)
        # seconds of a step at the chips' peak; None where the chip is not known
        self.ideal = work * config.batch_size / jax.device_count() / chip.flops if chip else None

    def hold(self, step: int, metrics: dict, waited: float) -> None:
        """Remember the metrics of a step that has been dispatched but may not have run yet."""
        self.pending = (step, metrics, waited)

    def read(self) -> None:
        """Wait for the remembered step, write it down, and stop the run if it went wrong.

        Raises FloatingPointError (something is not finite) or ValueError (too many unusable clips).
        """
        if self.pending is None:
            return
        (step, metrics, waited), self.pending = self.pending, None
        values = jax.device_get(metrics)
        finite = values.pop("finite")
        now = time.perf_counter()
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        row |= {"seconds": round(now - self.last, 4), "data_wait": round(waited, 4)}
        self.last = now
        if not finite.all():
            self._stop_not_finite(step, self.parts[int(np.argmin(finite))], row)
        if self.ideal:
            row["mfu"] = round(self.ideal / row["seconds"], 4)
        self.lines.append(json.dumps(row))
        self.changed = True
        self._show(row)
        self._check_clips(row)

    def settle(self) -> None:
        """All that has been done is known to be good, and written down.

        Raises what `read` does, and ValueError if no clip at all was heard: that is no training.
        """
        self.read()
        self.write()
        if self.seen and not self.heard:
            self.bar.close()
            first = ", ".join([*self.undecodable][:3])
            raise ValueError(
                f"{self.config.data}: none of the first {self.seen} clips could be decoded, so "
                f"nothing was learnt and nothing is saved; the first are {first}. The log above "
                "says what is wrong with each. Mend them, or check --data."
            )

    def write(self) -> None:
        """Bring metrics.jsonl up to date: at each line shown, each checkpoint and the end."""
        if self.writes and self.changed:
            with writing(self.file):
                files.write_text(self.file, "".join(line + "\n" for line in self.lines))
        self.changed = False

    def close(self) -> None:
        self.bar.close()
        self.write()

    def _show(self, row: dict) -> None:
        config, step = self.config, row["step"]
        if step == self.first:  # the first step compiles: its time says nothing of the others
            self.began = self.last
        rate = (step - self.first) / max(self.last - self.began, 1e-9)  # steps/s
        speed = f"{rate * config.batch_size:.0f} clips/s"
        loss = {name: f"{row[name]:.4g}" for name in ("loss", "alignment", "response")}
        self.bar.set_postfix(loss | {"speed": speed}, refresh=False)
        self.bar.update()
        if (step + 1) % config.log_every and step != self.first:
            return
        self.write()
        if not self.writes or not self.bar.disable:
            return
        texts = [f"step {step + 1}/{config.steps}"]
        texts += [f"{name} {value}" for name, value in loss.items()]
        if "kl" in row:
            texts += [
                f"KL {row['kl']:.4g} nats, nearest-token acc {row['nearest_token_accuracy']:.1%}"
            ]
        texts += [f"lr {row['lr']:.2e}", f"grad_norm {row['grad_norm']:.3g}"]
        if rate:
            texts += [f"{row['seconds']:.3f} s, data {1000 * row['data_wait']:.0f} ms", speed]
            if self.ideal:
                texts.append(f"MFU {self.ideal * rate:.1%}")
            if held := (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use"):
                texts.append(f"HBM {cost.gib(held)}")
            texts.append(f"{(config.steps - step - 1) / rate:.0f} s left")
        print("  ".join(texts), flush=True)

    def _stop_not_finite(self, step: int, part: str, row: dict) -> None:
        self.bar.close()
        raise FloatingPointError(
            f"step {step}: the {part} is not finite (alignment {row['alignment']:.4g}, "
            f"response {row['response']:.4g}, gradient norm {row['grad_norm']:.4g}). Stopped; the "
            f"last good checkpoint in {self.file.parent / 'checkpoints'} is untouched. Expected "
            "finite numbers in every part: try a lower --learning-rate, or --dtype float32."
        )

    def _check_clips(self, row: dict) -> None:
        self.seen += self.config.batch_size
        self.lost += int(row["undecodable"])
        self.heard |= row["undecodable"] < self.config.batch_size
        if self.lost > self.config.max_undecodable * max(self.seen, 1000):
            self.bar.close()
            raise ValueError(
                f"{self.config.data}: {self.lost} of the first {self.seen} clips could not be "
                f"decoded; expected a share of at most {self.config.max_undecodable}. The log "
                "above names them: mend or remove them, or raise --max-undecodable."
            )


def note_baseline(out: epath.Path, alignment: float) -> None:
    """Say, and write beside the log, what the mean embedding scores: `plot` draws it."""
    if jax.process_index() == 0:
        print(f"alignment baseline (predict the mean embedding): {alignment:.4g}")
        with writing(out / "baseline.json"):
            files.write_text(out / "baseline.json", json.dumps({"alignment": alignment}) + "\n")


def plot(folder: epath.Path) -> epath.Path:
    """Draw both losses of metrics.jsonl over the steps, and the baseline of the first, if it is
    known; returns folder/loss.png."""
    from matplotlib.figure import Figure  # takes a second, which a wrong flag need not wait for

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, file = np.array([row["step"] for row in rows]), folder / "baseline.json"
    baseline = files.read_json(file) if file.is_file() else {}
    watched = [row for row in rows if "kl" in row]
    figure = Figure(figsize=(8, 9 if watched else 6), layout="constrained")
    panels = figure.subplots(3 if watched else 2, 1, sharex=True)
    titles = {
        "alignment": "token alignment: virtual tokens against transcript embeddings",
        "response": "response distillation: student's state against teacher's",
    }
    for panel, (name, title) in zip(panels, titles.items(), strict=False):
        values = np.array([row[name] for row in rows])
        width = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        panel.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
        panel.plot(
            steps[width - 1 :], smooth, color="tab:blue", label=f"mean of the last {width} steps"
        )
        if name in baseline:
            label = "baseline (predict the mean embedding)"
            panel.axhline(baseline[name], color="tab:gray", linestyle="--", label=label)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylabel("loss")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    if watched:
        _plot_watched(panels[2], watched)
    panels[-1].set_xlabel("step")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    (folder / "loss.png").write_bytes(drawn.getvalue())
    return folder / "loss.png"


def _plot_watched(panel: Any, rows: list[dict]) -> None:
    """What clips that are not trained on tell: KL at the left, words heard at the right."""
    steps, other = [row["step"] for row in rows], panel.twinx()
    title = "validation: KL of the response, nearest-token accuracy"
    panel.set_title(title, loc="left", fontsize=10)
    sides = (
        (panel, "kl", "nats", "tab:red"),
        (other, "nearest_token_accuracy", "fraction", "tab:green"),
    )
    for axis, name, unit, color in sides:
        axis.plot(steps, [row[name] for row in rows], color=color)
        axis.set_ylabel(f"{name}, {unit}", color=color)
        axis.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def profile(out: epath.Path, starts: bool) -> None:
    """Begin to trace what host and devices do, or end it; to be opened with xprof or Perfetto."""
    if starts:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # not each Python call of the threads that read clips
        jax.profiler.start_trace(out / "profile", profiler_options=options)
    else:
        jax.profiler.stop_trace()
        print(f"profile   {out / 'profile'}", flush=True)


# -------------------------------------------------------------------------------------- checkpoints


def open_checkpoints(config: Any) -> ocp.CheckpointManager:
    """The run's checkpoints: written in the background, whole or absent, the newest kept."""
    out = epath.Path(config.out)
    folder = (out if files.in_bucket(out) else out.resolve()) / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, cleanup_tmp_directories=True)
    with writing(folder):
        return ocp.CheckpointManager(folder, options=options)


def save(manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any) -> None:
    """Begin to write the state after `step` steps. Raises OSError, also for the one before it."""
    with writing(manager.directory / str(step)):
        state = {"params": params, "opt_state": opt_state}
        manager.save(step, args=ocp.args.StandardSave(state), force=True)


def restore(manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any) -> tuple:
    """The state after `step` steps, laid out like `params` and `opt_state`, on whatever devices."""

    def template(x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    wanted = jax.tree.map(template, {"params": params, "opt_state": opt_state})
    try:
        state = manager.restore(step, args=ocp.args.StandardRestore(wanted))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{manager.directory / str(step)}: not the state of this model ({error}). "
            "Remove it to go on from the one before, or choose another --out."
        ) from error
    return state["params"], state["opt_state"]


def export(out: epath.Path, save_to: Callable[[str], None], names: tuple[str, ...]) -> None:
    """Let `save_to(folder)` write the files `names`, into `out` or, if that is in a bucket, beside
    and then there: safetensors writes to local files alone."""
    with writing(out / names[-1]):
        if not files.in_bucket(out):
            save_to(str(out))
            return
        with tempfile.TemporaryDirectory() as folder:
            save_to(folder)
            for name in names:
                (epath.Path(folder) / name).copy(out / name, overwrite=True)


def claim_run(out: epath.Path, recipe: dict, clips: dict, turn: dict) -> dict[str, Any]:
    """Note in the run's folder what run it is; in one that began, see that it is the same.

    Returns the turn it began with: some templates write today's date, and the run keeps its first.
    """
    claim_everywhere(out / "train.json", recipe)
    claim_everywhere(out / "clips.json", clips)
    return claim_everywhere(out / "turn.json", turn, keep=True)


def claim_everywhere(file: epath.Path, ours: dict[str, Any], keep: bool = False) -> dict[str, Any]:
    """`claim`, by process 0 for all: what it says or raises, all of them do."""
    found = sharding.from_process_0(lambda: claim(file, ours, keep))
    if not file.exists():
        raise ValueError(
            f"{file}: process {jax.process_index()} does not see what process 0 has written there; "
            "expected one folder for all hosts. Choose a mounted or gs:// folder as --out."
        )
    if not keep and found != ours:
        raise ValueError(
            f"{file}: {ours} in process {jax.process_index()}, {found} in process 0; expected the "
            "same on every host: the same flags, and the same clips (copied anew, or mounted)."
        )
    return found


def began(out: epath.Path) -> bool:
    """Whether the folder holds anything of a run but what it was meant to be."""
    checkpoints = out / "checkpoints"
    saved = checkpoints.exists() and any(checkpoints.iterdir())
    return saved or any((out / name).exists() for name in ("metrics.jsonl", "model.safetensors"))


def is_finished(out: epath.Path, recipe: dict[str, Any]) -> bool:
    """Whether a run of this recipe has written its student there."""
    if not all((out / name).is_file() for name in ("train.json", "model.safetensors")):
        return False
    theirs = files.read_json(out / "train.json")
    return all(theirs.get(name) == value for name, value in recipe.items())


def claim(file: epath.Path, ours: dict[str, Any], keep: bool = False) -> dict[str, Any]:
    """Write down what this run is; or, where one began already, see that it is the same run.

    Returns what is written; with `keep` the old values stand, whatever the new ones are.
    Raises ValueError naming every difference, OSError if the folder cannot be written.
    """
    if file.is_file() and began(file.parent):
        theirs = files.read_json(file)
        if keep:
            return theirs
        changed = [
            f"{name} was {theirs.get(name)!r}, now {value!r}"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{file}: this folder holds another run: {'; '.join(changed)}. Expected the same "
                "values to go on with it: give them again, or choose another --out."
            )
        return theirs
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(file, json.dumps(ours, indent=2) + "\n")
    return ours


class Stop:
    """Turns the first SIGTERM (preemption) or Ctrl-C between two steps into a wish; a second one
    ends at once, as one does before the first step, when there is nothing to save yet.

    Of several processes a preemption may reach only one: there JAX listens for SIGTERM and makes
    them agree on the step to stop at.
    """

    def __enter__(self) -> "Stop":
        self.asked, alone = "", jax.process_count() == 1
        signals = (signal.SIGTERM, signal.SIGINT) if alone else ()
        self.old = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def before(self, step: int) -> bool:
        """Whether to stop before this step; the same answer in every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.asked = signal.SIGTERM.name
        return bool(self.asked)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            signal.signal(number, self.old[signal.Signals(number)])
            signal.raise_signal(number)
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
