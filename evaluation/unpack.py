"""Unpack: what published sets are made of. Files, videos, clips inside tables.

Reads: runtime/files.py, formats/parquet.py.   Read next: suites.py.
"""

import codecs
import logging
import os
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from formats import parquet
from runtime import files

MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff": ".mp3"}

# Older copies of MELD hold cp1252: as bytes, or as code points that are not to be printed.
codecs.register_error("cp1252", lambda e: (e.object[e.start : e.end].decode("cp1252"), e.end))
CP1252 = {code: bytes([code]).decode("cp1252") for code in b"\x85\x91\x92\x93\x94\x96\x97"}
CP1252[0xA0] = " "

log = logging.getLogger(__name__)


def find(folder: Path, *patterns: str) -> Path:
    """The first that is there."""
    for pattern in patterns:
        if found := files.listed(folder, pattern):
            return found[0]
    return files.require_file(folder / " or ".join(patterns))


def present(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the parts that are there; the others are named in a warning."""
    absent = [name for name in names if not (folder / name).is_dir()]
    if len(absent) == len(names):
        files.require_file(folder / " or ".join(names))
    if absent:
        log.warning("%s: without %s: the set is not complete", folder, ", ".join(absent))
    return [name for name in names if name not in absent]


def wavs(folder: Path) -> Path:
    """The folder itself, if it may hold the audio; videos alone are refused with a remedy."""
    if not folder.is_dir():
        files.require_file(folder / "*.wav")
    names = sorted(name for name in os.listdir(folder) if not files.of_macos(name))
    videos = [name for name in names if name.endswith(".mp4")]
    if videos and not any(name.endswith(".wav") for name in names):
        raise ValueError(
            f"{folder}: {len(videos)} videos ({', '.join(videos[:3])}, ...) and no audio; expected "
            f"a *.wav beside each. Make them with\n  for f in {shlex.quote(str(folder))}/*.mp4; "
            'do ffmpeg -nostdin -i "$f" -vn -ac 1 -ar 16000 "${f%.mp4}.wav"; done'
        )
    return folder


def unpacked(sound: dict[str, Any] | None, folder: Path, name: str) -> str:
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
        with files.atomic_write(file) as partial:
            partial.write_bytes(content)
    return str(file)


def labelled(
    folder: Path,
    split: str,
    labels: Sequence[str],
    into: str | Path | None = None,
    column: str = "label",
    text: str | None = None,
    group: str | None = None,
    names: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, str, str, tuple[str], str]]:
    """(id, audio, text, answers, group) of each row of a copy in parquet, in the columns `audio`,
    `column`, `text` and `group`; its clips are written to `into` (default: folder/unpacked) once.

    A class is a number in the order of `labels`, a name that begins like one of them, or one of
    `names`, which maps the copy's class names to labels. The id is the name of the recording.
    """
    label_of = {label[:3].lower(): label for label in labels}
    label_of |= {str(number): label for number, label in enumerate(labels)}
    names = names or {}
    columns = ["audio", column, *filter(None, (text, group))]
    for number, (where, row) in enumerate(parquet.table(folder, split, columns)):
        value = str(int(row[column]) if isinstance(row[column], bool) else row[column])
        label = names.get(value) or label_of.get(value[:3].lower())
        if label is None:
            raise ValueError(
                f"{where}: {column} is {row[column]!r}; expected one of "
                f"{', '.join([*labels, *names])}, or its number. Download the set again."
            )
        stem = Path((row["audio"] or {}).get("path") or f"{split}-{number}").stem
        key = re.sub(r"[^\w.-]", "_", stem)
        audio = unpacked(row["audio"], Path(into or folder / "unpacked") / split, key)
        spoken, part = (str(row[name] or "") if name else "" for name in (text, group))
        yield key, audio, spoken.strip(), (label,), part


# ---------------------------------------------------------------------------------------------
# Answers


def references(found: Any) -> tuple[str, ...]:
    """Each once, without what stands for none; of texts, spans, or spans in SQuAD's own form."""
    texts = (found["text"] if isinstance(found, dict) else found) or ()
    texts = [text["text"] if isinstance(text, dict) else text for text in texts]
    once = dict.fromkeys(text.strip() for text in texts if text)
    return tuple(text for text in once if text.lower() not in ("", "n/a"))


def tydi_references(row: dict, where: str) -> tuple[str, ...]:
    """The minimal answers of all annotators: yes, no, or a span in bytes of UTF-8 (-1: none).

    Passage answers are left aside: a whole paragraph is no answer to compare with.
    """
    found = []
    try:
        document = row["document_plaintext"].encode()
        for annotation in row["annotations"]:
            span = annotation["minimal_answer"]
            start, end = span["plaintext_start_byte"], span["plaintext_end_byte"]
            if annotation["yes_no_answer"] in ("YES", "NO"):
                found.append(annotation["yes_no_answer"].capitalize())
            elif 0 <= start < end:
                found.append(document[start:end].decode())
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where}: not as in TyDi QA ({error!r}); expected document_plaintext and annotations "
            "with minimal_answer (offsets in bytes) and yes_no_answer. Download the file again."
        ) from error
    return references(found)
