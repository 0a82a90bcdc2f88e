"""Degrade: the same clips, harder to hear. Does distillation help or hurt where Whisper is unsure?

    python eval.py --model runs/toy --degrade babble:20 babble:10 babble:5 babble:0 reverb speed:0.9

    white:DB      noise, so many decibels below the clip's mean power
    babble:DB     four other clips of the task at once, likewise
    reverb:S      a room: noise that decays by 60 dB within S seconds (0.5) behind the direct sound
    speed:RATIO   played so much faster, and higher

Each clip is asked as it is, and once more under each condition; the conditions are the groups of
the report. The noise is drawn from the names of kind and clip alone; what is heard lies as wav in
runs/degraded, to be listened to.

Axes: S audio samples.
Reads: suites.py, formats/audio_files.py.   Read next: tasks.py.
"""

import dataclasses
import fractions
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float

from evaluation.suites import Example
from formats import audio_files
from runtime import files

FOLDER = Path("runs/degraded")
TALKERS = 4  # in a babble
KINDS = {"white": (-60, 60), "babble": (-60, 60), "reverb": (0.05, 5), "speed": (0.5, 2)}
UNITS = {"white": " dB", "babble": " dB", "reverb": " s", "speed": ""}


def parse(condition: str) -> tuple[str, float]:
    """Its kind and its number. Raises ValueError."""
    kind, _, number = condition.partition(":")
    try:
        value = float(number or ("0.5" if kind == "reverb" else "nan"))
        low, high = KINDS[kind]
    except (KeyError, ValueError):
        value, low, high = math.nan, 0, 0
    if not low <= value <= high:
        raise ValueError(
            f"--degrade {condition}: no such condition; expected white:DB or babble:DB (-60 to "
            "60), reverb:S (0.05 to 5 seconds) or speed:RATIO (0.5 to 2)."
        )
    return kind, value


def conditions(
    some: list[Example], every: list[Example], names: Sequence[str], folder: Path = FOLDER
) -> list[Example]:
    """Each of `some` clips as it is, and under each condition; what babbles are others of `every`.

    The group is the condition. What cannot be decoded stays as it is, to count as wrong.
    """
    if not names:
        return some
    found = [dataclasses.replace(example, group="as it is") for example in some]
    for name, (kind, value) in {name: parse(name) for name in names}.items():
        group = f"{kind} {value:3g}{UNITS[kind]}"  # so that 5 dB stands before 10 dB
        for example in some:
            # one noise at all its levels
            rng = np.random.default_rng(zlib.crc32(f"{kind} {Path(example.audio).name}".encode()))
            sources = [example.audio]
            if kind == "babble":
                others = sorted({e.audio for e in every} - {example.audio})
                if len(others) < TALKERS:
                    raise ValueError(
                        f"--degrade {name}: {len(others)} other clips; expected at least "
                        f"{TALKERS} to babble. Leave it out, or ask about more clips."
                    )
                sources += rng.choice(others, TALKERS, replace=False).tolist()
            try:
                audio = _made(kind, value, sources, rng, folder / name.replace(":", "-"))
            except (ValueError, OSError):
                audio = example.audio
            under = {"id": f"{example.id} {name}", "audio": audio, "group": group}
            found.append(dataclasses.replace(example, **under))
    return found


def _made(
    kind: str, value: float, sources: list[str], rng: np.random.Generator, folder: Path
) -> str:
    """The file, written unless it is there: its name tells what it was made of."""
    made_of = [(path, os.path.getsize(path), os.path.getmtime(path)) for path in sources]
    file = folder / f"{Path(sources[0]).stem}-{zlib.crc32(repr(made_of).encode()):08x}.wav"
    if not file.is_file():
        clip, *others = map(audio_files.load, sources)
        with files.atomic_write(file) as partial:
            heard = degraded(kind, value, clip, others, rng)
            soundfile.write(partial, heard, audio_files.SAMPLE_RATE, "FLOAT", format="WAV")
    return str(file)


def degraded(
    kind: str,
    value: float,
    clip: Float[np.ndarray, "S"],
    others: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> Float[np.ndarray, "S2"]:
    """The clip under a condition; as long as before, but for its speed."""
    if kind == "speed":
        from scipy.signal import resample_poly  # takes a second

        ratio = fractions.Fraction(value).limit_denominator(100)
        return resample_poly(clip, ratio.denominator, ratio.numerator)
    if kind == "reverb":
        length = math.ceil(value * audio_files.SAMPLE_RATE)
        room = rng.normal(size=length) * 10 ** (-3 * np.arange(length) / length)
        room[0] = np.linalg.norm(room[1:])  # as much of the sound comes directly as by the walls
        return _as_loud(np.convolve(clip, room)[: len(clip)], power(clip))
    if kind == "white":
        noise = rng.normal(size=len(clip))
    else:  # each talker as loud as the others, and wherever he is
        parts = [_as_loud(np.resize(other, len(clip)), 1.0) for other in others]
        noise = sum(np.roll(part, rng.integers(len(clip))) for part in parts)
    return clip + _as_loud(noise, power(clip) / 10 ** (value / 10))


def power(samples: Float[np.ndarray, "S"]) -> float:
    """The mean square."""
    return float(np.square(samples, dtype=float).mean())


def _as_loud(samples: Float[np.ndarray, "S"], wanted: float) -> Float[np.ndarray, "S"]:
    return samples * math.sqrt(wanted / max(power(samples), 1e-12))
