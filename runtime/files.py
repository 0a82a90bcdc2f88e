"""Files: what lies on disk, read strictly and written whole or not at all.

A file that another program wrote is read by one function for each format, and refused by name and
line where it is not what it should be. What we write stands beside its place until it is whole: a
crash, a full disk or a second process never leaves half of a file. A folder may also lie in a
bucket (gs://...), where an object is whole by itself.

Reads: nothing of ours.   Read next: command.py.
"""

import codecs
import collections
import contextlib
import csv
import functools
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TextIO

from etils import epath

FILES_AT_ONCE = 32  # that are looked into at a time: a bucket answers each slowly

TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}  # as Common Voice has it: bare quotes stay
QUOTED = re.compile(r'"((?:[^"]|"")*)"')  # as CSV: quotes inside are doubled
BROKEN = re.compile("[\0\ud800-\udfff]")  # NUL, and bytes or halves of letters that are no text
SOUNDS = (".mp3", ".wav", ".flac", ".ogg", ".opus")

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------ reading


def require_file(file: Path) -> Path:
    """The file itself. Raises FileNotFoundError where there is none."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected it as the set is published. Check the path and the "
            "split, or unpack the whole set."
        )
    return file


def read_text(file: Path) -> str:
    """The whole of a text file. Raises ValueError."""
    with opened(file) as lines:
        return lines.read()


@contextlib.contextmanager
def opened(file: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A text, gzipped or not, in UTF-8 or, if its first bytes say so, UTF-16. Raises ValueError.

    Lines end as they do on any system: with LF, CR LF or CR.
    """
    unpack = gzip.open if require_file(file).suffix == ".gz" else open
    try:
        with unpack(file, "rb") as stream:
            wide = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with unpack(file, "rt", encoding="utf-16" if wide else "utf-8-sig", errors=errors) as lines:
            yield lines
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{file}: no text in UTF-8 ({error}); expected a text file. Give another, or download "
            "it again."
        ) from error


def text_lines(file: Path) -> Iterator[tuple[str, str]]:
    """(FILE:LINE, line) of a text, without blank lines. Raises ValueError that names the line."""
    with opened(file, "surrogateescape") as lines:
        # not splitlines: a text may hold the other separators that Unicode knows
        for number, line in enumerate(lines, 1):
            if BROKEN.search(line):
                raise ValueError(
                    f"{file}:{number}: no text in UTF-8; expected a text file. Give another, or "
                    "save it as UTF-8."
                )
            if line.strip():
                yield f"{file}:{number}", line.lstrip("\ufeff").rstrip("\n")


def read_json(file: Path | epath.Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError or ValueError that names file and line."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected the {file.name} that is published with the model. "
            "Download it into this folder."
        )
    try:
        value = json.loads(file.read_bytes())  # UTF-8 or UTF-16, with or without a mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}; expected a JSON object.")
    return _writable(value)


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of JSON lines. Raises ValueError that names the line."""
    for where, line in text_lines(file):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"a {type(value).__name__}")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: no JSON object ({error}); expected one on each line."
            ) from error
        yield where, _writable(value) if "\\u" in line else value


def _writable(value: Any) -> Any:
    """JSON can hold NUL, which no path may, and halves of letters, which cannot be written: what is
    left is a blank, or the letter that stands for a broken one (in as many bytes: TyDi counts)."""
    if isinstance(value, dict):
        return {_writable(key): _writable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [*map(_writable, value)]
    return BROKEN.sub("\ufffd", value.replace("\0", " ")) if isinstance(value, str) else value


def table(
    file: Path,
    columns: Sequence[str],
    bad: list[tuple[str, str]] | None = None,
    errors: str = "surrogateescape",
    **dialect: Any,
) -> Iterator[tuple[str, dict[str, str]]]:
    """(FILE:LINE, row) of a CSV or TSV with at least these columns, without blanks at the ends.

    A row that cannot be used raises ValueError, or goes as (FILE:LINE, why) into `bad` if given.
    """
    with opened(file, errors) as lines:
        rows, names, after_bad = csv.reader(lines, strict=True, **dialect), None, False
        while True:
            try:
                row = next(rows, None)
                if names is None:
                    names = _header(row or [], columns)
                elif row is None:
                    return
                elif whole := "".join(row).strip():
                    if '""' in whole and dialect.get("quoting") == csv.QUOTE_NONE:
                        row = [*map(_unquoted, row)]
                    found = _row(row, names, columns, after_bad)
                    after_bad = False
                    yield f"{file}:{rows.line_num}", found
            except csv.Error as error:
                where = f"{file}:{max(rows.line_num, 1)}"
                if bad is None or names is None:
                    raise ValueError(
                        f"{where}: {error}; expected a table with "
                        f"{', '.join(columns) or 'a header'}. Download it again."
                    ) from error
                bad.append((where, str(error)))
                after_bad = True


def _header(row: list[str], columns: Sequence[str]) -> list[str]:
    names = [name.strip() for name in row]
    if absent := [name for name in columns if name not in names]:
        found = ", ".join(repr(name)[1:-1] for name in names)[:200] or "nothing"
        raise csv.Error(f"no column {' or '.join(absent)}; found {found}")
    if twice := [name for name in columns if names.count(name) > 1]:
        raise csv.Error(f"two columns {' and '.join(twice)}")
    return names


def _row(
    row: list[str], names: list[str], columns: Sequence[str], after_bad: bool
) -> dict[str, str]:
    """Empty fields at the end may be lacking: some editors remove them. But a line break inside a
    text leaves a row that ends with it and, after that, the rest; a tab makes one field too many.
    """
    if len(row) != len(names):
        last = max(map(names.index, columns), default=-2)
        if after_bad or not last + 2 <= len(row) < len(names):
            raise csv.Error(f"not of {len(names)} fields")
    if BROKEN.search("".join(row)):
        raise csv.Error("no text in UTF-8")
    # blanks, and no other space: in old copies of MELD \x85 is the mark of an ellipsis
    return dict(zip(names, [field.strip(" \t\r\n") for field in row], strict=False))


def _unquoted(field: str) -> str:
    """What was quoted as CSV: quotes inside are doubled, or nothing is inside."""
    quoted = QUOTED.fullmatch(field.strip()) if '""' in field else None
    return quoted[1].replace('""', '"') if quoted else field


def warn_left_out(source: Path, bad: Sequence[tuple[str, str]], kept: Sequence) -> None:
    """One warning, if anything was left out."""
    if bad:
        of = len(bad) + len(kept)
        log.warning("%s: left out %d of %d: %s", source, len(bad), of, left_out(bad))


def left_out(rows: Sequence[tuple[str, str]]) -> str:
    """How many for each reason, and which were the first: of (FILE:LINE, why)."""
    counts = collections.Counter(why for _, why in rows)
    first = ", ".join(f"{where} ({why})" for where, why in rows[:3])
    return f"{', '.join(f'{n} {why}' for why, n in counts.items())}; first {first}"


# ---------------------------------------------------------------------------------- what lists name


def listed(folder: Path, pattern: str) -> list[Path]:
    """Files in order; what macOS leaves beside each (._*, __MACOSX/) is none."""
    found = sorted(folder.glob(pattern))
    return [file for file in found if not of_macos(file.name) and "__MACOSX" not in file.parts]


def of_macos(file: str) -> bool:
    """Whether it is what macOS keeps beside a file, named like that."""
    return os.path.basename(file).startswith("._")


def resolve_audio_path(folder: str | Path, name: str) -> str:
    """The recording that a list in `folder` names: with the ending that Common Voice 1 left out,
    and the separators that Windows writes, if it is there so and not as it is named."""
    path = os.path.join(folder, name)
    if "\\" in name and not os.path.exists(path):
        path = os.path.join(folder, name.replace("\\", "/"))
    if not path.lower().endswith(SOUNDS) and not os.path.exists(path):
        path = next(filter(os.path.exists, (path + ending for ending in SOUNDS)), path)
    folder, name = os.path.split(path)
    return os.path.join(_straight(folder), name)


@functools.lru_cache
def _straight(folder: str) -> str:
    """Without "..", so that one clip of several lists has one name; behind a link that leads
    elsewhere than it reads."""
    plain, real = os.path.normpath(folder), os.path.realpath(folder)
    plain = plain if os.path.realpath(plain) == real else real
    return "" if plain == "." else plain


# ------------------------------------------------------------------------------------------ writing


def in_bucket(path: Path | epath.Path | str) -> bool:
    """gs://... and the like, where there is no renaming and no appending."""
    return "://" in str(path)


@contextlib.contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to; at the end of the block it becomes `file`, at once.

    Its folder is made; several processes may write the same file; after an error nothing is left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(file: Path | epath.Path, text: str) -> None:
    """Whole or not at all, on a disk or in a bucket."""
    if in_bucket(file):
        file.write_text(text, encoding="utf-8")
        return
    with atomic_write(Path(file)) as partial:
        partial.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------- between starts


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/diva (~/.cache/diva): what is kept for the next start, and may be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "diva")


def cached_per_file(
    name: str, files: Sequence[str], measure: Callable[[str], Any], failures: tuple[type, ...]
) -> dict[str, Any]:
    """{file: measure(file)}, which JSON can hold, 0 where that raises one of `failures`; each is
    measured once in its life.

    It is kept in one small file of the cache for each folder, {"BYTES NANOSECONDS FILE": value}: a
    file of another size or time of change is measured again.
    """
    if not files:
        return {}
    folder = os.path.commonpath([os.path.abspath(min(files)), os.path.abspath(max(files))])
    index = cache_folder() / f"{name}-{zlib.crc32(os.fsencode(folder)):08x}.json.gz"
    try:
        kept = json.loads(gzip.decompress(index.read_bytes()))  # gzip has a checksum
    except (OSError, EOFError, ValueError, zlib.error):  # not there yet, or damaged
        kept = {}

    def look(file: str) -> tuple[str, Any]:
        try:
            stat = os.stat(file)
            key = f"{stat.st_size} {stat.st_mtime_ns} {file}"
            return key, kept[key] if key in kept else measure(file)
        except (OSError, ValueError, *failures):  # no file, no name of one, or not of this kind
            return "", 0.0

    with ThreadPool(FILES_AT_ONCE) as pool:
        found = pool.map(look, files)
    if new := {key: value for key, value in found if key and key not in kept}:
        try:
            with atomic_write(index) as partial:
                partial.write_bytes(gzip.compress(json.dumps(kept | new).encode(), 1))
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): the next start will open %d files again. "
                "Set XDG_CACHE_HOME to a folder that can be written.",
                *(index, error, len(new)),
            )
    return {file: value for file, (_, value) in zip(files, found, strict=True)}
