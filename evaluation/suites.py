"""Suites: the benchmarks of the paper, as they lie on disk -> clips with references.

    SUITES["meld"].read(folder) -> [Example]

    heysquad, sd_qa      spoken questions      any of several answers
    covost               English speech        its translation
    meld, iemocap        emotions              one of 7, one of 4 labels
    mustard, ur_funny    sarcasm, humour       Yes or No
    manifest             anyone's own task     JSONL

Every reader takes the published layout. What cannot be asked (a question without an answer, an
emotion outside the task) is left out and counted; a clip whose audio is missing counts as wrong.

Reads: unpack.py, formats/parquet.py.   Read next: tasks.py.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.unpack import (
    CP1252,
    find,
    labelled,
    present,
    references,
    tydi_references,
    unpacked,
    wavs,
)
from formats import parquet
from runtime import files

DIALECTS = tuple("aus gbr ind_n ind_s irl kenya nga nzl phl usa zaf".split())  # SD-QA's folders
PAPER_LANGUAGES = ("ar", "zh-CN", "de", "id", "ja", "ta", "tr")  # of the paper's chart, out of 15
MELD_LABELS = ("Anger", "Disgust", "Fear", "Joy", "Neutral", "Sadness", "Surprise")
MELD_VIDEOS = {"train": "train_splits", "dev": "dev_splits_complete"}
MELD_VIDEOS["test"] = "output_repeated_splits_test"
MELD_DEFECTS = {("train", "dia125_utt3"), ("dev", "dia110_utt7")}  # corrupt; not in the archive
IEMOCAP_LABELS = {"ang": "Anger", "hap": "Happiness", "neu": "Neutral", "sad": "Sadness"}
NO_YES = ("No", "Yes")  # what 0 and 1 mean
HUMOUR_LABELS = {"not_humor": "No", "humor": "Yes"}  # class names of UR-FUNNY's copy
IEMOCAP_VOTE = re.compile(r"\[[\d.]+ - [\d.]+\]\t(\w+)\t(\w+)\t\[")  # times, turn, what most heard
IEMOCAP_TURN = re.compile(r"^(\w+) \[[^\]]*\]:[ \t]*(.*?)\s*$", re.MULTILINE)

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


# What is asked, or (where it stands, why it is left out)
Rows = Iterator[Example | tuple[str, str]]


def reader(read: Callable[..., Rows]) -> Callable[..., list[Example]]:
    """Of a generator of examples and of what is left out, make a function that returns the
    examples, warns of what was left out and of missing audio, and refuses an empty set.

    An id that comes again gets a number, so that every clip has one of its own.
    """

    @functools.wraps(read)
    def wrapped(path: str | Path, /, *args: Any, **kwargs: Any) -> list[Example]:
        seen, examples, bad = collections.Counter(), [], []
        for row in read(Path(path), *args, **kwargs):
            if isinstance(row, Example):
                seen[row.id] += 1
                name = row.id if seen[row.id] == 1 else f"{row.id}#{seen[row.id]}"
                examples.append(dataclasses.replace(row, id=name))
            else:
                bad.append(row)
        if not examples:
            why = files.left_out(bad) if bad else "nothing"
            raise ValueError(
                f"{path}: nothing to ask (left out: {why}); expected at least one clip with a "
                "reference. Check the path and the split."
            )
        files.warn_left_out(path, bad, examples)
        if absent := [e.audio for e in examples if not os.path.isfile(e.audio)]:
            log.warning(
                "%s: the audio of %d of %d clips is missing and will count as wrong, first %s",
                *(path, len(absent), len(examples), absent[0]),
            )
        return examples

    return wrapped


# ---------------------------------------------------------------------------------------------
# Questions


@reader
def read_heysquad(
    folder: Path, split: str = "validation", unpack: str | Path | None = None
) -> Rows:
    """HeySQuAD (human): data/SPLIT-*.parquet; the paper scores `validation` (4,158 rows).

    The clips inside are written to `unpack` (default: folder/unpacked) once.
    """
    into = Path(unpack or folder / "unpacked") / split
    for _, row in parquet.table(folder, split, "id audio question answers is_impossible".split()):
        key, answers = str(row["id"]), references(row["answers"])
        if row["is_impossible"] or not answers:
            yield key, "impossible" if row["is_impossible"] else "without an answer"
        else:
            audio = unpacked(row["audio"], into, key)
            yield Example(key, audio, (row["question"] or "").strip(), answers)


@reader
def read_sd_qa(folder: Path, split: str = "dev", unpack: str | Path | None = None) -> Rows:
    """SD-QA, English: the authors' repository, or WillHeld/SD-QA with data/SPLIT-*.parquet.

    The paper scores `dev`, 1,000 questions; groups are the eleven dialects that ask them.
    """
    if (folder / split / "eng").is_dir():
        yield from _sd_qa_repository(folder / split / "eng", split)
        return
    if not (folder / "data").is_dir():
        files.require_file(folder / f"{split}/eng or data")
    into = Path(unpack or folder / "unpacked") / split
    for _, row in parquet.table(folder, split, ["id", "question", "answers", *DIALECTS]):
        for dialect in DIALECTS:
            key, question = f"{dialect}/{row['id']}", (row["question"] or "").strip()
            if answers := references(row["answers"]):
                audio = unpacked(row[dialect], into / dialect, str(row["id"]))
                yield Example(key, audio, question, answers, dialect)
            else:
                yield key, "without an answer"


def _sd_qa_repository(home: Path, split: str) -> Rows:
    """DIALECT/metadata.csv says what was recorded, *.jsonl.gz beside it what the answers are.

    question_text there is what a speech recogniser heard; the question itself is in english.*.txt.
    """
    rows = [line.split("\t") for _, line in files.text_lines(home / f"english.{split}.txt")]
    questions = {row[0]: row[-1].strip() for row in rows}  # id, a flag, question
    for dialect in present(home, DIALECTS):
        file = find(home / dialect, "*.txt.jsonl.gz", "*.txt.jsonl", "*-[A-Z][A-Z].jsonl*")
        answers = {
            str(row.get("example_id")): tydi_references(row, at)
            for at, row in files.json_lines(file)
        }
        for where, row in files.table(home / dialect / "metadata.csv", ["example_id"]):
            key = row["example_id"]
            if answers.get(key):
                audio, text = home / dialect / "wav_eng" / f"{key}.wav", questions.get(key, "")
                yield Example(f"{dialect}/{key}", str(audio), text, answers[key], dialect)
            else:
                yield where, "without an answer"


# ---------------------------------------------------------------------------------------------
# Translation


@reader
def read_covost(
    folder: Path,
    split: str = "test",
    common_voice: str | Path | None = None,
    languages: Sequence[str] = PAPER_LANGUAGES,
) -> Rows:
    """CoVoST 2, English to `languages`; each has 15,531 clips to test. Groups are the languages.

    `folder` holds covost_v2.en_XX.tsv, or covost_v2.en_XX.SPLIT.tsv as CoVoST's own script joins
    them; `common_voice` (default: the same folder) has validated.tsv and clips/ of version 4.
    A translation that is empty or says REMOVE is none.
    """
    voice, rows = Path(common_voice or folder), []
    tsv = {**files.TSV, "escapechar": "\\"}  # as that script
    parts = ("train", "train_covost") if split == "train" else (split,)
    for language in languages:
        file = find(folder, f"covost_v2.en_{language}.{split}.tsv", f"covost_v2.en_{language}.tsv")
        joined = file.name.endswith(f".{split}.tsv")
        columns = ["path", "translation", "sentence" if joined else "split"]
        found = files.table(file, columns, **tsv)
        rows += [(language, *row) for row in found if joined or row[1]["split"] in parts]
    sentences, alone = {}, {row["path"] for *_, row in rows if "sentence" not in row}
    if alone:  # the join needs these few of a million rows
        validated = files.table(voice / "validated.tsv", ["path", "sentence"], [], **tsv)
        sentences = {row["path"]: row["sentence"] for _, row in validated if row["path"] in alone}
    for language, where, row in rows:
        text = row.get("sentence", sentences.get(row["path"]))
        if row["translation"].strip() in ("", "REMOVE"):
            yield where, "without a translation"
        elif text is None:
            yield where, "not in validated.tsv (expected that of Common Voice 4)"
        else:
            audio, name = str(voice / "clips" / row["path"]), f"{language}/{row['path']}"
            yield Example(name, audio, text, (row["translation"],), language, language)


# ---------------------------------------------------------------------------------------------
# Labels


@reader
def read_meld(folder: Path, split: str = "test", audio: str | Path | None = None) -> Rows:
    """MELD: SPLIT_sent_emo.csv and a folder of diaD_uttU.wav; 2,610 clips to test.

    `audio` is by default where MELD.Raw has the split's videos; the same names recur in each split.
    A copy in parquet has `audio` and `label`; there `audio` is where the clips are written to.
    """
    file = folder / f"{split}_sent_emo.csv"
    if not file.is_file() and parquet.shards(folder, split):
        yield from itertools.starmap(Example, labelled(folder, split, MELD_LABELS, audio))
        return
    files.require_file(file)
    sounds = wavs(Path(audio or folder / MELD_VIDEOS.get(split, split)))
    columns = ["Utterance", "Emotion", "Dialogue_ID", "Utterance_ID"]
    for where, row in files.table(file, columns, errors="cp1252"):
        name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        text, label = row["Utterance"].translate(CP1252).strip(), row["Emotion"].capitalize()
        if label not in MELD_LABELS or "â€" in text:
            raise ValueError(
                f"{where}: emotion {row['Emotion']!r}, text {text!r}; expected one of "
                f"{', '.join(MELD_LABELS)}, and a text that was not read in the wrong encoding and "
                "saved. Download the table again."
            )
        if (split, name) in MELD_DEFECTS and not (sounds / f"{name}.wav").is_file():
            yield where, f"known to be corrupt or missing ({name})"
        else:
            yield Example(name, str(sounds / f"{name}.wav"), text, (label,))


@reader
def read_iemocap(folder: Path, merge_excited: bool = True) -> Rows:
    """IEMOCAP_full_release: 5,531 turns of four emotions. Groups are the five sessions.

    `merge_excited` counts excitement as happiness, as is usual with four classes; without it 4,490
    turns are left. The authors scored a ready-made copy with these four and do not say what became
    of excitement. In that copy, parquet with `audio` and `label`, each session is a split.
    """
    copied = [n for n in range(1, 6) if parquet.shards(folder, f"session{n}")]
    for n in copied:
        for found in labelled(folder, f"session{n}", tuple(IEMOCAP_LABELS.values())):
            yield Example(*found[:-1], group=f"Session{n}")
    if copied:
        return
    label_of = IEMOCAP_LABELS | ({"exc": "Happiness"} if merge_excited else {})
    for session in present(folder, [f"Session{n}" for n in range(1, 6)]):
        home = folder / session
        for file in sorted((home / "dialog/EmoEvaluation").glob("Ses*.txt")):
            said = dict(
                IEMOCAP_TURN.findall(files.read_text(home / "dialog/transcriptions" / file.name))
            )
            for where, line in files.text_lines(file):
                if not line.startswith("["):  # the header, or one annotator's opinion
                    continue
                if not (vote := IEMOCAP_VOTE.match(line)):
                    raise ValueError(
                        f"{where}: {line!r}; expected [start - end], a turn, an emotion "
                        "and [V, A, D], with tabs between. Unpack the corpus again."
                    )
                turn, emotion = vote.groups()
                if emotion in label_of:
                    audio = str(home / "sentences/wav" / file.stem / f"{turn}.wav")
                    yield Example(turn, audio, said.get(turn, ""), (label_of[emotion],), session)
                else:
                    yield where, f"labelled {emotion}"


@reader
def read_mustard(folder: Path, audio: str | Path | None = None) -> Rows:
    """MUStARD: sarcasm_data.json and a folder of ID.wav; 690 clips. Groups are the shows.

    The authors scored a random fifth of them, and of that only the sarcastic clips; this is all.
    Their own copy is parquet: `audio`, `sarcasm`, `utterance` and `show`.
    """
    if parquet.shards(folder, "train") and not [*folder.rglob("sarcasm_data.json")]:
        columns = ("sarcasm", "utterance", "show")
        yield from itertools.starmap(Example, labelled(folder, "train", NO_YES, audio, *columns))
        return
    file = find(folder, "data/sarcasm_data.json", "sarcasm_data.json")
    sounds = wavs(Path(audio or find(folder, "**/utterances_final")))
    for key, entry in files.read_json(file).items():
        entry = entry if isinstance(entry, dict) else {}
        utterance, sarcastic = entry.get("utterance"), entry.get("sarcasm")
        if not isinstance(utterance, str) or not isinstance(sarcastic, bool):
            raise ValueError(
                f"{file}: {key!r} has utterance {utterance!r} and sarcasm {sarcastic!r}; expected "
                "a text, and true or false. Download the file again."
            )
        label, show = "Yes" if sarcastic else "No", str(entry.get("show", ""))
        yield Example(key, str(sounds / f"{key}.wav"), utterance, (label,), show)


@reader
def read_ur_funny(folder: Path, split: str = "test", audio: str | Path | None = None) -> Rows:
    """UR-FUNNY 2, the authors' parquet copy: `audio`, and `label` that is humor or not_humor.

    Its clips are written to `audio` (default: folder/unpacked) once. It has no transcripts.
    """
    rows = labelled(folder, split, NO_YES, into=audio, names=HUMOUR_LABELS)
    yield from itertools.starmap(Example, rows)


# ---------------------------------------------------------------------------------------------
# Anyone's own


@reader
def read_manifest(path: Path, split: str = "test") -> Rows:
    """JSONL: audio (relative to the file), answer or answers, and maybe id, text, group, language.

    `path` is the file, or a folder with SPLIT.jsonl.
    """
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        there = ", ".join(other.stem for other in files.listed(path, "*.jsonl")) or "none"
        raise FileNotFoundError(f"{file} is missing. Splits here: {there}. Check --split.")
    for number, (where, row) in enumerate(files.json_lines(file)):
        answers = [row["answer"]] if "answer" in row else row.get("answers", "")
        answers = [] if answers is None else answers
        fields = {key: row.get(key) for key in ("text", "group", "language")}
        fields = {key: "" if text is None else text for key, text in fields.items()}
        fields["id"] = str(number if row.get("id") is None else row["id"])
        fields["audio"] = row.get("audio") or None
        wrong = [key for key, text in fields.items() if not isinstance(text, str)]
        if fields["language"] not in ("", *LANGUAGES):
            wrong.append("language")
        if "answer" in row and "answers" in row:
            wrong.append("answer and answers together")
        elif not (isinstance(answers, list) and {*map(type, answers)} <= {str, type(None)}):
            wrong.append("answer" if "answer" in row else "answers")
        if wrong:
            raise ValueError(
                f"{where}: wrong or missing: {', '.join(wrong)}; expected an object such as "
                '{"audio": "a.wav", "text": "who ...?", "answers": ["Ada"], "group": "en"}, with '
                "either answer (a string) or answers (a list of strings), and a language only from "
                f"{', '.join(LANGUAGES)}. Correct the line."
            )
        answers = tuple(answer for answer in answers if answer is not None)
        if not answers or files.of_macos(row["audio"]):
            yield where, "of macOS (._*), no recording" if answers else "without an answer"
        else:
            fields["audio"] = files.resolve_audio_path(file.parent, row["audio"])
            yield Example(**fields, answers=answers)


# ---------------------------------------------------------------------------------------------
# The table


@dataclasses.dataclass(frozen=True)
class Suite:
    """How a benchmark is read, put to the model and scored."""

    read: Callable[..., list[Example]]
    prompt: str | None  # the system turn
    metrics: tuple[str, ...]  # of metrics.py; the first one is the headline
    labels: tuple[str, ...] = ()  # choose the likeliest of these instead of generating
    max_new_tokens: int = 64  # as in the paper


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
    # whatever it asks: the answers are known, so they are looked for; tasks.json may say more
    "manifest": Suite(read_manifest, None, ("contains", "f1", "exact_match", "wer")),
}

# German and Mandarin are the published script's words; the other names are ours.
LANGUAGES = dict(
    entry.split(":")
    for entry in "ar:Arabic ca:Catalan cy:Welsh de:German et:Estonian fa:Persian id:Indonesian "
    "ja:Japanese lv:Latvian mn:Mongolian sl:Slovenian sv-SE:Swedish ta:Tamil tr:Turkish "
    "zh-CN:Mandarin".split()
)
