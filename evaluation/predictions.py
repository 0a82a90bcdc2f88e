"""Predictions: predictions.jsonl, every answer as soon as it is known; and other systems' answers.

Reads: tasks.py, systems.py, runtime/files.py.   Read next: significance.py.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from evaluation.systems import SYSTEMS
from evaluation.tasks import Item
from runtime import files


class Predictions:
    """predictions.jsonl: one line for each answer of each system.

    A line's key is a digest of the model and of all that is asked: what was answered by other
    weights, to another prompt, about another transcript or to another sound is not taken for an
    answer. A clip that has been moved is still the same. Of several processes all but the first
    write to a file of their own, predictions.jsonl.1 and so on, until the first takes all together.
    """

    def __init__(self, file: Path, model: str, process: int = 0):
        self.file, self.model = file, model
        self.own = file.with_name(f"{file.name}.{process}") if process else file
        self.lines: dict[str, dict] = {}
        self.sounds: dict[str, str] = {}  # by clip: read once, since each has many keys
        self.stream: TextIO | None = None
        self.cut = False
        self.read()

    def parts(self) -> list[Path]:
        """The files of the other processes."""
        return sorted(self.file.parent.glob(f"{self.file.name}.[0-9]*"))

    def close(self) -> None:
        """What was told is written; what is told from now on opens the file again."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def read(self) -> None:
        """Take in what all processes have written."""
        for file in (self.file, *self.parts()):
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            if file == self.own:
                self.cut = bool(text) and not text.endswith("\n")  # a killed run's last line
            for row in text.split("\n"):
                try:
                    line = json.loads(row)
                    self.lines[line["key"]] = line
                    if "heard" in line and "transcript" not in line:  # as older files call it
                        line["transcript"] = line.pop("heard")
                except (ValueError, TypeError, KeyError):
                    continue  # the last line of a run that was killed, to be answered again

    def key(self, system: str, item: Item) -> str:
        example = item.example
        asked = [system, item.task, *dataclasses.astuple(item.ask), example.id, example.text]
        heard = [] if system == "text" else [self.sound(example.audio)]
        text = json.dumps(asked + heard)
        return f"{self.model}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def sound(self, clip: str) -> str:
        """A digest of a clip's content; of one that is missing, its name."""
        if clip not in self.sounds:
            try:
                with open(clip, "rb") as file:
                    self.sounds[clip] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                self.sounds[clip] = Path(clip).name
        return self.sounds[clip]

    def get(self, system: str, item: Item) -> dict | None:
        """The line of an answer, or None; of a clip that gave none, it says the reason."""
        return self.lines.get(self.key(system, item))

    def errors(self, items: list[Item]) -> dict[str, str]:
        """{clip: why diva has no answer to it}."""
        lines = (self.get("diva", item) or {} for item in items)
        pairs = zip(items, lines, strict=True)
        return {item.example.audio: line["error"] for item, line in pairs if "error" in line}

    def lacks(self, system: str, item: Item) -> bool:
        """What could not be answered is lacking too: the clip may be mended by now. A transcript
        that is unknown stays so."""
        line, unknown = self.get(system, item), system == "text" and not item.example.text
        return line is None or (line["answer"] is None and not unknown)

    def line(self, system: str, item: Item, said: dict[str, Any]) -> dict[str, Any]:
        """All that is written of an answer; `said` has "answer" and maybe "transcript" (Whisper's),
        "heard" (the text tokens nearest to the virtual tokens) and "error"."""
        example = item.example
        line = {"key": self.key(system, item), "system": system, "task": item.task}
        line |= {"id": example.id, "group": example.group, "audio": example.audio}
        line |= {"text": example.text, "prompt": item.ask.prompt}
        notes = ("answer", "transcript", "heard", "error")
        line |= {key: said[key] for key in notes if key in said}
        return line | {"references": list(example.answers)}

    def tell(self, system: str, item: Item, answer: str | None, note: dict[str, str]) -> None:
        """Add an answer and write it."""
        line = self.line(system, item, note | {"answer": answer})
        self.lines[line["key"]] = line
        if self.stream is None:
            self.stream = self.own.open("a", encoding="utf-8", newline="\n")
            self.stream.write("\n" if self.cut else "")
        self.stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.stream.flush()

    def finish(self, items: list[Item], scores: dict[tuple[str, int], dict[str, float]]) -> None:
        """Write the lines of these items anew, each with its scores, in order, into one file. Those
        of this model about other items stand behind them; those of other models go."""
        self.close()
        ours = {self.key(s, item): (s, i) for i, item in enumerate(items) for s in SYSTEMS}
        first = [
            self.line(system, items[i], self.lines[key]) | {"scores": scores[system, i]}
            for key, (system, i) in ours.items()
        ]
        rest = [
            line
            for key, line in self.lines.items()
            if key not in ours and key.startswith(self.model)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in first + rest)
        files.write_text(self.file, text)
        for part in self.parts():
            part.unlink()


def fingerprint(folder: Path) -> str:
    """A digest of a model's own files, and of the names of the models that it refers to."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def read_predictions(source: str, items: list[Item]) -> tuple[str, list[str | None]]:
    """Of NAME=FILE.jsonl the name and the answer to each item, None where there is none.

    Each line has "task", "id" and "answer" (a text, or null). A predictions.jsonl of ours is taken
    for what its diva said. Raises ValueError that names the line.
    """
    name, _, path = source.partition("=")
    file = Path(path)
    if not name or not path or name in SYSTEMS:
        raise ValueError(
            f"--predictions {source}: expected NAME=FILE.jsonl, with a name other than "
            f"{', '.join(SYSTEMS)}."
        )
    found: dict[tuple[str, str], str | None] = {}
    keys: dict[tuple[str, str], str] = {}  # of a file of ours
    for where, line in files.json_lines(file):
        place, answer = (line.get("task"), line.get("id")), line.get("answer")
        if line.get("system", "diva") != "diva":
            continue
        texts = all(isinstance(x, str) for x in place) and isinstance(answer, str | None)
        if not texts or "answer" not in line:
            raise ValueError(
                f'{where}: expected "task" and "id" (texts, as in predictions.jsonl) and "answer" '
                "(a text, or null if there was none). Correct the line."
            )
        if keys.get(place, line.get("key")) != line.get("key"):
            continue  # in a file of ours, what was answered to another prompt stands behind
        if place in found and place not in keys:
            raise ValueError(f"{where}: a second answer to {place}; expected one. Remove one.")
        if "key" in line:
            keys[place] = line["key"]
        found[place] = answer
    answers = [found.get((item.task, item.example.id)) for item in items]
    known = {(item.task, item.example.id) for item in items}
    if lacking := sum((item.task, item.example.id) not in found for item in items):
        print(f"{file}: no answer to {lacking} of {len(items)} items; they count as wrong")
    if extra := len(found.keys() - known):
        print(f"{file}: {extra} answers to what is not asked here are not counted")
    return name, answers
