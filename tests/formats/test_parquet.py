"""parquet.py: sets in the Hub's layouts, read row by row; what is amiss is refused by name, or is
one clip of weight 0, as it would be among files.

The columns are those of the published sets; the rows are made up.
"""

import io
import itertools
import json
import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import grain  # noqa: F401  (its import draws at random)
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

import data
from formats import audio_files, parquet

RATE = audio_files.SAMPLE_RATE
SOUND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def voice(number: int, kind: str = "FLAC", seconds: float = 0.1) -> bytes:
    """A tone of its own, a hundredth of a second longer for each number."""
    at = np.arange(round((seconds + number / 100) * RATE))
    stream = io.BytesIO()
    soundfile.write(stream, 0.5 * np.sin(at * (300 + 50 * number) / RATE * 6.28), RATE, format=kind)
    return stream.getvalue()


def row(number: int, text: str | None = "hello", kind: str = "FLAC", **others) -> dict:
    sound = {"bytes": voice(number, kind), "path": f"{number}.{kind.lower()}"}
    return {"audio": sound, "text": text, **others}


def shard(file: Path, rows: list[dict], group: int = 2, classes: dict | None = None) -> Path:
    """Row groups of two, so that there are some; `classes` are noted as `datasets` notes them."""
    fields = {name: pa.array([r[name] for r in rows]).type for name in rows[0] if name != "audio"}
    schema = pa.schema(({"audio": SOUND} if isinstance(rows[0]["audio"], dict) else {}) | fields)
    if "audio" not in fields and "audio" not in schema.names:
        schema = schema.append(pa.field("audio", pa.string()))
    features = {name: {"_type": "Value"} for name in schema.names}
    features |= {
        name: {"names": names, "_type": "ClassLabel"} for name, names in (classes or {}).items()
    }
    note = json.dumps({"info": {"features": features}})
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema).replace_schema_metadata({"huggingface": note})
    pq.write_table(table, file, row_group_size=group)
    return file


def refused(kind: type[Exception], action, *parts: object) -> None:
    """`action` raises `kind`, and the message, one line, holds every part."""
    with pytest.raises(kind) as error:
        action()
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value), f"{part!s} is not in: {error.value}"


# ------------------------------------------------------------------------------------ what is there

LAYOUTS = {
    "pushed": "data/train-{:05}-of-00003.parquet",
    "pushed twice": "data/train-{:05}-of-00003-0123456789abcdef.parquet",
    "a config": "train-{:05}-of-00003.parquet",
    "a config in folders": "train/{:04}.parquet",
    "converted": "default/train/{:04}.parquet",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shards_of_a_split_are_found_in_every_layout(tmp_path, layout):
    """In order, and of no other split: neither one that begins alike nor what macOS leaves."""
    files = [shard(tmp_path / LAYOUTS[layout].format(n), [row(n, f"said {n}")]) for n in range(3)]
    for other in ("train.other", "test", "train_x"):
        shard(tmp_path / LAYOUTS[layout].format(0).replace("train", other), [row(9)])
    files[0].with_name(f"._{files[0].name}").write_bytes(b"\0\5\x16\7")
    assert parquet.shards(tmp_path, "train") == files
    clips = data.read_clips(tmp_path)
    assert [clip.text for clip in clips] == ["said 0", "said 1", "said 2"]
    assert [clip.audio for clip in clips] == [f"{file}, row 0" for file in files]
    for number, clip in enumerate(clips):
        assert len(audio_files.load(clip.audio)) == RATE // 10 + number * RATE // 100
    assert data.read_clips(files[1]) == clips[1:2]


def test_shards_that_are_lacking_are_an_error(tmp_path):
    """As is a split that is not there, or a set of several configs without the name of one."""
    for n in (0, 2):
        shard(tmp_path / f"clean/train-{n:05}-of-00003.parquet", [row(n)])
    shard(tmp_path / "clean/test/0000.parquet", [row(0)])
    read = partial(data.read_clips, tmp_path / "clean")
    say = (
        f"{tmp_path}/clean/train-[0-9]*.parquet: 2 files of 3; expected all shards of one revision"
    )
    refused(FileNotFoundError, read, say)
    refused(
        FileNotFoundError, partial(read, "dev"), "no split 'dev'", "nor parquet", "found test, tra"
    )
    say = "no split 'test'"
    refused(
        FileNotFoundError, partial(data.read_clips, tmp_path, "test"), say, "clean/test, clean/tr"
    )


def test_published_columns_become_clips(tmp_path):
    """Texts by their usual names, classes by name, what is not a scalar or absent left aside."""
    sets = {
        "librispeech_asr": (
            {"file": "1.flac", "text": "IT IS", "speaker_id": 374, "chapter_id": 180298, "id": "a"},
            ("it is", {"file": "1.flac", "speaker_id": "374", "chapter_id": "180298", "id": "a"}),
        ),
        "peoples_speech": (
            {"id": "b.flac", "duration_ms": 14920, "text": "so it is"},
            ("so it is", {"id": "b.flac", "duration_ms": "14920"}),
        ),
        "voxpopuli": (
            {
                "audio_id": "c",
                "language": 1,
                "raw_text": "It is.",
                "normalized_text": "it is",
                "gender": "female",
                "is_gold_transcript": True,
                "accent": "None",
            },
            (
                "It is.",
                {
                    "audio_id": "c",
                    "language": "de",
                    "normalized_text": "it is",
                    "gender": "female",
                    "is_gold_transcript": "True",
                    "accent": "None",
                },
            ),
        ),
        "yodas": (
            {"id": "0", "utt_id": "d-00000-00000000-00000200", "text": "Feel it"},
            ("Feel it", {"id": "0", "utt_id": "d-00000-00000000-00000200"}),
        ),
        "common_voice": (
            {"client_id": "v", "path": "e.mp3", "sentence": " Is it? ", "up_votes": 2, "age": ""},
            ("Is it?", {"client_id": "v", "path": "e.mp3", "up_votes": "2"}),
        ),
        "nested": (
            {"words": ["a"], "transcript": "it", "score": 0.5, "raw": b"x", "day": None},
            ("it", {"score": "0.5"}),
        ),
    }
    for name, (columns, (text, meta)) in sets.items():
        sound = {"audio": {"bytes": voice(0), "path": None}}
        file = tmp_path / name / "data/train-00000-of-00001.parquet"
        shard(file, [sound | columns], classes={"language": ["en", "de"]})
        assert data.read_clips(tmp_path / name) == [data.Clip(f"{file}, row 0", text, meta)]


def test_of_several_texts_the_first_usual_one_is_taken_and_the_choice_is_said(tmp_path, caplog):
    """Or the one that was asked for, without a word."""
    rows = [
        row(0, "Aa", normalized_text="a", raw_text="A!"),
        row(1, "B", normalized_text="b", raw_text=""),
    ]
    file = shard(tmp_path / "train.parquet", rows)
    assert [clip.text for clip in data.read_clips(tmp_path)] == ["Aa", "B"]
    said = "taken from text, not from raw_text, normalized_text: --text-column chooses"
    assert [r.getMessage() for r in caplog.records] == [f"{file}: the transcripts are {said}"]
    caplog.clear()
    clips = data.read_clips(tmp_path, text_column="normalized_text")
    assert [clip.text for clip in clips] == ["a", "b"] and clips[0].meta["text"] == "Aa"
    assert not caplog.records


def test_rows_without_a_text_or_a_recording_are_left_out_and_named(tmp_path, caplog):
    rows = [row(0), row(1, None), row(2, " \t"), row(3), row(4) | {"audio": None}]
    file = shard(tmp_path / "train.parquet", rows)
    assert [clip.audio for clip in data.read_clips(tmp_path)] == [
        f"{file}, row {n}" for n in (0, 3)
    ]
    why = "without a path or a text"
    first = f"first {file}, row 1 ({why}), {file}, row 2 ({why}), {file}, row 4 ({why})"
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}: left out 3 of 5: 3 {why}; {first}"
    ]


def test_wrong_columns_are_refused_with_those_that_are_there(tmp_path):
    read = partial(data.read_clips, tmp_path)
    file = shard(tmp_path / "train.parquet", [row(0) | {"label": 3}])
    say = f"{file}: no text in a column label; found audio, text, label. Give the one that holds"
    refused(ValueError, partial(read, text_column="label"), say, "--text-column")
    refused(ValueError, partial(read, text_column="said"), "no text in a column said; found audio")
    pq.write_table(pa.table({"speech": ["a"], "text": ["b"]}), file)
    refused(
        ValueError, read, f"{file}: no recordings; found speech, text; expected a column `audio`"
    )
    pq.write_table(pa.table({"audio": [[0.5, 0.1]], "text": ["b"]}), file)
    refused(ValueError, read, f"{file}: no recordings; found audio, text")
    shard(file, [{"audio": {"bytes": b"", "path": "a"}, "said": "b"}])
    refused(ValueError, read, "no text in a column text or sentence or", "found audio, said. Give")


def test_a_second_shard_with_other_columns_is_refused(tmp_path):
    shard(tmp_path / "train/0000.parquet", [row(0)])
    other = shard(tmp_path / "train/0001.parquet", [{"audio": row(1)["audio"], "sentence": "b"}])
    say = f"{other}: no column text; found audio, sentence; expected a table in parquet"
    refused(ValueError, partial(data.read_clips, tmp_path), say)


@pytest.mark.parametrize("left", [0, 3, 200, -1])
def test_a_shard_cut_short_is_refused_by_name(tmp_path, left):
    file = shard(tmp_path / "train.parquet", [row(n) for n in range(4)])
    file.write_bytes(file.read_bytes()[:left])
    say = f"{file}: "
    refused(ValueError, partial(data.read_clips, tmp_path), say, "a table in parquet that is whole")


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    file = shard(tmp_path / "train.parquet", [row(0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    say = f"{file}: parquet needs pyarrow, which is not installed. Run pip install '.[parquet]'"
    refused(ValueError, partial(data.read_clips, tmp_path), say)


def test_paths_in_a_column_are_relative_to_the_shard(tmp_path):
    (tmp_path / "data/clips").mkdir(parents=True)
    (tmp_path / "data/clips/a.flac").write_bytes(voice(0))
    shard(tmp_path / "data/train.parquet", [{"audio": "clips/a.flac", "text": "a"}])
    [clip] = data.read_clips(tmp_path)
    assert clip == data.Clip(str(tmp_path / "data/clips/a.flac"), "a")
    assert data.seconds_of([clip]) == pytest.approx([0.1])


# ------------------------------------------------------------------------------------------ the Hub


class NoBranch(RevisionNotFoundError):
    def __init__(self):
        """What the library's own takes differs among its versions."""


class Hub:
    """In place of the Hub: {branch: names of its files}, and what was asked for."""

    def __init__(self, cache: Path, **branches: list[str]):
        self.cache, self.branches, self.asked = cache, branches, []

    def snapshot_download(self, repo, *, repo_type, revision, allow_patterns) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append((repo, repo_type, revision))
        files = self.list_repo_files(repo, repo_type=repo_type, revision=revision)
        home = self.cache / f"datasets--{repo.replace('/', '--')}/snapshots/{revision}"
        home.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(filter_repo_objects(files, allow_patterns=allow_patterns)):
            shard(home / name, [row(number, name)])
        return str(home)

    def list_repo_files(self, repo, *, repo_type, revision) -> list[str]:
        assert repo_type == "dataset"
        if (branch := (revision or "main").rpartition("/")[2]) not in self.branches:
            raise NoBranch
        return self.branches[branch]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that makes a Hub of branches."""

    def make(**branches: list[str]) -> Hub:
        made = Hub(tmp_path, **branches)
        monkeypatch.setattr(parquet, "snapshot_download", made.snapshot_download)
        monkeypatch.setattr(parquet, "HfApi", lambda: made)
        return made

    return make


def test_a_dataset_of_the_hub_is_downloaded_for_its_split_alone(hub):
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    made = hub(main=[*names, "data/test-00000-of-00001.parquet", "README.md", "train.zip"])
    clips = data.read_clips("owner/some.set")
    assert [clip.text for clip in clips] == names
    assert made.asked == [("owner/some.set", "dataset", None)]
    assert sorted(p.name for p in made.cache.glob("*/*/*/*/*")) == [
        Path(name).name for name in names
    ]


def test_a_config_is_the_next_part_of_the_name(hub):
    """In folders of splits, or with the splits in the names of files."""
    names = ["clean/train.100/0000.parquet", "clean/train.100/0001.parquet"]
    hub(main=[*names, "other/train.100/0000.parquet", "all/test-00000-of-00001.parquet"])
    assert [c.text for c in data.read_clips("owner/set/clean", "train.100")] == names
    assert len(data.read_clips("owner/set/all", "test")) == 1


def test_what_was_published_otherwise_is_read_as_the_hub_converted_it(hub):
    made = hub(main=["script.py"], parquet=["default/train/0000.parquet", "en/train/0000.parquet"])
    [clip] = data.read_clips("owner/set")
    assert clip.text == "default/train/0000.parquet"
    assert [c.text for c in data.read_clips("owner/set/en")] == ["en/train/0000.parquet"]
    assert made.asked[1] == ("owner/set", "dataset", "refs/convert/parquet")


def test_a_config_or_a_split_that_is_lacking_is_an_error_with_those_that_are_there(hub):
    hub(main=["clean/train-00000-of-00001.parquet", "other/train/0000.parquet"])
    say = (
        "owner/set: no split 'train' in parquet; found clean/train, other/train. Check --split, and"
    )
    refused(FileNotFoundError, partial(data.read_clips, "owner/set"), say, "owner/name/config")
    hub(main=["a.tar"], parquet=["en/test/0000.parquet"])
    refused(FileNotFoundError, partial(data.read_clips, "owner/set"), "found en/test. Check")


def test_what_is_neither_here_nor_on_the_hub_is_refused_in_a_line(monkeypatch):
    def fails(*_, **__):
        raise LocalEntryNotFoundError("Cannot reach it.\nMore of it.")

    monkeypatch.setattr(parquet, "snapshot_download", fails)
    say = "cv/en: neither a file or folder here nor a dataset of the Hub that could be fetched (Can"
    refused(FileNotFoundError, partial(data.read_clips, "cv/en"), say, "Check --data")
    for path in ("/no/where", "list.jsonl"):
        say = f"{path}: no such file or folder; expected a Common Voice folder"
        refused(FileNotFoundError, partial(data.read_clips, path), say)


def test_a_corpus_of_the_hub_is_the_same_on_every_machine(tmp_path):
    """Wherever the cache lies, and whatever commit it is; but not with other rows or texts."""

    def digest(home: str, texts: str = "ab") -> dict:
        rows = [data.Clip(f"{home}/data/train.parquet, row {n}", t) for n, t in enumerate(texts)]
        return data.Corpus(rows, [], RATE, 8).digest()

    same = digest("/home/a/hub/datasets--owner--set/snapshots/0123abcd")
    assert same == digest("/mnt/b/datasets--owner--set/snapshots/4567")
    assert same != digest("/mnt/b/datasets--owner--set/snapshots/4567", "ba")
    assert digest("/here") != digest("/there"), "folders are named as they were given"


# --------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("kind", ["FLAC", "MP3", "OGG", "WAV"])
@pytest.mark.parametrize("group", [1, 5, 40])
def test_a_row_holds_the_recording_that_was_put_in(tmp_path, kind, group):
    """Of any row group, and whatever its place in it: the same samples as from a file."""
    rows = [row(n, kind=kind) for n in range(23)]
    file = shard(tmp_path / "train.parquet", rows, group)
    for n in (0, 4, 5, 12, 22):
        alone = tmp_path / f"alone.{kind.lower()}"
        alone.write_bytes(rows[n]["audio"]["bytes"])
        heard = audio_files.load(f"{file}, row {n}")
        np.testing.assert_array_equal(heard, audio_files.load(alone))
    refused(
        ValueError, partial(audio_files.load, f"{file}, row 23"), f"{file}, row 23: there is none"
    )


def test_row_groups_that_make_each_clip_slow_are_a_warning(tmp_path, monkeypatch, caplog):
    file = shard(tmp_path / "train.parquet", [row(n, kind="WAV") for n in range(40)], 20)
    data.read_clips(tmp_path)
    assert not caplog.records
    monkeypatch.setattr(parquet, "LARGE", 10_000)
    data.read_clips(tmp_path)
    said = (
        f"{file}: each clip reads half of a row group of 0 MB on average; a pyarrow.parquet.write"
    )
    assert said in caplog.text and len(caplog.records) == 1


def test_a_row_group_is_read_no_further_than_the_row(tmp_path, monkeypatch):
    """A few rows at a time, of the audio alone, and of one row group."""
    file, read = shard(tmp_path / "train.parquet", [row(n) for n in range(40)], 20), []
    plain = pq.ParquetFile.iter_batches

    def counted(self, *how, **more):
        for batch in plain(self, *how, **more):
            read.append((len(batch), batch.schema.names))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    audio_files.load(f"{file}, row 29")
    assert read == [(8, ["audio"])] * 2


@pytest.mark.parametrize("path", ["7.flac", "gone.flac", None])
def test_a_row_without_bytes_names_a_file_beside_the_table(tmp_path, path):
    (tmp_path / "7.flac").write_bytes(voice(7))
    rows = [row(0), row(1) | {"audio": {"bytes": None, "path": path}}]
    file = shard(tmp_path / "train.parquet", rows)
    clips = data.read_clips(tmp_path)
    if path == "7.flac":
        assert len(audio_files.load(clips[1].audio)) == RATE * 17 // 100
        assert data.seconds_of(clips) == pytest.approx([0.1, 0.17])
    else:
        say = f"{file}, row 1: no bytes, and {tmp_path / path if path else 'no path'} in place of"
        refused(FileNotFoundError, partial(audio_files.load, clips[1].audio), say)
        assert data.seconds_of(clips) == pytest.approx([0.1, 0])


# ---------------------------------------------------------------------------------------- durations


@pytest.fixture
def scanned(tmp_path, monkeypatch) -> list[str]:
    """The tables whose recordings were read for their headers, with a cache of the test's own."""
    scanned, plain = [], audio_files.seconds_in

    def seconds_in(table: str) -> list[float]:
        scanned.append(Path(table).name)
        return plain(table)

    monkeypatch.setattr(audio_files, "seconds_in", seconds_in)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return scanned


@pytest.mark.parametrize("kind", ["FLAC", "MP3", "OGG"])
def test_headers_are_read_once_in_the_life_of_a_shard(tmp_path, scanned, kind):
    """The next start reads none; a shard that was replaced is read again, and it alone."""
    for s in range(2):
        shard(tmp_path / f"train/000{s}.parquet", [row(3 * s + n, kind=kind) for n in range(3)])
    clips = data.read_clips(tmp_path)
    seconds = [0.1 + n / 100 for n in range(6)]
    assert data.seconds_of(clips[::-1] + clips) == pytest.approx(seconds[::-1] + seconds)
    assert sorted(scanned) == ["0000.parquet", "0001.parquet"]
    scanned.clear()
    assert data.seconds_of(clips) == pytest.approx(seconds) and not scanned
    new = shard(tmp_path / "train/0001.parquet", [row(9 - n, kind=kind) for n in range(3)])
    os.utime(new, ns=(0, 0))
    assert data.seconds_of(clips)[3:] == pytest.approx([0.19, 0.18, 0.17])
    assert scanned == ["0001.parquet"]


@pytest.mark.parametrize(
    ("column", "said"),
    [("duration", 2.5), ("audio_duration", 2.5), ("duration_ms", 2500), ("duration", "2.5")],
)
def test_a_column_of_durations_saves_reading_the_recordings(tmp_path, scanned, column, said):
    shard(tmp_path / "train.parquet", [row(0, **{column: said})])
    assert data.seconds_of(data.read_clips(tmp_path)) == [2.5] and not scanned


@pytest.mark.parametrize("said", ["long", "", "nan", "inf", "-1", "0"])
def test_a_duration_that_is_none_is_read_from_the_header(tmp_path, scanned, said):
    """A row that says it is believed beside one that does not."""
    shard(tmp_path / "train.parquet", [row(0, duration=said), row(1, duration="2.5")])
    assert data.seconds_of(data.read_clips(tmp_path)) == pytest.approx([0.1, 2.5])
    assert scanned == ["train.parquet"]


def test_a_table_that_breaks_off_inside_has_no_durations_and_is_read_again(tmp_path, scanned):
    """Its damaged rows are found one by one when they are decoded; the others are heard."""
    rows = [row(n, kind="WAV") for n in range(6)]
    file = shard(tmp_path / "train.parquet", rows, 2)
    spoilt = bytearray(file.read_bytes())
    place = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    spoilt[place : place + 40] = bytes(40)
    file.write_bytes(spoilt)
    clips = data.read_clips(tmp_path)
    for _ in range(2):
        assert data.seconds_of(clips) == [0.0] * 6
    assert len(scanned) == 2
    assert len(audio_files.load(clips[5].audio)) == RATE * 15 // 100
    say = f"{file}, row 2: "
    refused(ValueError, partial(audio_files.load, clips[2].audio), say, "Download it again")


# ------------------------------------------------------------------------------------------ batches


def encode(texts: list[str]) -> list[list[int]]:
    return [[100 + int(text)] for text in texts]


def take(count: int, corpus: data.Corpus, **how) -> list[dict[str, np.ndarray]]:
    with closing(data.batches(corpus, **how)) as batches:
        return list(itertools.islice(batches, count))


@pytest.mark.parametrize("in_memory", [100, 0])
def test_batches_of_parquet_are_those_of_the_same_clips_as_files(tmp_path, monkeypatch, in_memory):
    """Bit for bit, from any step on, for any number of hosts."""
    monkeypatch.setattr(data, "IN_MEMORY", in_memory)
    kinds = ("FLAC", "MP3", "OGG", "WAV")
    rows = [row(n, str(n), kinds[n % 4]) for n in range(11)]
    for s, part in enumerate((rows[:4], rows[4:])):
        shard(tmp_path / f"data/train-0000{s}-of-00002.parquet", part, 3)
    files = []
    for n, r in enumerate(rows):
        file = tmp_path / f"clips/{n:02}-{r['audio']['path']}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(r["audio"]["bytes"])
        files.append(data.Clip(str(file), str(n)))
    a, b = (
        data.prepare(clips, encode, RATE * 18 // 100, 4)
        for clips in (data.read_clips(tmp_path), files)
    )
    assert len(a.clips) == len(b.clips) == 9 and a.too_long == 2
    whole = take(5, b, batch_size=4, seed=1)
    for start, count in ((0, 1), (2, 2)):
        how = {"batch_size": 4, "seed": 1, "start_step": start, "process_count": count}
        parts = [take(3, a, **how, process_index=p) for p in range(count)]
        for step in range(3):
            for name, expected in whole[start + step]._asdict().items():
                if expected is not None:
                    rows = np.concatenate([getattr(part[step], name) for part in parts])
                    np.testing.assert_array_equal(rows, expected, strict=True)


def test_rows_that_cannot_be_decoded_have_weight_0_and_are_named_once(tmp_path, caplog):
    """No audio, no bytes and no file, and longer than its column says."""
    rows = [row(n, str(n), duration=0.1 if n == 3 else 0.1 + n / 100) for n in range(5)]
    rows[1]["audio"] = {"bytes": b"RIFF, but not really", "path": "1.wav"}
    rows[2]["audio"] = {"bytes": None, "path": "2.wav"}
    rows[3]["audio"]["bytes"] = voice(30)
    file = shard(tmp_path / "data/train-00000-of-00001.parquet", rows)
    corpus = data.prepare(data.read_clips(tmp_path), encode, RATE * 15 // 100, 4)
    weights = {}
    for batch in take(9, corpus, batch_size=2, seed=0):
        for ids, weight, audio in zip(batch.transcript, batch.weights, batch.audio, strict=True):
            assert audio.any() == (weight > 0)
            weights.setdefault(int(ids[0]) - 100, set()).add(float(weight))
    assert weights == {0: {1.0}, 1: {0.0}, 2: {0.0}, 3: {0.0}, 4: {1.0}}
    names = {n: f"{file}, row {n}" for n in (1, 2, 3)}
    assert corpus.undecodable.keys() == {*names.values()}
    said = sorted(r.getMessage() for r in caplog.records)
    assert len(said) == 3
    assert said[0].startswith(f"weight 0: {names[1]}: not audio that can be decoded (")
    assert said[1].startswith(
        f"weight 0: {names[2]}: no bytes, and {file.parent}/2.wav in place of"
    )
    assert said[2].startswith(f"weight 0: {names[3]}: 0.40 s, longer than its header says")
