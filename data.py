"""Data: a clip and its transcript. Common Voice, LibriSpeech, JSONL, parquet -> batches.

    read_clips(path) -> [Clip]      what there is: names and transcripts, no audio yet
    prepare(clips)   -> Corpus      what can be used: tokenised, without what does not fit
    batches(corpus)  -> Batch(audio [B, S], transcript [B, L], lengths [B], ...), forever

The batch of step s is a function of (seed, s) alone, for any number of processes, so that a run
which resumes needs no replay. Audio is decoded (MP3, FLAC, Ogg/Opus, WAV, M4A, WebM, ...) in
threads that run ahead of the device. Nothing is ever cut: what does not fit is left out, counted
and reported. Run it to see what a corpus holds:  python data.py cv/en

Support: formats/audio_files.py decodes a file to 16 kHz mono, runtime/files.py reads the lists and
caches clip durations, formats/parquet.py reads datasets from the Hub.

Axes: B batch, S audio samples (16 kHz mono), L text tokens.
Reads: nothing of ours.   Read next: train.py.
"""

import collections
import dataclasses
import functools
import logging
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import soundfile as sf
import tyro
from jaxtyping import Float, Int, Int32

from formats import audio_files, parquet
from formats.audio_files import SAMPLE_RATE
from runtime import cli, files

IN_MEMORY = 10_000  # clips: a corpus up to this size stays decoded in memory
AHEAD = 4  # batches that are prepared before they are asked for
TOKEN_MULTIPLE = 8  # the transcripts' padded length is rounded up to it

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one training step reads, all arrays of one batch. Fields that are None are absent."""

    transcript: Int[Any, "B L"]  # token ids, padded with 0 on the right
    lengths: Int[Any, "B"]  # how many of each row are real
    weights: Float[Any, "B"]  # 0 for a clip that cannot be decoded
    audio: Float[Any, "B S"] | None = None  # 16 kHz mono, padded with silence to the window
    encoder_states: Float[Any, "B T D"] | None = None  # precomputed, instead of audio
    teacher_states: Float[Any, "B K E"] | None = None  # precomputed
    response: Int[Any, "B A"] | None = None  # the teacher's, without its last token; None: empty
    response_lengths: Int[Any, "B"] | None = None  # states that predict each response; None: 1

    @property
    def fed_response(self) -> Int[Any, "B A"]:
        """The response tokens that the LLM is fed: [B, 0] if there are none."""
        return self.transcript[:, :0] if self.response is None else self.response


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One recording and its transcript; `meta` holds what else is known (accent, speaker, ...)."""

    audio: str
    text: str
    meta: dict[str, str] = dataclasses.field(default_factory=dict)


# ---------------------------------------------------------------------------------------------
# What there is


def read_clips(
    path: str | Path, split: str = "train", text_column: str | None = None
) -> list[Clip]:
    """List the clips of a Common Voice folder, a LibriSpeech folder, a JSONL manifest, or parquet,
    in a folder or on the Hub, whose transcripts stand in `text_column` or the first usual one.

    Raises FileNotFoundError or ValueError that names file and line.
    """
    if Path(split).name != split or split in ("", ".."):
        raise ValueError(f"split {split!r}: expected a name, such as train. Check --split.")
    path, clips, bad = parquet.downloaded(Path(path), split), [], []
    if (path / f"{split}.tsv").is_file():
        rows = _common_voice_rows(path / f"{split}.tsv", bad)
    elif shards := parquet.shards(path, split):
        rows = parquet.clips(shards, text_column)
    elif path.is_file():
        rows = _manifest_rows(path)
    elif path.is_dir():
        rows = _librispeech_rows(path, split)
    else:
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a Common Voice folder (SPLIT.tsv and "
            "clips/), a LibriSpeech folder (*.trans.txt), a folder of parquet, a JSONL manifest or "
            "the id of a dataset on the Hub. Check --data."
        )
    for where, folder, audio, text, meta in rows:
        if not audio.strip() or not text.strip():
            bad.append((where, "without a path or a text"))
        elif files.of_macos(audio):
            bad.append((where, "of macOS (._*), no recording"))
        else:
            audio = audio if folder is None else files.resolve_audio_path(folder, audio)
            clips.append(Clip(audio, text.strip(), meta))
    files.warn_left_out(path, bad, clips)
    if not clips:
        raise ValueError(f"{path}: split {split!r} lists no clip; expected at least one.")
    if all(clip.text == clip.text.upper() for clip in clips):  # LibriSpeech: twice the tokens
        clips = [dataclasses.replace(clip, text=clip.text.lower()) for clip in clips]
    return clips


# (FILE:LINE, folder that the path is relative to, path, text, what else is known) of each row
Rows = Iterator[tuple[str, str | Path | None, str, str, dict[str, str]]]


def _common_voice_rows(file: Path, bad: list[tuple[str, str]]) -> Rows:
    """Any version's TSV: columns by name; no quoting, since sentences hold bare quotes."""
    folder, same = file.parent / "clips", {}  # equal strings (speaker, accent, ...) are held once
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing; expected the folder of audio that {file.name} names. "
            "Unpack the whole corpus."
        )
    for where, row in files.table(file, ["path", "sentence"], bad, **files.TSV):
        audio, text = row.pop("path"), row.pop("sentence")
        if "accent" in row:  # older versions
            row["accents"] = row.pop("accent")
        meta = {k: same.setdefault(v, v) for k, v in row.items() if k and v}
        yield where, folder, audio, text, meta


def _librispeech_rows(folder: Path, split: str) -> Rows:
    """*.trans.txt lines `ID TEXT` beside ID.flac; `folder` holds the split, or is one itself."""
    if (folder / split).is_dir():
        found = files.listed(folder / split, "**/*.trans.txt")
    else:  # SPEAKER/CHAPTER/ and no deeper: another split never stands in for a missing one
        found = files.listed(folder, "*/*/*.trans.txt")
    if not found:
        splits = [p.stem for p in files.listed(folder, "*.tsv")] + parquet.splits_in(folder)
        splits += sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "clips")
        raise FileNotFoundError(
            f"{folder}: no split {split!r}: neither {split}.tsv (Common Voice) nor parquet nor "
            f"*.trans.txt (LibriSpeech); found {', '.join(splits) or 'nothing of the kind'}. "
            "Check --data and --split."
        )
    for file in found:
        for where, line in files.text_lines(file):
            name, _, text = line.partition(" ")
            if not text.strip():
                raise ValueError(f"{where}: {line!r}; expected an id, a space and a text.")
            yield where, file.parent, f"{name}.flac", text, {"speaker": name.split("-")[0]}


def _manifest_rows(file: Path) -> Rows:
    """One JSON object a line: audio (relative to the manifest), text, and anything else."""
    for where, row in files.json_lines(file):
        values = [row.pop(key, 0) for key in ("audio", "text")]
        if not all(isinstance(value, str | None) for value in values):
            raise ValueError(
                f"{where}: no audio or no text; expected an object with both as strings, "
                'such as {"audio": "a.mp3", "text": "hello"}.'
            )
        audio, text = (value or "" for value in values)
        yield where, file.parent, audio, text, {key: str(value) for key, value in row.items()}


# ---------------------------------------------------------------------------------------------
# How long it is


def seconds_of(clips: list[Clip]) -> list[float]:
    """Length of each clip, almost without decoding: Common Voice's clip_durations.tsv or a column
    of the parquet, else what the headers say, where they do.

    A clip whose header cannot be read counts as 0 s: decoding it will say what is wrong.
    """
    known = audio_files.seconds_by_table(clip.audio for clip in clips)
    failures = (sf.SoundFileError, RuntimeError)
    rest = {clip.audio: clip.meta for clip in clips if clip.audio not in known}
    rows = [name for name in rest if parquet.is_row(name)]
    known |= {name: said for name in rows if (said := parquet.seconds_said(rest[name]))}
    rows = [name for name in rows if name not in known]
    tables = sorted({parquet.row_of(name)[0] for name in rows})
    held = files.cached_per_file("seconds-in-tables", tables, audio_files.seconds_in, failures)
    for name in rows:
        file, row = parquet.row_of(name)
        known[name] = held[file][row] if held[file] else 0.0
    rest = [name for name in rest if name not in known]
    known |= files.cached_per_file("seconds-held", rest, audio_files.seconds, failures)
    return [known[clip.audio] for clip in clips]


# ---------------------------------------------------------------------------------------------
# What can be used


@dataclasses.dataclass
class Corpus:
    """Clips that fit, with their tokens; one padded length L for the whole run, so that the step
    compiles once."""

    clips: list[Clip]
    ids: list[Int32[np.ndarray, "_"]]
    window_samples: int
    max_length: int  # L
    too_long: int = 0  # left out: audio longer than the window
    too_wordy: int = 0  # left out: more tokens than queries
    wordless: int = 0  # left out: no token at all
    max_tokens: int = 0
    undecodable: dict[str, str] = dataclasses.field(default_factory=dict)  # file: reason
    # Fields of Batch that were computed before step 0: arrays [clips, ...] by their names.
    precomputed: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_response_tokens(self) -> int:
        """A: response tokens that are fed for each clip."""
        return self.precomputed["response"].shape[1] if "response" in self.precomputed else 0

    def batch_shapes(self, batch_size: int) -> Batch:
        """Shapes of the global batch that `batches` yields, all processes together."""
        shapes = batch_shapes(
            batch_size, max_length=self.max_length, window_samples=self.window_samples
        )
        if "encoder_states" in self.precomputed:
            shapes = shapes._replace(audio=None)
        return shapes._replace(
            **{
                name: jax.ShapeDtypeStruct((batch_size, *rows.shape[1:]), rows.dtype)
                for name, rows in self.precomputed.items()
            }
        )

    def digest(self) -> dict[str, int]:
        """What tells this corpus from others: its size, and a checksum of names and transcripts."""
        text = "".join(f"{parquet.known_as(c.audio)}\t{c.text}\n" for c in self.clips)
        content = text.encode("utf-8", "surrogatepass")  # a file's name need not be UTF-8
        return {"clips": len(self.clips), "crc32": zlib.crc32(content)}

    def left_out(self) -> str:
        """How many, and why."""
        return (
            f"{self.too_long} longer than {self.window_samples / SAMPLE_RATE:g} s, "
            f"{self.too_wordy} of more than {self.max_tokens} tokens, "
            f"{self.wordless} without a token"
        )


def prepare(
    clips: list[Clip],
    encode: Callable[[list[str]], list[list[int]]],
    window_samples: int,
    max_tokens: int,
) -> Corpus:
    """Tokenise, and leave out (never cut) what does not fit; reports the counts.

    Raises ValueError if nothing is left.
    """
    corpus = Corpus([], [], window_samples, 0, max_tokens=max_tokens)
    window = window_samples / SAMPLE_RATE
    for clip, row, seconds in zip(clips, _tokens(clips, encode), seconds_of(clips), strict=True):
        if seconds > window:
            corpus.too_long += 1
        elif len(row) > max_tokens:
            corpus.too_wordy += 1
        elif not len(row):
            corpus.wordless += 1
        else:
            corpus.clips.append(clip)
            corpus.ids.append(row)
    if not corpus.clips:
        raise ValueError(
            f"{clips[0].audio if clips else 'the corpus'}: none of {len(clips)} clips can be used "
            f"({corpus.left_out()}); expected speech of at most {window:g} s. "
            "Check --data and --split."
        )
    if absent := len(clips) - len(corpus.clips):
        log.warning("left out %d of %d clips: %s", absent, len(clips), corpus.left_out())
    longest = max(map(len, corpus.ids))
    corpus.max_length = -(-longest // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    return corpus


def _tokens(
    clips: list[Clip], encode: Callable[[list[str]], list[list[int]]], at_once: int = 10_000
) -> Iterator[Int32[np.ndarray, "_"]]:
    """The tokens of each clip, as arrays: a list of Python integers takes over twice the room."""
    for start in range(0, len(clips), at_once):
        for row in encode([clip.text for clip in clips[start : start + at_once]]):
            yield np.asarray(row, np.int32)


# ---------------------------------------------------------------------------------------------
# Batches


def batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's rows of the batches from `start_step` on, endlessly, shuffled anew each epoch.

    A clip that cannot be decoded is silence of weight 0, named in the log once and listed in
    corpus.undecodable. Fields in corpus.precomputed are taken from there.
    Raises ValueError if the processes cannot share the batch equally.
    """
    if batch_size % process_count:
        raise ValueError(
            f"--batch-size {batch_size}: cannot be shared equally by {process_count} processes; "
            f"expected a multiple of {process_count}."
        )
    rows = batch_size // process_count
    import grain  # importing it takes a second, which only training needs

    order = grain.MapDataset.range(len(corpus.clips)).seed(seed).shuffle().repeat()
    process_rows = _Rows(order, batch_size, rows, process_index, start_step)
    dataset = grain.MapDataset.source(process_rows).map(samples(corpus))
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=AHEAD * rows)  # in clips
    return (Batch(**fields) for fields in dataset.to_iter_dataset(options).batch(rows))


def samples(corpus: Corpus) -> Callable[[int], dict[str, np.ndarray]]:
    """A function from a clip's number to the fields of its row in a Batch.

    Audio is not decoded if the encoder states are precomputed.
    """
    read = _reader(corpus)

    def load(index: int) -> dict[str, np.ndarray]:
        tokens = corpus.ids[index]
        sample = {
            "transcript": np.pad(tokens, (0, corpus.max_length - len(tokens))),
            "lengths": np.int32(len(tokens)),
        }
        if "encoder_states" not in corpus.precomputed:
            audio, is_decoded = read(index)
            sample["audio"] = audio_files.pad([audio], corpus.window_samples)[0]
            sample["weights"] = np.float32(is_decoded)
        return sample | {name: rows[index] for name, rows in corpus.precomputed.items()}

    return load


def batch_shapes(
    batch_size: int,
    *,
    max_length: int,
    window_samples: int,
    num_response_tokens: int | None = None,
) -> Batch:
    """Shapes of a global batch of audio, with responses of so many fed tokens if not None."""

    def shape(dtype: Any, *axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *axes), dtype)

    has_response = num_response_tokens is not None
    return Batch(
        transcript=shape(np.int32, max_length),
        lengths=shape(np.int32),
        weights=shape(np.float32),
        audio=shape(np.float32, window_samples),
        response=shape(np.int32, num_response_tokens) if has_response else None,
        response_lengths=shape(np.int32) if has_response else None,
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The clip numbers that one process reads: its part of every batch from a step on."""

    order: Any  # grain.MapDataset of clip numbers
    batch_size: int
    rows: int
    process_index: int
    start_step: int

    def __len__(self) -> int:
        return 2**40  # endless: no run gets there

    def __getitem__(self, i: int) -> int:
        step, row = divmod(i, self.rows)
        first = (self.start_step + step) * self.batch_size + self.process_index * self.rows
        return self.order[first + row]


def _reader(corpus: Corpus) -> Callable[[int], tuple[np.ndarray, bool]]:
    """Clip number -> (samples, could it be decoded); a small corpus stays in memory as int16."""

    lock = threading.Lock()

    def read(index: int) -> tuple[np.ndarray, float]:
        file = corpus.clips[index].audio
        try:
            samples = audio_files.load(file)
            if len(samples) > corpus.window_samples + SAMPLE_RATE // 100:
                raise ValueError(
                    f"{file}: {len(samples) / SAMPLE_RATE:.2f} s, longer than its header says; "
                    f"expected at most {corpus.window_samples / SAMPLE_RATE:g} s."
                )
        except (OSError, ValueError) as error:
            with lock:  # several threads may meet the same clip at once
                if file not in corpus.undecodable:
                    corpus.undecodable[file] = str(error)
                    log.warning("weight 0: %s", error)
            return np.zeros(0, np.int16), 0.0
        samples = samples[: corpus.window_samples]  # resampling may add a few samples of padding
        peak = max(1.0, float(np.abs(samples).max()))  # what overshoots keeps its shape
        return np.round(samples / np.float32(peak) * 32767).astype(np.int16), peak

    if len(corpus.clips) <= IN_MEMORY:
        read = functools.cache(read)

    def as_float(index: int) -> tuple[Float[np.ndarray, "S"], bool]:
        samples, peak = read(index)
        return samples.astype(np.float32) / 32767 * np.float32(peak), peak > 0

    return as_float


# ---------------------------------------------------------------------------------------------
# What a trainer must know before it starts


def describe(clips: list[Clip], lengths: list[int], corpus: Corpus, batch_size: int) -> list[str]:
    """Lines about `clips`, whose transcripts have `lengths` tokens, and what is left of them."""
    seconds = seconds_of(clips)
    lines = [
        f"{len(clips):,} clips, {sum(seconds) / 3600:.2f} hours; "
        f"{len(corpus.clips):,} can be used: left out {corpus.left_out()}",
        f"clip        longest {max(seconds):.2f} s, median {np.median(seconds):.2f} s",
        f"transcript  longest {max(lengths)} tokens, median {np.median(lengths):g}",
    ]
    if silent := [clip.audio for clip, s in zip(clips, seconds, strict=True) if not s]:
        lines.append(f"no header   {len(silent)}, first {silent[0]}: they will count for nothing")
    for name in ("accents", "accent", "speaker", "speaker_id", "client_id"):
        counts = collections.Counter(clip.meta[name] for clip in clips if name in clip.meta)
        if counts:
            most = ", ".join(f"{key} {n}" for key, n in counts.most_common(8))
            lines.append(f"{name:11} {len(counts)}: {most}{', ...' if len(counts) > 8 else ''}")
    batch = next(batches(corpus, batch_size=batch_size, seed=0))
    fields = [(name, x) for name, x in batch._asdict().items() if x is not None]
    shapes = (f"{name} {x.dtype} {list(x.shape)}" for name, x in fields)
    return [*lines, f"a batch     {', '.join(shapes)}"]


def main(
    path: Annotated[Path, tyro.conf.Positional] = Path("toy/common_voice/en"),
    split: str = "train",
    whisper: str = "toy/whisper",
    llm: str = "toy/llama",
    queries: int | None = None,
    batch_size: int = 16,
    text_column: str | None = None,
) -> None:
    """Print what a corpus holds, and what of it a training run would leave out.

    Args:
        path: a Common Voice folder, a LibriSpeech folder, a JSONL manifest, or parquet: its folder
            or its id on the Hub, owner/name or owner/name/config.
        split: which split of it.
        whisper: folder or repo id of the speech model, whose window clips must fit.
        llm: folder or repo id of the text model, whose tokens are counted.
        queries: the most tokens a transcript may have; None: the positions of Whisper's decoder.
        batch_size: clips in the batch that is shown.
        text_column: where parquet has the transcripts; None: text, sentence, transcription, ...
    """
    import weights  # the models' sizes and tokens are told in the chapters before
    from llama import Chat
    from whisper import WhisperConfig

    sizes, chat = weights.read_config(WhisperConfig, weights.resolve(whisper)), Chat.load(llm)
    clips = read_clips(path, split, text_column)
    lengths = [len(row) for row in _tokens(clips, chat.encode_batch)]
    most = queries or sizes.max_target_positions
    corpus = prepare(clips, chat.encode_batch, sizes.window_samples, most)
    print(f"{path}, split {split}, window {sizes.window_samples / SAMPLE_RATE:g} s")
    print("\n".join(describe(clips, lengths, corpus, batch_size)))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    cli.run(lambda: tyro.cli(main))
