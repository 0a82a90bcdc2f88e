"""audio_files.py and containers.py: every file is decoded whole, whatever its header says, or it is
refused with its name and the reason.

Axes: S audio samples.
"""

import io
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

import data
from formats import audio_files, containers

RATE = audio_files.SAMPLE_RATE
PCM = ("WAV", "WAVEX", "RF64", "AIFF", "CAF", "AU", "NIST")  # samples as they are


def tone(hertz: float, seconds: float, rate: int = RATE, peak: float = 0.5) -> np.ndarray:
    return peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def encoded(samples: np.ndarray, kind: str, rate: int = RATE, **how) -> bytearray:
    subtype = kind if kind in ("VORBIS", "OPUS") else "PCM_16" if kind in PCM else None
    stream = io.BytesIO()
    container = "OGG" if kind in ("VORBIS", "OPUS") else kind
    soundfile.write(stream, samples, rate, format=container, **({"subtype": subtype} | how))
    return bytearray(stream.getvalue())


A, B = tone(440, 0.5), tone(880, 0.7)
GARBAGE = np.random.default_rng(0).bytes(5000)
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 32 + 8, 1, 1 << 31) + bytes(8)
APE += bytes(8) + b"APETAGEX" + struct.pack("<IIII", 2000, 32 + 8, 1, 1 << 31) + bytes(8)
ID3V2 = b"ID3\x04\0\0\0\0\x01\x7f" + bytes(255)


def put(content: bytes, at: int, value: int, code: str = "<I") -> bytes:
    """`content` with a number at a place."""
    return content[:at] + struct.pack(code, value) + content[at + struct.calcsize(code) :]


def load_bytes(file: Path, content: bytes) -> np.ndarray:
    file.write_bytes(content)
    return audio_files.load(file)


def assert_refused(file: Path, content: bytes, *parts: object, **how) -> None:
    """`load` raises one line that begins with the file's name and holds every part."""
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        audio_files.load(file, **how)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    for part in parts:
        assert str(part) in message, f"{part} is not in: {message}"


def contains_tone(samples: np.ndarray, hertz: float, seconds: float) -> bool:
    """A tone for about so long, by the loudest share of frames of 20 ms (their Fourier bins)."""
    frames = samples[: len(samples) // 320 * 320].reshape(-1, 320)
    power = np.abs(frames @ np.exp(-2j * np.pi * hertz * np.arange(320) / RATE)) / 160
    return abs((power > 0.3).sum() * 0.02 - seconds) < 0.08  # an encoder's delay, and half frames


# --------------------------------------------------------------------------------------------- MP3


def mp3(samples: np.ndarray, rate: int = RATE, tag: bool = True, **how) -> bytes:
    """With or without the Xing frame that counts the others."""
    content = bytes(encoded(samples, "MP3", rate, **how))
    length, _, _ = containers._frame(int.from_bytes(content[:4], "big"))
    assert b"Xing" in content[:length]
    return content if tag else content[length:]


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("between", [b"", ID3V1, ID3V2, GARBAGE[:3000]])
def test_joined_mp3s_are_decoded_whole(tmp_path, rate, between):
    """Each has a Xing frame of its own; the first one's count is not believed."""
    first, second = mp3(tone(440, 0.5, rate), rate), mp3(tone(880, 0.7, rate), rate)
    alone = [load_bytes(tmp_path / "a.mp3", content) for content in (first, second)]
    samples = load_bytes(tmp_path / "a.mp3", first + between + second)
    np.testing.assert_array_equal(samples, np.concatenate(alone))  # no silence between, no click
    assert contains_tone(samples, 440, 0.5) and contains_tone(samples, 880, 0.7)


def test_three_joined_mp3s_are_decoded_whole(tmp_path):
    samples = load_bytes(tmp_path / "a.mp3", mp3(A) + mp3(B) + mp3(A))
    assert contains_tone(samples, 440, 1.0) and contains_tone(samples, 880, 0.7)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_a_count_is_decoded_whole(tmp_path, mode):
    """libsndfile would take the first frame's size for that of all; also of several joined."""
    content = mp3(B, tag=False, bitrate_mode=mode)
    for before in (b"", ID3V2):
        assert contains_tone(
            samples := load_bytes(tmp_path / "a.mp3", before + content + ID3V1), 880, 0.7
        )
        assert 0.65 < len(samples) / RATE < 0.8
    for between in (b"", ID3V2, GARBAGE[:3000]):
        samples = load_bytes(tmp_path / "a.mp3", mp3(A, tag=False) + between + mp3(B, tag=False))
        assert contains_tone(samples, 440, 0.5) and contains_tone(samples, 880, 0.7)


@pytest.mark.parametrize("header_count", [0, 1, 7, 15])
def test_an_mp3_that_holds_more_frames_than_it_says_is_decoded_whole(tmp_path, header_count):
    content = mp3(A)
    at = content.find(b"Xing") + 8
    assert int.from_bytes(content[at : at + 4], "big") == 16
    assert len(load_bytes(tmp_path / "a.mp3", put(content, at, header_count, ">I"))) == len(A)


def test_an_mp3_that_holds_fewer_frames_than_it_says_is_refused(tmp_path):
    content = mp3(B)
    for share in (0.3, 0.6, 0.9):
        part = content[: int(len(content) * share)]
        assert_refused(
            tmp_path / "a.mp3", part, "cut short: ", "frames; its header says 22. Copy or"
        )
    at = content.find(b"Xing") + 8
    assert_refused(tmp_path / "a.mp3", put(content, at, 30, ">I"), "22 frames; its header says 30")


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 1), (16_000, 2)])
def test_joined_mp3s_of_two_kinds_are_decoded_or_refused(tmp_path, rate, channels):
    """Without a Xing frame nothing says where the second begins."""
    second = np.repeat(tone(880, 0.7, rate)[:, None], channels, 1)
    samples = load_bytes(tmp_path / "a.mp3", mp3(A) + mp3(second, rate))
    assert (
        contains_tone(samples, 440, 0.5)
        and contains_tone(samples, 880, 0.7)
        and len(samples) == 1.2 * RATE
    )
    kind = f"{rate} Hz {'mono' if channels == 1 else 'stereo'}"
    say = f"its frames change among 16000 Hz mono, {kind}; expected one recording"
    for tag in (True, False):
        assert_refused(tmp_path / "a.mp3", mp3(A, tag=tag) + mp3(second, rate, tag=False), say)


def test_a_joined_mp3_that_was_cut_is_refused(tmp_path):
    a, b = mp3(A), mp3(B)
    for content in (a[: len(a) * 2 // 3] + b, a + b[: len(b) * 2 // 3]):
        assert_refused(tmp_path / "a.mp3", content, "cut short: ", "frames; its header says")


def test_the_window_counts_all_parts_of_a_joined_mp3(tmp_path):
    content = mp3(A) + mp3(B)
    assert_refused(
        tmp_path / "a.mp3", content, "longer than the model's window of 1.1 s", longest=1.1
    )
    assert len(audio_files.load(tmp_path / "a.mp3", longest=1.2)) == len(A) + len(B)


@pytest.mark.parametrize("behind", [ID3V1, APE, APE + ID3V1, GARBAGE, bytes(5000)])
def test_what_lies_behind_an_mp3_is_not_sound(tmp_path, behind):
    """Tags, garbage, zeros: as without them, to the bit."""
    alone = load_bytes(tmp_path / "a.mp3", mp3(A))
    np.testing.assert_array_equal(load_bytes(tmp_path / "b.mp3", ID3V2 + mp3(A) + behind), alone)
    assert len(alone) == len(A)


# ------------------------------------------------------------------------------- WAV and the like

# where the length of the sound stands, and its code
PLACES: dict[str, tuple[Callable[[bytes], int], str]] = {
    "WAV": (lambda content: content.find(b"data") + 4, "<I"),
    "WAVEX": (lambda content: content.find(b"data") + 4, "<I"),
    "RF64": (lambda content: 28, "<Q"),
    "AIFF": (lambda content: content.find(b"SSND") + 4, ">I"),
    "CAF": (lambda content: content.find(b"data") + 4, ">Q"),
    "AU": (lambda content: 8, ">I"),
}


@pytest.mark.parametrize("kind", [*PLACES, "NIST", "FLAC", "VORBIS", "OPUS", "MP3"])
def test_a_sound_file_is_decoded_whole(tmp_path, kind):
    assert len(load_bytes(tmp_path / "a", encoded(A, kind))) == len(A)


@pytest.mark.parametrize("length", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 1 - 36])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "AIFF", "AU"])
def test_a_length_that_a_pipe_left_open_is_that_of_the_rest(tmp_path, kind, length):
    """Tags behind it do not count."""
    find, code = PLACES[kind]
    content = encoded(A, kind)
    alone = load_bytes(tmp_path / "a", content)
    for behind in (b"", ID3V1, APE):
        samples = load_bytes(tmp_path / "a", put(content, find(content), length, code) + behind)
        np.testing.assert_array_equal(samples, alone)
    assert data.seconds_of([data.Clip(str(tmp_path / "a"), "")]) == pytest.approx([0.5], abs=0.01)


@pytest.mark.parametrize("length", [0, 2**64 - 1])
def test_an_open_length_of_a_caf_is_that_of_the_rest(tmp_path, length):
    content = encoded(A, "CAF")
    at = content.find(b"data") + 4
    assert len(load_bytes(tmp_path / "a", put(content, at, length, ">Q"))) == len(A)


@pytest.mark.parametrize("length", [0, 100, 8000, 2**32 - 1])
@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
def test_the_length_of_the_whole_file_does_not_matter(tmp_path, kind, length):
    """RIFF's and FORM's: the chunks say what is there."""
    content = put(encoded(A, kind), 4, length, "<I" if kind == "WAV" else ">I")
    assert len(load_bytes(tmp_path / "a", content)) == len(A)


@pytest.mark.parametrize("kind", PLACES)
def test_a_length_that_is_too_small_is_refused(tmp_path, kind):
    find, code = PLACES[kind]
    content = encoded(A, kind)
    assert_refused(
        tmp_path / "a",
        put(content, find(content), 8004, code),
        "bytes lie behind the end that its header gives; expected nothing there. If recordings",
    )


@pytest.mark.parametrize("kind", PLACES)
def test_a_length_that_is_too_large_is_refused(tmp_path, kind):
    find, code = PLACES[kind]
    content = encoded(A, kind)
    say = "bytes of sound; its header says 50,000. Copy or download it again"
    assert_refused(tmp_path / "a", put(content, find(content), 50_000, code), "cut short: ", say)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
@pytest.mark.parametrize("kind", [*PLACES, "NIST", "FLAC", "VORBIS", "OPUS", "MP3"])
def test_half_a_file_is_refused(tmp_path, kind, share):
    content = encoded(tone(440, 3) + np.random.default_rng(0).normal(size=3 * RATE) / 20, kind)
    say = "not audio that can be decoded (" if kind == "FLAC" else "again"
    assert_refused(tmp_path / "a", content[: int(len(content) * share)], say)


@pytest.mark.parametrize("kind", [*PLACES, "NIST", "FLAC", "VORBIS", "OPUS"])
def test_two_files_in_one_are_refused(tmp_path, kind):
    assert_refused(tmp_path / "a", encoded(A, kind) + encoded(B, kind), "oin")


@pytest.mark.parametrize("kind", [*PLACES, "FLAC", "VORBIS", "OPUS"])
@pytest.mark.parametrize("behind", [ID3V1, APE, APE + ID3V1])
def test_tags_behind_the_sound_are_not_decoded(tmp_path, kind, behind):
    content = encoded(A, kind)
    alone = load_bytes(tmp_path / "a", content)
    np.testing.assert_array_equal(load_bytes(tmp_path / "a", content + behind), alone)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "AIFF", "CAF"])
def test_chunks_behind_the_sound_are_not_decoded(tmp_path, kind):
    width = ">Q" if kind == "CAF" else ">I" if kind == "AIFF" else "<I"
    chunk = b"note" + struct.pack(width, 2000) + bytes(2000)
    for behind in (chunk, 2 * chunk, chunk + b"\0" * 100):
        assert len(load_bytes(tmp_path / "a", encoded(A, kind) + behind)) == len(A)
    assert_refused(tmp_path / "a", encoded(A, kind) + chunk + GARBAGE, "5,000 bytes lie behind")


@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
def test_a_missing_pad_byte_behind_an_odd_chunk_is_inserted(tmp_path, kind):
    """Some recorders leave it out: behind a note before the samples, or behind the samples."""
    code = "<I" if kind == "WAV" else ">I"
    note = b"note" + struct.pack(code, 15) + b"fifteen letters"
    content = bytes(encoded(A, kind))
    expected = load_bytes(tmp_path / "a", content)
    at = content.find(b"data" if kind == "WAV" else b"SSND")
    np.testing.assert_array_equal(
        load_bytes(tmp_path / "a", content[:at] + note + content[at:]), expected
    )


def test_a_missing_pad_byte_behind_an_odd_number_of_samples_is_inserted(tmp_path):
    content = bytes(encoded(A[:7999], "WAV", subtype="PCM_U8"))
    end = content.find(b"data") + 8 + 7999
    note = b"note" + struct.pack("<I", 2000) + bytes(2000)
    assert len(load_bytes(tmp_path / "a.wav", content[:end] + note)) == 7999


def test_a_wav_without_samples_holds_none(tmp_path):
    """A chunk behind a length of 0 is no sound."""
    chunk = b"LIST" + struct.pack("<I", 2000) + bytes(2000)
    for behind in (b"", chunk):
        assert_refused(tmp_path / "a", encoded(A[:0], "WAV") + behind, "no samples; expected audio")


@pytest.mark.parametrize("kind", sorted(soundfile.available_formats()))
def test_every_other_container_is_decoded_whole_or_refused(tmp_path, kind):
    """Of no container that soundfile writes a part is heard in silence."""
    how = {"WVE": ("ALAW", 8000), "XI": ("DPCM_16", 44_100), "OGG": ("VORBIS", RATE)}
    subtype, rate = how.get(kind, (soundfile.default_subtype(kind), RATE))
    if kind in ("RAW", "SD2"):  # neither is a file by itself
        assert_refused(
            tmp_path / "a", bytes(encoded(A, "WAV"))[44:], "not audio that can be decoded"
        )
        return
    content = encoded(tone(440, 1, rate), kind, rate, subtype=subtype)
    (tmp_path / "a").write_bytes(content)
    if kind in containers.FORMATS:
        assert len(audio_files.load(tmp_path / "a")) == RATE
    else:
        say = "a length that cannot be checked (", "expected MP3, FLAC, Ogg or WAV. Convert"
        assert_refused(tmp_path / "a", content, *say)
    for part in (content[: len(content) * 2 // 3], content + content):
        (tmp_path / "a").write_bytes(part)
        if kind == "MP3" and len(part) > len(content):
            assert len(audio_files.load(tmp_path / "a")) == 2 * RATE
        else:
            assert_refused(tmp_path / "a", part)


# ------------------------------------------------------------------------------------ FLAC and Ogg


def flac(samples: np.ndarray, total: int) -> bytes:
    """Its header says `total` samples."""
    content = bytes(encoded(samples, "FLAC"))
    word = int.from_bytes(content[18:26], "big")
    assert word & 2**36 - 1 == len(samples)
    return content[:18] + (word >> 36 << 36 | total).to_bytes(8, "big") + content[26:]


@pytest.mark.parametrize("before", [b"", ID3V2])
@pytest.mark.parametrize("total", [0, 2**36 - 1])  # 49 days
def test_a_flac_of_unknown_length_is_decoded_whole(tmp_path, before, total):
    samples = load_bytes(tmp_path / "a.flac", before + flac(A, total))
    np.testing.assert_array_equal(samples, load_bytes(tmp_path / "a.flac", flac(A, len(A))))
    assert len(samples) == len(A)


@pytest.mark.parametrize("total", [1, 4000, 7999, 8001, 9000, 10**9])
def test_a_flac_that_says_another_length_is_refused(tmp_path, total):
    say = "0.500 s could be decoded; its header says", f"{total / RATE:.3f} s. It was cut, joined"
    assert_refused(tmp_path / "a.flac", flac(A, total), *say)


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
def test_several_streams_in_an_ogg_file_are_refused(tmp_path, kind):
    """One behind the other, or page by page: the decoder would hear the first alone."""
    a, b = bytes(encoded(A, kind)), bytes(encoded(B, "VORBIS"))
    say = "2 streams of sound in one Ogg file; expected one"
    assert_refused(tmp_path / "a.ogg", a + b, say)
    first, second = a.find(b"OggS", 4), b.find(b"OggS", 4)
    assert_refused(tmp_path / "a.ogg", a[:first] + b[:second] + a[first:] + b[second:], say)
    flac = b"OggS\0\2" + bytes(20) + b"\1\5\x7fFLAC"
    assert_refused(tmp_path / "a.ogg", a + flac, say)


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
def test_an_ogg_file_that_lacks_a_page_is_refused(tmp_path, kind):
    sound = np.random.default_rng(0).normal(size=20 * RATE) / 10
    content = bytes(encoded(sound, kind))
    pages = [at for at in range(len(content)) if content[at : at + 4] == b"OggS"]
    hole = content[: pages[-4]] + content[pages[-3] :]
    assert_refused(
        tmp_path / "a.ogg", hole, "s could be decoded; its header says 20.000 s. It was cut"
    )
    assert_refused(tmp_path / "a.ogg", content[:-50], "cut short: its last page is not whole")


# ------------------------------------------------------------------------- MP4, M4A, MOV and WebM

FFMPEG_FILES = {  # name: FFmpeg's container format and codec
    "a.m4a": ("ipod", "aac"),
    "a.mp4": ("mp4", "aac"),
    "a.mov": ("mov", "pcm_s16le"),
    "a.webm": ("webm", "libopus"),
    "a.mka": ("matroska", "pcm_s16le"),
}


def encoded_with_ffmpeg(samples: np.ndarray, container_format: str, codec: str, **options) -> bytes:
    """Encode samples of 48 kHz, [S] or [S, channels], with FFmpeg."""
    samples = samples.reshape(len(samples), -1).astype(np.float32)
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=container_format, options=options) as container,
    ):
        stream = container.add_stream(codec, rate=48_000)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples.T), format="fltp", layout=layout
        )
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        container.close()
        return Path(file.name).read_bytes()


@pytest.mark.parametrize("name", FFMPEG_FILES)
@pytest.mark.parametrize("channels", [1, 2])
def test_mp4_and_webm_files_are_decoded_whole(tmp_path, capfd, name, channels):
    samples = np.concatenate([tone(440, 1.0, 48_000), tone(880, 0.6, 48_000)])
    samples = np.repeat(samples[:, None], channels, axis=1)
    decoded = load_bytes(tmp_path / name, encoded_with_ffmpeg(samples, *FFMPEG_FILES[name]))
    assert contains_tone(decoded, 440, 1.0) and contains_tone(decoded, 880, 0.6)
    assert len(decoded) / RATE == pytest.approx(1.6, abs=0.05)
    assert audio_files.seconds(str(tmp_path / name)) == pytest.approx(1.6, abs=0.05)
    assert not any(capfd.readouterr())


@pytest.mark.parametrize("name", FFMPEG_FILES)
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_an_mp4_or_webm_file_that_was_cut_is_refused(tmp_path, capfd, name, fraction):
    content = encoded_with_ffmpeg(tone(440, 3.0, 48_000), *FFMPEG_FILES[name])
    assert_refused(tmp_path / name, content[: int(fraction * len(content))], "was cut or damaged")
    assert not any(capfd.readouterr())


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_a_cut_mp4_with_its_index_in_front_is_refused(tmp_path, capfd, fraction):
    """FFmpeg opens it and decodes the samples that are left."""
    noise = np.random.default_rng(0).normal(size=3 * 48_000) / 10
    content = encoded_with_ffmpeg(noise, "mp4", "aac", movflags="faststart")
    assert content.find(b"moov") < content.find(b"mdat")
    assert_refused(
        tmp_path / "a.mp4", content[: int(fraction * len(content))], "was cut or damaged"
    )
    assert not any(capfd.readouterr())


def test_a_webm_recording_without_a_length_is_decoded_whole(tmp_path):
    """As a browser's MediaRecorder writes it."""
    content = encoded_with_ffmpeg(tone(440, 1.6, 48_000), "webm", "libopus", live="1")
    assert contains_tone(load_bytes(tmp_path / "a.webm", content), 440, 1.6)
    assert audio_files.seconds(str(tmp_path / "a.webm")) == pytest.approx(1.6, abs=0.05)


def test_an_mp4_that_is_too_long_or_has_no_audio_is_refused(tmp_path):
    content = encoded_with_ffmpeg(tone(440, 1.6, 48_000), "mp4", "aac")
    assert_refused(
        tmp_path / "a.mp4", content, "longer than the model's window of 1 s", longest=1.0
    )
    video = io.BytesIO()
    with av.open(video, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert_refused(tmp_path / "a.mp4", video.getvalue(), "no audio stream; expected audio")


# ------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("peak", [8.5, 127, 15_900, 2**31])
@pytest.mark.parametrize("rate", [RATE, 48_000])
def test_samples_in_another_scale_are_refused(tmp_path, peak, rate):
    """Integers that were written as floats: whole words would be noise."""
    content = encoded(tone(440, 0.5, rate, peak), "WAV", rate, subtype="FLOAT")
    assert_refused(tmp_path / "a.wav", content, "holds a sample of ", "expected samples in [-1, 1]")
    one = np.stack([tone(440, 0.5, rate), tone(440, 0.5, rate, peak)], 1)
    assert_refused(
        tmp_path / "a.wav", encoded(one, "WAV", rate, subtype="FLOAT"), "holds a sample of "
    )


@pytest.mark.parametrize("peak", [1.0, 1.3, 4.0])
def test_what_overshoots_is_the_same_everywhere(tmp_path, peak):
    """As a training run hears it, and as all others do: neither cut off nor scaled."""
    file = tmp_path / "a.wav"
    samples = load_bytes(file, encoded(tone(440, 0.5, peak=peak), "WAV", subtype="FLOAT"))
    np.testing.assert_allclose(samples, tone(440, 0.5, peak=peak), atol=1e-6)
    corpus = data.Corpus([data.Clip(str(file), "a")], [np.array([1], np.int32)], len(samples), 8)
    trained, is_usable = data._reader(corpus)(0)
    assert is_usable and np.abs(trained - samples).max() < 0.51 * max(1, peak) / 32767
    np.testing.assert_array_equal(audio_files.load_window(file, len(samples))[0], samples)


def test_a_file_of_a_gigabyte_is_refused_unread(tmp_path):
    with (tmp_path / "a.wav").open("wb") as file:
        file.truncate(audio_files.LARGEST + 1)  # a hole, on any disk
    with pytest.raises(ValueError, match="1,073,741,825 bytes; expected at most 1,073,741,824"):
        audio_files.load(tmp_path / "a.wav")


# ------------------------------------------------------------------------- how long, for a training

LENGTHS = {  # content, and seconds
    "a FLAC of unknown length": (flac(A, 0), 0.5),
    "a WAV of a pipe": (put(encoded(A, "WAV"), 40, 0), 0.5),
    "an AU of a pipe": (put(encoded(A, "AU"), 8, 0, ">I"), 0.5),
    "an MP3 that nobody counted": (mp3(B, tag=False), 22 * 576 / RATE),
    "its title behind a picture": (
        b"ID3\x04\0\0" + bytes([0, 6, 0, 0]) + bytes(6 << 14) + mp3(B),
        0.7,
    ),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_clip_is_not_left_out_for_what_its_header_says(tmp_path, name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content, seconds = LENGTHS[name]
    (tmp_path / "a").write_bytes(content)
    clip = data.Clip(str(tmp_path / "a"), "a")
    assert data.seconds_of([clip]) == pytest.approx([seconds], abs=0.001)
    corpus = data.prepare([clip], lambda texts: [[1]], RATE, 3)
    assert corpus.clips == [clip]
    assert data._reader(corpus)(0)[1] and not corpus.undecodable


def test_a_clip_that_is_longer_than_its_header_says_has_weight_0_and_a_name(tmp_path, caplog):
    """Two MP3s in one, of which the first would fit."""
    (tmp_path / "a.mp3").write_bytes(mp3(A) + mp3(B))
    clip = data.Clip(str(tmp_path / "a.mp3"), "a")
    corpus = data.prepare([clip], lambda texts: [[1]], RATE, 3)
    samples, is_usable = data._reader(corpus)(0)
    assert not len(samples) and not is_usable
    assert "1.20 s, longer than its header says; expected at most 1 s" in caplog.text


@pytest.mark.parametrize("kind", ["MP3", "FLAC", "WAV", "OPUS"])
def test_clips_are_listed_without_decoding_them(tmp_path, monkeypatch, kind):
    """Two million of them: a header each."""
    (tmp_path / "a").write_bytes(encoded(A, kind))
    monkeypatch.setattr(audio_files, "load", lambda path: pytest.fail("decoded"))
    monkeypatch.setattr(containers, "mp3_frames", lambda *_: pytest.fail("counted"))
    assert audio_files.seconds(str(tmp_path / "a")) == pytest.approx(0.5)
