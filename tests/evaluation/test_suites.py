"""suites.py: each benchmark in the layout in which it is published, in small, and what is read.

Nothing here is a copy of a benchmark: the rows are made up, the layouts are not.
"""

import gzip
import io
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from evaluation import published, suites
from evaluation.suites import Example


def voice(number: int, kind: str) -> bytes:
    """A clip of the toy universe, in another format."""
    clips = Path(suites.__file__).parents[1] / "toy/common_voice/en/clips"
    samples, rate = soundfile.read(clips / f"toy_en_test_{number:05d}.opus")
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind)
    return stream.getvalue()


WAV, FLAC, MP3, OGG = (voice(n, kind) for n, kind in enumerate(("WAV", "FLAC", "MP3", "OGG")))


def put(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def wavs(folder: Path, *names: str) -> None:
    for name in names:
        put(folder / f"{name}.wav", WAV)


def refused(kind: type[Exception], action, *parts: object) -> None:
    """`action` raises `kind`, and the message holds every part."""
    with pytest.raises(kind) as error:
        action()
    for part in parts:
        assert str(part) in str(error.value), f"{part!s} is not in: {error.value}"


def by_id(examples: list[Example]) -> dict[str, Example]:
    found = {example.id: example for example in examples}
    assert len(found) == len(examples)
    return found


# ------------------------------------------------------------------------------------ HeySQuAD

SPAN = pa.list_(pa.struct([("answer_start", pa.int64()), ("text", pa.string())]))
SOUND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HEYSQUAD = pa.schema(
    {
        "audio": SOUND,
        "transcription": pa.string(),
        "question": pa.string(),
        "context": pa.string(),
        "answers": SPAN,
        "is_impossible": pa.bool_(),
        "id": pa.string(),
        "plausible_answers": SPAN,
    }
)


def spoken(name: str, sound: bytes | None, path: str | None, *answers: str, impossible=False):
    spans = [{"answer_start": i, "text": text} for i, text in enumerate(answers)]
    return {
        "audio": None if sound is None else {"bytes": sound, "path": path},
        "transcription": "what was heard",
        "question": f"Who is {name}? ",
        "context": "A passage.",
        "answers": [] if impossible else spans,
        "is_impossible": impossible,
        "id": name,
        "plausible_answers": spans if impossible else [],
    }


def shard(folder: Path, rows: list[dict], schema: pa.Schema, name: str) -> Path:
    file = folder / "data" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
    return file


@pytest.fixture
def heysquad(tmp_path) -> Path:
    first = [
        spoken("56ddde6b", WAV, "1.wav", "in France", "France", "in France"),
        spoken("5ad39d53", WAV, "2.wav", "a guess", impossible=True),
    ]
    second = [
        spoken("56ddde6c", FLAC, None, "Rollo"),
        spoken("56ddde6d", MP3, "", "1066"),
        spoken("56ddde6e", WAV, "5.wav"),
        spoken("56ddde6f", None, None, "gone"),
        spoken("56ddde70", OGG, "7.opus", "Opus"),
    ]
    shard(tmp_path, first, HEYSQUAD, "validation-00000-of-00002.parquet")
    shard(tmp_path, second, HEYSQUAD, "validation-00001-of-00002-0123456789abcdef.parquet")
    shard(tmp_path, [spoken("train", WAV, "0.wav", "no")], HEYSQUAD, "train-00000-of-00001.parquet")
    return tmp_path


def test_heysquad_gives_the_questions_that_have_answers(heysquad, caplog):
    """Impossible ones and those without answers are counted; a row without audio stays."""
    found = by_id(suites.read_heysquad(heysquad))
    assert list(found) == ["56ddde6b", "56ddde6c", "56ddde6d", "56ddde6f", "56ddde70"]
    assert found["56ddde6b"].answers == ("in France", "France")
    assert found["56ddde6b"].text == "Who is 56ddde6b?"
    assert "left out 2 of 7: 1 impossible, 1 without an answer" in caplog.text
    assert "the audio of 1 of 5 clips is missing and will count as wrong" in caplog.text
    assert not os.path.exists(found["56ddde6f"].audio)


def test_embedded_audio_is_written_whole_and_named_by_what_it_is(heysquad, tmp_path):
    """The ending is that of the embedded path; without one, the first bytes tell."""
    found = by_id(suites.read_heysquad(heysquad, unpack=tmp_path / "clips"))
    kinds = {"6b": (WAV, ".wav"), "6c": (FLAC, ".flac"), "6d": (MP3, ".mp3"), "70": (OGG, ".opus")}
    for name, (sound, ending) in kinds.items():
        file = Path(found[f"56ddde{name}"].audio)
        assert file.suffix == ending and file.read_bytes() == sound
        assert file.parent == tmp_path / "clips/validation"
    assert len(list((tmp_path / "clips/validation").iterdir())) == 4  # nothing half-written stays


def test_audio_is_not_unpacked_again(heysquad):
    [file, *_] = [Path(example.audio) for example in suites.read_heysquad(heysquad)]
    assert heysquad / "unpacked" in file.parents
    file.write_bytes(b"marked")
    assert suites.read_heysquad(heysquad)[0].audio == str(file)
    assert file.read_bytes() == b"marked"


def test_two_recordings_under_one_id_are_two_files(tmp_path):
    rows = [spoken("same", WAV, "1.wav", "a"), spoken("same", WAV + b"!", "2.wav", "a")]
    shard(tmp_path, rows, HEYSQUAD, "validation-00000-of-00001.parquet")
    a, b = suites.read_heysquad(tmp_path)
    assert [Path(e.audio).read_bytes() for e in (a, b)] == [WAV, WAV + b"!"]


def test_an_interrupted_unpacking_leaves_no_clip_behind(heysquad, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suites.read_heysquad(heysquad)
    monkeypatch.undo()
    assert not list((heysquad / "unpacked").rglob("*.wav"))
    assert Path(suites.read_heysquad(heysquad)[0].audio).read_bytes() == WAV


def test_an_id_cannot_lead_out_of_the_folder(tmp_path):
    rows = [spoken("../../outside", WAV, "1.wav", "a")]
    shard(tmp_path / "set", rows, HEYSQUAD, "validation-00000-of-00001.parquet")
    refused(ValueError, partial(suites.read_heysquad, tmp_path / "set"), "'../../outside' is no")
    assert not list(tmp_path.rglob("outside*"))


def test_parquet_that_is_not_whole_is_refused_by_name(heysquad):
    read = partial(suites.read_heysquad, heysquad)
    file = heysquad / "data/validation-00000-of-00002.parquet"
    put(file, file.read_bytes()[:-9])
    refused(ValueError, read, file, "expected a table in parquet that is whole")
    shard(heysquad, [{"id": "a"}], pa.schema([("id", pa.string())]), file.name)
    refused(ValueError, read, file, "no column audio or question or answers or is_impossible")
    file.unlink()
    refused(FileNotFoundError, read, "1 files of 2; expected all shards", "Check the split")
    say = "data/test-*.parquet is missing; found data/train, data/validation. Check the path and"
    refused(FileNotFoundError, partial(read, split="test"), say)


def test_parquet_without_pyarrow_says_what_to_install(heysquad, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    say = "pip install '.[parquet]'"
    refused(ValueError, partial(suites.read_heysquad, heysquad), say, heysquad)


# --------------------------------------------------------------------------------------- SD-QA

DOCUMENT = (
    "Zürich naïvely — 한글: King Sejong invented Hangul in 1443, it is said. Sejong the Great."
)
METADATA = (
    ",example_id,user_id,region,language,gender,age,device,lang_spoken,mother_tongue,audio_file\n"
)


def annotation(span: str = "", yes_no: str = "NONE", passage: int = -1) -> dict:
    start = DOCUMENT.encode().index(span.encode()) if span else -1
    end = start + len(span.encode()) if span else -1
    return {
        "annotation_id": 12852520138824648163,
        "minimal_answer": {"plaintext_start_byte": start, "plaintext_end_byte": end},
        "passage_answer": {"candidate_index": passage},
        "yes_no_answer": yes_no,
    }


def tydi(key: int, *annotations: dict) -> dict:
    return {
        "annotations": list(annotations),
        "document_plaintext": DOCUMENT,
        "document_title": "Hangul",
        "example_id": key,
        "language": "english",
        "passage_answer_candidates": [{"plaintext_start_byte": 0, "plaintext_end_byte": 20}],
        "question_text": "who invented hang wool",
    }


def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def sd_qa(tmp_path) -> Path:
    """dev/eng of the authors' repository, two of the eleven dialects."""
    home = tmp_path / "dev/eng"
    half = annotation("King Sejong")
    half["minimal_answer"]["plaintext_end_byte"] = -1
    rows = (
        tydi(-74015, annotation("King Sejong"), annotation("Sejong the Great"), annotation(), half),
        tydi(31848, annotation(yes_no="YES"), annotation("in 1443", passage=0)),
        tydi(79576, annotation(), annotation(passage=0)),
        tydi(55555, annotation("한글"), annotation("한글")),
    )
    put(
        home / "english.dev.txt",
        "ID\tin XOR dev\tsentence\n-74015\tFalse\tWho invented Hangul?\n31848\tFalse\tIs it old?\n"
        "79576\tFalse\tWhen?\n",
    )
    put(home / "english.dev.csv", "ID,english-gold\n")
    for dialect, region in (("kenya", "KE"), ("usa", "US")):
        name = f"english.dev.{dialect}-en-{region}"
        put(home / dialect / f"{name}.txt.jsonl.gz", gzip.compress(jsonl(*rows)))
        put(home / dialect / f"._{name}.txt.jsonl.gz", b"\0macOS")
        put(home / dialect / f"{name}.triples.jsonl", jsonl({"example_id": 1, "answers": ["no"]}))
        text = METADATA
        for i, row in enumerate(rows):
            key = row["example_id"]
            text += f"{i},{key},1,{dialect},eng,male,20,X,\"['swh', 'eng']\",kik,dev/{key}.wav\n"
            wavs(home / dialect / "wav_eng", f"{key}")
        put(home / dialect / "metadata.csv", text)
    (home / "usa/wav_eng/55555.wav").unlink()
    return tmp_path


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.struct({"text": pa.list_(pa.string())}), SPAN]
)
def test_answers_that_stand_for_none_are_none(tmp_path, caplog, kind):
    """Null, blank and n/a, which any answer would contain; in the three shapes they come in."""
    fields = {field.name: field.type for field in HEYSQUAD} | {"answers": kind}
    rows = []
    for name, texts in (("a", ["", None, " N/A ", " so ", "so"]), ("b", [None, " "]), ("c", None)):
        spans = None if texts is None else [{"text": text} for text in texts]
        shapes = {"struct": {"text": texts}, "list": spans if kind == SPAN else texts}
        answers = shapes["struct" if pa.types.is_struct(kind) else "list"]
        rows.append(spoken(name, WAV, "1.wav") | {"answers": answers, "question": None})
    shard(tmp_path, rows, pa.schema(fields), "validation-00000-of-00001.parquet")
    [example] = suites.read_heysquad(tmp_path)
    assert (example.id, example.text, example.answers) == ("a", "", ("so",))
    say = "left out 2 of 3: 2 without an answer; first b (without an answer), c (without an answer)"
    assert say in caplog.text


def test_offsets_of_answers_are_bytes(sd_qa, caplog):
    """Before every answer stand letters of two and three bytes: offsets in characters would miss.
    Yes is an answer, -1 is none, a passage is none, and what two annotators say counts once."""
    found = by_id(suites.read_sd_qa(sd_qa))
    assert DOCUMENT.index("King") != DOCUMENT.encode().index(b"King")
    assert found["kenya/-74015"].answers == ("King Sejong", "Sejong the Great")
    assert found["usa/31848"].answers == ("Yes", "in 1443")
    assert found["usa/55555"].answers == ("한글",)
    assert "left out 2 of 8: 2 without an answer" in caplog.text  # 79576 in two dialects


def test_each_dialect_asks_the_questions_with_its_own_voice(sd_qa, caplog):
    """The question is the one that was read, not what a recogniser heard; ids begin with '-'."""
    found = by_id(suites.read_sd_qa(sd_qa))
    assert [e.group for e in found.values()] == ["kenya"] * 3 + ["usa"] * 3
    example = found["usa/-74015"]
    assert example.audio == str(sd_qa / "dev/eng/usa/wav_eng/-74015.wav")
    assert example.text == "Who invented Hangul?" and found["usa/55555"].text == ""
    assert "without aus, gbr, ind_n, ind_s, irl, nga, nzl, phl, zaf" in caplog.text


def test_a_question_whose_recording_is_missing_is_still_asked(sd_qa, caplog):
    found = by_id(suites.read_sd_qa(sd_qa))
    assert not os.path.exists(found["usa/55555"].audio)
    assert "audio of 1 of 6 clips is missing" in caplog.text
    assert "usa/wav_eng/55555.wav" in caplog.text


def test_answers_without_gzip_are_read_too(sd_qa):
    before = suites.read_sd_qa(sd_qa)
    for file in sd_qa.glob("dev/eng/*/[!.]*.gz"):
        name = file.name.replace(".txt.jsonl.gz", ".jsonl")
        put(file.with_name(name), gzip.decompress(file.read_bytes()))
        file.unlink()
    assert suites.read_sd_qa(sd_qa) == before


def test_damaged_answers_are_refused_with_their_line(sd_qa):
    read, home = partial(suites.read_sd_qa, sd_qa), sd_qa / "dev/eng/kenya"
    file = home / "english.dev.kenya-en-KE.txt.jsonl.gz"
    whole = file.read_bytes()
    inside = tydi(1, annotation("King"))
    inside["annotations"][0]["minimal_answer"]["plaintext_start_byte"] = 2  # within the ü
    put(file, gzip.compress(jsonl(tydi(0), inside)))
    refused(ValueError, read, f"{file}:2: not as in TyDi QA", "offsets in bytes")
    put(file, gzip.compress(jsonl(tydi(0)) + b'{"example_id": 3}\n'))
    refused(ValueError, read, f"{file}:2", "document_plaintext")
    put(file, gzip.compress(jsonl(tydi(0)) + b"\n[1]\n"))
    refused(ValueError, read, f"{file}:3: no JSON object")
    for content in (whole[:-20], b"plain"):
        put(file, content)
        refused(ValueError, read, f"{file}: no text in UTF-8")
    file.unlink()
    refused(FileNotFoundError, read, home, "*.txt.jsonl.gz or ")


def test_sd_qa_of_another_shape_is_refused(sd_qa, tmp_path):
    refused(
        FileNotFoundError,
        partial(suites.read_sd_qa, tmp_path / "x"),
        tmp_path / "x/dev/eng or data is",
    )
    put(sd_qa / "dev/eng/usa/metadata.csv", "id,user\n1,2\n")
    refused(ValueError, partial(suites.read_sd_qa, sd_qa), "metadata.csv:1: no column example_id")
    (sd_qa / "test/eng").mkdir(parents=True)
    put(sd_qa / "test/eng/english.test.txt", "ID\tsentence\n")
    refused(FileNotFoundError, partial(suites.read_sd_qa, sd_qa, "test"), "aus or gbr or ind_n")


def test_sd_qa_in_one_row_per_question(tmp_path, caplog):
    """Eleven columns of audio, named by dialect; one recording is missing and stays in the list."""
    texts = {"answers": pa.list_(pa.string()), "question": pa.string()}
    schema = pa.schema({"id": pa.string()} | dict.fromkeys(suites.DIALECTS, SOUND) | texts)
    voices = {d: {"bytes": WAV + d.encode(), "path": "-9.wav"} for d in suites.DIALECTS}
    rows = [
        {"id": "-9", **voices, "answers": ["Ada", "Ada", "Ada L."], "question": "who?"},
        {"id": "8", **voices, "answers": [], "question": "why?"},
        {"id": "7", **voices, "zaf": None, "answers": ["so"], "question": "how?"},
    ]
    shard(tmp_path, rows, schema, "dev-00000-of-00001.parquet")
    examples = suites.read_sd_qa(tmp_path, unpack=tmp_path / "clips")
    assert [e.group for e in examples] == [*suites.DIALECTS, *suites.DIALECTS]
    assert len(suites.DIALECTS) == 11
    for example in examples[:11]:
        assert example.id == f"{example.group}/-9" and example.answers == ("Ada", "Ada L.")
        assert Path(example.audio).read_bytes() == WAV + example.group.encode()
    assert examples[21].id == "zaf/7" and not os.path.exists(examples[21].audio)
    assert "left out 11 of 33: 11 without an answer" in caplog.text


# ------------------------------------------------------------------------------------- CoVoST 2

CV4 = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent\n"


@pytest.fixture
def covost(tmp_path) -> tuple[Path, Path]:
    """Folders of translations and of Common Voice 4; each row has something to trip over."""
    rows = {
        "a.mp3": ('"Wait, he said.', '„Warte, sagte er.', "test"),
        "b.mp3": ('She said \\"no\\".', "Sie sagte \\\"nein\\\".", "test"),
        "c.mp3": ("A \\\\ is a backslash.", "NA", "train"),
        "d.mp3": ("", "leer", "train_covost"),
        "e.mp3": ("dev one", "dev eins", "dev"),
        "f.mp3": ("unused", "fehlt", "test"),
    }  # fmt: skip
    voice, folder = tmp_path / "cv/en", tmp_path / "covost"
    known = [f"v\t{path}\t{row[0]}\t2\t0\t\t\tus\n" for path, row in rows.items()]
    put(
        voice / "validated.tsv",
        CV4 + "".join(reversed(known[:5])) + "v\tz.mp3\tother\t2\t0\t\t\t\n",
    )
    for name in rows:
        put(voice / "clips" / name, MP3)
    for language in ("de", "tr"):
        text = "".join(f"{path}\t{row[1]}\t{row[2]}\n" for path, row in rows.items())
        put(folder / f"covost_v2.en_{language}.tsv", f"path\ttranslation\tsplit\n{text}")
    return folder, voice


def test_covost_joins_translations_with_common_voice(covost, caplog):
    """Bare quotes are letters, a backslash escapes what follows it, and what Common Voice lacks
    is counted."""
    folder, voice = covost
    examples = suites.read_covost(folder, common_voice=voice, languages=["de", "tr"])
    assert [e.group for e in examples] == ["de", "de", "tr", "tr"]
    assert examples[0] == Example(
        "de/a.mp3",
        str(voice / "clips/a.mp3"),
        '"Wait, he said.',
        ("„Warte, sagte er.",),
        *("de", "de"),
    )
    assert examples[1].text == 'She said "no".' and examples[1].answers == ('Sie sagte "nein".',)
    assert "left out 2 of 6: 2 not in validated.tsv" in caplog.text
    assert "Common Voice 4" in caplog.text and "missing" not in caplog.text


def test_covost_trains_on_both_of_its_training_splits(covost):
    """NA is a text like any other, and so is an empty one."""
    folder, voice = covost
    train = suites.read_covost(folder, "train", voice, ["de"])
    texts = [(e.text, e.answers) for e in train]
    assert texts == [("A \\ is a backslash.", ("NA",)), ("", ("leer",))]
    [dev] = suites.read_covost(folder, "dev", voice, ["de"])
    assert dev.text == "dev one"


def test_covost_reads_what_its_own_script_joined(covost):
    """As the script writes it: the same escapes, no split column, no need of validated.tsv."""
    folder, voice = covost
    rows = (
        "path\tsentence\ttranslation\tclient_id\n"
        'a.mp3\t"Wait\tWarte \\" \\\\ \\\t.\tv\n'  # an escaped quote, backslash and tab
    )
    put(folder / "covost_v2.en_tr.test.tsv", rows)
    (voice / "validated.tsv").unlink()
    [example] = suites.read_covost(folder, common_voice=voice, languages=["tr"])
    assert example.text == '"Wait' and example.answers == ('Warte " \\ \t.',)


def test_what_covost_did_not_translate_is_left_out_and_named(covost, caplog):
    """Its tables say REMOVE, or nothing, in place of a translation."""
    folder, voice = covost
    rows = ["a.mp3\tWarte\ttest", "b.mp3\t\ttest", "c.mp3\t REMOVE \ttest", "d.mp3\t\xa0\ttest"]
    rows += ["e.mp3\tREMOVE it\ttest"]
    file = put(folder / "covost_v2.en_de.tsv", "\n".join(["path\ttranslation\tsplit", *rows]))
    examples = suites.read_covost(folder, common_voice=voice, languages=["de"])
    assert [e.answers for e in examples] == [("Warte",), ("REMOVE it",)]
    assert "left out 3 of 5: 3 without a translation; first" in caplog.text
    assert f"{file}:3 (without a translation), {file}:4 (" in caplog.text


def test_single_bad_rows_of_common_voice_do_not_stop_covost(covost, caplog):
    """It needs few of a million."""
    folder, voice = covost
    known = (voice / "validated.tsv").read_bytes()
    put(
        voice / "validated.tsv",
        known + b"v\tx.mp3\tgr\xfcn\t2\t0\t\t\t\nv\ty.mp3\tone\ttab\t2\t0\t\t\t\n",
    )
    assert len(suites.read_covost(folder, common_voice=voice, languages=["de"])) == 2


def test_covost_asks_for_the_seven_languages_of_the_paper(covost):
    folder, voice = covost
    say = folder / "covost_v2.en_ar.test.tsv or covost_v2.en_ar.tsv"
    refused(FileNotFoundError, partial(suites.read_covost, folder, common_voice=voice), say)
    for language in suites.PAPER_LANGUAGES:
        put(
            folder / f"covost_v2.en_{language}.tsv",
            "path\ttranslation\tsplit\na.mp3\tx\ttest\n",
        )
    examples = suites.read_covost(folder, common_voice=voice)
    assert [e.group for e in examples] == "ar zh-CN de id ja ta tr".split()


def test_a_damaged_table_is_refused_with_its_line(covost):
    folder, voice = covost
    read = partial(suites.read_covost, folder, common_voice=voice, languages=["de"])
    file = folder / "covost_v2.en_de.tsv"
    put(file, "path\ttranslation\tsplit\na.mp3\tx\ttest\nb.mp3\tone\ttab too many\ttest\n")
    refused(
        ValueError,
        read,
        f"{file}:3: not of 3 fields; expected a table with path, translation",
    )
    put(file, "path\ttranslation\tsplit\na.mp3\tx\n")
    refused(ValueError, read, f"{file}:2: not of 3 fields")
    put(file, "path,translation,split\na.mp3,x,test\n")
    refused(ValueError, read, f"{file}:1: no column path or translation or split")
    put(file, b"path\ttranslation\tsplit\na.mp3\tx\ttest\nb.mp3\t" + b"\xe4\ttest\n")
    refused(ValueError, read, f"{file}:3: no text in UTF-8")
    put(file, "path\ttranslation\tsplit\nnowhere.mp3\tx\ttest\n")
    refused(ValueError, read, folder, "nothing to ask (left out: 1 not in validated.tsv")
    (voice / "validated.tsv").unlink()
    refused(FileNotFoundError, read, voice / "validated.tsv", "Check the path")


# ------------------------------------------------------------------------------------------ MELD

MELD = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,"
    "EndTime"
)
TIMES = '3,19,"00:14:38,127","00:14:40,378"'


def meld_table(*rows: tuple[str, str, int, int]) -> str:
    lines = [
        f"{i},{text},Joey,{emotion},neutral,{dialogue},{utterance},{TIMES}"
        for i, (text, emotion, dialogue, utterance) in enumerate(rows, 1)
    ]
    return "\n".join([MELD, *lines]) + "\n"


@pytest.fixture
def meld(tmp_path) -> Path:
    table = meld_table(
        ("Why do all you’re coffee mugs have numbers?", "surprise", 0, 0),
        ('"Oh. He said, ""Where’s 27?!"""', "anger", 0, 1),
        ("Y'know what?", "neutral", 0, 2),
    )
    put(tmp_path / "test_sent_emo.csv", table)
    folder = tmp_path / "output_repeated_splits_test"
    wavs(folder, "dia0_utt0", "dia0_utt1", "dia0_utt2", "._dia0_utt0", "final_videos_testdia0_utt0")
    return tmp_path


def test_meld_gives_texts_and_emotions_by_dialogue_and_utterance(meld, caplog):
    examples = suites.read_meld(meld)
    folder = meld / "output_repeated_splits_test"
    assert examples == [
        Example(
            "dia0_utt0",
            str(folder / "dia0_utt0.wav"),
            "Why do all you’re coffee mugs have numbers?",
            ("Surprise",),
        ),
        Example("dia0_utt1", f"{folder}/dia0_utt1.wav", 'Oh. He said, "Where’s 27?!"', ("Anger",)),
        Example("dia0_utt2", f"{folder}/dia0_utt2.wav", "Y'know what?", ("Neutral",)),
    ]
    assert not caplog.records


@pytest.mark.parametrize("how", ["bytes", "code points"])
def test_old_copies_of_meld_in_cp1252_read_like_the_new_one(meld, how):
    """Curly quotes, dashes and the hard space, as bytes of cp1252 or as unprintable letters."""
    text = "It’s “so” – well ‘new’—yeah,\xa0é…"
    table = meld_table((f'"{text}"', "joy", 0, 0)).encode("cp1252")
    put(meld / "test_sent_emo.csv", table if how == "bytes" else table.decode("latin1"))
    [example] = suites.read_meld(meld)
    assert example.text == text.replace("\xa0", " ")


def test_only_what_the_published_videos_lack_is_left_out(meld, caplog):
    """A clip known to be corrupt counts if someone mended it; an unknown one stays, missing."""
    rows = [("One.", "joy", 125, 3), ("Two.", "fear", 125, 4), ("Three.", "joy", 110, 7)]
    for split, folder in (("train", "train_splits"), ("dev", "dev_splits_complete")):
        put(meld / f"{split}_sent_emo.csv", meld_table(*rows))
        wavs(meld / folder, "dia0_utt0")
    assert [e.id for e in suites.read_meld(meld, "train")] == ["dia125_utt4", "dia110_utt7"]
    assert "left out 1 of 3: 1 known to be corrupt or missing (dia125_utt3)" in caplog.text
    assert "audio of 2 of 2 clips is missing and will count as wrong" in caplog.text
    assert [e.id for e in suites.read_meld(meld, "dev")] == ["dia125_utt3", "dia125_utt4"]
    wavs(meld / "dev_splits_complete", "dia110_utt7")
    assert len(suites.read_meld(meld, "dev")) == 3


def test_videos_alone_are_refused_with_the_line_that_makes_audio(meld):
    """And that line works on what it was given: it is a loop that a shell understands."""
    folder = meld / "it's a folder"
    for name in ("dia0_utt0.mp4", "dia0_utt1.mp4", "._dia0_utt2.mp4"):
        put(folder / name, b"\0video")
    put(folder / "._dia0_utt0.wav", b"\0macOS")
    read = partial(suites.read_meld, meld, audio=folder)
    refused(ValueError, read, folder, "2 videos (dia0_utt0.mp4, dia0_utt1.mp4", "ffmpeg -nostdin")
    with pytest.raises(ValueError) as error:
        read()
    line = str(error.value).split("\n")[1]
    fake = put(meld / "bin/ffmpeg", '#!/bin/sh\nfor last; do :; done\ncp "$3" "$last"\n')
    fake.chmod(0o755)
    assert os.system(f"export PATH={meld / 'bin'}:$PATH\n{line}") == 0
    assert len(read()) == 3  # two of them with audio
    assert {f.name for f in folder.glob("d*.wav")} == {"dia0_utt0.wav", "dia0_utt1.wav"}


def test_a_meld_table_with_surprises_is_refused_with_the_line(meld):
    read, file = partial(suites.read_meld, meld), meld / "test_sent_emo.csv"
    put(file, meld_table(("Fine.", "joy", 0, 0), ("Hm.", "boredom", 0, 1)))
    refused(ValueError, read, f"{file}:3: emotion 'boredom'", "Anger, Disgust, Fear, Joy")
    put(file, meld_table(("It’s".encode().decode("cp1252"), "joy", 0, 0)))
    refused(ValueError, read, f"{file}:2", "read in the wrong encoding")
    refused(FileNotFoundError, partial(read, "valid"), meld / "valid_sent_emo.csv")
    refused(FileNotFoundError, partial(read, audio=meld / "wav"), meld / "wav/*.wav is missing")


# --------------------------------------------------------------------------------------- IEMOCAP

EVALUATION = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes0{n}F_impro01_F000\t{a}\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
C-F1:\tNeutral;\t(curious)
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\tSes0{n}F_impro01_M001\t{b}\t[1.0000, 4.0000, 4.5000]
C-E2:\tAnger;\t()

"""


@pytest.fixture
def iemocap(tmp_path) -> Path:
    emotions = ["neu ang", "sad hap", "exc fru", "xxx sur", "fru neu"]
    for n, (a, b) in enumerate(map(str.split, emotions), 1):
        home = tmp_path / f"Session{n}"
        dialog = f"Ses0{n}F_impro01"
        evaluation = EVALUATION.format(n=n, a=a, b=b)
        put(home / f"dialog/EmoEvaluation/{dialog}.txt", evaluation)
        put(home / f"dialog/EmoEvaluation/._{dialog}.txt", b"\xff\0macOS")
        put(home / f"dialog/EmoEvaluation/Categorical/{dialog}_e2_cat.txt", "not this one")
        put(
            home / f"dialog/transcriptions/{dialog}.txt",
            f"{dialog}_F000 [006.2901-008.2357]: Excuse me: [sir].\n"
            f"{dialog}_M001 [010.0100-011.3925]: \n"
            f"{dialog}_FXX0 [008.0000-008.1000]: Hm.\nM: not a turn\n",
        )
        wavs(home / "sentences/wav" / dialog, f"{dialog}_F000", f"{dialog}_M001")
    return tmp_path


def test_iemocap_gives_the_turns_of_four_emotions(iemocap, caplog):
    """Excitement counts as happiness; what the four classes do not hold is counted by name."""
    found = by_id(suites.read_iemocap(iemocap))
    audio = iemocap / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    first = Example(audio.stem, str(audio), "Excuse me: [sir].", ("Neutral",), "Session1")
    assert found[audio.stem] == first and audio.is_file()
    assert found["Ses01F_impro01_M001"].text == ""
    assert [(e.group, *e.answers) for e in found.values()] == [
        ("Session1", "Neutral"),
        ("Session1", "Anger"),
        ("Session2", "Sadness"),
        ("Session2", "Happiness"),
        ("Session3", "Happiness"),
        ("Session5", "Neutral"),
    ]
    expected = "left out 4 of 10: 2 labelled fru, 1 labelled xxx, 1 labelled sur"
    assert expected in caplog.text and "missing" not in caplog.text


def test_excitement_need_not_count_as_happiness(iemocap, caplog):
    examples = suites.read_iemocap(iemocap, merge_excited=False)
    assert [e.group for e in examples] == [f"Session{n}" for n in (1, 1, 2, 2, 5)]
    assert "1 labelled exc" in caplog.text


def test_iemocap_with_lines_or_sessions_amiss(iemocap, caplog):
    read = partial(suites.read_iemocap, iemocap)
    file = iemocap / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt"
    put(file, EVALUATION.format(n=2, a="sad", b="hap").replace("\thap\t", " hap "))
    refused(ValueError, read, f"{file}:8: ", "with tabs between")
    (iemocap / "Session2").rename(iemocap / "Session6")
    assert len(read()) == 4
    assert "without Session2: the set is not complete" in caplog.text
    (iemocap / "Session1/dialog/transcriptions/Ses01F_impro01.txt").unlink()
    refused(FileNotFoundError, read, "Session1/dialog/transcriptions/Ses01F_impro01.txt")
    refused(FileNotFoundError, partial(suites.read_iemocap, iemocap / "Session1"), "or Session5")


# --------------------------------------------------------------------------------------- MUStARD


@pytest.fixture
def mustard(tmp_path) -> Path:
    entries = {
        "1_60": {
            "utterance": "It's just a privilege to watch your mind at work.",
            "speaker": "SHELDON",
            "context": ["My apologies. What's your plan?"],
            "context_speakers": ["LEONARD"],
            "show": "BBT",
            "sarcasm": True,
        },
        "2_380": {"utterance": "Yes.", "speaker": "ROSS", "show": "FRIENDS", "sarcasm": False},
    }
    put(tmp_path / "data/sarcasm_data.json", json.dumps(entries))
    folder = tmp_path / "mmsd_raw_data/utterances_final"
    wavs(folder, "1_60", "2_380", "._1_60")
    put(tmp_path / "__MACOSX/mmsd_raw_data/utterances_final/._1_60.mp4", b"\0")
    put(folder / "1_60.mp4", b"\0")  # the videos may stay beside
    return tmp_path


def test_mustard_gives_utterances_and_yes_or_no(mustard, caplog):
    yes, no = suites.read_mustard(mustard)
    folder = mustard / "mmsd_raw_data/utterances_final"
    text = "It's just a privilege to watch your mind at work."
    assert yes == Example("1_60", str(folder / "1_60.wav"), text, ("Yes",), "BBT")
    assert no == Example("2_380", str(folder / "2_380.wav"), "Yes.", ("No",), "FRIENDS")
    assert not caplog.records


def test_mustard_without_audio_or_with_other_labels_is_refused(mustard):
    read, file = partial(suites.read_mustard, mustard), mustard / "data/sarcasm_data.json"
    videos = mustard / "videos"
    put(videos / "1_60.mp4", b"\0")
    refused(ValueError, partial(read, audio=videos), videos, "1 videos (1_60.mp4", "ffmpeg")
    put(file, json.dumps({"1_60": {"utterance": "Hm.", "sarcasm": "no"}}))
    refused(ValueError, read, f"{file}: '1_60' has utterance 'Hm.' and sarcasm 'no'")
    for content, say in (("{", "not valid JSON"), ("[1]", "holds a list; expected a JSON object")):
        put(file, content)
        refused(ValueError, read, f"{file}: {say}")
    put(file, '{"1_60": 3}')
    refused(ValueError, read, f"{file}: '1_60' has utterance None and sarcasm None")
    file.unlink()
    refused(FileNotFoundError, read, mustard / "data/sarcasm_data.json or sarcasm_data.json")


# ------------------------------------------------------------------------------------ their copies


def copy(folder: Path, split: str, labels: list, kind: pa.DataType, names=(), **more) -> Path:
    """As the Hub has it: `audio`, and `label` as `kind`, with or without names."""
    column, texts = more.pop("column", "label"), dict.fromkeys(more, pa.string())
    schema = pa.schema({"audio": SOUND, column: kind} | texts)
    if names:
        note = {"info": {"features": {column: {"names": [*names], "_type": "ClassLabel"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(note)})
    sounds = [
        {"bytes": WAV + bytes([n]), "path": f"{split}/clip {n}.wav"} for n in range(len(labels))
    ]
    rows = [{"audio": sound, column: label} for sound, label in zip(sounds, labels, strict=True)]
    rows = [row | {key: values[n] for key, values in more.items()} for n, row in enumerate(rows)]
    return shard(folder, rows, schema, f"{split}-00000-of-00001-0123456789abcdef.parquet")


EMOTIONS = "anger disgust fear joy neutral sadness surprise".split()


@pytest.mark.parametrize("names", [(), EMOTIONS, EMOTIONS[::-1]])
def test_a_copy_of_meld_in_parquet_has_numbers_for_emotions(tmp_path, names, caplog):
    """By the names that stand beside the schema, in any order; without, in the alphabet's."""
    copy(tmp_path, "test", [0, 3, 6], pa.int64(), names)
    copy(tmp_path, "train", [1], pa.int64())
    found = suites.read_meld(tmp_path, audio=tmp_path / "clips")
    order = [name.capitalize() for name in names or EMOTIONS]
    assert [e.answers for e in found] == [(order[n],) for n in (0, 3, 6)]
    assert [e.id for e in found] == ["clip_0", "clip_1", "clip_2"]
    for n, e in enumerate(found):
        assert Path(e.audio).read_bytes() == WAV + bytes([n])
        assert Path(e.audio).parent == tmp_path / "clips/test" and e.text == ""
    assert not caplog.records


def test_a_copy_of_iemocap_in_parquet_has_a_split_for_each_session(tmp_path):
    for n in (1, 5):
        copy(tmp_path, f"session{n}", [0, 1, 2, 3], pa.int64(), ["ang", "hap", "neu", "sad"])
    found = suites.read_iemocap(tmp_path)
    assert [e.group for e in found] == ["Session1"] * 4 + ["Session5"] * 4
    answers = [(label,) for label in ("Anger", "Happiness", "Neutral", "Sadness")]
    assert [e.answers for e in found] == answers * 2 and len({e.id for e in found}) == 8


def test_copies_of_yes_and_no_keep_the_class_0(tmp_path):
    """As numbers or truth values; a show is a group."""
    copy(tmp_path / "u", "test", [0, 1], pa.int64(), ["0", "1"])
    assert [e.answers for e in suites.read_ur_funny(tmp_path / "u")] == [("No",), ("Yes",)]
    more = {"utterance": [" It's a privilege. ", None], "show": ["BBT", "FRIENDS"]}
    copy(tmp_path / "m", "train", [True, False], pa.bool_(), column="sarcasm", **more)
    yes, no = suites.read_mustard(tmp_path / "m", audio=tmp_path / "clips")
    assert (yes.answers, yes.text, yes.group) == (("Yes",), "It's a privilege.", "BBT")
    assert (no.answers, no.text, no.group) == (("No",), "", "FRIENDS")
    assert Path(yes.audio).parent == tmp_path / "clips/train"


@pytest.mark.parametrize("label", [7, -1, None])
def test_a_class_that_a_copy_does_not_explain_is_refused_with_its_row(tmp_path, label):
    file = copy(tmp_path, "test", [0, label], pa.int64())
    say = f"{file}, row 1: label is {label}; expected one of Anger, Disgust"
    refused(ValueError, partial(suites.read_meld, tmp_path), say, "Download the set again")


# -------------------------------------------------------------------------------------- manifest


def test_a_manifest_gives_one_example_a_line(tmp_path):
    """One answer or several; a separator that only Unicode knows does not end a line."""
    file = put(
        tmp_path / "own/tasks.jsonl",
        '{"audio": "clips/a.wav", "text": "who\u2028?", "answers": ["Ada", "Ada L."], '
        '"group": "en"}\n'
        "\n"
        '{"audio": "/b.wav", "answer": "", "id": 7, "speaker": "x"}\r\n',
    )
    wavs(file.parent / "clips", "a")
    assert suites.read_manifest(file) == [
        Example("0", str(file.parent / "clips/a.wav"), "who\u2028?", ("Ada", "Ada L."), "en"),
        Example("7", "/b.wav", "", ("",)),
    ]


@pytest.mark.parametrize(
    ("line", "say"),
    [
        ("{", "no JSON object"),
        ('"a"', "no JSON object"),
        ('{"answer": "x"}', "wrong or missing: audio;"),
        ('{"audio": "a.wav"}', "wrong or missing: answers;"),
        ('{"audio": "", "answer": "x"}', "wrong or missing: audio;"),
        ('{"audio": "a.wav", "answers": "Ada"}', "wrong or missing: answers;"),
        ('{"audio": "a.wav", "answers": ["Ada", 3]}', "wrong or missing: answers;"),
        ('{"audio": "a.wav", "answer": 3}', "wrong or missing: answer;"),
        ('{"audio": "a.wav", "answer": "a", "answers": ["a"]}', "answer and answers together"),
        ('{"audio": "a.wav", "answer": "a", "text": 0}', "wrong or missing: text;"),
        ('{"audio": "a.wav", "answer": "a", "group": 1}', "wrong or missing: group;"),
        ('{"audio": "a.wav", "answer": "a", "language": "xx"}', "wrong or missing: language;"),
    ],
)
def test_a_wrong_line_of_a_manifest_is_named(tmp_path, line, say):
    file = put(tmp_path / "own.jsonl", '{"audio": "a.wav", "answer": "x"}\n' + line + "\n")
    refused(ValueError, partial(suites.read_manifest, file), f"{file}:2: ", say)


def test_null_in_a_manifest_is_nothing(tmp_path, caplog):
    """Without an answer a clip cannot be asked about; a transcript that is unknown is ''."""
    lines = [
        '{"audio": "a.wav", "answer": null}',
        '{"audio": "a.wav", "answers": null}',
        '{"audio": "a.wav", "answers": [null]}',
        '{"audio": "a.wav", "answers": []}',
        '{"audio": "b/._a.wav", "answer": "x"}',
        '{"audio": "a.wav", "answers": ["x", null], "text": null, "group": null, "id": null}',
    ]
    file = put(tmp_path / "own.jsonl", "\n".join(lines))
    [example] = suites.read_manifest(file)
    assert example == Example("5", str(tmp_path / "a.wav"), "", ("x",))
    why = "4 without an answer, 1 of macOS (._*), no recording"
    assert f"left out 5 of 6: {why}; first {file}:1 (without an answer)" in caplog.text


def test_a_manifest_that_is_empty_or_not_there_is_refused(tmp_path):
    file = tmp_path / "own.jsonl"
    refused(FileNotFoundError, partial(suites.read_manifest, file), f"{file} is missing")
    refused(ValueError, partial(suites.read_manifest, put(file, "\n")), f"{file}: nothing to ask")


# --------------------------------------------------------------------------------- all the suites


@pytest.fixture
def ur_funny(tmp_path) -> Path:
    """The parquet copy: a ClassLabel whose alphabetical order puts humor before not_humor."""
    copy(tmp_path / "ur_funny", "test", [1, 0, 0], pa.int64(), ["humor", "not_humor"])
    return tmp_path / "ur_funny"


def test_ur_funny_maps_the_class_names_of_its_parquet_copy(ur_funny, tmp_path):
    """By name and not by number, whether they are stored as ClassLabel or as strings."""
    examples = suites.read_ur_funny(ur_funny, audio=tmp_path / "clips")
    assert [e.answers for e in examples] == [("No",), ("Yes",), ("Yes",)]
    assert [Path(e.audio).parent for e in examples] == [tmp_path / "clips/test"] * 3
    copy(tmp_path / "strings", "train", ["humor", "not_humor"], pa.string())
    examples = suites.read_ur_funny(tmp_path / "strings", "train")
    assert [e.answers for e in examples] == [("Yes",), ("No",)]


def test_ur_funny_refuses_other_classes_and_splits(ur_funny, tmp_path):
    file = copy(tmp_path / "other", "test", ["funny"], pa.string())
    say = f"{file}, row 0: label is 'funny'; expected one of No, Yes, not_humor, humor"
    refused(ValueError, partial(suites.read_ur_funny, tmp_path / "other"), say)
    refused(FileNotFoundError, partial(suites.read_ur_funny, ur_funny, "valid"), "valid")


def test_the_first_class_is_kept(mustard, ur_funny, meld, iemocap):
    """Sets number their classes from 0, and what is 0 or False is easily taken for missing: not
    sarcastic, not funny, angry."""
    for name, folder, first in (
        ("mustard", mustard, "No"),
        ("ur_funny", ur_funny, "No"),
        ("meld", meld, "Anger"),
        ("iemocap", iemocap, "Anger"),
    ):
        answers = [answer for e in suites.SUITES[name].read(folder) for answer in e.answers]
        assert first in answers, name
        assert {*answers} <= {*suites.SUITES[name].labels}, name


def test_the_prompts_are_the_published_ones():
    neutral = "\nIf there is no clear emotion, respond 'Neutral'."
    prompts = {name: suite.prompt for name, suite in suites.SUITES.items()}
    assert prompts == {
        "heysquad": "You are a helpful assistant. Give your answers as a simple single sentence.",
        "sd_qa": "You are a helpful assistant. Give your answers as a simple single sentence.",
        "covost": "You are a helpful assistant. Translate the inputs from English to {language}.",
        "meld": "Respond in a single word what emotion the input exhibits." + neutral,
        "iemocap": "Respond in a single word what emotion the audio represents." + neutral,
        "mustard": "Respond whether the input is sarcastic. Answer with a simple yes or no.",
        "ur_funny": "Respond whether the input is intended to be humorous. "
        "Answer with a simple yes or no.",
        "manifest": None,
    }
    assert suites.LANGUAGES["de"] == "German" and suites.LANGUAGES["zh-CN"] == "Mandarin"
    assert len(suites.LANGUAGES) == 15 and {*suites.PAPER_LANGUAGES} < {*suites.LANGUAGES}


def test_every_suite_has_metrics_and_labels_where_it_chooses_among_them():
    kinds = {name: (suite.metrics, suite.labels) for name, suite in suites.SUITES.items()}
    answers = ("pedant", "contains", "f1", "exact_match", "prompt_ignoring")
    emotions, two = ("weighted_f1", "accuracy"), ("accuracy", "weighted_f1")
    seven = ("Anger", "Disgust", "Fear", "Joy", "Neutral", "Sadness", "Surprise")
    assert kinds == {
        "heysquad": (answers, ()),
        "sd_qa": (answers, ()),
        "covost": (("bleu", "chrf", "wrong_script"), ()),
        "meld": (emotions, seven),
        "iemocap": (emotions, ("Anger", "Happiness", "Neutral", "Sadness")),
        "mustard": (two, ("Yes", "No")),
        "ur_funny": (two, ("Yes", "No")),
        "manifest": (("contains", "f1", "exact_match", "wer"), ()),
    }


def test_what_was_published_is_of_these_suites_metrics_and_groups():
    """Every figure has its place beside one of ours; the means are those of the charts."""
    groups = {"sd_qa": suites.DIALECTS, "covost": suites.PAPER_LANGUAGES}
    for name, parts in published.PUBLISHED.items():
        assert {*parts} <= {"", *groups.get(name, ())}, name
        for metrics in parts.values():
            assert {*metrics} <= {*suites.SUITES[name].metrics}, name
            for scores in metrics.values():
                assert [*scores] == [*published.PUBLISHED_SYSTEMS]
    for name, metric in (("sd_qa", "pedant"), ("covost", "bleu")):
        parts = published.PUBLISHED[name]
        for system, mean in parts[""][metric].items():
            bars = [parts[group][metric][system] for group in parts if group]
            assert np.mean(bars) == pytest.approx(mean, abs=0.3), (name, system)


def test_an_id_that_comes_again_gets_a_number(tmp_path):
    line = json.dumps({"audio": "a.wav", "answer": "x", "id": "q"}) + "\n"
    found = suites.read_manifest(put(tmp_path / "own.jsonl", 3 * line))
    assert [example.id for example in found] == ["q", "q#2", "q#3"]


def test_a_manifest_may_have_a_file_for_each_split(tmp_path):
    for split in ("dev", "test"):
        put(tmp_path / f"own/{split}.jsonl", json.dumps({"audio": "a.wav", "answer": split}) + "\n")
    (example,) = suites.read_manifest(tmp_path / "own")
    assert example.answers == ("test",)
    (example,) = suites.read_manifest(tmp_path / "own", "dev")
    assert example.answers == ("dev",)
    put(tmp_path / "own/._dev.jsonl", b"\0macOS")
    read = partial(suites.read_manifest, tmp_path / "own", "train")
    refused(FileNotFoundError, read, "own/train.jsonl", "Splits here: dev, test", "--split")


def test_one_clip_of_two_manifests_has_one_name(tmp_path):
    """However it is reached, so that it is decoded once."""
    for folder in ("a", "b"):
        put(tmp_path / f"{folder}/own.jsonl", '{"audio": "../c/x.wav", "answer": "x"}\n')
    found = [suites.read_manifest(tmp_path / f"{folder}/own.jsonl")[0] for folder in ("a", "b")]
    assert found[0].audio == found[1].audio == str(tmp_path / "c/x.wav")
