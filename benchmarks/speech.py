"""An English speech corpus from nothing: `python -m benchmarks.speech` (about an hour).

What people ask and tell an assistant, put together from our own words.txt and sentences.txt, and
spoken by flite and espeak-ng: enough words to train a connector between a published Whisper and a
published LLM where no recorded corpus is at hand. Needs `apt-get install flite espeak-ng`.

A sentence is in one split only. Every word of dev and test is also in train, and so are their
voices: they ask whether new sentences of known words are heard. The same seed makes the same
sentences in the same voices.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import soundfile as sf
import tyro
from scipy.signal import resample_poly
from tqdm import tqdm

from formats.audio_files import SAMPLE_RATE

FOLDER = Path(__file__).parent
WORDS = (4, 14)  # of a sentence
SECONDS = 6.0  # at most, of a clip
HELD_OUT = {"dev": 300, "test": 300}  # clips
SPARE = 0.1  # how many more sentences than clips: some prove too long
CONSONANT_Y = "(?<=[^aeiou])y$"  # ladies, carried
FORMS = {"pl": 1, "capital": 1, "ed": 1, "ing": 2, "en": 3}  # where words.txt gives them
# Share of the clips. espeak-ng's are the hardest to hear.
VOICES = {
    "flite slt": 0.25,
    "flite rms": 0.25,
    "flite awb": 0.22,
    "flite kal16": 0.18,
    "espeak en-us+m3": 0.03,
    "espeak en-us+f2": 0.03,
    "espeak en-gb+m7": 0.02,
    "espeak en-gb+f4": 0.02,
}


@dataclasses.dataclass(frozen=True)
class Sentence:
    """What is said, and whether it is a question, a request or a statement."""

    text: str
    kind: str

    def words(self) -> list[str]:
        return re.findall(r"[a-z']+", self.text.lower())


# ---------------------------------------------------------------------------------------------
# Sentences


def sections(name: str) -> dict[str, str]:
    """{heading: what stands below it} of a file of ours; lines that begin with # are remarks."""
    text = re.sub(r"^#.*\n", "", (FOLDER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))


def topics() -> dict[str, list[list[str]]]:
    """{topic: its words, each with the forms that are given}"""
    items = {name: re.split(r",\s+", text) for name, text in sections("words.txt").items()}
    return {name: [" ".join(w.split()).split("/") for w in x] for name, x in items.items()}


def inflect(word: list[str], form: str) -> str:
    """A word's form: as words.txt gives it, else by rule; a participle is else like the past."""
    base, at = word[0], FORMS.get(form, 0)
    if form == "en" and len(word) <= at:
        at = FORMS["ed"]
    if not form or 0 < at < len(word):
        return word[at]
    if form == "ing":
        return base.removesuffix("e") + "ing"
    if form in ("ed", "en"):
        return re.sub(CONSONANT_Y, "i", base).removesuffix("e") + "ed"
    if form == "s" and " " in base:  # a verb with its particle: throws away
        verb, particle = base.split()
        return f"{inflect([verb], form)} {particle}"
    if re.search("(s|x|z|ch|sh)$", base):
        return base + "es"
    return re.sub(CONSONANT_Y, "ie", base) + "s"


def fill(template: str, words: dict[str, list[list[str]]], rng: random.Random) -> str:
    """The template with words in its slots, and `an` where it is said so."""
    chosen: dict[str, list[str]] = {}
    for slot in re.findall(r"{(\w+)", template):
        topic = slot.rstrip("0123456789")
        others = [word for other, word in chosen.items() if other.startswith(topic)]
        if slot not in chosen:
            chosen[slot] = rng.choice([word for word in words[topic] if word not in others])
    text = re.sub(r"{(\w+):?(\w*)}", lambda m: inflect(chosen[m[1]], m[2]), template)
    vowel = r"(?=(?!uni[fv]|use|uk|eu|one)[aeiou]|hour|honest)"
    text = re.sub(rf"\b(a) {vowel}", r"\1n ", text, flags=re.IGNORECASE)
    return text[0].upper() + text[1:]


def sentences(seed: int) -> Iterator[Sentence]:
    """Different sentences, without end; kinds and templates are equally likely."""
    rng, words, templates = random.Random(seed), topics(), sections("sentences.txt")
    frames, seen = templates.pop("frame").splitlines(), set()
    lines = [(kind, line) for kind, text in templates.items() for line in text.splitlines()]
    while True:
        kind, line = rng.choice(lines)
        if kind == "request":
            line = rng.choice(frames).replace("{}", line)
        said = Sentence(fill(line, words, rng), kind)
        key = tuple(said.words())
        if WORDS[0] <= len(key) <= WORDS[1] and key not in seen:
            seen.add(key)
            yield said


def split(said: list[Sentence]) -> dict[str, list[Sentence]]:
    """dev, test and train; no word is held out that train has not twice: one may be too long."""
    counts = collections.Counter(word for sentence in said for word in set(sentence.words()))
    splits, rest, train = {name: [] for name in HELD_OUT}, iter(said), []
    for name, clips in HELD_OUT.items():
        while len(splits[name]) < (1 + SPARE) * clips:
            sentence = next(rest, None)
            if sentence is None:
                raise ValueError("Too few sentences for every word to be in train; raise --clips.")
            words = set(sentence.words())
            if all(counts[word] > 2 for word in words):
                counts.subtract(words)
                splits[name].append(sentence)
            else:
                train.append(sentence)
    return {**splits, "train": train + list(rest)}


# ---------------------------------------------------------------------------------------------
# Speech


def speak(sentence: Sentence, voice: str, pace: float, file: Path) -> float:
    """Write the clip and return its seconds; a clip that is too long is not written."""
    program, name = voice.split()
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        if program == "flite":
            stretch = f"duration_stretch={1 / pace:.3f}"
            command = ["flite", "-voice", name, "--setf", stretch, "-t", sentence.text]
            command += ["-o", wav.name]
        else:
            speed = str(round(160 * pace))  # words a minute
            command = ["espeak-ng", "-v", name, "-s", speed, "-w", wav.name, sentence.text]
        subprocess.run(command, check=True)
        samples, rate = sf.read(wav.name, dtype="float32")
    samples = resample_poly(samples, SAMPLE_RATE, rate) if rate != SAMPLE_RATE else samples
    seconds = len(samples) / SAMPLE_RATE
    if seconds <= SECONDS:
        sf.write(file, samples, SAMPLE_RATE, subtype="PCM_16")
    return seconds


def record(
    said: list[Sentence], clips: int, out: Path, name: str, seed: int, workers: int
) -> float:
    """Speak sentences until `clips` are short enough; the hours of what was written."""
    rng, hours, rows = random.Random(f"{name} {seed}"), 0.0, []
    voices, shares = list(VOICES), list(VOICES.values())
    folder = out / "clips" / name
    folder.mkdir(parents=True, exist_ok=True)
    takes = [
        (s, rng.choices(voices, shares)[0], rng.uniform(0.9, 1.15), folder / f"{n:06}.flac")
        for n, s in enumerate(said)
    ]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool, tqdm(total=clips) as bar:
        while len(rows) < clips:
            now, takes = takes[: clips - len(rows)], takes[clips - len(rows) :]
            if not now:
                raise ValueError(
                    f"{name}: too few sentences last {SECONDS} s at most; raise SPARE."
                )
            lengths = pool.map(speak, *zip(*now, strict=True), chunksize=4)
            for (sentence, voice, _, file), seconds in zip(now, lengths, strict=True):
                if seconds > SECONDS:
                    continue
                hours += seconds / 3600
                row = {"audio": str(file.relative_to(out)), "text": sentence.text}
                rows.append(json.dumps({**row, "voice": voice, "kind": sentence.kind}) + "\n")
                bar.update()
    (out / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return hours


def main(
    out: tyro.conf.Positional[Path], clips: int = 20_000, seed: int = 0, workers: int = 2
) -> None:
    """Write train.jsonl, dev.jsonl, test.jsonl and their clips to the folder `out`.

    Args:
        clips: to train on; dev and test have 300 each.
    """
    spoken = round((1 + SPARE) * (clips + sum(HELD_OUT.values())))
    for name, said in split(list(itertools.islice(sentences(seed), spoken))).items():
        hours = record(said, HELD_OUT.get(name, clips), out, name, seed, workers)
        print(f"{name}: {hours:.2f} hours")


if __name__ == "__main__":
    tyro.cli(main)
