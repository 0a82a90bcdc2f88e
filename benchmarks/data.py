"""What feeding the model costs: `python -m benchmarks.data` (about a minute).

Makes a Common Voice folder of 10,000 clips as they are published (MP3, 48 kHz, mono, 64 kbit/s, 5.4
seconds; speech, cut together from the toy corpus), lists it twice, and reads batches through
data.py as train.py does: decoded, resampled, padded to 30 s and stacked, no clip kept in memory.

The process is held on one core, so that audio per second of wall is a core's share; on a machine
with other work, audio per second of CPU (all threads) is the figure that counts.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
import soundfile as sf
import tyro
from scipy.signal import resample_poly

import data
import llama
from formats import audio_files

TOY = Path(__file__).parents[1] / "toy"
CLIPS = 10_000
DIFFERENT = 40  # recordings; the other clips are links to them
SECONDS = 5.4  # mean of Common Voice 17, English
WINDOW = 30 * audio_files.SAMPLE_RATE
BATCH = 16
STEPS = 20  # batches that are timed at a time
RUNS = 5


def make(folder: Path) -> None:
    """A Common Voice folder: train.tsv, clips/*.mp3, and no table of durations."""
    (folder / "clips").mkdir()
    toy = itertools.cycle(data.read_clips(TOY / "common_voice" / "en"))
    length, recordings = round(SECONDS * audio_files.SAMPLE_RATE), []
    for n in range(DIFFERENT):
        said, samples = [], np.zeros(0, np.float32)
        while len(samples) < length:
            clip = next(toy)
            said.append(clip.text)
            samples = np.concatenate([samples, audio_files.load(clip.audio)])
        file = folder / f"{n}.mp3"
        up = resample_poly(samples[:length], 3, 1)
        level = 0.89  # of compression: 64 kbit/s
        sf.write(file, up, 48_000, bitrate_mode="CONSTANT", compression_level=level)
        recordings.append((file, " ".join(said)))
    rows = ["client_id\tpath\tsentence\tup_votes\tdown_votes\taccents\tlocale"]
    for n in range(CLIPS):
        file, text = recordings[n % DIFFERENT]
        os.link(file, folder / "clips" / f"{n}.mp3")
        rows.append(f"v{n % 500}\t{n}.mp3\t{text}\t2\t0\tEngland English\ten")
    (folder / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def prepare(folder: Path) -> data.Corpus:
    """As train.py does: with the LLM's own tokenizer."""
    chat = llama.Chat.load(TOY / "llama")
    return data.prepare(data.read_clips(folder), chat.encode_batch, WINDOW, 448)


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall, and of CPU over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def starts(folder: Path) -> tuple[float, float]:
    """Seconds of wall to list and filter all clips: the first time, and with what is kept of it."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        first, second = (timed(lambda: prepare(folder))[0] for _ in range(2))
    return first, second


def speeds(corpus: data.Corpus) -> list[tuple[float, float]]:
    """Seconds of audio per second of wall and of CPU, of RUNS stretches of one endless reading."""
    result = []
    with closing(data.batches(corpus, batch_size=BATCH, seed=0)) as batches:
        next(batches)  # the threads are up
        for _ in range(RUNS):
            wall, cpu = timed(lambda: [next(batches) for _ in range(STEPS)])
            audio = STEPS * BATCH * SECONDS
            result.append((audio / wall, audio / cpu))
    return result


def decoding(clip: data.Clip) -> float:
    """Seconds of CPU to decode and resample one clip."""
    return timed(lambda: audio_files.load(clip.audio))[1]


def main(clips_per_host_per_step: int = 16, step_seconds: float = 0.3) -> None:
    """The figures, and the cores that one host needs for its part of a training step.

    Args:
        clips_per_host_per_step: clips that one host feeds to its chips in a step.
        step_seconds: how long the chips take for it.
    """
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    data.IN_MEMORY = 0
    with tempfile.TemporaryDirectory(prefix="voice-") as name:
        make(Path(name))
        first, second = np.median([starts(Path(name)) for _ in range(3)], axis=0)
        os.environ["XDG_CACHE_HOME"] = name
        corpus = prepare(Path(name))
        wall, cpu = np.median(speeds(corpus), axis=0)
        alone = median(SECONDS / decoding(clip) for clip in corpus.clips[:200])
    needed = clips_per_host_per_step * SECONDS / step_seconds
    print(f"""\
| one core | |
|---|--:|
| decode, resample, pad, batch: hours of audio per hour of CPU | {cpu:,.0f} |
| the same per hour of wall | {wall:,.0f} |
| decode and resample alone, per hour of CPU | {alone:,.0f} |
| {CLIPS:,} clips listed and filtered, first start | {first:.2f} s |
| the same, second start | {second:.2f} s |

A host that feeds {clips_per_host_per_step} clips every {step_seconds:g} s needs {needed:,.0f} \
hours of audio an hour: {needed / cpu:.2f} cores.""")


if __name__ == "__main__":
    tyro.cli(main)
