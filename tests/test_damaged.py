"""No library's traceback: every way in is fed damaged copies of each kind of file.

A command answers, or ends with exit code 1 and one line that begins with `error:` and names the
file or its folder; in three seconds of the processor.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import universe

import connector
import data
import demo
import eval as evaluation
import llama
import weights
import whisper
from runtime import cli

SECONDS = 3.0  # of the processor
DAMAGES = ("cut", "cut", "flipped", "flipped", "flipped", "other", "empty", "folder", "locked")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Models, recordings and lists, all of them undamaged."""
    root = tmp_path_factory.mktemp("whole")
    with universe.compiled_fast():
        universe.build(root)
        for kind in ("whisper", "llama"):
            file = root / kind / "config.json"
            file.write_text(json.dumps({"model_type": kind} | json.loads(file.read_text())))
        clip = universe.write_clips(root / "cv/clips", 1)[0]
        sound, rate = soundfile.read(clip)
        for name in ("a.mp3", "b.flac", "c.ogg"):
            soundfile.write(root / "cv/clips" / name, sound, rate)
        os.rename(clip, root / "cv/clips/d.wav")
        names = ("a.mp3", "b.flac", "c.ogg", "d.wav")
        rows = "".join(f"{name}\tone two {n}\tus\n" for n, name in enumerate(names))
        (root / "cv/train.tsv").write_text("path\tsentence\taccents\n" + rows)
        sounds = [{"bytes": (root / "cv/clips" / n).read_bytes(), "path": n} for n in names]
        table = pa.table({"audio": sounds, "text": ["one two"] * 4, "accent": [*"abca"]})
        pq.write_table(table, root / "train.parquet", row_group_size=2)
        lines = [
            {"audio": f"cv/clips/{name}", "text": "one two", "answer": "red"} for name in names
        ]
        (root / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = {"suite": "manifest", "path": "list.jsonl", "metrics": ["wer"], "prompt": "say it"}
        (root / "tasks.json").write_text(json.dumps({"mine": task}))
        said = [{"task": "mine", "id": str(n), "answer": "red"} for n in range(4)]
        (root / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
        for name, (chapter, _) in WAYS.items():
            assert outcome(chapter, root) is None, name
        yield root


def evaluated(root: Path) -> None:
    tasks, said = (str(root / "tasks.json"),), (f"other={root / 'said.jsonl'}",)
    evaluation.evaluate(root / "diva", tasks, predictions=said, out=root / "out", batch_size=4)


def clip_of(root: Path, name: str) -> Path:
    return root / "cv/clips" / name


# {files that are damaged: (the command, how many damaged copies)}
WAYS: dict[str, tuple[Callable[[Path], object], int]] = {
    "cv/clips/a.mp3": (
        lambda root: whisper.main(clip_of(root, "a.mp3"), str(root / "whisper")),
        35,
    ),
    "cv/clips/b.flac": (
        lambda root: connector.main(clip_of(root, "b.flac"), str(root / "diva")),
        35,
    ),
    "cv/clips/c.ogg": (
        lambda root: demo.main(
            (str(clip_of(root, "c.ogg")),), str(root / "diva"), max_new_tokens=4
        ),
        35,
    ),
    "cv/clips/d.wav": (evaluated, 20),
    "cv/train.tsv": (
        lambda root: data.main(
            root / "cv", "train", str(root / "whisper"), str(root / "llama"), None, 2
        ),
        35,
    ),
    "train.parquet": (
        lambda root: data.main(
            root / "train.parquet", "train", str(root / "whisper"), str(root / "llama"), None, 2
        ),
        35,
    ),
    "list.jsonl": (
        lambda root: data.main(
            root / "list.jsonl", "train", str(root / "whisper"), str(root / "llama"), None, 2
        ),
        35,
    ),
    "tasks.json": (lambda root: evaluation.read_tasks([root / "tasks.json"]), 35),
    "said.jsonl": (evaluated, 20),
    "whisper/config.json": (
        lambda root: whisper.main(clip_of(root, "d.wav"), str(root / "whisper")),
        25,
    ),
    "whisper/model.safetensors": (lambda root: weights.main(str(root / "whisper"), 2), 30),
    "whisper/tokenizer.json": (
        lambda root: whisper.main(clip_of(root, "d.wav"), str(root / "whisper")),
        20,
    ),
    "llama/config.json": (lambda root: llama.main("one two", str(root / "llama"), None, 4), 25),
    "llama/model.safetensors": (
        lambda root: llama.main("one two", str(root / "llama"), None, 4),
        25,
    ),
    "llama/tokenizer.json": (lambda root: llama.main("one two", str(root / "llama"), None, 4), 20),
    "llama/tokenizer_config.json": (
        lambda root: llama.main("one two", str(root / "llama"), None, 4),
        25,
    ),
    "diva/config.json": (
        lambda root: connector.main(clip_of(root, "d.wav"), str(root / "diva")),
        25,
    ),
    "diva/model.safetensors": (lambda root: weights.main(str(root / "diva"), 2), 25),
}


def outcome(chapter: Callable[[Path], object], root: Path) -> int | str | None:
    """The exit code of a command, None for an answer."""
    try:
        cli.run(lambda: chapter(root))
    except SystemExit as end:
        return end.code
    return None


def damage(file: Path, kind: str, rng: np.random.Generator, others: list[Path]) -> None:
    content = file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[: rng.integers(len(content))])
    elif kind == "flipped":
        noisy = np.frombuffer(content, np.uint8).copy()
        for _ in range(rng.integers(1, 9)):
            noisy[rng.integers(len(noisy))] = rng.integers(256)
        file.write_bytes(noisy.tobytes())
    elif kind == "other":
        file.write_bytes(others[rng.integers(len(others))].read_bytes())
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.chmod(0)


@pytest.mark.parametrize("name", WAYS)
def test_a_damaged_file_is_read_rightly_or_refused_by_name(name, whole, tmp_path, capsys):
    """Cut, with bytes flipped, with another file's content, empty, a folder, without permission
    (which root does not need): for each command and each kind of file."""
    chapter, copies = WAYS[name]
    others = [whole / other for other in WAYS if other != name]
    rng = np.random.default_rng(sum(name.encode()))
    refused = 0
    with universe.compiled_fast():
        for number in range(copies):
            root = tmp_path / str(number)
            shutil.copytree(whole, root)
            kind = DAMAGES[number % len(DAMAGES)]
            damage(root / name, kind, rng, others)
            capsys.readouterr()
            began = time.process_time()
            code = outcome(chapter, root)
            took, said = time.process_time() - began, capsys.readouterr().err
            where = f"{name}, {kind}, {number}: {said[-400:]}"
            assert code in (None, 1) and "Traceback" not in said, where
            assert took < SECONDS, f"{took:.1f} s for {where}"
            if code == 1:
                refused += 1
                last = [line for line in said.splitlines() if line.startswith("error: ")]
                assert len(last) == 1 and said.rstrip().splitlines()[-1] == last[0], where
                folder = str((root / name).parent)
                assert folder in last[0] or Path(name).name in last[0], where
            shutil.rmtree(root)
    if name != "cv/clips/d.wav":  # to an evaluation, which counts such a clip as wrong and goes on
        assert refused >= copies // 6, "these were too little damaged to say anything"
    assert sum(count for _, count in WAYS.values()) >= 300
