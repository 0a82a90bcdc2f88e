"""Suites: the benchmarks of the paper, as they lie on disk -> clips with references.

    SUITES["meld"].read(folder) -> [Example]

    heysquad, sd_qa      spoken questions      any of several answers
    covost               English speech        its translation
    meld, iemocap        emotions              one of 7, one of 4 labels
    mustard, ur_funny    sarcasm, humour       Yes or No
    manifest             anyone's own task     JSONL

Every reader takes the layout in which the set is published. What cannot be asked (a question
without an answer, an emotion outside the task) is left out and counted in a warning; a clip whose
audio is missing stays in the list, so that it counts as wrong instead of making the set easier.

Reads: nothing of ours.   Read next: systems.py.
"""

import codecs
import collections
import csv
import dataclasses
import functools
import gzip
import json
import logging
import os
import pickle
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DIALECTS = tuple("aus gbr ind_n ind_s irl kenya nga nzl phl usa zaf".split())  # SD-QA's folders
PAPER_LANGUAGES = ("ar", "zh-CN", "de", "id", "ja", "ta", "tr")  # of the paper's chart, out of 15
MELD_LABELS = ("Anger", "Disgust", "Fear", "Joy", "Neutral", "Sadness", "Surprise")
MELD_VIDEOS = {"train": "train_splits", "dev": "dev_splits_complete"}
MELD_VIDEOS["test"] = "output_repeated_splits_test"
MELD_DEFECTS = {("train", "dia125_utt3"), ("dev", "dia110_utt7")}  # corrupt; not in the archive
IEMOCAP_LABELS = {"ang": "Anger", "hap": "Happiness", "neu": "Neutral", "sad": "Sadness"}
IEMOCAP_VOTE = re.compile(r"\[[\d.]+ - [\d.]+\]\t(\w+)\t(\w+)\t\[")  # times, turn, what most heard
IEMOCAP_TURN = re.compile(r"^(\w+) \[[^\]]*\]:[ \t]*(.*?)\s*$", re.MULTILINE)
MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff": ".mp3"}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One recording and what counts as a right answer to it."""

    id: str
    audio: str  # a path; the file may be missing
    text: str  # transcript or question, '' if unknown
    answers: tuple[str, ...]  # any of them
    group: str = ""  # dialect, target language, session or show: for scores by group
    language: str = ""  # of the answers, if they are translations: a key of LANGUAGES


def reader(read: Callable[..., Iterator[Example | str]]) -> Callable[..., list[Example]]:
    """Of a generator of examples and of reasons to leave a row out, make a function that returns
    the examples, warns of what was left out and of missing audio, and refuses an empty set.

    An id that comes again gets a number, so that every clip has one of its own.
    """

    @functools.wraps(read)
    def wrapped(path: str | Path, /, *args: Any, **kwargs: Any) -> list[Example]:
        rows, seen, examples = list(read(Path(path), *args, **kwargs)), collections.Counter(), []
        for row in rows:
            if isinstance(row, Example):
                seen[row.id] += 1
                name = row.id if seen[row.id] == 1 else f"{row.id}#{seen[row.id]}"
                examples.append(dataclasses.replace(row, id=name))
        reasons = collections.Counter(row for row in rows if isinstance(row, str))
        counts = ", ".join(f"{number} {reason}" for reason, number in reasons.items()) or "nothing"
        if not examples:
            raise ValueError(
                f"{path}: nothing to ask (left out: {counts}); expected at least one clip with a "
                "reference. Check the path and the split."
            )
        if reasons:
            log.warning("%s: left out %d of %d: %s", path, reasons.total(), len(rows), counts)
        if absent := [e.audio for e in examples if not os.path.isfile(e.audio)]:
            log.warning(
                "%s: the audio of %d of %d clips is missing and will count as wrong, first %s",
                *(path, len(absent), len(examples), absent[0]),
            )
        return examples

    return wrapped


def sample(items: Sequence, most: int) -> list:
    """At most `most` items at random, in their order; every n-th could meet one accent alone."""
    chosen = np.random.default_rng(0).permutation(len(items))[:most]
    return [items[i] for i in sorted(chosen)]


# ---------------------------------------------------------------------------------------------
# Questions


@reader
def read_heysquad(
    folder: Path, split: str = "validation", unpack: str | Path | None = None
) -> Iterator[Example | str]:
    """HeySQuAD (human): data/SPLIT-*.parquet; the paper scores `validation` (4,158 rows).

    The clips inside are written to `unpack` (default: folder/unpacked) once.
    """
    into = Path(unpack or folder / "unpacked") / split
    for row in _parquet(folder, split, "id audio question answers is_impossible".split()):
        answers = tuple(dict.fromkeys(answer["text"] for answer in row["answers"] or ()))
        if row["is_impossible"]:
            yield "impossible"
        elif not answers:
            yield "without an answer"
        else:
            audio = _unpacked(row["audio"], into, str(row["id"]))
            yield Example(str(row["id"]), audio, row["question"].strip(), answers)


@reader
def read_sd_qa(
    folder: Path, split: str = "dev", unpack: str | Path | None = None
) -> Iterator[Example | str]:
    """SD-QA, English: the authors' repository, or WillHeld/SD-QA with data/SPLIT-*.parquet.

    The paper scores `dev`, 1,000 questions; groups are the eleven dialects that ask them.
    """
    if (folder / split / "eng").is_dir():
        yield from _sd_qa_repository(folder / split / "eng", split)
        return
    if not (folder / "data").is_dir():
        _there(folder / f"{split}/eng or data")
    into = Path(unpack or folder / "unpacked") / split
    for row in _parquet(folder, split, ["id", "question", "answers", *DIALECTS]):
        for dialect in DIALECTS:
            if answers := tuple(dict.fromkeys(row["answers"] or ())):
                audio = _unpacked(row[dialect], into / dialect, str(row["id"]))
                yield Example(f"{dialect}/{row['id']}", audio, row["question"], answers, dialect)
            else:
                yield "without an answer"


def _sd_qa_repository(home: Path, split: str) -> Iterator[Example | str]:
    """DIALECT/metadata.csv says what was recorded, *.jsonl.gz beside it what the answers are.

    question_text there is what a speech recogniser heard; the question itself is in english.*.txt.
    """
    lines = _text(home / f"english.{split}.txt").split("\n")  # id, a flag, question
    questions = {line.split("\t")[0]: line.split("\t")[-1].strip() for line in lines}
    for dialect in _present(home, DIALECTS):
        file = _find(home / dialect, "*.txt.jsonl.gz", "*.txt.jsonl", "*-[A-Z][A-Z].jsonl*")
        answers = {str(row.get("example_id")): _tydi(row, at) for at, row in json_lines(file)}
        for _, row in _table(home / dialect / "metadata.csv", ["example_id"]):
            key = row["example_id"]
            if answers.get(key):
                audio, text = home / dialect / "wav_eng" / f"{key}.wav", questions.get(key, "")
                yield Example(f"{dialect}/{key}", str(audio), text, answers[key], dialect)
            else:
                yield "without an answer"


def _tydi(row: dict, where: str) -> tuple[str, ...]:
    """The minimal answers of all annotators: yes, no, or a span in bytes of UTF-8 (-1: none).

    Passage answers are left aside: a whole paragraph is no answer to compare with.
    """
    found = {}
    try:
        document = row["document_plaintext"].encode()
        for annotation in row["annotations"]:
            span = annotation["minimal_answer"]
            start, end = span["plaintext_start_byte"], span["plaintext_end_byte"]
            if annotation["yes_no_answer"] in ("YES", "NO"):
                found[annotation["yes_no_answer"].capitalize()] = True
            elif 0 <= start < end:
                found[document[start:end].decode().strip()] = True
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where}: not as in TyDi QA ({error!r}); expected document_plaintext and annotations "
            "with minimal_answer (offsets in bytes) and yes_no_answer. Download the file again."
        ) from error
    return tuple(filter(None, found))


# ---------------------------------------------------------------------------------------------
# Translation


@reader
def read_covost(
    folder: Path,
    split: str = "test",
    common_voice: str | Path | None = None,
    languages: Sequence[str] = PAPER_LANGUAGES,
) -> Iterator[Example | str]:
    """CoVoST 2, English to `languages`; each has 15,531 clips to test. Groups are the languages.

    `folder` holds covost_v2.en_XX.tsv, or covost_v2.en_XX.SPLIT.tsv as CoVoST's own script joins
    them; `common_voice` (default: the same folder) has validated.tsv and clips/ of version 4.
    """
    voice, rows = Path(common_voice or folder), []
    tsv = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}  # as that script
    parts = ("train", "train_covost") if split == "train" else (split,)
    for language in languages:
        file = _find(folder, f"covost_v2.en_{language}.{split}.tsv", f"covost_v2.en_{language}.tsv")
        joined = file.name.endswith(f".{split}.tsv")
        columns = ["path", "translation", "sentence" if joined else "split"]
        found = _table(file, columns, **tsv)
        rows += [(language, row) for _, row in found if joined or row["split"] in parts]
    sentences, alone = {}, {row["path"] for _, row in rows if "sentence" not in row}
    if alone:  # the join needs these few of a million rows
        validated = _table(voice / "validated.tsv", ["path", "sentence"], **tsv)
        sentences = {row["path"]: row["sentence"] for _, row in validated if row["path"] in alone}
    for language, row in rows:
        text = row.get("sentence", sentences.get(row["path"]))
        if text is None:
            yield "not in validated.tsv (expected that of Common Voice 4)"
        else:
            audio, name = str(voice / "clips" / row["path"]), f"{language}/{row['path']}"
            yield Example(name, audio, text, (row["translation"],), language, language)


# ---------------------------------------------------------------------------------------------
# Labels


# Older copies of MELD hold cp1252: as bytes, or as code points that are not to be printed.
codecs.register_error("cp1252", lambda e: (e.object[e.start : e.end].decode("cp1252"), e.end))
CP1252 = {code: bytes([code]).decode("cp1252") for code in b"\x85\x91\x92\x93\x94\x96\x97"}
CP1252[0xA0] = " "


@reader
def read_meld(
    folder: Path, split: str = "test", audio: str | Path | None = None
) -> Iterator[Example | str]:
    """MELD: SPLIT_sent_emo.csv and a folder of diaD_uttU.wav; 2,610 clips to test.

    `audio` is by default where MELD.Raw has the split's videos; the same names recur in each split.
    """
    file = _there(folder / f"{split}_sent_emo.csv")
    wavs = _wavs(Path(audio or folder / MELD_VIDEOS.get(split, split)))
    columns = ["Utterance", "Emotion", "Dialogue_ID", "Utterance_ID"]
    for line, row in _table(file, columns, errors="cp1252"):
        name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        text, label = row["Utterance"].translate(CP1252).strip(), row["Emotion"].capitalize()
        if label not in MELD_LABELS or "â€" in text:
            raise ValueError(
                f"{file}:{line}: emotion {row['Emotion']!r}, text {text!r}; expected one of "
                f"{', '.join(MELD_LABELS)}, and a text that was not read in the wrong encoding and "
                "saved. Download the table again."
            )
        if (split, name) in MELD_DEFECTS and not (wavs / f"{name}.wav").is_file():
            yield f"known to be corrupt or missing ({name})"
        else:
            yield Example(name, str(wavs / f"{name}.wav"), text, (label,))


@reader
def read_iemocap(folder: Path, merge_excited: bool = True) -> Iterator[Example | str]:
    """IEMOCAP_full_release: 5,531 turns of four emotions. Groups are the five sessions.

    `merge_excited` counts excitement as happiness, as is usual with four classes. The authors
    scored a ready-made copy with these four and do not say what became of excitement: the default
    follows the usage. Without it 4,490 turns are left.
    """
    label_of = IEMOCAP_LABELS | ({"exc": "Happiness"} if merge_excited else {})
    for session in _present(folder, [f"Session{n}" for n in range(1, 6)]):
        home = folder / session
        for file in sorted((home / "dialog/EmoEvaluation").glob("Ses*.txt")):
            said = dict(IEMOCAP_TURN.findall(_text(home / "dialog/transcriptions" / file.name)))
            for number, line in enumerate(_text(file).split("\n"), 1):
                if not line.startswith("["):  # the header, or one annotator's opinion
                    continue
                if not (vote := IEMOCAP_VOTE.match(line)):
                    raise ValueError(
                        f"{file}:{number}: {line!r}; expected [start - end], a turn, an emotion "
                        "and [V, A, D], with tabs between. Unpack the corpus again."
                    )
                turn, emotion = vote.groups()
                if emotion in label_of:
                    audio = str(home / "sentences/wav" / file.stem / f"{turn}.wav")
                    yield Example(turn, audio, said.get(turn, ""), (label_of[emotion],), session)
                else:
                    yield f"labelled {emotion}"


@reader
def read_mustard(folder: Path, audio: str | Path | None = None) -> Iterator[Example | str]:
    """MUStARD: sarcasm_data.json and a folder of ID.wav; 690 clips. Groups are the shows.

    The authors scored a random fifth of them, and of that only the sarcastic clips; this is all.
    """
    file = _find(folder, "data/sarcasm_data.json", "sarcasm_data.json")
    wavs = _wavs(Path(audio or _find(folder, "**/utterances_final")))
    try:
        entries = {key: dict(entry) for key, entry in dict(json.loads(_text(file))).items()}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file}: no JSON object of objects ({error}). Download it again."
        ) from error
    for key, entry in entries.items():
        utterance, sarcastic = entry.get("utterance"), entry.get("sarcasm")
        if not isinstance(utterance, str) or not isinstance(sarcastic, bool):
            raise ValueError(
                f"{file}: {key!r} has utterance {utterance!r} and sarcasm {sarcastic!r}; expected "
                "a text, and true or false. Download the file again."
            )
        label, show = "Yes" if sarcastic else "No", str(entry.get("show", ""))
        yield Example(key, str(wavs / f"{key}.wav"), utterance, (label,), show)


@reader
def read_ur_funny(
    folder: Path, split: str = "test", audio: str | Path | None = None
) -> Iterator[Example | str]:
    """UR-FUNNY 2: three pickles and a folder of ID.wav (default: urfunny2_videos).

    A segment is a punchline after its context: the text is both.
    """
    wavs = _wavs(Path(audio or folder / "urfunny2_videos"))
    folds = _unpickle(_find(folder, "data_folds.pkl"))
    said = _unpickle(_find(folder, "language_sdk.pkl", "langauge_sdk.pkl"))  # as its README spells
    labels = _unpickle(file := _find(folder, "humor_label_sdk.pkl"))
    if split not in folds:
        raise ValueError(
            f"{folder}: no split {split!r} in data_folds.pkl; expected one of {', '.join(folds)}."
        )
    for key in folds[split]:
        if (label := labels.get(key)) not in (0, 1):
            raise ValueError(
                f"{file}: the label of {key!r} is {label!r}; expected 0 or 1. Download it again."
            )
        segment, answer = said.get(key, {}), "Yes" if label else "No"
        parts = [segment.get("context_sentences", ""), segment.get("punchline_sentence", "")]
        yield Example(str(key), str(wavs / f"{key}.wav"), _words(parts), (answer,))


def _words(part: Any) -> str:
    """A sentence, or sentences or words nested in lists, as one text."""
    return part.strip() if isinstance(part, str) else " ".join(filter(None, map(_words, part)))


# ---------------------------------------------------------------------------------------------
# Anyone's own


@reader
def read_manifest(path: Path, split: str = "test") -> Iterator[Example | str]:
    """JSONL: audio (relative to the file), answer or answers, and maybe id, text, group, language.

    `path` is the file, or a folder with SPLIT.jsonl.
    """
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        there = ", ".join(sorted(other.stem for other in path.glob("*.jsonl"))) or "none"
        raise FileNotFoundError(f"{file} is missing. Splits here: {there}. Check --split.")
    for number, (where, row) in enumerate(json_lines(file)):
        answers = [row["answer"]] if "answer" in row else row.get("answers")
        texts = {key: row.get(key, "") for key in ("text", "group", "language")}
        texts["audio"] = row.get("audio")
        wrong = [key for key, text in texts.items() if not isinstance(text, str)]
        if texts["language"] not in ("", *LANGUAGES):
            wrong.append("language")
        if "answer" in row and "answers" in row:
            wrong.append("answer and answers together")
        elif not (isinstance(answers, list) and {*map(type, answers)} == {str}):
            wrong.append("answer" if "answer" in row else "answers")
        if wrong:
            raise ValueError(
                f"{where}: wrong or missing: {', '.join(wrong)}; expected an object such as "
                '{"audio": "a.wav", "text": "who ...?", "answers": ["Ada"], "group": "en"}, with '
                "either answer (a string) or answers (a list of strings), and a language only from "
                f"{', '.join(LANGUAGES)}. Correct the line."
            )
        # without "..", so that one clip of several tasks has one name
        texts["audio"] = os.path.normpath(file.parent / texts["audio"])
        fields = texts | {"answers": tuple(answers)}
        yield Example(id=str(row.get("id", number)), **fields)


# ---------------------------------------------------------------------------------------------
# Files


def _there(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected it as the set is published. Check the path and the "
            "split, or unpack the whole set."
        )
    return file


def _find(folder: Path, *patterns: str) -> Path:
    """The first that is there; what macOS leaves beside each file (._*, __MACOSX/) is not."""
    for pattern in patterns:
        for found in sorted(folder.glob(pattern)):
            if not found.name.startswith("._") and "__MACOSX" not in found.parts:
                return found
    return _there(folder / " or ".join(patterns))


def _present(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the parts that are there; the others are named in a warning."""
    absent = [name for name in names if not (folder / name).is_dir()]
    if len(absent) == len(names):
        _there(folder / " or ".join(names))
    if absent:
        log.warning("%s: without %s: the set is not complete", folder, ", ".join(absent))
    return [name for name in names if name not in absent]


def _wavs(folder: Path) -> Path:
    """The folder itself, if it may hold the audio; videos alone are refused with a remedy."""
    if not folder.is_dir():
        _there(folder / "*.wav")
    names = sorted(name for name in os.listdir(folder) if not name.startswith("._"))
    videos = [name for name in names if name.endswith(".mp4")]
    if videos and not any(name.endswith(".wav") for name in names):
        raise ValueError(
            f"{folder}: {len(videos)} videos ({', '.join(videos[:3])}, ...) and no audio; expected "
            f"a *.wav beside each. Make them with\n  for f in {shlex.quote(str(folder))}/*.mp4; "
            'do ffmpeg -nostdin -i "$f" -vn -ac 1 -ar 16000 "${f%.mp4}.wav"; done'
        )
    return folder


def _text(file: Path) -> str:
    """The content of a file in UTF-8, gzipped or not."""
    content = _there(file).read_bytes()
    try:
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        return content.decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{file}: no text in UTF-8 ({error}). Download it again.") from error


def json_lines(file: Path) -> Iterator[tuple[str, dict]]:
    """(FILE:LINE, object) of JSON lines. Raises ValueError that names the line."""
    # not splitlines: a JSON string may hold the other separators that Unicode knows
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: no JSON object ({error}); expected one on each line."
            ) from error


def _table(
    file: Path, columns: Sequence[str], errors: str = "strict", **dialect: Any
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV or TSV with at least these columns. Raises ValueError with the line."""
    with _there(file).open(encoding="utf-8-sig", errors=errors, newline="") as lines:
        rows = csv.DictReader(lines, **dialect)
        try:
            names = rows.fieldnames or []
            if absent := [name for name in columns if name not in names]:
                raise csv.Error(f"no column {' or '.join(absent)}")
            for row in rows:
                if None in row or None in [row[name] for name in columns]:
                    raise csv.Error(f"expected {len(names)} fields, {', '.join(names)}")
                yield rows.line_num, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{file}:{rows.line_num}: {error}; expected a table with {', '.join(columns)}. "
                "Download it again."
            ) from error


def _parquet(folder: Path, split: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of data/SPLIT-*.parquet, all shards of them. Raises ValueError that names the file.

    pyarrow is needed here alone, and only here imported.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{folder}: parquet needs pyarrow, which is not installed. Run pip install pyarrow, "
            "or install this project with its extra: pip install '.[eval]'"
        ) from error
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    shards = [int(file.stem.partition("-of-")[2][:5] or 1) for file in files]
    if not files or {*shards} != {len(files)}:
        raise FileNotFoundError(
            f"{folder}/data/{split}-*.parquet: {len(files)} files of {max(shards, default='any')}; "
            "expected all shards of one revision. Check the split, or download them again."
        )
    for file in files:
        try:
            table = pq.ParquetFile(file)
            if absent := [name for name in columns if name not in table.schema_arrow.names]:
                raise ValueError(f"no column {' or '.join(absent)}")
            for batch in table.iter_batches(batch_size=32, columns=columns):  # audio is large
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(
                f"{file}: {error}; expected parquet with {', '.join(columns)}. Download it again."
            ) from error


def _unpacked(sound: dict[str, Any] | None, folder: Path, name: str) -> str:
    """The file of an embedded clip {bytes, path}, written unless it is there: whole or not at all.

    Its name holds the content's checksum; it ends like the embedded path, or as the first bytes
    say.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"{name!r} is no name for a file in {folder}; expected an id.")
    content, path = (sound or {}).get("bytes") or b"", (sound or {}).get("path") or ""
    endings = [kind for magic, kind in MAGIC.items() if content.startswith(magic)]
    ending = Path(path).suffix or [*endings, ".wav"][0]
    file = folder / f"{name}-{zlib.crc32(content):08x}{ending}"
    if content and not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(file)
    return str(file)


# ---------------------------------------------------------------------------------------------
# Pickles that need not be trusted


class _Unpickler(pickle.Unpickler):
    """Makes numbers, texts and containers, and calls nothing but the functions below.

    An ordinary unpickler calls whatever a file from the internet asks for. Arrays of numpy come as
    lists: numpy's own constructors would take any bytes for pointers to objects.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        maker = MAKERS.get((module_name.replace("_core.", "core."), global_name))
        if maker is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return maker


class _Dtype:
    """What a pickle says of a dtype: its code, such as <f8."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple):
        self.code = state[1] + self.code  # the order of the bytes

    def values(self, content: bytes | bytearray | str | list) -> list:
        if isinstance(content, list):  # of objects
            return content
        if not re.fullmatch(r"[<>=|]?[biufcSU]\d+", self.code):
            raise pickle.UnpicklingError(f"it asks for numpy's dtype {self.code}")
        content = content.encode("latin1") if isinstance(content, str) else content  # Python 2
        return np.frombuffer(content, self.code).tolist()


class _Array(list):
    """An array as a flat list."""

    def __init__(self, *_: Any):
        super().__init__()

    def __setstate__(self, state: tuple):
        self[:] = state[-3].values(state[-1])  # version, shape, dtype, order, content


MAKERS: dict[tuple[str, str], Callable] = {
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes in protocols 0 to 2
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): lambda dtype, content: dtype.values(content)[0],
    ("numpy.core.numeric", "_frombuffer"): lambda content, dtype, *_: dtype.values(content),
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, bytes)},
    **{("__builtin__", kind.__name__): kind for kind in (set, frozenset, bytes)},  # Python 2's name
}


def _unpickle(file: Path) -> dict:
    """A dictionary from a pickle that need not be trusted. Raises ValueError."""
    with file.open("rb") as stream:
        try:
            content = _Unpickler(stream, encoding="latin1").load()  # latin1: written by Python 2
            return {**content}
        except (  # a damaged file lets pickle raise any of these
            *(pickle.UnpicklingError, EOFError, ImportError, AttributeError, LookupError),
            *(TypeError, ValueError, OverflowError, MemoryError),
        ) as error:
            raise ValueError(
                f"{file}: refused ({error}); expected a pickled dictionary of numbers, texts, "
                "lists and numpy arrays. Download it again from its authors."
            ) from error


# ---------------------------------------------------------------------------------------------
# The table


@dataclasses.dataclass(frozen=True)
class Suite:
    """How a benchmark is read, put to the model and scored."""

    read: Callable[..., list[Example]]
    prompt: str | None  # the system turn
    metrics: tuple[str, ...]  # of metrics.py; the first one is the headline
    labels: tuple[str, ...] = ()  # choose the likeliest of these instead of generating


QA = "You are a helpful assistant. Give your answers as a simple single sentence."
QA_METRICS = ("pedant", "contains", "f1", "exact_match", "prompt_ignoring")
YES_NO = ("Yes", "No")
SUITES = {
    "heysquad": Suite(read_heysquad, QA, QA_METRICS),
    "sd_qa": Suite(read_sd_qa, QA, QA_METRICS),
    "covost": Suite(
        read_covost,
        # As the script for DiVA has it; the project's page says "Translate the input from English
        # to ...". {language} is LANGUAGES[group].
        "You are a helpful assistant. Translate the inputs from English to {language}.",
        ("bleu", "chrf", "wrong_script"),
    ),
    "meld": Suite(
        read_meld,
        "Respond in a single word what emotion the input exhibits.\n"
        "If there is no clear emotion, respond 'Neutral'.",
        ("weighted_f1", "accuracy"),
        MELD_LABELS,
    ),
    "iemocap": Suite(
        read_iemocap,
        "Respond in a single word what emotion the audio represents.\n"
        "If there is no clear emotion, respond 'Neutral'.",
        ("weighted_f1", "accuracy"),
        tuple(IEMOCAP_LABELS.values()),
    ),
    "mustard": Suite(
        read_mustard,
        "Respond whether the input is sarcastic. Answer with a simple yes or no.",
        ("accuracy", "weighted_f1"),
        YES_NO,
    ),
    "ur_funny": Suite(
        read_ur_funny,
        "Respond whether the input is intended to be humorous. Answer with a simple yes or no.",
        ("accuracy", "weighted_f1"),
        YES_NO,
    ),
    "manifest": Suite(read_manifest, None, ()),  # prompt and metrics are the user's
}

# German and Mandarin are the published script's words; the other names are ours.
LANGUAGES = dict(
    entry.split(":")
    for entry in "ar:Arabic ca:Catalan cy:Welsh de:German et:Estonian fa:Persian id:Indonesian "
    "ja:Japanese lv:Latvian mn:Mongolian sl:Slovenian sv-SE:Swedish ta:Tamil tr:Turkish "
    "zh-CN:Mandarin".split()
)

# Read off the bars of the published charts (their vector graphics): within 0.3 for questions, 0.1
# for the rest. "pedant" was PANDA, as qa-metrics 0.1 computed it: later versions score otherwise.
# "prompt_ignoring" is what the authors found in 50 answers that they read.
PUBLISHED_SYSTEMS = ("Qwen Audio", "Qwen 2 Audio", "SALMONN", "DiVA Llama 3 8B")
PUBLISHED = {}  # {suite: {group, or "" for all: {metric: {system: score}}}}
for _line in """
heysquad pedant         45.1 46.1 48.7 55.0
sd_qa    pedant         43.3 43.3 46.8 53.8
sd_qa    pedant   usa   42.5 44.4 48.2 54.8
sd_qa    pedant   gbr   43.6 44.6 47.1 54.6
sd_qa    pedant   phl   42.1 42.8 45.8 52.6
sd_qa    pedant   ind_s 43.0 42.8 45.7 54.0
sd_qa    pedant   ind_n 42.6 41.9 45.5 52.2
sd_qa    pedant   irl   43.0 43.5 47.7 54.2
sd_qa    pedant   aus   45.3 44.3 47.9 55.5
sd_qa    pedant   nzl   44.3 44.9 48.0 55.0
sd_qa    pedant   nga   42.3 41.6 45.9 52.9
sd_qa    pedant   zaf   43.9 42.6 45.8 52.6
covost   bleu           15.7 16.1  9.1 13.8
covost   bleu     ar     8.1 13.3  0.7 12.9
covost   bleu     zh-CN 25.2 16.5 19.7 12.3
covost   bleu     de    28.9 30.3 21.0 27.6
covost   bleu     id    17.0 25.7 11.5 22.9
covost   bleu     ja    22.6 16.5  8.4  6.2
covost   bleu     ta     0.2  0.4  0.0  3.2
covost   bleu     tr     7.7  9.9  2.1 11.8
meld     weighted_f1     3.0 37.7 31.7 41.3
iemocap  weighted_f1     9.4 33.9 17.4 50.6
mustard  accuracy       49.7 55.5 50.1 52.6
ur_funny accuracy       54.5 50.7 52.3 50.2
heysquad prompt_ignoring 30.0 4.0 8.0 0.0
""".strip().split("\n"):
    _suite, _metric, *_group, _a, _b, _c, _d = _line.split()
    _scores = dict(zip(PUBLISHED_SYSTEMS, map(float, (_a, _b, _c, _d)), strict=True))
    PUBLISHED.setdefault(_suite, {}).setdefault("".join(_group), {})[_metric] = _scores
