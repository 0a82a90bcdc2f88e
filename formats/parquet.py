"""Parquet: speech as the Hugging Face Hub publishes it, the recordings inside of tables.

A split is a few files, its shards. A recording in one of them is named like a file, wherever a
file's name may stand: `data/train-00000-of-00003.parquet, row 17`, counted from 0. It is read when
it is listened to, and never written elsewhere.

A table by columns has no way to a single row: what precedes it in its row group is read with it,
half a group on average, a few rows at a time. In groups of 100 rows, as the Hub writes them, that
takes 3 ms for an MP3 of 44 kB (decoding it: 15 ms), 15 ms for a FLAC of 290 kB (decoding it: 7 ms);
in groups of 1,000 ten times as long: such shards are to be written anew. Nothing is kept: of a
million rows in any order the next is hardly ever near. In order, one core reads 600 MB a second.
The names, texts and other columns of 1.1 million rows take 0.7 GiB, the footers of shards 0.1.

Reads: files.py.   Read next: recording.py.
"""

import bisect
import contextlib
import functools
import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)

from runtime import files

TEXTS = "text sentence transcription transcript raw_text normalized_text".split()  # first is best
STRINGS = ("string", "large_string")  # as pyarrow writes the types of texts
SECONDS = {"duration": 1, "audio_duration": 1, "duration_ms": 1000}  # columns, and units a second
PLACES = ("", "data/", "default/")  # where a split's shards stand, below the folder of its config
SHARDS = ("{}-[0-9]*.parquet", "{}.parquet", "{}/*.parquet")
CONVERTED = "refs/convert/parquet"  # the Hub's own copy of what was published in another form
HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+")
ROW = ", row "  # between a shard and a number
BUFFER = 1 << 20  # bytes that are read at a time
LARGE = 100_000_000  # bytes of a row group that is worth a warning
AT_ONCE = 8  # rows with audio that are held at a time

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------- shards


def shards(path: Path, split: str) -> list[Path]:
    """The shards of a split, in order, below the folder of a set or of its config; none where there
    are none. A shard is its own.

    Raises FileNotFoundError if some of them are lacking.
    """
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    for pattern in _patterns(split):
        if found := files.listed(path, pattern):
            counts = {int(count) for file in found for count in re.findall(r"-of-(\d+)", file.name)}
            if counts - {len(found)}:
                raise FileNotFoundError(
                    f"{path}/{pattern}: {len(found)} files of {max(counts)}; expected all shards "
                    "of one revision. Check the split, or download them again."
                )
            return found
    return []


def _patterns(split: str) -> list[str]:
    return [f"{place}{shard}".format(split) for place in PLACES for shard in SHARDS]


def splits(names: Iterable[str]) -> list[str]:
    """CONFIG/SPLIT of all shards among the names of files."""
    tables = [name for name in names if name.endswith(".parquet")]
    return sorted({re.sub(r"(-\d+-of-\d+.*|/\d+)?\.parquet$", "", name) for name in tables})


def splits_in(folder: Path) -> list[str]:
    """CONFIG/SPLIT of all shards below a folder."""
    found = itertools.chain(*(folder.glob("*/" * depth + "*.parquet") for depth in range(3)))
    return splits(file.relative_to(folder).as_posix() for file in found)


def downloaded(path: Path, split: str) -> Path:
    """The path itself; or, where nothing is there and it may be a dataset of the Hub (`owner/name`,
    `owner/name/config`), the folder that its split was downloaded to, once.

    Raises FileNotFoundError if the Hub has no such split.
    """
    name = path.as_posix()
    if path.exists() or not HUB.fullmatch(name):
        return path
    owner, dataset, *config = name.split("/")
    repo, found = f"{owner}/{dataset}", []
    wanted = [str(PurePosixPath(*config, pattern)) for pattern in _patterns(split)]
    try:
        with contextlib.suppress(RevisionNotFoundError):  # what is parquet need not be converted
            for branch in (None, CONVERTED):
                which = {"repo_type": "dataset", "revision": branch}
                folder = Path(snapshot_download(repo, allow_patterns=wanted, **which), *config)
                if shards(folder, split):
                    return folder
                found += splits(HfApi().list_repo_files(repo, **which))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: neither a file or folder here nor a dataset of the Hub that could be fetched "
            f"({reason}). Expected a path, or an id such as openslr/librispeech_asr/clean (log in "
            "with `hf auth login` for gated ones). Check --data."
        ) from error
    raise FileNotFoundError(
        f"{name}: no split {split!r} in parquet; found {', '.join(found) or 'none'}. Check "
        "--split, and write the config behind the name: owner/name/config."
    )


# --------------------------------------------------------------------------------------------- rows


@contextlib.contextmanager
def _opened(file: Path, name: str = "", footer: Any = None) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile. Raises ValueError that names `name`, by default the file.

    pyarrow is needed here alone, and only here imported.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{file}: parquet needs pyarrow, which is not installed. Run pip install '.[parquet]'"
        ) from error
    try:
        # not mapped into memory: what breaks off would end the process instead of raising OSError
        how = {"metadata": footer, "buffer_size": BUFFER, "pre_buffer": False}
        with pq.ParquetFile(file, **how) as content:
            yield content
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{name or file}: {' '.join(str(error).split())}; expected a table in parquet that is "
            "whole and has the columns of its set. Download it again."
        ) from error


def rows(
    file: Path, columns: Sequence[str], at_once: int = AT_ONCE
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE, row N; its values) of a shard; a class (ClassLabel) comes as its name.

    Raises ValueError that names the file.
    """
    with _opened(file) as content:
        there = content.schema_arrow.names
        if absent := [name for name in columns if name.partition(".")[0] not in there]:
            raise ValueError(f"no column {' or '.join(absent)}; found {', '.join(there)}")
        classes = _classes(content.schema_arrow)
        batches = content.iter_batches(at_once, columns=columns)
        values = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(values):
            for name in classes.keys() & row.keys():
                row[name] = dict(enumerate(classes[name])).get(row[name])  # -1: none
            yield f"{file}{ROW}{number}", row


def _classes(schema: Any) -> dict[str, list[str]]:
    """What the Hub notes beside the schema: the names of a column of integers."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: of["names"] for name, of in features.items() if "names" in of}
    except (TypeError, LookupError, AttributeError, ValueError):  # another program wrote it
        return {}


def table(folder: Path, split: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of all shards of a split. Raises FileNotFoundError where there is none."""
    found = shards(folder, split)
    if not found:
        raise FileNotFoundError(
            f"{folder}/data/{split}-*.parquet is missing; found "
            f"{', '.join(splits_in(folder)) or 'no parquet'}. Check the path and the split."
        )
    for file in found:
        yield from rows(file, columns)


def clips(
    found: Sequence[Path], text_column: str | None = None
) -> Iterator[tuple[str, Path | None, str, str, dict[str, str]]]:
    """(where, folder, recording, text, what else is known) of each row of these shards.

    The recording is the row itself, where the table holds it, and there is no folder; else a path
    as the row has it, relative to the shard. Raises ValueError if there is no such column.
    """
    audio, text, others = _columns(found[0], text_column)
    same = {}  # equal strings (speaker, accent, ...) are held once
    for file in found:
        for where, row in rows(file, [*audio, text, *others], at_once=1000):
            inside, said = row.pop("audio", {}), row.pop(text) or ""
            meta = {k: str(v) for k, v in row.items() if v not in (None, "")}
            meta = {k: same.setdefault(v, v) for k, v in meta.items()}
            if isinstance(inside, str):
                yield where, file.parent, inside, said, meta
            else:
                yield where, None, "" if inside is None else where, said, meta


def seconds_said(meta: dict[str, str]) -> float:
    """How long a row's own columns say that it is, 0 where they do not. What they say wrongly is
    found when the clip is decoded."""
    for column, units in SECONDS.items():
        with contextlib.suppress(KeyError, ValueError):  # no such column, or no number
            if 0 < (found := float(meta[column])) < math.inf:
                return found / units
    return 0.0


def _columns(file: Path, text_column: str | None) -> tuple[list[str], str, list[str]]:
    """Columns of recordings (without what is large), of text, and of all else that is a scalar."""
    with _opened(file) as content:
        schema = {field.name: field.type for field in content.schema_arrow}
        groups = [content.metadata.row_group(n) for n in range(content.num_row_groups)]
    if (most := max((group.total_byte_size for group in groups), default=0)) > LARGE:
        log.warning(
            "%s: each clip reads half of a row group of %d MB on average; a pyarrow.parquet."
            "write_table(table, file, row_group_size=100) would make that less",
            *(file, most // 1_000_000),
        )
    there = f"found {', '.join(schema)}"
    audio, texts = schema.get("audio"), [name for name in schema if str(schema[name]) in STRINGS]
    fields = [field.name for field in audio] if str(audio).startswith("struct") else []
    if "bytes" not in fields and "audio" not in texts:
        raise ValueError(
            f"{file}: no recordings; {there}; expected a column `audio`, of bytes and path or of "
            "paths alone. Rename the column, or give another set."
        )
    usual = [name for name in ([text_column] if text_column else TEXTS) if name in texts]
    if not usual:
        raise ValueError(
            f"{file}: no text in a column {text_column or ' or '.join(TEXTS)}; {there}. Give the "
            "one that holds the transcripts as --text-column."
        )
    if usual[1:]:
        log.warning(
            "%s: the transcripts are taken from %s, not from %s: --text-column chooses",
            *(file, usual[0], ", ".join(usual[1:])),
        )
    scalars = [n for n, of in schema.items() if not of.num_fields and "binary" not in str(of)]
    others = [name for name in scalars if name not in ("audio", usual[0])]
    paths = ["audio.path"] if "path" in fields else []
    return paths if fields else ["audio"], usual[0], others


# --------------------------------------------------------------------------------------- recordings


def is_row(name: str | Path) -> bool:
    """Whether a recording of that name is inside of a table."""
    file, _, row = str(name).rpartition(ROW)
    return file.endswith(".parquet") and row.isdecimal()


def row_of(name: str) -> tuple[str, int]:
    """The shard and the row that a name means."""
    file, _, row = name.rpartition(ROW)
    return file, int(row)


def known_as(name: str) -> str:
    """Without where the Hub's cache has it, which no two machines share."""
    cache, _, inside = name.rpartition("/snapshots/")
    return inside.partition("/")[2] if "/datasets--" in cache else name


@functools.lru_cache(1024)
def _layout(file: str) -> tuple[Any, list[int]]:
    """A shard's footer, and the number of rows before the end of each row group."""
    with _opened(Path(file)) as content:
        footer = content.metadata
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return footer, list(itertools.accumulate(sizes))


def sound(name: str) -> bytes | Path:
    """What a row holds: a whole recording, or where it lies instead.

    Raises FileNotFoundError or ValueError.
    """
    file, row = row_of(name)
    footer, ends = _layout(file)
    group = bisect.bisect_right(ends, row)
    if group == len(ends):
        raise ValueError(f"{name}: there is none; the table has {footer.num_rows}. Check the name.")
    at = row - ends[group] + footer.row_group(group).num_rows
    value = None
    with _opened(Path(file), name, footer) as content:
        for batch in content.iter_batches(AT_ONCE, [group], ["audio"], use_threads=False):
            if at < len(batch):
                value = batch.column(0)[at].as_py()
                break
            at -= len(batch)
    return held(name, value)


def held(name: str, value: dict[str, Any] | None) -> bytes | Path:
    """The bytes of a row's `audio`, or the file that it names. Raises FileNotFoundError."""
    content, path = (value or {}).get("bytes"), (value or {}).get("path")
    if content:
        return content
    file = Path(files.resolve_audio_path(Path(name).parent, path or ""))
    if not path or not file.is_file():
        raise FileNotFoundError(
            f"{name}: no bytes, and {file if path else 'no path'} in place of them; expected a "
            "recording, in the table or beside it. Leave the row out, or copy the file there."
        )
    return file
