"""The toy universe: what is held out is held out, the files are in the published layouts, and the
shipped models do what README says of them."""

import csv
import json
import random
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import eval as evaluation
import generate
import llama
from evaluation import metrics, systems
from formats import audio_files

TOY = Path(__file__).parents[1] / "toy"
CORPUS = TOY / "common_voice" / "en"
SPLITS = ("train", "dev", "test")
sys.path.insert(0, str(TOY))

import make  # noqa: E402
import world  # noqa: E402


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    """The lines of each split's TSV."""
    found = {}
    for split in SPLITS:
        with (CORPUS / f"{split}.tsv").open(encoding="utf-8", newline="") as lines:
            found[split] = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return found


@pytest.mark.parametrize("column", ["sentence", "client_id", "path"])
def test_no_sentence_and_no_voice_is_in_two_splits(rows, column):
    """Nothing that is tested was ever heard in training, neither the words nor the voice."""
    values = {split: {row[column] for row in rows[split]} for split in SPLITS}
    assert all(values.values())
    assert not values["train"] & values["dev"]
    assert not values["train"] & values["test"]
    assert not values["dev"] & values["test"]


def test_the_clips_are_those_that_the_recipe_would_make(rows):
    """Sizes, sentences and speakers of every split are those of make.py and world.py."""
    planned = make.split_sentences()
    for split in SPLITS:
        assert len(rows[split]) == make.CLIPS[split]
        assert {row["client_id"] for row in rows[split]} == set(make.SPEAKERS[split])
        known = {sentence.text for sentence in planned[split]}
        strange = [row["sentence"] for row in rows[split] if row["sentence"] not in known]
        share = make.RANDOM_SHARE if split == "train" else 0
        assert abs(len(strange) / len(rows[split]) - share) < 0.02
        assert {word for text in strange for word in text.split()} <= set(world.spoken_words())


def test_whisper_never_hears_a_speaker_of_the_other_splits():
    """The voices that Whisper alone hears are none of those that dev and test are spoken in."""
    heard = {voice.lower() for voice in make.SPEAKERS["train"] + make.MORE_SPEAKERS}
    assert not heard & {voice.lower() for s in ("dev", "test") for voice in make.SPEAKERS[s]}


def test_every_accent_is_spoken_about_equally_often(rows):
    """At least eight accents, in each split within a tenth of an equal share."""
    for split in SPLITS:
        counts = Counter(row["accents"] for row in rows[split])
        assert set(counts) == set(make.ACCENTS) and len(counts) >= 8
        assert max(counts.values()) <= 1.1 * len(rows[split]) / len(counts)


def test_every_clip_is_sixteen_kilohertz_mono_and_fits_the_window(rows):
    """Headers of all clips; none is longer than the encoder's window."""
    window = json.loads((TOY / "whisper/config.json").read_text())["max_source_positions"] / 50
    for split in SPLITS:
        for row in rows[split]:
            info = soundfile.info(CORPUS / "clips" / row["path"])
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "OPUS")
            assert 0.3 < info.duration <= window


@pytest.mark.parametrize("split", ["dev", "test"])
def test_tasks_ask_of_each_clip_what_its_sentence_is_for(rows, split):
    """Each clip once in the task of its sentence, with the reference of world.py; a random quarter
    of them is also to be repeated."""
    references = {s.text: (s.task, s.answer) for s in world.sentences()}
    of_clip = {str(CORPUS / "clips" / row["path"]): row for row in rows[split]}
    seen = Counter()
    for name, task in evaluation.read_tasks([TOY / "tasks"], split).items():
        for example in task.examples:
            row = of_clip[example.audio]
            assert example.text == row["sentence"]
            if name == "repeat":
                assert example.answers == (example.text,)
                continue
            assert (name, *example.answers) == references[example.text]
            assert example.group == (row["accents"] if name == "spoken_qa" else "")
            seen[example.audio] += 1
    assert seen == Counter(of_clip.keys())
    repeated = [e.audio for e in evaluation.read_tasks([TOY / "tasks"], split)["repeat"].examples]
    assert len({*repeated}) == len(repeated) == -(-len(of_clip) // 4)
    assert len({of_clip[clip]["accents"] for clip in repeated}) == len(make.ACCENTS)


def test_every_reply_is_a_sentence_about_what_was_said():
    """Of four to nine words, and no two utterances have the same."""
    everything = world.sentences()
    replies = {world.reply(sentence, None) for sentence in everything}
    assert len(replies) == len(everything)
    assert {len(reply.split()) for reply in replies} == {*range(4, 10)}


def test_the_tasks_use_the_papers_instructions_alone():
    """None of the further ones that the LLM was trained to follow."""
    listed = world.MORE_PROMPTS.values()
    tasks = evaluation.read_tasks([TOY / "tasks"], "dev").values()
    asked = {task.ask(example).prompt for task in tasks for example in task.examples}
    assert asked == {*world.PROMPTS.values()} and not asked & {*listed}


def test_the_universe_is_small():
    """All of it, as it lies in the repository: at most 25 MB."""
    written = {"charts", "cases.tsv", "predictions.jsonl", "report.html"}  # by an evaluation
    files = [f for f in TOY.rglob("*") if f.is_file() and not written & {f.name, f.parent.name}]
    assert 15e6 < sum(file.stat().st_size for file in files) <= 25e6


# ---------------------------------------------------------------------------------------------
# The shipped models


def test_the_shipped_llama_knows_its_universe():
    """At least 98 % of the dev split's questions, sentences, emotions and repetitions in text."""
    tasks = evaluation.read_tasks([TOY / "tasks"], "dev").values()
    chat, llm = llama.Chat.load(TOY / "llama"), llama.Llama.load(TOY / "llama")
    wanted = {(t.ask(e), e.text): e.answers[0] for t in tasks for e in t.examples}
    responder = systems.Responder(llm, chat, {ask for ask, _ in wanted}, 64)
    said = {pair: text for batch in responder.texts([*wanted]) for pair, text in batch.items()}
    right = [said[pair].lower() == answer.lower() for pair, answer in wanted.items()]
    assert np.mean(right) >= 0.98


def test_the_shipped_llama_replies_in_sentences_and_follows_instructions():
    """At least 98 % of the dev split's sentences and of random words, without and with each."""
    rng = random.Random(1)
    said = make.split_sentences()["dev"] + [world.random_words(rng) for _ in range(40)]
    chat, llm = llama.Chat.load(TOY / "llama"), llama.Llama.load(TOY / "llama")
    prompts = {None: None} | world.MORE_PROMPTS
    asks = {name: systems.Ask(prompt, max_new_tokens=16) for name, prompt in prompts.items()}
    wanted = {(asks[n], s.text): world.reply(s, n) for s in said for n in asks}
    responder = systems.Responder(llm, chat, {*asks.values()}, 64)
    answers = {pair: text for batch in responder.texts([*wanted]) for pair, text in batch.items()}
    for ask in asks.values():
        right = [answers[pair] == reply for pair, reply in wanted.items() if pair[0] == ask]
        assert np.mean(right) >= 0.98 and len(right) > 100, ask.prompt


def test_the_shipped_whisper_transcribes(rows):
    """At most 5 % word errors on 128 dev clips, in voices that it has never heard."""
    asr = generate.Transcriber.load(TOY / "whisper")
    some = rows["dev"][:128]
    clips = [audio_files.load(CORPUS / "clips" / row["path"]) for row in some]
    heard = asr(jnp.asarray(audio_files.pad(clips, asr.model.config.window_samples)))
    errors = sum(metrics.edits(h, r["sentence"]) for h, r in zip(heard, some, strict=True))
    assert errors / sum(len(row["sentence"].split()) for row in some) <= 0.05


def test_the_shipped_student_understands_speech(tmp_path):
    """From speech, on the dev split: questions and emotions far above the untrained connector."""
    config = json.loads((TOY / "diva/config.json").read_text())
    for key in ("reference_encoder", "reference_decoder"):
        config[key] = str((TOY / "diva" / config[key]).resolve())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(TOY / "diva/model.safetensors")
    asked = {"split": "dev", "limit": 64, "out": tmp_path}
    found = evaluation.evaluate(tmp_path, [TOY / "tasks"], **asked)["tasks"]
    questions = found["spoken_qa"]["metrics"]["exact_match"]
    assert questions["diva"]["score"] >= 75 and questions["untrained"]["score"] < 15
    assert found["emotion"]["metrics"]["accuracy"]["diva"]["score"] >= 90
    translations = found["translation"]["metrics"]["exact_match"]
    assert translations["diva"]["score"] >= 0.6 * translations["text"]["score"]
