"""Load any audio file as 16 kHz mono float samples, all of them.

A length in a header cannot be trusted: joined MP3s carry the length of the first one, a pipe writes
none, an interrupted download is shorter. The decoder trusts it, so containers.py corrects the
header first, or refuses the file. FFmpeg decodes the containers that libsndfile cannot open.

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
RATES = 1_000, 768_000  # accepted sample rates in Hz
BLOCK = 1 << 22  # samples decoded at a time, over all channels
FRAME = SAMPLE_RATE // 50  # samples of a loudness frame, 20 ms
LARGEST = 1 << 30  # bytes of a file; ten windows of 30 s in studio quality are a third of it
# Largest accepted sample. Codecs exceed full scale by half, a hot mix in floats by a few times;
# unscaled speech reaches a hundred in 8-bit integers and thousands in 16-bit integers.
MAX_ABS_SAMPLE = 8.0
MAX_HEADER_SECONDS = 86_400  # a header with a longer duration is that of a stream of unknown length
MAX_MISSING_SECONDS = 0.1  # of an MP4 or WebM: a codec's delay, and timestamps in milliseconds
MAX_MISSING_FRAMES = 2 * 1152  # samples of two MP3 frames: the first frames of a cut-out part
# refer to data before the cut

log = logging.getLogger(__name__)


class _SequentialSoundFile(sf.SoundFile):
    """A file that is read to its end. If it can seek, soundfile stops at the header's length."""

    def seekable(self) -> bool:
        return False


def load(path: str | Path, longest: float = math.inf, limit: str = "") -> Float32[np.ndarray, "S"]:
    """Decode an audio file, or a row of a parquet table, to 16 kHz mono with full scale at 1.

    Args:
        longest: seconds; decoding stops where a file is longer.
        limit: what `longest` stands for, for the error message.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the audio is unreadable, empty, not finite, out of scale, longer than `longest`
            or not as long as its header says.
    """
    source = parquet.sound(str(path)) if parquet.is_row(path) else Path(path)
    limit = limit or f"the model's window of {longest:g} s"
    return _load(path, source, longest=longest, limit=limit)


def _load(
    name: str | Path, source: str | Path | bytes, longest: float, limit: str
) -> Float32[np.ndarray, "S"]:
    """`load`, from a path or from the bytes of a file; `name` is for the error messages."""
    try:
        content = source if isinstance(source, bytes) else _read_bytes(Path(source))
        if _is_mp4_or_webm(content):
            return _resample(*_decode_with_ffmpeg(content, longest=longest, limit=limit))

        recordings, seconds_left = [], longest
        for part in containers.split_concatenated_mp3(content):
            header_frames = containers.fix_header(part)
            with (
                _sndfile_input(source if part == content else part) as readable,
                _SequentialSoundFile(readable) as file,
            ):
                samples, rate = _decode(file, header_frames, longest=seconds_left, limit=limit)
            recordings.append(_resample(samples, rate))
            seconds_left = longest - sum(map(len, recordings)) / SAMPLE_RATE
        return np.concatenate(recordings)
    except (sf.SoundFileError, RuntimeError, TypeError) as error:  # TypeError: raw samples
        reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
        raise ValueError(
            f"{name}: not audio that can be decoded ({reason}); expected MP3, FLAC, Ogg or WAV. "
            "Convert or remove the file."
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _resample(samples: Float32[np.ndarray, "any"], rate: int) -> Float32[np.ndarray, "S"]:
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly  # a slow import, so only when needed

        # Polyphase with a low-pass below the lower of the two Nyquist rates: no aliases.
        common = math.gcd(rate, SAMPLE_RATE)
        samples = resample_poly(samples, SAMPLE_RATE // common, rate // common)
    return samples.astype(np.float32)


def _read_bytes(path: Path) -> bytes:
    """The whole file. Raises ValueError if it is larger than LARGEST."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected an audio file. Check the path.")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{size:,} bytes; expected at most {LARGEST:,}. Split it at a pause.")
    return path.read_bytes()


@contextlib.contextmanager
def _sndfile_input(source: str | Path | bytes | bytearray) -> Iterator[str | Path | io.BytesIO]:
    """What soundfile opens: the path itself, or a stream of the bytes.

    The bytes of an MP3 are written to a temporary file, since libsndfile 1.2 searches a stream in
    memory for frames from the 13th byte on.
    """
    if not isinstance(source, bytes | bytearray):
        yield source
    elif source[:1] == b"\xff" or source[:3] == b"ID3":
        with tempfile.NamedTemporaryFile(suffix=".mp3") as copy:
            copy.write(source)
            copy.flush()
            yield copy.name
    else:
        yield io.BytesIO(source)


def _decode(
    file: _SequentialSoundFile, header_frames: int | None, longest: float, limit: str
) -> tuple[Float32[np.ndarray, "S"], int]:
    """All samples, channels averaged, and their rate. Raises ValueError without the file's name."""
    rate, is_mp3 = file.samplerate, file.format == "MP3"
    header_frames = header_frames or file.frames

    if file.format not in containers.FORMATS or file.subtype.startswith("MPEG") != is_mp3:
        raise ValueError(
            f"a length that cannot be checked ({file.format_info}, {file.subtype_info}); expected "
            "MP3, FLAC, Ogg or WAV. Convert the file."
        )

    # One sample more than the header's number, so that the first read reaches the end.
    block_size = max(1, min(BLOCK // file.channels, header_frames + 1))
    samples = _checked_mono(_blocks(file, block_size), rate, longest=longest, limit=limit)
    total = len(samples)

    if header_frames >= MAX_HEADER_SECONDS * rate:
        header_frames = total
    if not 0 <= header_frames - total <= (MAX_MISSING_FRAMES if is_mp3 else 0):
        raise ValueError(
            f"{total / rate:.3f} s could be decoded; its header says {header_frames / rate:.3f} s. "
            "It was cut, joined or damaged: copy or download it again, or convert it."
        )
    return samples, rate


def _blocks(file: _SequentialSoundFile, size: int) -> Iterator[Float32[np.ndarray, "S channels"]]:
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
        if (peak := np.abs(block).max(initial=0)) > MAX_ABS_SAMPLE:
            raise ValueError(
                f"holds a sample of {peak:,.6g}; expected samples in [-1, 1]. Scale them: integers "
                "of 16 bits that were written as floats are to be divided by 32768."
            )
        parts.append(block.mean(axis=1))
        total += len(block)
        if total > longest * rate + 1e-6:  # seconds_left is rounded
            raise ValueError(f"longer than {limit}; expected at most that. Split it at a pause.")

    if not RATES[0] <= rate <= RATES[1]:  # resampling has no such limit
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
    import av  # loads FFmpeg's libraries, so only when needed

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

        return _checked_mono(blocks(), rate, longest=longest, limit=limit), rate


def seconds(source: str | Path | bytes) -> float:
    """Duration of an audio file, given by path or as bytes: read from the header, without decoding,
    unless the header does not hold a reliable length.

    Raises soundfile's errors, OSError, or ValueError.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
        if _is_mp4_or_webm(stream.read(8)):
            stream.seek(0)
            with _open_with_ffmpeg(stream) as (_, header_seconds):
                pass
            return header_seconds or _decoded_seconds(source)

    with _sndfile_input(source) as readable:
        info = sf.info(readable)

    # Without a frame count in an MP3, libsndfile estimates its length from the first frame.
    if info.format == "MP3":
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            if samples := containers.count_mp3_samples(stream):
                return samples / info.samplerate

    if 0 < info.frames < MAX_HEADER_SECONDS * info.samplerate:
        return info.duration
    return _decoded_seconds(source)


def _decoded_seconds(source: str | Path | bytes) -> float:
    return len(_load("", source, longest=math.inf, limit="")) / SAMPLE_RATE


def seconds_in(table: str) -> list[float]:
    """Duration of each row of a parquet table, in one pass over the table; 0 if it is unreadable.

    Raises ValueError if the table cannot be read.
    """
    durations = []
    for name, row in parquet.rows(Path(table), ["audio"]):
        try:
            durations.append(seconds(parquet.held(name, row["audio"])))
        except (sf.SoundFileError, RuntimeError, OSError, ValueError):
            durations.append(0.0)
    return durations


def seconds_by_table(audio: Iterable[str]) -> dict[str, float]:
    """Durations of the files that Common Voice's clip_durations.tsv lists, by path.

    The table is in the parent of the folder that holds the clips.
    """
    durations, bad = {}, []
    for folder in {os.path.dirname(os.path.dirname(name)) for name in audio}:
        table = Path(folder, "clip_durations.tsv")
        if not table.is_file():
            continue
        for where, row in files.table(table, (), bad, **files.TSV):
            name, ms, *_ = [*row.values(), "", ""]
            if ms.isdecimal():
                durations[os.path.join(folder, "clips", name)] = int(ms) / 1000
            else:
                bad.append((where, "without milliseconds"))

    if bad:
        log.warning("clips will be opened, for want of a duration: %s", files.left_out(bad))
    return durations


def pad(audio: Sequence[np.ndarray], window: int) -> Float32[np.ndarray, "B S"]:
    """Stack clips, padded with zeros to the window. Raises ValueError for a longer clip."""
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
    """Load a file as one row, padded to the window. Raises the errors of `load` and `pad`."""
    samples = load(path, longest=window / SAMPLE_RATE)
    try:
        return pad([samples], window)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def windows(
    path: str | Path, window: int, long: bool = False, live: bool = False, most: int = 120
) -> Float32[np.ndarray, "parts S"]:
    """Load the speech of a file in rows of `window` samples.

    Args:
        long: split a longer file at its quietest moments, into at most `most` windows (an hour with
            windows of 30 s), instead of refusing it. Silence at its ends does not count.
        live: always trim both ends; a microphone recording begins with the click of a key.

    Raises FileNotFoundError or ValueError with the file's name, also for silence.
    """
    seconds = window / SAMPLE_RATE
    limit = f"the model's window of {seconds:g} s, and than the {most * seconds:g} s"
    samples = load(path, most * seconds, f"{limit} that --long splits")
    if is_silent(samples):
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
    """Mean square of each frame of 20 ms."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    return np.square(frames).mean(1)


def is_silent(samples: Float[np.ndarray, "S"]) -> bool:
    """Whether the samples are silence, or no more than faint and even noise.

    Below -80 dB (three steps of 16 bits), rounding leaves nothing of a word. Below -60 dB, speech
    is recognised by its changes in loudness: 6 dB and more, where those of noise are about 1 dB.
    """
    loud = loudness(np.pad(samples, (0, FRAME)))
    return bool(loud.max() < 1e-8 or (loud.max() < 1e-6 and loud.max() < 2 * np.median(loud)))


def trim(samples: Float[np.ndarray, "S"]) -> Float[np.ndarray, "part"]:
    """Remove from both ends what is 34 dB quieter than the loudest frame."""
    loud = loudness(samples)
    loud_frames = np.flatnonzero(loud > 4e-4 * loud.max(initial=0))
    if not len(loud_frames):
        return samples
    return samples[FRAME * loud_frames[0] : FRAME * (loud_frames[-1] + 2)]


def split(samples: Float[np.ndarray, "S"], window: int) -> list[Float[np.ndarray, "part"]]:
    """Cut into parts of at most `window` samples, at the quietest frame of each second half."""
    parts = []
    while len(samples) > window:
        quietest = int(loudness(samples[window // 2 : window]).argmin())
        cut = window // 2 + FRAME * quietest + FRAME // 2
        parts.append(samples[:cut])
        samples = samples[cut:]
    return [*parts, samples]
