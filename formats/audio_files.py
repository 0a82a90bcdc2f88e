"""Recording: a file becomes samples, 16 kHz mono, whatever it was, and all that it holds.

A header's length is a hint: joined MP3s carry that of the first, a pipe leaves it open, a download
breaks off. The decoder believes it, so it is put right, or the file refused, before one listens.

Axes: B batch, S audio samples.
Reads: containers.py, files.py, parquet.py.   Read next: sharding.py.
"""

import contextlib
import io
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from jaxtyping import Float, Float32

from formats import containers, parquet
from runtime import files

SAMPLE_RATE = 16_000
RATES = 1_000, 768_000  # samples a second that are believed
BLOCK = 1 << 22  # samples that are decoded at a time, all channels together
FRAME = SAMPLE_RATE // 50  # samples whose loudness is judged together, 20 ms
LARGEST = 1 << 30  # bytes of a file: ten windows of 30 s in studio quality are a third of it
# Codecs overshoot full scale by half of it, a hot mix in floats by a few times. A voice that is not
# scaled reaches a hundred in integers of 8 bits, and thousands in those of 16.
LOUDEST = 8.0
UNTOLD = 86_400  # seconds: a header that says more is one of a stream, and says nothing
MAX_MISSING_SECONDS = 0.1  # of an MP4 or WebM: a codec's delay, and timestamps in milliseconds
LOST = 2 * 1152  # samples of two MP3 frames: cut out of a stream, the first refer to what is gone

log = logging.getLogger(__name__)


class _Forward(sf.SoundFile):
    """Is read to its end: where it could seek, soundfile itself would stop at the header's."""

    def seekable(self) -> bool:
        return False


def load(path: str | Path, longest: float = math.inf, limit: str = "") -> Float32[np.ndarray, "S"]:
    """Decode a file, or a row of a table in parquet, to 16 kHz mono, full scale at 1; any rate and
    channel count, and all of it.

    Raises FileNotFoundError, or ValueError for what is unreadable, empty, not finite, out of scale,
    not as long as its header says, or longer than `longest` seconds (`limit` says why that); of
    such a file no more is decoded.
    """
    sound = parquet.sound(str(path)) if parquet.is_row(path) else Path(path)
    return _load(path, sound, longest, limit or f"the model's window of {longest:g} s")


def _load(
    name: str | Path, sound: str | Path | bytes, longest: float, limit: str
) -> Float32[np.ndarray, "S"]:
    try:
        content, heard = sound if isinstance(sound, bytes) else _content(Path(sound)), []
        if _is_mp4_or_webm(content):
            return _resampled(*_decode_with_ffmpeg(content, longest, limit))
        for part in containers.parts(content):
            promised, room = containers.mend(part), longest - sum(map(len, heard)) / SAMPLE_RATE
            with _readable(sound if part == content else part) as it, _Forward(it) as file:
                heard.append(_resampled(*_decode(file, promised, room, limit)))
    except (sf.SoundFileError, RuntimeError, TypeError) as error:  # TypeError: raw samples
        reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
        raise ValueError(
            f"{name}: not audio that can be decoded ({reason}); expected MP3, FLAC, Ogg or WAV. "
            "Convert or remove the file."
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return np.concatenate(heard)


def _resampled(samples: Float32[np.ndarray, "any"], rate: int) -> Float32[np.ndarray, "S"]:
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly  # takes a second: only who resamples waits for it

        # Polyphase with a low-pass below the lower of the two Nyquist rates: no aliases.
        common = math.gcd(rate, SAMPLE_RATE)
        samples = resample_poly(samples, SAMPLE_RATE // common, rate // common)
    return samples.astype(np.float32)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected an audio file. Check the path.")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{size:,} bytes; expected at most {LARGEST:,}. Split it at a pause.")
    return path.read_bytes()


@contextlib.contextmanager
def _readable(sound: str | Path | bytes | bytearray) -> Iterator[str | Path | io.BytesIO]:
    """What libsndfile reads: a file by its name; else what it holds, and of an MP3 a copy, since
    libsndfile 1.2 looks in memory for frames from the 13th byte on."""
    if not isinstance(sound, bytes | bytearray):
        yield sound
    elif sound[:1] == b"\xff" or sound[:3] == b"ID3":
        with tempfile.NamedTemporaryFile(suffix=".mp3") as copy:
            copy.write(sound)
            copy.flush()
            yield copy.name
    else:
        yield io.BytesIO(sound)


def _decode(
    file: _Forward, promised: int | None, longest: float, limit: str
) -> tuple[Float32[np.ndarray, "S"], int]:
    """All samples, channels averaged, and their rate. Raises ValueError without the file's name."""
    rate, promised = file.samplerate, promised or file.frames
    most = max(1, min(BLOCK // file.channels, promised + 1))  # one more, to see the end
    mp3 = file.format == "MP3"
    if file.format not in containers.FORMATS or file.subtype.startswith("MPEG") != mp3:
        raise ValueError(
            f"a length that cannot be checked ({file.format_info}, {file.subtype_info}); expected "
            "MP3, FLAC, Ogg or WAV. Convert the file."
        )
    samples = _checked_mono(_blocks(file, most), rate, longest, limit)
    total = len(samples)
    promised = promised if promised < UNTOLD * rate else total
    if not 0 <= promised - total <= (LOST if mp3 else 0):
        raise ValueError(
            f"{total / rate:.3f} s could be decoded; its header says {promised / rate:.3f} s. It "
            "was cut, joined or damaged: copy or download it again, or convert it."
        )
    return samples, rate


def _blocks(file: _Forward, size: int) -> Iterator[Float32[np.ndarray, "S channels"]]:
    """Blocks of `size` samples up to the end of the file; the last one is shorter."""
    block = range(size)
    while len(block) == size:
        block = file.read(size, dtype="float32", always_2d=True)
        yield block


def _checked_mono(
    blocks: Iterable[Float32[np.ndarray, "S channels"]], rate: int, longest: float, limit: str
) -> Float32[np.ndarray, "S"]:
    """Average the channels and join the blocks. Raises ValueError for samples that are not finite,
    out of scale, or longer than `longest` seconds, and for an unlikely sample rate."""
    parts, total = [], 0
    for block in blocks:
        if not np.isfinite(block).all():
            raise ValueError("holds NaN or infinity; expected samples in [-1, 1]. Remove it.")
        if (peak := np.abs(block).max(initial=0)) > LOUDEST:
            raise ValueError(
                f"holds a sample of {peak:,.6g}; expected samples in [-1, 1]. Scale them: integers "
                "of 16 bits that were written as floats are to be divided by 32768."
            )
        parts.append(block.mean(axis=1))
        total += len(block)
        if total > longest * rate + 1e-6:  # the rounding of what is left for a later part
            raise ValueError(f"longer than {limit}; expected at most that. Split it at a pause.")

    if not RATES[0] <= rate <= RATES[1]:  # a header may say anything, and resampling would try
        raise ValueError(
            f"{rate} samples a second; expected {RATES[0]} to {RATES[1]}. Convert the file."
        )
    if not total:
        raise ValueError("no samples; expected audio. Record it again or remove it.")
    return np.concatenate(parts)


def _is_mp4_or_webm(content: bytes) -> bool:
    """MP4, M4A and MOV, or WebM and Matroska: the containers that FFmpeg decodes instead of
    libsndfile."""
    return content[4:8] == b"ftyp" or content[:4] == b"\x1a\x45\xdf\xa3"


@contextlib.contextmanager
def _open_with_ffmpeg(source: io.BufferedIOBase) -> Iterator[tuple[Any, float | None]]:
    """The container, and the seconds of its first audio stream by its header (None: unknown).

    Raises ValueError, also for an error of FFmpeg within the block.
    """
    import av  # loads FFmpeg's libraries: only who has such a file waits for it

    av.logging.set_level(None)  # FFmpeg writes nothing to the console: errors are raised
    try:
        with av.open(source) as container:
            if not container.streams.audio:
                raise ValueError("no audio stream; expected audio. Record it again or remove it.")
            stream = container.streams.audio[0]
            header_seconds = None
            if stream.duration:
                header_seconds = float(stream.duration * stream.time_base)
            elif container.duration and not container.streams.video:
                header_seconds = container.duration / av.time_base
            yield container, header_seconds
    except av.FFmpegError as error:
        raise ValueError(
            f"not audio that can be decoded ({error.strerror}). It was cut or damaged: copy or "
            "download it again, or convert it."
        ) from error


def _decode_with_ffmpeg(
    content: bytes, longest: float, limit: str
) -> tuple[Float32[np.ndarray, "S"], int]:
    """All samples of the first audio stream, channels averaged, and their rate.

    Raises ValueError without the file's name.
    """
    import av

    with _open_with_ffmpeg(io.BytesIO(content)) as (container, header_seconds):
        rate = container.streams.audio[0].rate
        to_float = av.AudioResampler(format="fltp", rate=rate)

        def blocks() -> Iterator[Float32[np.ndarray, "S channels"]]:
            num_samples = 0
            for frame in container.decode(audio=0):
                for converted in to_float.resample(frame):
                    num_samples += converted.samples
                    yield converted.to_ndarray().T

            seconds = num_samples / rate
            if header_seconds is not None and seconds < header_seconds - MAX_MISSING_SECONDS:
                raise ValueError(
                    f"{seconds:.3f} s could be decoded; its header says {header_seconds:.3f} s. It "
                    "was cut or damaged: copy or download it again, or convert it."
                )

        return _checked_mono(blocks(), rate, longest, limit), rate


def seconds(sound: str | Path | bytes) -> float:
    """How long a file is, or what one held, without decoding it: by its header, unless that would
    be a guess.

    Raises what soundfile raises, OSError, or ValueError.
    """
    with io.BytesIO(sound) if isinstance(sound, bytes) else open(sound, "rb") as stream:
        if _is_mp4_or_webm(stream.read(8)):
            stream.seek(0)
            with _open_with_ffmpeg(stream) as (_, header_seconds):
                pass
            return header_seconds or len(_load("", sound, math.inf, "")) / SAMPLE_RATE
    with _readable(sound) as it:
        info = sf.info(it)
    if info.format == "MP3":
        with io.BytesIO(sound) if isinstance(sound, bytes) else open(sound, "rb") as stream:
            if samples := containers.uncounted(stream):
                return samples / info.samplerate
    if 0 < info.frames < UNTOLD * info.samplerate:
        return info.duration
    return len(_load("", sound, math.inf, "")) / SAMPLE_RATE


def seconds_in(table: str) -> list[float]:
    """How long each row of a table in parquet is, read once from end to end; 0 where its header
    does not say. Raises ValueError if it cannot be read."""
    found = []
    for name, row in parquet.rows(Path(table), ["audio"]):
        try:
            found.append(seconds(parquet.held(name, row["audio"])))
        except (sf.SoundFileError, RuntimeError, OSError, ValueError):
            found.append(0.0)
    return found


def seconds_by_table(audio: Iterable[str]) -> dict[str, float]:
    """Of those files that Common Voice's clip_durations.tsv lists, beside their folder."""
    known, bad = {}, []
    for folder in {os.path.dirname(os.path.dirname(name)) for name in audio}:
        if (table := Path(folder, "clip_durations.tsv")).is_file():
            for where, row in files.table(table, (), bad, **files.TSV):
                name, ms, *_ = [*row.values(), "", ""]
                if ms.isdecimal():
                    known[os.path.join(folder, "clips", name)] = int(ms) / 1000
                else:
                    bad.append((where, "without milliseconds"))
    if bad:
        log.warning("clips will be opened, for want of a duration: %s", files.left_out(bad))
    return known


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


def windows(
    path: str | Path, window: int, long: bool = False, live: bool = False, most: int = 120
) -> Float32[np.ndarray, "parts S"]:
    """What is said in a file, in rows of `window` samples. One that is longer, silence at its ends
    aside, is refused, or, if `long`, split at its quietest moments: `most` windows, an hour if they
    have 30 s. Of a `live` one the ends are cut in any case: one clicks before one speaks.

    Raises FileNotFoundError or ValueError by name, also where nothing is said.
    """
    seconds = window / SAMPLE_RATE
    limit = f"the model's window of {seconds:g} s, and than the {most * seconds:g} s"
    samples = load(path, most * seconds, f"{limit} that --long splits")
    if nothing(samples):
        raise ValueError(
            f"{path}: nothing was heard (loudest sample {np.abs(samples).max():.1g}); "
            "expected speech. Check the microphone and record it again."
        )
    samples = trim(samples) if live or len(samples) > window else samples
    if len(samples) > window and not long:
        raise ValueError(
            f"{path}: {len(samples) / SAMPLE_RATE:.1f} s of speech; expected at most the "
            f"model's window of {seconds:g} s. Say less, or split it with --long."
        )
    return pad(split(samples, window), window)


def loudness(samples: Float[np.ndarray, "S"]) -> Float[np.ndarray, "frames"]:
    """Mean square of each 20 ms."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    return np.square(frames).mean(1)


def nothing(samples: Float[np.ndarray, "S"]) -> bool:
    """Is nothing said in it: silence, or no more than a faint and even noise?

    Below -80 dB, three steps of 16 bits, there is no room for a word beside their rounding. Below
    -60 dB it is heard if its moments differ: those of noise by 1 dB, those of speech by 6 and more.
    """
    loud = loudness(np.pad(samples, (0, FRAME)))
    return bool(loud.max() < 1e-8 or (loud.max() < 1e-6 and loud.max() < 2 * np.median(loud)))


def trim(samples: Float[np.ndarray, "S"]) -> Float[np.ndarray, "part"]:
    """Without what is 34 dB quieter than the loudest moment, at both ends."""
    loud = loudness(samples)
    spoken = np.flatnonzero(loud > 4e-4 * loud.max(initial=0))
    if not len(spoken):
        return samples
    return samples[FRAME * spoken[0] : FRAME * (spoken[-1] + 2)]


def split(samples: Float[np.ndarray, "S"], window: int) -> list[Float[np.ndarray, "part"]]:
    """Parts of at most `window` samples, cut at the quietest moment of a window's second half."""
    parts = []
    while len(samples) > window:
        quietest = int(loudness(samples[window // 2 : window]).argmin())
        cut = window // 2 + FRAME * quietest + FRAME // 2
        parts.append(samples[:cut])
        samples = samples[cut:]
    return [*parts, samples]
