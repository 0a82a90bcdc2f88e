"""data.py: clips are found, decoded, left out for a reason, and dealt the same way every time.

Axes: B batch, S audio samples, L text tokens.
"""

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import grain  # noqa: F401  (its import draws at random: not inside of a test of hypothesis)
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from evaluation import suites
from formats import audio_files

RATE = audio_files.SAMPLE_RATE
V17 = (  # Common Voice 17.0's header
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\t"
    "accents\tvariant\tlocale\tsegment"
)
OLD = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent"  # versions 3 to 6


def tone(hertz: float, seconds: float, rate: int = RATE, peak: float = 0.5) -> np.ndarray:
    return peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_audio(file: Path, samples: np.ndarray, rate: int = RATE, **how) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, rate, **how)
    return file


def write_lines(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def refused(kind: type[Exception], action, *parts: object) -> None:
    """`action` raises `kind`, and the message holds every part."""
    with pytest.raises(kind) as error:
        action()
    for part in parts:
        assert str(part) in str(error.value), f"{part!s} is not in: {error.value}"


# ---------------------------------------------------------------------------- Common Voice folders


@pytest.fixture
def voice(tmp_path) -> Path:
    """A Common Voice 17 folder with two MP3 clips at 48 kHz."""
    for name in ("a.mp3", "b.mp3"):
        write_audio(tmp_path / "clips" / name, tone(440, 0.25, 48_000), 48_000)
    write_lines(
        tmp_path / "train.tsv",
        V17,
        'v1\ta.mp3\ts1\t"Wait, he said, and left.\t\t2\t0\ttwenties\t\tIndia,England\t\ten\t',
        "v2\tb.mp3\ts2\t It's \"fine\", isn't it? \t\t2\t0\t\t\t\t\ten\t",
    )
    return tmp_path


def test_a_common_voice_folder_gives_paths_sentences_and_what_else_is_known(voice):
    """Quotes, closed or not, are part of the sentence and do not swallow the next row."""
    a, b = data.read_clips(voice)
    assert a == data.Clip(
        str(voice / "clips/a.mp3"),
        '"Wait, he said, and left.',
        {
            "client_id": "v1",
            "sentence_id": "s1",
            "up_votes": "2",
            "down_votes": "0",
            "age": "twenties",
            "accents": "India,England",
            "locale": "en",
        },
    )
    assert b.text == "It's \"fine\", isn't it?" and "accents" not in b.meta
    samples = audio_files.load(a.audio)
    # 440 Hz stay; MP3 is lossy: 2 % of the amplitude
    assert len(samples) == RATE // 4 and abs(part_of(samples, 440) - 0.5) < 0.01


def test_older_versions_call_the_accent_by_another_name(voice):
    """Columns go by name, in any order; `accent` and `accents` are the same thing."""
    write_lines(voice / "dev.tsv", OLD, "v1\ta.mp3\thello there\t2\t0\t\tmale\tus")
    write_lines(voice / "odd.tsv", "sentence\taccents\tpath", "hello there\tus\ta.mp3")
    [old], [odd] = data.read_clips(voice, "dev"), data.read_clips(voice, "odd")
    assert old.meta["accents"] == "us" and "accent" not in old.meta
    assert (old.audio, old.text) == (odd.audio, odd.text) and odd.meta == {"accents": "us"}


def test_what_many_clips_share_is_held_once(voice):
    """A speaker's name has 128 letters; the corpus a million rows."""
    speaker = "5f" * 64
    rows = [f"{speaker}\t{name}\thello\t2\t0\t\tmale\tus" for name in ("a.mp3", "b.mp3")]
    write_lines(voice / "dev.tsv", OLD, *rows)
    a, b = data.read_clips(voice, "dev")
    assert a.meta["client_id"] == speaker and a.meta.keys() == b.meta.keys()
    assert all(a.meta[key] is b.meta[key] for key in ("client_id", "gender", "accents"))


def test_rows_without_a_path_or_a_sentence_are_left_out_and_named(voice, caplog):
    write_lines(
        voice / "train.tsv",
        "path\tsentence",
        "a.mp3\tone",
        "\ttwo",
        "b.mp3\t  ",
        "b.mp3",
        " \t",
        "b.mp3\t\xa0",
        "b.mp3\tfive",
    )
    clips = data.read_clips(voice)
    assert [clip.text for clip in clips] == ["one", "five"]
    file, why = voice / "train.tsv", "without a path or a text"
    assert [r.getMessage() for r in caplog.records] == [
        f"{voice}: left out 4 of 6: 3 {why}, 1 not of 2 fields; "
        f"first {file}:3 ({why}), {file}:4 ({why}), {file}:5 (not of 2 fields)"
    ]


def test_sentences_that_were_quoted_as_csv_are_unquoted(voice, caplog):
    """An empty one is none; a bare quote is a letter."""
    rows = ['a.mp3\t"""Good day,"" said the dog."', 'a.mp3\t""', 'b.mp3\tthe 5" dog']
    write_lines(voice / "train.tsv", "path\tsentence", *rows)
    texts = [clip.text for clip in data.read_clips(voice)]
    assert texts == ['"Good day," said the dog.', 'the 5" dog']
    assert f"left out 1 of 3: 1 without a path or a text; first {voice}/train.tsv:3" in caplog.text


def test_single_bad_rows_do_not_stand_in_the_way_of_a_large_corpus(voice, caplog):
    """Half a sentence is none: not before a tab or a break in it, and not behind."""
    good = "v1\ta.mp3\thello there\t2\t0\t\tmale\tus"
    tab, broken = good.replace(" ", "\t"), good.replace(" ", "\n")
    macos, latin = good.replace("a.mp3", "._a.mp3"), good.replace("hello", "grün").encode("latin-1")
    file = write_lines(voice / "train.tsv", OLD, good, tab, broken, macos, good)
    file.write_bytes(file.read_bytes() + latin + b"\n" + good.encode() + b"\0\n")
    assert [clip.text for clip in data.read_clips(voice)] == ["hello there"] * 2
    why = "3 not of 8 fields, 1 of macOS (._*), no recording, 2 no text in UTF-8; first"
    assert f"{voice}: left out 6 of 8: {why} {file}:3 (not of 8 fields), " in caplog.text
    assert len(caplog.records) == 1


def test_names_without_an_ending_are_those_of_the_clips(voice):
    """So Common Voice 1 lists them."""
    write_lines(voice / "train.tsv", "path\tsentence", "a\tone", "b.mp3\ttwo", "c\tthree")
    a, b, c = data.read_clips(voice)
    assert [Path(clip.audio).name for clip in (a, b, c)] == ["a.mp3", "b.mp3", "c"]
    assert data.seconds_of([a, b, c]) == pytest.approx([0.25, 0.25, 0])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_lists_of_windows_and_old_programs_are_read(voice, encoding, end):
    """The table of a corpus, its durations, a manifest and a LibriSpeech transcript."""

    def write(file: Path, *lines: str) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((end.join(lines) + end).encode(encoding))
        return file

    write(voice / "train.tsv", "path\tsentence", "a.mp3\tgrün")
    write(voice / "clip_durations.tsv", "clip\tduration[ms]", "a.mp3\t31")
    manifest = write(voice / "list.jsonl", '{"audio": "clips/a.mp3", "text": "grün"}')
    write(voice / "libri/1/2/1-2.trans.txt", "1-2-3 grün")
    [clip] = data.read_clips(voice)
    assert data.read_clips(manifest) == [clip] == [data.Clip(f"{voice}/clips/a.mp3", "grün")]
    assert data.seconds_of([clip]) == [0.031]
    [spoken] = data.read_clips(voice / "libri")
    assert spoken.text == "grün" and spoken.audio.endswith("1/2/1-2-3.flac")


@pytest.mark.parametrize(
    ("header", "absent", "found"),
    [
        ("client_id,path,sentence", "path or sentence", "found client_id,path,sentence;"),
        ("path\ttext", "sentence", "found path, text;"),
        ("", "path or sentence", "found nothing;"),
    ],
)
def test_wrong_columns_are_refused_with_those_that_are_there(voice, header, absent, found):
    file = voice / "train.tsv"
    file.write_text(header)
    say = f"{file}:1: no column {absent}; {found} expected a table with path, sentence. Download"
    refused(ValueError, partial(data.read_clips, voice), say)


def test_a_missing_clips_folder_is_named(voice):
    (voice / "clips").rename(voice / "elsewhere")
    refused(
        FileNotFoundError,
        partial(data.read_clips, voice),
        f"{voice / 'clips'} is missing; expected the folder of audio that train.tsv names",
        "Unpack the whole corpus",
    )


def test_a_missing_split_is_refused_with_those_that_are_there(voice):
    refused(
        FileNotFoundError,
        partial(data.read_clips, voice, "trian"),
        f"{voice}: no split 'trian': neither trian.tsv (Common Voice) nor parquet nor *.trans.txt",
        "found train. Check --data and --split",
    )
    (voice / "train.tsv").unlink()
    refused(FileNotFoundError, partial(data.read_clips, voice), "found nothing of the kind")


@pytest.mark.parametrize("split", ["", ".", "..", "/train", "a/b", "train/"])
def test_a_split_is_a_name(voice, split):
    say = f"split {split!r}: expected a name"
    refused(ValueError, partial(data.read_clips, voice, split), say)


def test_an_empty_split_is_refused(voice):
    (voice / "train.tsv").write_text(V17 + "\n")
    say = f"{voice}: split 'train' lists no clip; expected at least one"
    refused(ValueError, partial(data.read_clips, voice), say)


# ----------------------------------------------------------------------------- LibriSpeech folders


@pytest.fixture
def libri(tmp_path) -> Path:
    """LibriSpeech/SPLIT/SPEAKER/CHAPTER/: FLAC files and one list of transcripts."""
    for split, speaker in (("train-clean-100", 19), ("train-clean-100", 103), ("dev-clean", 84)):
        folder = tmp_path / split / f"{speaker}/7"
        names = [f"{speaker}-7-{n:04}" for n in range(2)]
        for name in names:
            write_audio(folder / f"{name}.flac", tone(300, 0.1))
        write_lines(folder / f"{speaker}-7.trans.txt", *(f"{name} I'M {name}" for name in names))
    return tmp_path


def test_a_librispeech_split_gives_clips_texts_and_speakers(libri):
    """By name in the folder of splits, or the split's own folder."""
    clips = data.read_clips(libri, "train-clean-100")
    assert {Path(clip.audio).stem for clip in clips} == {
        "19-7-0000", "19-7-0001", "103-7-0000", "103-7-0001"
    }  # fmt: skip
    for clip in clips:
        name = Path(clip.audio).stem
        assert clip.text == f"i'm {name}" and clip.meta == {"speaker": name.split("-")[0]}
        assert len(audio_files.load(clip.audio)) == RATE // 10
    assert data.read_clips(libri / "train-clean-100") == clips


def test_a_list_all_in_capitals_is_lowered_and_no_other(tmp_path):
    """A tokenizer cuts HELLO in pieces: where capitals tell nothing, they go."""
    lines = [
        '{"audio": "a.wav", "text": "ÄRGER AT 8 O\'CLOCK"}',
        '{"audio": "b.wav", "text": "你好"}',
    ]
    file = write_lines(tmp_path / "list.jsonl", *lines)
    assert [clip.text for clip in data.read_clips(file)] == ["ärger at 8 o'clock", "你好"]
    write_lines(file, *lines, '{"audio": "c.wav", "text": "Yes"}')
    assert [clip.text for clip in data.read_clips(file)] == ["ÄRGER AT 8 O'CLOCK", "你好", "Yes"]


def test_another_split_does_not_stand_in_for_a_missing_one(libri):
    """Or a misspelt test split would be scored on training clips."""
    refused(
        FileNotFoundError,
        partial(data.read_clips, libri, "test-clean"),
        f"{libri}: no split 'test-clean'",
        "nor *.trans.txt (LibriSpeech); found dev-clean, train-clean-100. Check --data and --split",
    )


@pytest.mark.parametrize("line", ["84-7-0001", "84-7-0001 "])
def test_a_transcript_line_without_a_text_is_refused(libri, line):
    file = write_lines(libri / "dev-clean/84/7/84-7.trans.txt", "84-7-0000 A", line, "84-7-0002 B")
    say = f"{file}:2: {line!r}; expected an id, a space and a text"
    refused(ValueError, partial(data.read_clips, libri, "dev-clean"), say)


def test_what_macos_leaves_beside_transcripts_is_not_read(libri):
    """Nor named among the splits that are there."""
    before = data.read_clips(libri, "dev-clean")
    (libri / "dev-clean/84/7/._84-7.trans.txt").write_bytes(b"\0\5\x16\7\xb0Mac OS X")
    copy = libri / "dev-clean/__MACOSX/84/7/84-7.trans.txt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"\0\5\x16\7\xb0Mac OS X")
    (libri / "._train.tsv").write_bytes(b"\0")
    assert data.read_clips(libri, "dev-clean") == before
    say = "found dev-clean, train-clean-100. Check"
    refused(FileNotFoundError, partial(data.read_clips, libri, "train"), say)


# -------------------------------------------------------------------------------- JSONL manifests


def test_a_manifest_names_audio_beside_it_and_keeps_what_else_it_says(tmp_path):
    """Relative and absolute paths, blank lines, CRLF, and the line separators of other scripts."""
    rows = [
        {"audio": "a.mp3", "text": "hello", "accent": "us", "age": 7},
        {"audio": "/far/b.mp3", "text": "two\u2028lines and \x85 more"},
    ]
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file = tmp_path / "sub/list.jsonl"
    file.parent.mkdir()
    file.write_bytes(text.encode() + b"\r\n")
    assert data.read_clips(file) == [
        data.Clip(str(tmp_path / "sub/a.mp3"), "hello", {"accent": "us", "age": "7"}),
        data.Clip("/far/b.mp3", rows[1]["text"], {}),
    ]


GOOD = '{"audio": "a.mp3", "text": "hello"}'


@pytest.mark.parametrize(
    "line",
    [
        '{"audio": "a.mp3"}',
        '{"text": "hello"}',
        '{"audio": 3, "text": "hello"}',
        '{"audio": "a.mp3", "text": 3}',
        '{"audio": "a.mp3", "text": ["hello"]}',
    ],
)
def test_a_manifest_line_without_audio_or_text_is_refused_with_its_number(tmp_path, line):
    file = write_lines(tmp_path / "list.jsonl", GOOD, "", line, GOOD)
    say = f"{file}:3: no audio or no text; expected an object with both as strings, such as {GOOD}"
    refused(ValueError, partial(data.read_clips, file), say)


def test_lines_of_a_manifest_without_a_text_are_left_out_and_named(tmp_path, caplog):
    """Blank or null, as pandas writes it; and what macOS leaves beside a recording."""
    lines = [GOOD, *(GOOD.replace('"hello"', text) for text in ('""', '" \\t"', "null"))]
    lines += [GOOD.replace("a.mp3", "b/._a.mp3"), GOOD.replace('"a.mp3"', "null")]
    file = write_lines(tmp_path / "list.jsonl", *lines, GOOD.replace("hello", " hello "))
    assert data.read_clips(file) == [data.Clip(str(tmp_path / "a.mp3"), "hello")] * 2
    why = "4 without a path or a text, 1 of macOS (._*), no recording"
    assert f"{file}: left out 5 of 7: {why}; first {file}:2 (" in caplog.text
    write_lines(file, lines[1])
    refused(ValueError, partial(data.read_clips, file), "lists no clip")


def test_a_broken_letter_in_a_manifest_stops_no_run(tmp_path):
    """Half a letter cannot be written, nor tokenised; a file's name need not be UTF-8."""
    text = GOOD.replace("hello", "hello \\ud83d")
    [clip] = clips = data.read_clips(write_lines(tmp_path / "list.jsonl", text))
    assert clip.text == "hello \ufffd"
    odd = data.Clip(os.fsdecode(b"gr\xfcn.mp3"), "hello")
    digest = data.Corpus([*clips, odd], [], RATE, 8).digest()
    assert digest["clips"] == 2 and digest["crc32"] != data.Corpus(clips, [], RATE, 8).digest()


def test_a_manifest_behind_a_link_names_what_its_readers_both_find(tmp_path):
    """`..` is that of the folder that the link leads to."""
    write_audio(tmp_path / "real/clips/a.wav", tone(440, 0.1))
    line = '{"audio": "../clips/a.wav", "text": "hello", "answer": "hello"}'
    write_lines(tmp_path / "real/lists/test.jsonl", line)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/lists").symlink_to(tmp_path / "real/lists")
    file = tmp_path / "here/lists/test.jsonl"
    [clip], [example] = data.read_clips(file), suites.read_manifest(file)
    assert clip.audio == example.audio == str(tmp_path / "real/clips/a.wav")


def test_a_manifest_line_that_is_no_json_is_refused_with_its_number(tmp_path):
    file = write_lines(tmp_path / "list.jsonl", GOOD, "{'audio': 'a.mp3'}", GOOD)
    say = f"{file}:2: no JSON object (Expecting property name"
    refused(ValueError, partial(data.read_clips, file), say, "expected one on each line")


def test_a_path_that_is_no_data_is_refused(tmp_path):
    """Nothing there, an empty manifest, a recording in place of a manifest, another encoding."""
    refused(
        FileNotFoundError,
        partial(data.read_clips, tmp_path / "nowhere"),
        f"{tmp_path / 'nowhere'}: no such file or folder; expected a Common Voice folder",
        "LibriSpeech folder (*.trans.txt), a folder of parquet, a JSONL manifest or the id of a",
    )
    empty = tmp_path / "list.jsonl"
    empty.write_text("\n")
    refused(ValueError, partial(data.read_clips, empty), f"{empty}: split 'train' lists no clip")
    sound = write_audio(tmp_path / "a.flac", tone(440, 0.1))
    say = f"{sound}:1: no text in UTF-8; expected a text file"
    refused(ValueError, partial(data.read_clips, sound), say)


# ------------------------------------------------------------------------------------------- audio


def part_of(samples: np.ndarray, hertz: float, rate: int = RATE) -> float:
    """Amplitude of a frequency, by projection; the first and last 50 ms (filter edges) are cut."""
    inner = np.arange(rate // 20, len(samples) - rate // 20)
    wave = np.exp(-2j * np.pi * hertz * inner / rate) * np.hanning(len(inner))
    return 2 * abs(np.dot(samples[inner], wave)) / np.hanning(len(inner)).sum()


@pytest.mark.parametrize("hertz", [440, 3000])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_becomes_16_khz_with_the_same_tone_and_length(tmp_path, rate, hertz):
    """Frequency and amplitude survive, and nothing else appears."""
    for seconds in (0.5, 0.3337):
        sound = tone(hertz, seconds, rate)
        samples = audio_files.load(write_audio(tmp_path / "a.wav", sound, rate, subtype="FLOAT"))
        assert samples.dtype == np.float32 and samples.ndim == 1
        assert len(samples) == -(-len(sound) * RATE // rate), "ceil: at most one sample more"
        # scipy's default low-pass (Kaiser, beta 5) ripples by 0.1 % in the band
        assert abs(part_of(samples, hertz) - 0.5) < 0.001
        middle = slice(RATE // 20, len(samples) - RATE // 20)
        error = samples[middle] - tone(hertz, 1)[: len(samples)][middle]
        assert np.abs(error).max() < 0.002  # the same ripple, and images of the tone below -48 dB


def test_16_khz_mono_passes_unchanged(tmp_path):
    sound = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    file = write_audio(tmp_path / "a.wav", sound, subtype="FLOAT")
    np.testing.assert_array_equal(audio_files.load(file), sound)


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
def test_a_tone_above_the_new_nyquist_frequency_is_removed(tmp_path, rate):
    """10 kHz, a quarter above 8 kHz, is 50 dB down in every form: no alias at 6 kHz is heard.

    Taking every third sample would leave the alias at 0 dB; a filter that is too short, at -20 dB.
    """
    file = write_audio(tmp_path / "a.wav", tone(10_000, 0.5, rate), rate, subtype="FLOAT")
    inner = audio_files.load(file)[RATE // 20 : -RATE // 20]
    left = 20 * np.log10(np.sqrt(2 * np.mean(inner**2)) / 0.5)
    assert left < -50, f"{left:.1f} dB of the tone are left"


def test_channels_are_averaged(tmp_path):
    """Two voices on two channels are both heard at half their amplitude."""
    sound = np.stack([tone(440, 0.5, 48_000, 0.8), tone(1000, 0.5, 48_000, 0.4)], 1)
    samples = audio_files.load(write_audio(tmp_path / "a.wav", sound, 48_000, subtype="FLOAT"))
    assert samples.shape == (RATE // 2,)
    # 0.1 %: ripple of the low-pass
    assert abs(part_of(samples, 440) - 0.4) < 0.001 and abs(part_of(samples, 1000) - 0.2) < 0.001


FORMATS = {  # how it is written, and by how much the tone's amplitude may change
    "wav": ({"subtype": "PCM_16"}, 0.001),
    "flac": ({}, 0.001),
    "ogg": ({"format": "OGG", "subtype": "VORBIS"}, 0.02),  # lossy
    "opus": ({"format": "OGG", "subtype": "OPUS"}, 0.02),
    "mp3": ({}, 0.02),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_usual_format_is_decoded(tmp_path, kind):
    """Same length to the sample (encoder delay is taken away) and the same tone."""
    how, tolerance = FORMATS[kind]
    file = write_audio(tmp_path / f"a.{kind}", tone(440, 0.5, 48_000), 48_000, **how)
    samples = audio_files.load(file)
    assert len(samples) == RATE // 2
    assert abs(part_of(samples, 440) - 0.5) < tolerance
    assert np.abs(samples).max() < 0.6  # overshoot at the edges


def test_a_missing_recording_is_refused(tmp_path):
    for path in (tmp_path / "a.wav", tmp_path):
        say = f"{path} is missing; expected an audio file. Check the path"
        refused(FileNotFoundError, partial(audio_files.load, path), say)


@pytest.mark.parametrize("content", [b"", b"RIFF, but not really", b"ID3\x04" + bytes(500)])
@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.ogg"])
def test_what_is_no_audio_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(
        ValueError,
        partial(audio_files.load, tmp_path / name),
        f"{tmp_path / name}: not audio that can be decoded (",
        "expected MP3, FLAC, Ogg or WAV. Convert or remove the file",
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_recording_cut_short_is_refused(tmp_path, share):
    """FLAC's header says how long it is, so that a clip does not lose its last words unnoticed."""
    file = write_audio(tmp_path / "a.flac", tone(440, 2) + tone(1234, 2, peak=0.1))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    say = f"{file}: not audio that can be decoded ("
    refused(ValueError, partial(audio_files.load, file), say, "Convert or remove the file")


def test_a_recording_without_samples_is_refused(tmp_path):
    file = write_audio(tmp_path / "a.wav", np.zeros(0))
    say = f"{file}: no samples; expected audio. Record it again or remove it"
    refused(ValueError, partial(audio_files.load, file), say)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_a_recording_with_a_number_that_is_not_finite_is_refused(tmp_path, value, rate):
    """One sample of one channel is enough."""
    sound = np.zeros((100, 2), np.float32)
    sound[50, 1] = value
    file = write_audio(tmp_path / "a.wav", sound, rate, subtype="FLOAT")
    say = f"{file}: holds NaN or infinity; expected samples in [-1, 1]. Remove it"
    refused(ValueError, partial(audio_files.load, file), say)


def test_padding_puts_silence_behind_and_cuts_nothing():
    """A clip as long as the window fits; one sample more is an error that gives both lengths."""
    clips = [np.ones(3, np.float32), np.ones(5, np.float32), np.ones(0, np.float32)]
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(audio_files.pad(clips, 5), expected)
    refused(
        ValueError,
        partial(audio_files.pad, [np.ones(48_001, np.float32)], 48_000),
        "a clip has 3.00 s; expected at most the model's window of 3 s. Split it at a pause",
    )


def test_a_file_is_padded_to_the_window_or_refused_by_name(tmp_path):
    """One row with silence behind; what does not fit is an error that names the file, once."""
    file = write_audio(tmp_path / "a.wav", tone(440, 1.5))
    row = audio_files.load_window(file, 2 * RATE)
    assert row.shape == (1, 2 * RATE) and not row[0, 3 * RATE // 2 :].any()
    np.testing.assert_array_equal(row[0, : 3 * RATE // 2], audio_files.load(file))
    refused(
        ValueError,
        partial(audio_files.load_window, file, RATE),
        f"{file}: longer than the model's window of 1 s; expected at most that. Split it at a",
    )


@pytest.mark.parametrize("seconds", [1.0, 1.0 + 1 / 44100])
def test_the_window_is_exact_at_any_rate(tmp_path, seconds):
    """One second at 44.1 kHz fits a window of one second; one sample more does not."""
    samples = tone(440, 2.0, rate=44100)[: round(seconds * 44100)]
    file = write_audio(tmp_path / "a.wav", samples, rate=44100)
    if seconds == 1.0:
        assert audio_files.load_window(file, RATE).shape == (1, RATE)
    else:
        say = "longer than the model's window"
        refused(ValueError, partial(audio_files.load_window, file, RATE), say)


def test_of_a_long_file_no_more_than_the_window_is_decoded(tmp_path, monkeypatch):
    file, decoded = write_audio(tmp_path / "a.wav", tone(440, 4.0)), []
    monkeypatch.setattr(audio_files, "BLOCK", RATE // 2)
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda *a, **k: decoded.append(read(*a, **k)) or decoded[-1]
    )
    refused(ValueError, partial(audio_files.load, file, 1.0), file, "longer than")
    assert sum(map(len, decoded)) == 3 * RATE // 2
    decoded.clear()
    np.testing.assert_allclose(audio_files.load(file), tone(440, 4.0), atol=1e-4)
    assert len(decoded) == 9, "block by block, and an empty one at the end"


@pytest.mark.parametrize("rate", [1, 999, 800_000, 2**31 - 1])
def test_a_rate_that_nobody_records_at_is_refused_before_it_is_resampled(tmp_path, rate):
    """A header may ask for a filter of a billion taps."""
    file = write_audio(tmp_path / "a.wav", tone(440, 0.1), rate=rate)
    refused(
        ValueError, partial(audio_files.load, file), f"{file}: {rate} samples a second", "768000"
    )


# --------------------------------------------------------------------------------- what can be used


def test_the_table_of_durations_saves_opening_the_files(voice, monkeypatch):
    write_lines(voice / "clip_durations.tsv", "clip\tduration[ms]", "b.mp3\t2500", "a.mp3\t31")
    clips = data.read_clips(voice)
    monkeypatch.setattr(data.sf, "info", lambda file: pytest.fail(f"{file} was opened"))
    assert data.seconds_of(clips) == [0.031, 2.5]


def test_durations_come_from_the_headers_otherwise(voice):
    """Also for a clip that the table does not list; what has no header counts as 0 s."""
    (voice / "clips/b.mp3").write_bytes(b"RIFF, but not really")
    absent = [data.Clip(str(voice / "clips" / name), "x") for name in ("gone.mp3", "no\0name.mp3")]
    clips = data.read_clips(voice) + absent
    assert data.seconds_of(clips) == pytest.approx([0.25, 0, 0, 0], abs=1e-9)
    write_lines(voice / "clip_durations.tsv", "clip\tduration[ms]", "b.mp3\t2500")
    assert data.seconds_of(clips) == pytest.approx([0.25, 2.5, 0, 0], abs=1e-9)


@pytest.mark.parametrize("row", ["a.mp3\tlong", "a.mp3", "a.mp3\t1\t2", "a.mp3\t-5", "a.mp3\t"])
def test_a_clip_without_a_duration_in_the_table_is_opened(voice, row, caplog):
    """A damaged row is named, and costs no more than the header of its clip."""
    file = write_lines(voice / "clip_durations.tsv", "clip\tduration[ms]", row, "b.mp3\t2500")
    assert data.seconds_of(data.read_clips(voice)) == [0.25, 2.5]
    assert "clips will be opened, for want of a duration: 1 " in caplog.text
    assert f"first {file}:2 (" in caplog.text


@pytest.fixture
def opened(tmp_path, monkeypatch) -> list[str]:
    """The names of the files whose headers were read, with a cache folder of the test's own."""
    opened, plain = [], soundfile.info

    def info(file: str):
        opened.append(Path(file).name)
        return plain(file)

    monkeypatch.setattr(data.sf, "info", info)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return opened


def test_a_header_is_read_once_in_the_life_of_a_file(tmp_path, opened):
    """First start: once, also where a clip is listed twice. Second start: what is new, no other."""
    clips = write_corpus(tmp_path / "clips", *[(0.1 + 0.01 * n, "a") for n in range(40)])
    seconds = [0.1 + 0.01 * n for n in range(40)]
    assert data.seconds_of(clips[:30] * 2) == pytest.approx(seconds[:30] * 2)
    assert sorted(opened) == sorted(f"{n}.wav" for n in range(30))
    opened.clear()
    assert data.seconds_of(clips[:30]) == pytest.approx(seconds[:30]) and not opened
    assert data.seconds_of(clips[20:]) == pytest.approx(seconds[20:])
    assert sorted(opened) == sorted(f"{n}.wav" for n in range(30, 40)), "another part of the corpus"
    opened.clear()
    assert data.seconds_of(clips[::-1]) == pytest.approx(seconds[::-1]) and not opened
    assert len([*(tmp_path / "cache/diva").iterdir()]) == 1, "one file, and nothing half written"


@pytest.mark.parametrize("change", ["longer", "as long, and later"])
def test_a_clip_that_was_replaced_is_measured_again(tmp_path, opened, change):
    """By size or by time of change, and it alone."""
    clips = write_corpus(tmp_path / "clips", (0.1, "a"), (0.2, "b"))
    file = Path(clips[1].audio)
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    data.seconds_of(clips)
    opened.clear()
    if change == "longer":
        write_audio(file, tone(440, 0.3))
    else:  # as many bytes, in half the time
        write_audio(file, tone(440, 0.2), 2 * RATE)
        times = (times[0], times[1] + 1)
    os.utime(file, ns=times)
    expected = [0.1, 0.3 if change == "longer" else 0.1]
    assert data.seconds_of(clips) == pytest.approx(expected) and opened == ["1.wav"]
    opened.clear()
    assert data.seconds_of(clips) == pytest.approx(expected) and not opened


def test_what_has_no_header_yet_is_tried_again(tmp_path, opened):
    """Or a clip that a bucket failed to deliver once would never be measured."""
    clips = write_corpus(tmp_path / "clips", (0.1, "a"), (0.2, "b"))
    whole, file = Path(clips[0].audio).read_bytes(), Path(clips[0].audio)
    file.write_bytes(b"RIFF, but not really".ljust(len(whole)))
    os.utime(file, ns=(0, 0))
    assert data.seconds_of(clips) == pytest.approx([0, 0.2])
    file.write_bytes(whole)
    os.utime(file, ns=(0, 0))
    assert data.seconds_of(clips) == pytest.approx([0.1, 0.2])
    assert opened.count("0.wav") == 2 and opened.count("1.wav") == 1


def test_clips_of_one_size_and_time_are_told_apart(tmp_path, opened):
    clips = write_corpus(tmp_path / "clips", (0.2, "a"), (0.2, "b"))
    write_audio(Path(clips[1].audio), tone(440, 0.2), 2 * RATE)
    for clip in clips:
        os.utime(clip.audio, ns=(0, 0))
    assert len({Path(clip.audio).stat().st_size for clip in clips}) == 1
    for _ in range(2):
        assert data.seconds_of(clips) == pytest.approx([0.2, 0.1])
    assert len(opened) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_lengths_are_measured_anew(tmp_path, opened, caplog, damage):
    """And mended: the next start opens no clip."""
    clips = write_corpus(tmp_path / "clips", (0.1, "a"), (0.2, "b"))
    data.seconds_of(clips)
    [file] = (tmp_path / "cache/diva").iterdir()
    damaged = {"cut": file.read_bytes()[:-1], "empty": b"", "other": b'{"a": 1}'}
    file.write_bytes(damaged[damage])
    opened.clear()
    assert data.seconds_of(clips) == pytest.approx([0.1, 0.2]) and len(opened) == 2
    opened.clear()
    assert data.seconds_of(clips) == pytest.approx([0.1, 0.2]) and not opened
    assert not caplog.records


def test_no_flipped_bit_of_the_lengths_is_believed(tmp_path, opened):
    """In any part of the file: measured anew, or of no consequence."""
    clips = write_corpus(tmp_path / "clips", (0.1, "a"), (0.2, "b"))
    data.seconds_of(clips)
    [file] = (tmp_path / "cache/diva").iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert data.seconds_of(clips) == pytest.approx([0.1, 0.2]), f"byte {place}"
    assert len(opened) > len(whole) / 3


def test_a_cache_folder_that_cannot_be_written_is_a_warning(tmp_path, opened, monkeypatch, caplog):
    """The lengths are right, and measured at every start."""
    clips = write_corpus(tmp_path / "clips", (0.1, "a"), (0.2, "b"))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    for _ in range(2):
        assert data.seconds_of(clips) == pytest.approx([0.1, 0.2])
    assert len(opened) == 4
    assert len(caplog.records) == 2
    said = caplog.records[0].getMessage()
    assert said.startswith(f"{tmp_path / 'file/cache/diva'}/seconds-")
    assert "cannot be written (" in said and "the next start will open 2 files again. Set" in said


def test_an_interrupted_write_leaves_the_old_lengths(tmp_path, opened, monkeypatch):
    """They are written beside and then renamed."""
    clips = write_corpus(tmp_path / "clips", (0.1, "a"), (0.2, "b"), (0.3, "c"))
    data.seconds_of(clips[:2])
    [file] = (tmp_path / "cache/diva").iterdir()
    before = file.read_bytes()
    write = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        data.seconds_of(clips)
    assert file.read_bytes() == before


def write_corpus(folder: Path, *clips: tuple[float, str]) -> list[data.Clip]:
    """Clips of (seconds, text)."""
    result = []
    for i, (seconds, text) in enumerate(clips):
        file = write_audio(folder / f"{i}.wav", tone(300 + 50 * i, seconds))
        result.append(data.Clip(str(file), text))
    return result


def encode(texts: list[str]) -> list[list[int]]:
    """A token for each word: its length, behind a 100."""
    return [[100 + len(word) for word in text.split()] for text in texts]


def test_clips_that_do_not_fit_are_left_out_counted_and_reported(tmp_path, caplog):
    """Too long, too many tokens, no token; exactly at a limit fits."""
    clips = write_corpus(
        tmp_path,
        (0.5, "a bb ccc"),  # at both limits
        (0.5001, "a"),
        (0.1, "a b c d"),
        (0.1, "bb"),
        (0.1, " "),
        (0.1, ""),
        (0.6, "a b c d e"),  # counted once
    )
    corpus = data.prepare(clips, encode, RATE // 2, max_tokens=3)
    assert corpus.clips == [clips[0], clips[3]]
    assert [ids.tolist() for ids in corpus.ids] == [[101, 102, 103], [102]]
    assert (corpus.too_long, corpus.too_wordy, corpus.wordless) == (2, 1, 2)
    assert corpus.window_samples == RATE // 2 and corpus.undecodable == {}
    assert [r.getMessage() for r in caplog.records] == [
        "left out 5 of 7 clips: 2 longer than 0.5 s, 1 of more than 3 tokens, 2 without a token"
    ]


def test_a_corpus_that_fits_is_kept_without_a_word(tmp_path, caplog):
    clips = write_corpus(tmp_path, (0.1, "a"), (0.2, "b c"))
    corpus = data.prepare(clips, encode, RATE, max_tokens=3)
    assert corpus.clips == clips and not caplog.records


def test_a_million_transcripts_are_tokenised_in_parts(monkeypatch):
    """As lists of Python's integers they never stand in memory all at once."""
    clips = [data.Clip("", str(n)) for n in range(25_000)]
    monkeypatch.setattr(data, "seconds_of", lambda clips: [1.0] * len(clips))
    parts = []

    def encode(texts: list[str]) -> list[list[int]]:
        parts.append(len(texts))
        return [[int(text)] for text in texts]

    corpus = data.prepare(clips, encode, RATE, max_tokens=3)
    assert parts == [10_000, 10_000, 5_000]
    assert [ids.tolist() for ids in corpus.ids] == [[n] for n in range(25_000)]
    assert corpus.ids[0].dtype == np.int32


@pytest.mark.parametrize(("longest", "padded"), [(1, 8), (8, 8), (9, 16)])
def test_the_padded_length_is_the_longest_rounded_up_to_8(tmp_path, longest, padded):
    clips = write_corpus(tmp_path, (0.1, "a"), (0.1, "b " * longest), (0.1, "c " * 30))
    assert data.prepare(clips, encode, RATE, max_tokens=20).max_length == padded


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    clips = write_corpus(tmp_path, (0.5, "a"), (0.1, "a b c d"), (0.1, ""))
    refused(
        ValueError,
        partial(data.prepare, clips, encode, RATE // 4, 3),
        f"{clips[0].audio}: none of 3 clips can be used (1 longer than 0.25 s, 1 of more than 3 "
        "tokens, 1 without a token); expected speech of at most 0.25 s. Check --data and --split",
    )
    refused(ValueError, partial(data.prepare, [], encode, RATE, 3), "the corpus: none of 0 clips")


# ----------------------------------------------------------------------------------------- batches


WINDOW = 64  # samples


def made_up(count: int) -> data.Corpus:
    """Clip i has the tokens [i + 1, ...] and, through Decoder, audio of its own."""
    clips = [data.Clip(f"{i}.wav", "") for i in range(count)]
    ids = [np.full(1 + i % 5, i + 1, np.int32) for i in range(count)]
    return data.Corpus(clips, ids, WINDOW, 8)


class Decoder:
    """In place of load_audio, which takes a while: which clips were asked for, by which threads."""

    def __init__(self):
        self.asked: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, path: str) -> np.ndarray:
        self.asked.append(number := int(Path(path).stem))
        self.threads.add(threading.get_ident())
        return np.full(20 + number % 40, (number + 1) / 1000, np.float32)


@pytest.fixture
def decoder(monkeypatch) -> Decoder:
    decoder = Decoder()
    monkeypatch.setattr(audio_files, "load", decoder)
    return decoder


@pytest.fixture(autouse=True)
def no_thread_decodes_on(monkeypatch) -> Iterator[None]:
    """Into the next test, that is, where load_audio is another one."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)


def take(count: int, corpus: data.Corpus, **how) -> list[dict[str, np.ndarray]]:
    with closing(data.batches(corpus, **how)) as batches:
        return list(itertools.islice(batches, count))


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """Which clips of the made-up corpus a batch holds."""
    return [int(n) - 1 for n in batch.transcript[:, 0]]


def fields_of(batch: data.Batch) -> dict[str, np.ndarray]:
    """The fields of a batch that are not absent."""
    return {name: x for name, x in batch._asdict().items() if x is not None}


def equal(a: list[data.Batch], b: list[data.Batch]) -> None:
    """Bit for bit."""
    assert len(a) == len(b)
    for x, y in zip(map(fields_of, a), map(fields_of, b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name, strict=True)


few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `decoder` has no state to reset
)


def test_a_batch_holds_audio_tokens_lengths_and_weights(decoder):
    """Types and shapes; tokens and audio belong together; zeros behind both."""
    corpus = made_up(30)
    batch = take(1, corpus, batch_size=12, seed=0)[0]
    assert {key: (x.dtype, x.shape) for key, x in fields_of(batch).items()} == {
        "audio": (np.float32, (12, WINDOW)),
        "transcript": (np.int32, (12, 8)),
        "lengths": (np.int32, (12,)),
        "weights": (np.float32, (12,)),
    }
    assert len(set(numbers(batch))) == 12 and set(batch.weights) == {1.0}
    for row, n in enumerate(numbers(batch)):
        ids = corpus.ids[n].tolist()
        assert batch.lengths[row] == len(ids)
        assert batch.transcript[row].tolist() == ids + [0] * (8 - len(ids))
        audio, length = batch.audio[row], 20 + n % 40
        # 16 bits: half a step of 1 / 32767
        assert np.abs(audio[:length] - (n + 1) / 1000).max() < 0.51 / 32767
        assert not audio[length:].any()


def test_a_batch_has_the_sound_of_its_files_to_16_bits(tmp_path):
    """Real files at another rate; what is louder than full scale keeps its shape, as eval and demo
    hear it."""
    loud = tone(440, 0.3, 48_000, peak=1.5)
    quiet = tone(440, 0.2, 44_100, peak=0.01)
    files = [
        write_audio(tmp_path / "loud.wav", loud, 48_000, subtype="FLOAT"),
        write_audio(tmp_path / "quiet.wav", quiet, 44_100, subtype="FLOAT"),
    ]
    ids = [np.array([n], np.int32) for n in (1, 2)]
    corpus = data.Corpus([data.Clip(str(f), "") for f in files], ids, RATE, 8)
    batch = take(1, corpus, batch_size=2, seed=0)[0]
    for n, file in enumerate(files):
        audio = batch.audio[numbers(batch).index(n)]
        expected = audio_files.load(file)
        step = max(1, np.abs(expected).max()) / 32767
        assert np.abs(audio[: len(expected)] - expected).max() < 0.51 * step
        assert not audio[len(expected) :].any()


@few
@given(
    count=st.integers(1, 12),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 15),
)
def test_a_batch_is_a_function_of_seed_and_step(decoder, count, batch_size, seed, start):
    """Starting at step k gives what the k-th step from 0 gives: a resumed run sees the same."""
    how = dict(batch_size=batch_size, seed=seed)
    whole = take(start + 3, made_up(count), **how)
    equal(take(3, made_up(count), **how, start_step=start), whole[start:])


def test_another_seed_gives_another_order(decoder):
    orders = {
        tuple(numbers(take(1, made_up(20), batch_size=20, seed=seed)[0])) for seed in range(5)
    }
    assert len(orders) == 5


@few
@given(count=st.integers(1, 12), batch_size=st.integers(1, 9), seed=st.integers(0, 9))
def test_every_clip_comes_once_per_epoch(decoder, count, batch_size, seed):
    """Also where an epoch ends within a batch: nothing is dropped and nothing is doubled."""
    steps = -(-4 * count // batch_size)
    batches = take(steps, made_up(count), batch_size=batch_size, seed=seed)
    dealt = [n for batch in batches for n in numbers(batch)]
    for epoch in range(4):
        assert sorted(dealt[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_are_shuffled_differently(decoder):
    """And none is in the order of the files."""
    epochs = [tuple(numbers(b)) for b in take(5, made_up(20), batch_size=20, seed=0)]
    assert len({*epochs, tuple(range(20))}) == 6


@few
@given(
    count=st.integers(1, 12),
    rows=st.integers(1, 4),
    processes=st.sampled_from([2, 4]),
    start=st.integers(0, 9),
)
def test_the_rows_of_all_processes_are_the_batch_of_one(decoder, count, rows, processes, start):
    """In the order of the processes, from any step on: the number of hosts changes no number."""
    how = dict(batch_size=rows * processes, seed=1, start_step=start)
    whole = take(3, made_up(count), **how)
    parts = [
        take(3, made_up(count), **how, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        rows_of_all = zip(*(fields_of(part[step]).values() for part in parts), strict=True)
        together = map(np.concatenate, rows_of_all)
        equal([data.Batch(**dict(zip(fields_of(batch), together, strict=True)))], [batch])


def test_a_batch_that_processes_cannot_share_is_refused():
    refused(
        ValueError,
        partial(data.batches, made_up(3), batch_size=10, seed=0, process_count=4),
        "--batch-size 10: cannot be shared equally by 4 processes; expected a multiple of 4",
    )


def test_decoding_keeps_ahead_by_four_batches_and_no_more(decoder):
    """Other threads decode while the first batch is used; memory holds AHEAD batches beside it."""
    with closing(data.batches(made_up(1000), batch_size=5, seed=0)) as batches:
        next(batches)
        ahead = (1 + data.AHEAD) * 5
        deadline = time.monotonic() + 10
        while len(decoder.asked) < ahead:
            assert time.monotonic() < deadline, f"{len(decoder.asked)} clips, not {ahead}"
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(decoder.asked) == ahead, "clips decoded after one batch"
    assert threading.get_ident() not in decoder.threads


def test_a_small_corpus_is_decoded_once_and_a_large_one_again(decoder, monkeypatch):
    """Up to IN_MEMORY clips stay; the batches are the same."""
    kept = take(10, made_up(6), batch_size=6, seed=0)
    assert len(decoder.asked) <= 4 * 6, "each of four threads may meet a clip before it is there"
    monkeypatch.setattr(data, "IN_MEMORY", 5)
    decoder.asked.clear()
    again = take(10, made_up(6), batch_size=6, seed=0)
    assert len(decoder.asked) >= 60
    equal(kept, again)


# --------------------------------------------------------------------------------- clips that fail


@pytest.mark.parametrize("in_memory", [10, 0])
def test_a_corrupt_clip_among_good_ones(tmp_path, monkeypatch, caplog, in_memory):
    """Weight 0 and silence in each epoch; named in the log once; counted. The others are heard."""
    monkeypatch.setattr(data, "IN_MEMORY", in_memory)
    clips = write_corpus(tmp_path, *[(0.2, "a bb")] * 5)
    Path(clips[1].audio).write_bytes(b"RIFF, but not really")
    Path(clips[3].audio).unlink()
    corpus = data.prepare(clips, lambda texts: [[i + 1] for i in range(5)], RATE, 3)
    assert corpus.clips == clips, "what cannot be opened is found when it is decoded"
    seen = 0
    for batch in take(15, corpus, batch_size=2, seed=0):  # six epochs
        for n, weight, audio in zip(numbers(batch), batch.weights, batch.audio, strict=True):
            assert weight == (n not in (1, 3))
            assert np.abs(audio).max() == (pytest.approx(0.5, abs=0.01) if weight else 0)
            seen += weight == 0
    assert seen == 12
    assert corpus.undecodable.keys() == {clips[1].audio, clips[3].audio}
    assert corpus.undecodable[clips[1].audio].startswith(f"{clips[1].audio}: not audio that can be")
    assert corpus.undecodable[clips[3].audio].startswith(f"{clips[3].audio} is missing")
    said = sorted(r.getMessage() for r in caplog.records)
    assert said == sorted(f"weight 0: {reason}" for reason in corpus.undecodable.values())


def test_threads_that_meet_a_corrupt_clip_at_once_name_it_once(monkeypatch, caplog):
    """Four threads, one clip: whoever comes first says it."""

    class Slow(ValueError):
        def __str__(self) -> str:
            time.sleep(0.02)  # the others arrive in this time
            return "0.wav: broken"

    def broken(path: str):
        raise Slow

    monkeypatch.setattr(audio_files, "load", broken)
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    take(2, made_up(1), batch_size=8, seed=0)
    assert len([r for r in caplog.records if r.msg.startswith("weight 0")]) == 1


def test_a_clip_longer_than_the_table_says_has_weight_0_and_is_not_cut(voice):
    """The table says 250 and 100 ms; the second recording has 400 ms, and the window 300."""
    write_audio(voice / "clips/b.mp3", tone(440, 0.4, 48_000), 48_000)
    write_lines(voice / "clip_durations.tsv", "clip\tduration[ms]", "a.mp3\t250", "b.mp3\t100")
    clips = data.read_clips(voice)
    window = RATE * 3 // 10
    corpus = data.prepare(clips, lambda texts: [[1], [2]], window, 3)
    assert corpus.clips == clips
    batch = take(1, corpus, batch_size=2, seed=0)[0]
    a, b = (numbers(batch).index(n) for n in (0, 1))
    assert batch.weights[[a, b]].tolist() == [1, 0]
    assert batch.audio[a].any() and not batch.audio[b].any()
    [(file, reason)] = corpus.undecodable.items()
    assert file == clips[1].audio
    assert f"{file}: 0.40 s, longer than its header says; expected at most 0.3 s" in reason


def test_a_clip_as_long_as_the_window_survives_the_rounding_of_its_resampling(tmp_path):
    """0.3 s at 44.1 kHz and one sample more are 4,801 samples at 16 kHz: 0.06 ms, not 0 weight."""
    write_audio(tmp_path / "clips/a.wav", tone(440, 0.3 + 1 / 44_100, 44_100), 44_100)
    write_lines(tmp_path / "clip_durations.tsv", "clip\tduration[ms]", "a.wav\t300")
    write_lines(tmp_path / "train.tsv", OLD, "v1\ta.wav\thello\t2\t0\t\t\t")
    clips = data.read_clips(tmp_path)
    assert len(audio_files.load(clips[0].audio)) == 4801
    corpus = data.prepare(clips, encode, 4800, 3)
    batch = take(1, corpus, batch_size=1, seed=0)[0]
    assert batch.weights == [1] and batch.audio.shape == (1, 4800)
    assert batch.audio[0, -100:].any() and not corpus.undecodable


# ------------------------------------------------------------------------------------- the command


def test_the_command_says_what_a_corpus_holds(tmp_path, capsys):
    """Clips, hours, longest and median, what would be left out and why, accents, a batch."""
    toy = Path(data.__file__).parent / "toy"
    folder = tmp_path / "cv"
    write_audio(folder / "clips/long.wav", tone(440, 2.0))
    write_audio(folder / "clips/short.wav", tone(440, 0.5))
    rows = ["short.wav\tthe dog sleeps\tus", "long.wav\tthe dog sleeps\tus"]
    rows.append(f"short.wav\t{'dog ' * 9}\tscottish")
    write_lines(folder / "train.tsv", "path\tsentence\taccents", *rows)
    data.main(folder, "train", str(toy / "whisper"), str(toy / "llama"), 8, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}, split train, window 1.6 s"
    left = "1 longer than 1.6 s, 1 of more than 8 tokens, 0 without a token"
    assert lines[1] == f"3 clips, 0.00 hours; 1 can be used: left out {left}"
    assert lines[2].split() == "clip longest 2.00 s, median 0.50 s".split()
    assert lines[3].split() == "transcript longest 9 tokens, median 3".split()
    assert lines[4].split(None, 1) == ["accents", "2: us 2, scottish 1"]
    assert "transcript int32 [2, 8]" in lines[5] and "audio float32 [2, 25600]" in lines[5]
