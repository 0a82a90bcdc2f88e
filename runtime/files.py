"""Files: what lies on disk, read strictly and written whole or not at all.

A file that another program wrote is read by one function for each format, and refused by name and
line where it is not what it should be. What we write stands beside its place until it is whole: a
crash, a full disk or a second process never leaves half of a file. A folder may also lie in a
bucket (gs://...), where an object is whole by itself.

Reads: nothing of ours.   Read next: weights.py.
"""

import contextlib
import csv
import gzip
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from etils import epath

FILES_AT_ONCE = 32  # that are looked into at a time: a bucket answers each slowly

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------ reading


def there(file: Path) -> Path:
    """The file itself. Raises FileNotFoundError where there is none."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected it as the set is published. Check the path and the "
            "split, or unpack the whole set."
        )
    return file


def read_text(file: Path) -> str:
    """A file in UTF-8, with or without a mark of byte order, gzipped or not. Raises ValueError."""
    content = there(file).read_bytes()
    try:
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        return content.decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{file}: no text in UTF-8 ({error}); expected a text file. Give another, or download "
            "it again."
        ) from error


def read_json(file: Path | epath.Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError or ValueError that names file and line."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected the {file.name} that is published with the model. "
            "Download it into this folder."
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}; expected a JSON object.")
    return value


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of JSON lines. Raises ValueError that names the line."""
    # not splitlines: a JSON string may hold the other separators that Unicode knows
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: no JSON object ({error}); expected one on each line."
            ) from error


def table(
    file: Path, columns: Sequence[str], errors: str = "strict", **dialect: Any
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV or TSV with at least these columns. Raises ValueError with the line."""
    with there(file).open(encoding="utf-8-sig", errors=errors, newline="") as lines:
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


def parquet(folder: Path, split: str, columns: list[str]) -> Iterator[dict[str, Any]]:
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
            content = pq.ParquetFile(file)
            if absent := [name for name in columns if name not in content.schema_arrow.names]:
                raise ValueError(f"no column {' or '.join(absent)}")
            for batch in content.iter_batches(batch_size=32, columns=columns):  # audio is large
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(
                f"{file}: {error}; expected parquet with {', '.join(columns)}. Download it again."
            ) from error


# ------------------------------------------------------------------------------------------ writing


def in_bucket(path: Path | epath.Path | str) -> bool:
    """gs://... and the like, where there is no renaming and no appending."""
    return "://" in str(path)


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
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
    with whole(Path(file)) as partial:
        partial.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------- between starts


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/diva (~/.cache/diva): what is kept for the next start, and may be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "diva")


def remembered(
    name: str, files: Sequence[str], measure: Callable[[str], float], failures: tuple[type, ...]
) -> dict[str, float]:
    """{file: measure(file)}, 0 where that raises one of `failures`; each is measured once in its
    life.

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

    def look(file: str) -> tuple[str, float]:
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
            with whole(index) as partial:
                partial.write_bytes(gzip.compress(json.dumps(kept | new).encode(), 1))
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): the next start will open %d files again. "
                "Set XDG_CACHE_HOME to a folder that can be written.",
                *(index, error, len(new)),
            )
    return {file: value for file, (_, value) in zip(files, found, strict=True)}
