"""Recording: a file becomes samples, 16 kHz mono, whatever it was.

Axes: B batch, S audio samples.
Reads: nothing of ours.   Read next: sharding.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile as sf
from jaxtyping import Float32
from scipy.signal import resample_poly

SAMPLE_RATE = 16_000
RATES = 1_000, 768_000  # samples a second that are believed
BLOCK = 1 << 22  # samples that are decoded at a time, all channels together


def load(path: str | Path, longest: float = math.inf) -> Float32[np.ndarray, "S"]:
    """Decode a file to 16 kHz mono in [-1, 1]; any rate and channel count.

    Raises FileNotFoundError, or ValueError for what is unreadable, empty, not finite, or longer
    than `longest` seconds; of such a file no more is decoded, whatever its header says.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; expected an audio file. Check the path.")
    parts, total = [], 0
    try:
        with sf.SoundFile(path) as file:
            rate, most = file.samplerate, max(1, BLOCK // file.channels)
            while len(block := file.read(most, dtype="float32", always_2d=True)):
                parts.append(block.mean(axis=1))
                total += len(block)
                if total > longest * rate:
                    break
    except (sf.SoundFileError, RuntimeError, TypeError) as error:  # TypeError: raw samples
        reason = str(error).strip().rstrip(".")
        raise ValueError(
            f"{path}: not audio that can be decoded ({reason}); expected MP3, FLAC, Ogg or WAV. "
            "Convert or remove the file."
        ) from error
    if total > longest * rate:
        raise ValueError(
            f"{path}: longer than the model's window of {longest:g} s; expected at most that. "
            "Split it at a pause."
        )
    if not RATES[0] <= rate <= RATES[1]:  # a header may say anything, and resampling would try
        raise ValueError(
            f"{path}: {rate} samples a second; expected {RATES[0]} to {RATES[1]}. Convert the file."
        )
    if not total:
        raise ValueError(f"{path}: no samples; expected audio. Record it again or remove it.")
    samples = np.concatenate(parts)
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: holds NaN or infinity; expected samples in [-1, 1]. Remove it.")
    if rate != SAMPLE_RATE:
        # Polyphase with a low-pass below the lower of the two Nyquist rates: no aliases.
        common = math.gcd(rate, SAMPLE_RATE)
        samples = resample_poly(samples, SAMPLE_RATE // common, rate // common)
    return samples.astype(np.float32)


def pad(audio: Sequence[np.ndarray], window: int) -> Float32[np.ndarray, "B S"]:
    """Stack clips, silence behind each. Raises ValueError for one longer than the window."""
    batch = np.zeros((len(audio), window), np.float32)
    for row, samples in zip(batch, audio, strict=True):
        if len(samples) > window:
            raise ValueError(
                f"a clip has {len(samples) / SAMPLE_RATE:.2f} s; expected at most the model's "
                f"window of {window / SAMPLE_RATE:g} s. Split it at a pause."
            )
        row[: len(samples)] = samples
    return batch


def load_window(path: str | Path, window: int) -> Float32[np.ndarray, "1 S"]:
    """A file as one row, padded to the window. Raises as `load` and `pad` do, by name."""
    samples = load(path, longest=window / SAMPLE_RATE)
    try:
        return pad([samples], window)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
