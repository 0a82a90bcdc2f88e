"""eval.py: the metrics are what they say, the intervals hold, and no item is scored for another.

One tiny universe of random models in the published layouts. The oracle answers one clip at a time
with whole passes, no cache and no batch, so that the harness is compared with something else than
itself. Axes: N items, Y systems, C columns of a metric, R resamples.
"""

import dataclasses
import functools
import itertools
import json
import shutil
import unicodedata
from pathlib import Path

import checks
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU
from tokenizers import Tokenizer, models, pre_tokenizers

import connector
import data
import eval as evaluation
import llama
import weights
import whisper

WINDOW, ROOM = 8000, 48
WHISPER = whisper.WhisperConfig(
    d_model=16,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=20,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=20,
    num_mel_bins=8,
    max_source_positions=25,
    max_target_positions=7,
    vocab_size=29,
    decoder_start_token_id=1,
    eos_token_id=4,
)
LLAMA = llama.LlamaConfig(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=29,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    eos_token_id=[4, 2],
)
SPECIAL = ["<unk>", "<|bos|>", "<|start|>", "<|end|>", "<|eot|>"]
WORDS = (
    "one two three four five six red green blue dog cat sun moon say what is the colour of it good"
)
VOCABULARY = [*SPECIAL, "user", "assistant", "system", *WORDS.split()]
TEMPLATE = (
    "<|bos|>{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
TASKS = {
    "spoken_qa": {"system": "say what it is", "max_new_tokens": 6},
    "translation": {"system": None, "max_new_tokens": 9},
    "emotion": {"system": "what colour is the moon", "labels": ["red", "green", "blue", "sun"]},
    "repeat": {"system": "say it", "max_new_tokens": 6},
}
QUESTIONS = {"what is the colour of the sun": "red", "what is one": "two", "is it good": "dog"}


def write_model(folder: Path, model, prefix: str) -> None:
    weights.save(model, folder, prefix=prefix)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = {"chat_template": TEMPLATE, "bos_token": "<|bos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(chat))


def write_tasks(folder: Path, rows: list[dict], split: str = "test", tasks=TASKS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks.json").write_text(json.dumps(tasks))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines)
    return folder


def rows_of_the_universe() -> list[dict]:
    """Six questions in two accents and one unknown one, four translations, four emotions."""
    rows = [
        {"text": text, "task": "spoken_qa", "answer": reply, "accent": accent}
        for text, reply in QUESTIONS.items()
        for accent in ("Scottish English", "England English")
    ]
    texts = ("the dog is red", "the cat is blue", "the sun is it", "good moon")
    rows += [{"text": t, "task": "translation", "answer": "one two three four"} for t in texts]
    texts = ("good dog", "what cat is it", "the moon is green", "sun")
    answers = ("red", "Green", "blue", "red")
    rows += [
        {"text": t, "task": "emotion", "answer": a} for t, a in zip(texts, answers, strict=True)
    ]
    return [{"audio": f"{n}.wav"} | row for n, row in enumerate(rows)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """whisper/, llama/, diva/ and tasks/ in the published layouts."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)  # compile fast, run slowly
    root = tmp_path_factory.mktemp("universe")
    template = weights.abstract(whisper.Whisper.init, WHISPER, jax.random.key(0))
    asr = checks.random_weights(template, 11, 1.0)
    template = weights.abstract(llama.Llama.init, LLAMA, jax.random.key(0))
    llm = checks.random_weights(template, 1, 0.7)
    write_model(root / "whisper", asr, "model.")
    write_model(root / "llama", llm, "")
    diva = connector.DiVA.create(asr, llm, None, jax.random.key(1))
    trained = checks.random_weights(diva.connector, 2, 0.4)
    diva = eqx.tree_at(lambda d: d.connector, diva, trained)
    diva.save(root / "diva", str(root / "whisper"), str(root / "llama"))
    rows = rows_of_the_universe()
    write_tasks(root / "tasks", rows)
    rng = np.random.default_rng(4)
    for row in rows:
        length = int(rng.integers(4000, WINDOW))
        tone = np.sin(np.arange(length) * rng.uniform(0.05, 1.5)) * rng.uniform(0.1, 0.5)
        soundfile.write(root / "tasks" / row["audio"], tone, 16000)
    yield root
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def parts(root) -> evaluation.Models:
    return evaluation.Models.load(root / "diva")


@pytest.fixture(scope="module")
def tasks(root) -> dict[str, evaluation.Task]:
    return evaluation.read_tasks(root / "tasks")


@pytest.fixture(scope="module")
def items(root, tasks) -> list[evaluation.Item]:
    return evaluation.read_items(root / "tasks", "test", tasks)


@jax.jit
def next_logits(llm, embeds, length):
    return llm.logits(llm(embeds)[0, length - 1])


class Oracle:
    """The answer to one prompt: the whole sequence again for every token, no cache, no batch."""

    def __init__(self, parts: evaluation.Models, tasks: dict[str, evaluation.Task]):
        self.llm, self.chat, self.tasks = parts.diva.llm, parts.chat, tasks
        self.diva, self.asr, self.connectors = parts.diva, parts.asr, parts.connectors
        self.table = np.asarray(self.llm.model.embed_tokens.weight)

    def answer(self, task: str, user: np.ndarray) -> str:
        """`user` holds the embeddings of what the user says."""
        prefix, suffix = self.chat.wrap(self.tasks[task].system)
        rows = [*self.table[prefix], *user, *self.table[suffix]]
        if labels := self.tasks[task].labels:
            logits = self.logits(rows)
            return max(labels, key=lambda label: logits[VOCABULARY.index(label)])
        words = []
        for _ in range(self.tasks[task].max_new_tokens):
            token = int(self.logits(rows).argmax())
            if token in LLAMA.eos_token_id:
                break
            words.append(VOCABULARY[token])
            rows.append(self.table[token])
        return " ".join(word for word in words if word not in SPECIAL)

    def logits(self, rows: list[np.ndarray]) -> np.ndarray:
        padded = np.zeros((1, ROOM, len(rows[0])), np.float32)
        padded[0, : len(rows)] = rows
        return np.asarray(next_logits(self.llm, jnp.asarray(padded), len(rows)))

    def text(self, task: str, text: str) -> str:
        return self.answer(task, self.table[[VOCABULARY.index(word) for word in text.split()]])

    def audio(self, clip: str) -> jnp.ndarray:
        return jnp.asarray(data.pad([data.load_audio(clip)], WINDOW))

    def hears(self, system: str, clip: str) -> np.ndarray:
        diva = eqx.tree_at(lambda d: d.connector, self.diva, self.connectors[system])
        return np.asarray(hear(diva, self.audio(clip))[0])

    def all(self, item: evaluation.Item) -> dict[str, str]:
        """{system: answer}"""
        said = {
            system: self.answer(item.task, self.hears(system, item.audio))
            for system in ("untrained", "diva")
        }
        said["cascade"] = self.text(item.task, self.asr(self.audio(item.audio))[0])
        return said | {"text": self.text(item.task, item.text)}


hear = jax.jit(connector.DiVA.virtual_tokens)


@pytest.fixture(scope="module")
def oracle(parts, tasks) -> Oracle:
    return Oracle(parts, tasks)


@pytest.fixture(scope="module")
def expected(oracle, items) -> list[dict[str, str]]:
    """What the oracle says for every item, in every system."""
    return [oracle.all(item) for item in items]


def item_of(text="what is it", task="spoken_qa", answer="red", accent="") -> evaluation.Item:
    return evaluation.Item("a.wav", text, task, answer, accent)


# ----------------------------------------------------------------------------------- single answers


@pytest.mark.parametrize(
    "text, plain",
    [
        ("  Paris,\n is THE capital!  ", "paris is the capital"),
        ("It's 3.5 -- really?", "its 35 really"),
        ("GRÖSSE", "grösse"),
        (unicodedata.normalize("NFD", "größe"), unicodedata.normalize("NFC", "größe")),
        ("你好。", "你好"),
        ("...", ""),
    ],
)
def test_case_punctuation_space_and_unicode_form_do_not_count(text, plain):
    assert evaluation.normalise(text) == plain


@functools.cache
def slow_edits(a: tuple, b: tuple, substitution: int) -> int:
    """The definition, tried in every way."""
    if not a or not b:
        return len(a) + len(b)
    change = slow_edits(a[1:], b[1:], substitution) + substitution * (a[0] != b[0])
    return min(
        change, slow_edits(a[1:], b, substitution) + 1, slow_edits(a, b[1:], substitution) + 1
    )


@pytest.mark.parametrize("substitution", [1, 2])
def test_edits_are_the_cheapest_of_all_ways(substitution):
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (tuple(rng.choice(["x", "y", "z"], rng.integers(0, 7))) for _ in range(2))
        found = evaluation.edits(" ".join(a), " ".join(b), substitution)
        assert found == slow_edits(a, b, substitution), (a, b)


def test_edits_count_words_and_not_letters():
    assert evaluation.edits("the cat sat", "a cat sat down") == 2
    assert evaluation.edits("The cat, sat.", "the cat sat") == 0
    assert evaluation.edits("", "three new words") == 3


def test_the_word_error_rate_counts_errors_and_words_of_the_reference():
    item = item_of(answer="The dog is red.")
    assert evaluation.word_errors("the cat is red now", item) == (2, 4)
    assert evaluation.word_errors("the dog is red", item) == (0, 4)
    assert evaluation.word_errors(None, item) == evaluation.word_errors("", item) == (4, 4)


def test_an_answer_is_correct_if_it_matches_after_normalisation():
    assert evaluation.correct("Red!", item_of(answer="red")) == (1, 1)
    assert evaluation.correct("dark red", item_of(answer="red")) == (0, 1)
    assert evaluation.correct("", item_of(answer="red")) == (0, 1)
    assert evaluation.correct("...", item_of(answer="")) == (1, 1)


@pytest.mark.parametrize("reference", ["red", ""])
def test_a_clip_that_was_not_decoded_is_wrong_even_where_the_reference_is_empty(reference):
    assert evaluation.correct(None, item_of(answer=reference)) == (0, 1)


@pytest.mark.parametrize(
    "answer, ignored",
    [
        ("What is the capital of France?", 1),  # the question again
        ("you ask what is the capital of france", 1),  # with an introduction
        ("what is capital of france", 1),  # five of six words
        ("the capital of France is Paris", 0),  # shares much, but answers
        ("what is the capital of france it is paris", 0),  # repeats, but answers too
        ("what is the capital of france it is parisian", 1),  # a word that begins like the answer
        ("Paris", 0),
        ("London", 0),  # wrong, but an attempt
        ("france of capital the is what", 0),  # the words in another order are not the question
        ("what is the name of germany", 0),  # another question of the same form: four of six words
        ("", 0),
        (None, 0),
    ],
)
def test_ignoring_the_prompt_is_to_repeat_the_question_without_the_answer(answer, ignored):
    item = item_of(text="What is the capital of France", answer="Paris")
    assert evaluation.ignores_prompt(answer, item) == (ignored, 1)


# --------------------------------------------------------------------------------------------- bleu

SENTENCES = st.lists(st.sampled_from(["a", "b", "c", "d.", "ü"]), max_size=9).map(" ".join)
CORPORA = st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=5)


def bleu_sums(corpus) -> np.ndarray:
    counts = [evaluation.bleu_counts(said, item_of(answer=wanted)) for said, wanted in corpus]
    return np.array(counts).sum(0)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(CORPORA)
def test_bleu_from_sums_is_sacrebleus_corpus_score(corpus):
    """With any number of matches in each order. float64 logarithms of both sides: 1e-9."""
    said, wanted = zip(*corpus, strict=True)
    published = BLEU().corpus_score(list(said), [list(wanted)]).score
    found = float(evaluation.bleu(bleu_sums(corpus)))
    assert found == pytest.approx(published, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("matching", range(5))
def test_bleu_is_smoothed_like_sacrebleu_where_the_longer_matches_are_none(matching):
    """Answers that share runs of 0, 1, 2, 3 and 4 words with the reference; 0 matches score 0."""
    words = "a b c d".split()
    said = " ".join([*words[:matching], "x", "y", "z", "u", "v"])
    corpus = [(said, "a b c d e f g")]
    published = BLEU().corpus_score([said], [["a b c d e f g"]])
    assert published.counts == [max(0, matching - n) for n in range(4)]
    found = float(evaluation.bleu(bleu_sums(corpus)))
    assert found == pytest.approx(published.score, rel=1e-9)
    assert (found == 0) == (matching == 0)


def test_many_corpora_at_once_score_as_each_alone():
    corpora = [[("a b c d e", "a b c d f")], [("", "a")], [("a b", "a b")], [("x", "y z")]]
    corpora += [[("x b c y z", "a b c d e f")], [("x b c d y", "a b c d e f")]]
    sums = np.stack([bleu_sums(corpus) for corpus in corpora])
    together = evaluation.bleu(sums[:, None])
    assert together.shape == (6, 1)
    np.testing.assert_array_equal(together[:, 0], [evaluation.bleu(row) for row in sums])
    assert together[0, 0] > 50


def test_no_answer_is_an_empty_one_for_bleu():
    item = item_of(answer="a b c d e")
    assert evaluation.bleu_counts(None, item) == evaluation.bleu_counts("", item)
    assert evaluation.bleu_counts(None, item)[-2:] == (0, 5)


# --------------------------------------------------------------------------------------- statistics


def four(diva, other=None) -> np.ndarray:
    """[N, Y, 2] columns of a metric that is a share, from 0/1 of diva and of the other systems."""
    other = diva if other is None else other
    right = np.stack([diva if y == "diva" else other for y in evaluation.SYSTEMS], 1)
    return np.stack([right, np.ones_like(right)], -1).astype(float)


def test_rates_are_pooled_over_clips_and_not_averaged():
    """2 errors in 2 words and 0 in 8 are 20 %, not the mean of 100 % and 0 %."""
    tasks = {"repeat": evaluation.Task("say it")}
    items = [item_of(text=t, task="repeat", answer=t) for t in ("a b", "c d e f g h i j")]
    answers = {system: ["x y", "c d e f g h i j"] for system in evaluation.SYSTEMS}
    report = evaluation.score(tasks, items, answers)["repeat_wer"]
    assert report["text"]["score"] == pytest.approx(0.2) and report["text"]["n"] == 2


def test_the_bootstrap_draws_whole_sentences(monkeypatch):
    """Each resample holds as many sentences as there are, each with all of its clips.

    Drawn with equal chances: a sentence comes once on average, with variance 1 - 1/K. Of 4,000
    resamples the mean is off by 1/63 and the variance by about 1.7/63: four times that is 0.11.
    """
    monkeypatch.setattr(evaluation, "RESAMPLES", 4000)
    sizes = np.array([3, 1, 4, 2])
    clusters = np.repeat(["b", "d", "a", "c"], sizes)
    order = np.random.default_rng(0).permutation(sizes.sum())
    membership = np.eye(4)[np.repeat(range(4), sizes)]  # [N, C]: one column for each sentence
    drawn = evaluation.resample(membership[order][:, None], list(clusters[order]))
    assert drawn.shape == (4000, 1, 4)
    times = drawn[:, 0] / sizes
    np.testing.assert_array_equal(times, times.round())
    np.testing.assert_array_equal(times.sum(1), 4)
    np.testing.assert_allclose(times.mean(0), 1, atol=0.11)
    np.testing.assert_allclose(times.var(0), 1 - 1 / 4, atol=0.11)


def test_the_bootstrap_is_paired_and_the_same_every_time():
    """All systems get the same draws, every call gives the same numbers."""
    rng = np.random.default_rng(0)
    columns, clusters = rng.normal(size=(30, 1, 2)), list(map(str, rng.integers(0, 12, 30)))
    drawn = evaluation.resample(np.repeat(columns, 4, axis=1), clusters)
    np.testing.assert_array_equal(drawn, np.repeat(drawn[:, :1], 4, axis=1))
    np.testing.assert_array_equal(
        drawn, evaluation.resample(np.repeat(columns, 4, axis=1), clusters)
    )
    assert len(np.unique(drawn[:, 0, 0])) > 9000, "the resamples are one resample"


def test_intervals_and_p_are_those_of_a_slow_bootstrap():
    """Written out with lists of clips: draw sentences, pool their clips, score, sort.

    4,000 slow resamples: the share beyond an end of the interval is off by at most
    4 * sqrt(0.025 / 4000) = 1 %, and p, twice a share, by 2 * 4 * sqrt(0.25 / 4000) = 6.4 %.
    """
    rng = np.random.default_rng(0)
    clusters = [f"sentence {i}" for i in rng.integers(0, 15, 40)]
    words = rng.integers(3, 9, 40).astype(float)
    errors = rng.binomial(words[:, None].astype(int), [0.5, 0.35, 0.4, 0.3]).astype(float)
    columns = np.stack([errors, np.repeat(words[:, None], 4, 1)], -1)
    entries = evaluation.compare(columns, clusters, evaluation.ratio)
    names = sorted(set(clusters))
    members = {name: [n for n, c in enumerate(clusters) if c == name] for name in names}
    slow = []
    for _ in range(4000):
        clips = [n for i in rng.integers(0, len(names), len(names)) for n in members[names[i]]]
        slow.append(errors[clips].sum(0) / words[clips].sum())
    slow = np.array(slow)
    for y, system in enumerate(evaluation.SYSTEMS):
        entry = entries[system]
        assert entry["score"] == pytest.approx(errors[:, y].sum() / words.sum())
        assert entry["n"] == 40
        assert (slow[:, y] < entry["low"]).mean() == pytest.approx(0.025, abs=0.01)
        assert (slow[:, y] > entry["high"]).mean() == pytest.approx(0.025, abs=0.01)
        if system != "diva":
            gain = slow[:, 1] - slow[:, y]
            share = min((gain <= 0).mean(), (gain >= 0).mean())
            assert entry["p"] == pytest.approx(min(1, 2 * share), abs=0.064)
    assert "p" not in entries["diva"]


def test_intervals_hold_the_truth_and_p_is_small_by_chance_as_often_as_they_say(monkeypatch):
    """Of sentences spoken by three people each, where all clips of a hard sentence suffer.

    The four systems of a group share half of their noise. Counted as two of their own, 800
    intervals are off by at most 4 * sqrt(0.0475 / 800) = 3.1 %; counted as one, 400 p values by
    4 * sqrt(0.0475 / 400) = 4.4 %. A bootstrap of 50 sentences is 1 % too narrow besides. Drawing
    clips would give 75 %, an interval from 5 to 95 % gives 89 %.
    """
    monkeypatch.setattr(evaluation, "RESAMPLES", 800)
    rng = np.random.default_rng(1)
    sentences = np.repeat(np.arange(50), 3)
    clusters = list(map(str, sentences))
    held, false = [], []
    for _ in range(400):
        hard = rng.normal(size=(50, 1))[sentences] + rng.normal(size=(50, 4))[sentences]
        values = 0.3 + hard + 0.5 * rng.normal(size=(150, 4))
        columns = np.stack([values, np.ones_like(values)], -1)
        entries = evaluation.compare(columns, clusters, evaluation.ratio)
        held += [entry["low"] <= 0.3 <= entry["high"] for entry in entries.values()]
        false += [entry["p"] < 0.05 for name, entry in entries.items() if name != "diva"]
    assert np.mean(held) == pytest.approx(0.94, abs=0.031)
    assert np.mean(false) == pytest.approx(0.06, abs=0.044)


@pytest.mark.parametrize("gain", [1, -1])
def test_a_small_difference_that_always_points_one_way_is_significant(gain):
    """6 of 60 sentences: invisible beside the spread of a score of one half, clear in pairs.

    p is 2 * 0.9^60 = 0.36 % (no such sentence is drawn); unpaired it would be about 27 %.
    """
    diva = np.tile([0, 1], 30)
    other = diva.copy()
    flipped = np.flatnonzero(diva == (gain > 0))[:6]
    other[flipped] = 1 - other[flipped]
    entries = evaluation.compare(four(diva, other), list(map(str, range(60))), evaluation.ratio)
    assert entries["diva"]["score"] - entries["text"]["score"] == pytest.approx(gain * 0.1)
    assert 1e-4 < entries["text"]["p"] < 0.01


def test_equal_systems_do_not_differ():
    """The same answers: p is 1. As many better as worse: p is large."""
    diva, clusters = np.tile([0, 1], 30), list(map(str, range(60)))
    same = evaluation.compare(four(diva), clusters, evaluation.ratio)
    assert {same[y]["p"] for y in ("untrained", "cascade", "text")} == {1.0}
    mixed = evaluation.compare(four(diva, np.roll(diva, 1)), clusters, evaluation.ratio)
    assert mixed["text"]["p"] > 0.5


# ------------------------------------------------------------------------------------------- labels


def test_the_first_label_is_scored_like_any_other():
    """Filtering by `if label` has dropped class 0 elsewhere: here it counts, right and wrong."""
    tasks = {"emotion": evaluation.Task("what is it", ("red", "green", "blue"))}
    items = [item_of(task="emotion", answer=a) for a in ("red", "red", "Red", "green")]
    answers = {system: ["red", "green", "red", "red"] for system in evaluation.SYSTEMS}
    entry = evaluation.score(tasks, items, answers)["emotion"]["diva"]
    assert entry["n"] == 4 and entry["score"] == 0.5
    assert entry["predicted"] == {"red": 3, "green": 1, "blue": 0}


@pytest.mark.parametrize(
    "labels, message",
    [
        (("red sun", "blue", "red moon"), r"label 'red moon' begins with .* 'red sun'; expected"),
        (("red", "  "), "label '  ' begins with .* nothing; expected"),
        (("lilac", "mauve"), "label 'mauve' begins with .* 'lilac'"),  # both unknown words
    ],
)
def test_labels_that_begin_with_the_same_token_are_refused(parts, labels, message):
    with pytest.raises(ValueError, match=f"tasks.json: emotion: {message}"):
        evaluation.first_tokens(parts.chat, "emotion", labels)


def test_the_labels_of_the_toy_are_told_apart_by_its_tokenizer():
    """By the token that the label itself begins with."""
    toy = Path(__file__).parents[1] / "toy"
    chat, labels = (
        llama.Chat.load(toy / "llama"),
        evaluation.read_tasks(toy / "tasks")["emotion"].labels,
    )
    found = evaluation.first_tokens(chat, "emotion", labels)
    assert len(set(found)) == len(labels) == 7
    for token, label in zip(found, labels, strict=True):
        start = chat.decode([token]).strip()
        assert start and label.lower().startswith(start.lower()), (start, label)


def test_the_answer_is_the_likeliest_label_wherever_it_stands(parts, oracle):
    """By the LLM's own logits, for tasks with different labels in one batch; each label can win."""
    labels = {
        "emotion": ("sun", "moon", "good"),
        "spoken_qa": ("five", "colour", "six", "it", "dog"),
    }
    tasks = {name: evaluation.Task("what is it", some) for name, some in labels.items()}
    responder = evaluation.Responder(parts.diva.llm, parts.chat, tasks, 8)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), rng.integers(1, 6))) for _ in range(40)]
    asked = [(name, text) for text in texts for name in labels]
    said = responder.texts(asked, lambda _: None)
    alone = Oracle(parts, tasks)
    assert said == {(name, text): alone.text(name, text) for name, text in asked}
    for name, some in labels.items():
        chosen = {reply for (task, _), reply in said.items() if task == name}
        assert chosen == set(some), "some label never wins: a mistake about it would not show"


# ------------------------------------------------------------------------------------------ answers


def test_every_system_answers_as_one_clip_alone_with_whole_passes(
    parts, tasks, items, expected, monkeypatch
):
    """Batches of mixed prompts and lengths, filled up at the end, change no answer.

    Each clip is decoded once, though some are also to be repeated. The oracle's answers differ
    between clips and between systems and end in both ways, else this would prove little.
    """
    decoded, load = [], data.load_audio
    monkeypatch.setattr(data, "load_audio", lambda clip: decoded.append(clip) or load(clip))
    answers, failed = evaluation.answer(parts, tasks, items, batch_size=4)
    assert failed == {}
    assert sorted(decoded) == sorted({item.audio for item in items}) and len(decoded) < len(items)
    for system in evaluation.SYSTEMS:
        wanted = [said[system] for said in expected]
        assert answers[system] == wanted, system
        assert len(set(wanted)) > len(wanted) / 3, f"{system} says the same to everything"
    for a, b in itertools.combinations(evaluation.SYSTEMS, 2):
        assert [said[a] for said in expected] != [said[b] for said in expected], (a, b)
    room = [
        tasks[item.task].max_new_tokens - len(said["diva"].split())
        for item, said in zip(items, expected, strict=True)
        if item.task != "emotion"
    ]
    assert min(room) == 0 < max(room), "all answers end by a stop token, or all by their length"


@pytest.mark.parametrize("size", [1, 3])
def test_a_text_is_answered_alone_as_beside_longer_ones(parts, tasks, oracle, size):
    """Whatever the size of the batches, and none is left out."""
    asked = [
        ("spoken_qa", "sun"),
        ("translation", ""),
        ("emotion", "it"),
        ("spoken_qa", "what is the colour of the dog of the cat of the sun of the moon"),
        ("repeat", "one two three four five six"),
        ("emotion", "the colour of it is red"),
        ("translation", "good"),
    ]
    counted = []
    responder = evaluation.Responder(parts.diva.llm, parts.chat, tasks, size)
    said = responder.texts(asked, counted.append)
    assert said == {pair: oracle.text(*pair) for pair in asked}
    assert sum(counted) == len(asked)


@pytest.mark.parametrize("size", [1, 3])
def test_speech_is_answered_alone_as_beside_other_tasks(parts, tasks, items, oracle, size):
    """Row 0 is asked twice, under prompts of different lengths; rows are taken as given."""
    names = ["spoken_qa", "emotion", "translation", "repeat", "emotion"]
    rows = [0, 2, 1, 0, 1]
    heard = {
        system: np.stack([oracle.hears(system, items[n].audio) for n in range(3)])
        for system in ("untrained", "diva")
    }
    responder = evaluation.Responder(parts.diva.llm, parts.chat, tasks, size)
    said = responder.speech(names, {k: jnp.asarray(v) for k, v in heard.items()}, rows)
    for system, virtual in heard.items():
        wanted = [oracle.answer(name, virtual[row]) for name, row in zip(names, rows, strict=True)]
        assert said[system] == wanted, system


def test_an_answer_ends_before_the_first_stop_token(parts, tasks):
    """Any of the stop tokens; what stands behind it is not read, specials are not shown."""
    responder = evaluation.Responder(parts.diva.llm, parts.chat, tasks, 1)
    ids = {word: n for n, word in enumerate(VOCABULARY)}
    for stop in ("<|eot|>", "<|start|>"):
        said = [ids[word] for word in ("red", "<|bos|>", "dog", stop, "cat", "<|eot|>")]
        assert responder.decode(np.array(said)) == "red dog"
    assert responder.decode(np.array([ids["<|eot|>"]])) == ""
    assert responder.decode(np.array([ids["red"], ids["cat"]])) == "red cat"


# --------------------------------------------------------------------------------------- reading in


def test_a_folder_without_tasks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing; expected .*--tasks"):
        evaluation.read_tasks(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tasks\.json is missing"):
        evaluation.read_tasks(tmp_path)


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            {"singing": {"system": "sing"}},
            "unknown task 'singing'; expected spoken_qa, translation",
        ),
        ({"emotion": {"labels": ["red"]}}, r"task 'emotion' is .*labels.*the key system"),
        ({"spoken_qa": ["system"]}, r"task 'spoken_qa' is \[\"system\"\]; expected an object"),
        (
            {"repeat": {"system": None, "max_tokens": 3}},
            "task 'repeat' is .*max_tokens.*at most labels, max_new_tok",
        ),
    ],
)
def test_a_wrong_prompt_names_file_and_task(tmp_path, entry, message):
    write_tasks(tmp_path, [], tasks=entry)
    with pytest.raises(ValueError, match=rf"tasks\.json: {message}"):
        evaluation.read_tasks(tmp_path)


def test_prompts_are_read_as_written(tmp_path):
    write_tasks(tmp_path, [])
    found = evaluation.read_tasks(tmp_path)
    assert found["emotion"] == evaluation.Task(
        "what colour is the moon", ("red", "green", "blue", "sun")
    )
    assert found["translation"] == evaluation.Task(None, (), 9)
    assert list(found) == list(TASKS)


def test_a_missing_split_lists_those_that_are_there(tmp_path, tasks):
    write_tasks(tmp_path, [], split="dev")
    write_tasks(tmp_path, [], split="extra")
    with pytest.raises(
        FileNotFoundError, match=r"test\.jsonl is missing.*here: dev, extra\. Check"
    ):
        evaluation.read_items(tmp_path, "test", tasks)


GOOD = {"audio": "a.wav", "text": "is it", "task": "spoken_qa", "answer": "red"}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"audio": "a.wav", ', "not JSON .*one object a line"),
        ("[1, 2]", "no text under audio, text, task, answer; expected"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "answer"}), "no text under answer; exp"),
        (json.dumps(GOOD | {"text": 3, "answer": None}), "no text under text, answer; expected"),
        (
            json.dumps(GOOD | {"task": "singing"}),
            "unknown task 'singing'; expected one of spoken_qa",
        ),
        (
            json.dumps(GOOD | {"task": "emotion", "answer": "pink"}),
            "the answer is 'pink'; .*red, gr",
        ),
    ],
)
def test_a_wrong_line_names_file_and_line(tmp_path, tasks, line, message):
    write_tasks(tmp_path, [])
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"test\.jsonl:3: {message}"):
        evaluation.read_items(tmp_path, "test", tasks)


def test_a_file_without_lines_is_an_error(tmp_path, tasks):
    write_tasks(tmp_path, [])
    with pytest.raises(ValueError, match=r"test\.jsonl: no lines"):
        evaluation.read_items(tmp_path, "test", tasks)


def test_lines_become_items(tmp_path, tasks):
    """Clips are relative to the folder; an empty answer is one; accent is optional."""
    row = GOOD | {"answer": "", "accent": "Scottish English", "more": 1}
    write_tasks(tmp_path / "deep", [row, GOOD | {"audio": "../b.wav"}])
    one, two, *_ = evaluation.read_items(tmp_path / "deep", "test", tasks)
    clip = str(tmp_path / "deep/a.wav")
    assert one == evaluation.Item(clip, "is it", "spoken_qa", "", "Scottish English")
    assert Path(two.audio).resolve() == tmp_path / "b.wav" and two.accent == ""


def test_only_a_new_line_ends_a_line(tmp_path, tasks):
    """Not the other separators that Unicode knows, which JSON allows inside of a string."""
    text = "what\u2028is\x85it"
    write_tasks(tmp_path, [])
    line = json.dumps(GOOD | {"text": text}, ensure_ascii=False)
    (tmp_path / "test.jsonl").write_text(line + "\n", encoding="utf-8")
    assert evaluation.read_items(tmp_path, "test", tasks)[0].text == text


def test_one_clip_in_four_is_also_to_be_repeated(tmp_path, tasks):
    """Rounded up, a random but fixed choice of different clips; the reference is the transcript."""
    rows = [GOOD | {"audio": f"{n}.wav", "text": f"{n}"} for n in range(41)]
    write_tasks(tmp_path, rows)
    items = evaluation.read_items(tmp_path, "test", tasks)
    first, more = items[:41], items[41:]
    assert [item.text for item in first] == [row["text"] for row in rows]
    assert all(item.task == "repeat" and item.answer == item.text for item in more)
    numbers = [int(item.text) for item in more]
    assert len(set(numbers)) == 11 and numbers == sorted(numbers)
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    assert len(steps) > 2, "every n-th clip may be of one accent alone"
    assert evaluation.read_items(tmp_path, "test", tasks) == items


def test_nothing_is_repeated_without_a_prompt_or_where_the_split_says_what(tmp_path, tasks):
    write_tasks(tmp_path, [GOOD, GOOD])
    without = {name: task for name, task in tasks.items() if name != "repeat"}
    assert len(evaluation.read_items(tmp_path, "test", without)) == 2
    write_tasks(tmp_path, [GOOD, GOOD | {"task": "repeat", "answer": "is it"}])
    assert len(evaluation.read_items(tmp_path, "test", tasks)) == 2


# --------------------------------------------------------------------------------------- the report

METRICS = {
    "spoken_qa": 6,
    "prompt_ignoring": 6,
    "translation": 4,
    "translation_bleu": 4,
    "emotion": 4,
    "repeat_wer": 4,
}


@pytest.fixture(scope="module")
def known(root, items, expected) -> Path:
    """The same clips, with references from the oracle: for every system some that it alone has.

    Repetitions stand in the split itself, so that they too have such references.
    """
    rows = []
    for n, (item, said) in enumerate(zip(items, expected, strict=True)):
        system = evaluation.SYSTEMS[n % 4]
        row = dataclasses.asdict(item) | {"answer": said[system]}
        rows.append(row | {"audio": "../tasks/" + Path(item.audio).name})
    return write_tasks(root / "known", rows)


@pytest.fixture(scope="module")
def report(root, known) -> dict:
    """What is returned, which is also what is written."""
    report = evaluation.evaluate(root / "diva", known, batch_size=4)
    assert json.loads((root / "diva/eval.json").read_text()) == report
    return report


def test_the_report_has_every_task_and_system(report):
    """eval.json is {"tasks": {task: {system: {score, low, high, n, errors, and p}}}, ...}."""
    assert {"model", "split", "limit", "errors", "tasks", "seconds"} == report.keys()
    assert report["errors"] == {}
    tasks = report["tasks"]
    assert {name: systems["diva"]["n"] for name, systems in tasks.items()} == METRICS
    for name, systems in tasks.items():
        assert list(systems) == ["untrained", "diva", "cascade", "text"]
        for system, entry in systems.items():
            assert {"score", "low", "high", "n", "errors"} <= entry.keys()
            assert ("p" in entry) == (system != "diva")
            assert 0 <= entry["low"] <= entry["score"] + 1e-9, (name, system)
            assert entry["score"] <= entry["high"] + 1e-9, (name, system)
            assert ("accents" in entry) == (name == "spoken_qa")
    assert tasks["emotion"]["text"]["predicted"].keys() == {"red", "green", "blue", "sun"}
    assert tasks["translation_bleu"]["text"]["signature"].startswith("nrefs:1|case:mixed|eff:no|")


def test_the_scores_are_those_of_the_oracles_answers(known, tasks, expected, report):
    """Counted here from the answers of one clip at a time; BLEU by sacrebleu itself."""
    items = evaluation.read_items(known, "test", tasks)
    for system in evaluation.SYSTEMS:
        rows = [(item, said[system]) for item, said in zip(items, expected, strict=True)]
        found = {name: systems[system]["score"] for name, systems in report["tasks"].items()}
        for task in ("spoken_qa", "translation", "emotion"):
            right = [said == item.answer for item, said in rows if item.task == task]
            assert found[task] == pytest.approx(np.mean(right)), (task, system)
        said, wanted = zip(
            *[(s, i.answer) for i, s in rows if i.task == "translation"], strict=True
        )
        score = BLEU().corpus_score(list(said), [list(wanted)]).score
        assert found["translation_bleu"] == pytest.approx(score), system
        pairs = [(s.split(), i.answer.split()) for i, s in rows if i.task == "repeat"]
        errors = sum(slow_edits(tuple(a), tuple(b), 1) for a, b in pairs)
        assert found["repeat_wer"] == pytest.approx(errors / sum(len(b) for _, b in pairs)), system
    for task in ("spoken_qa", "translation", "emotion"):
        right = [report["tasks"][task][system]["score"] for system in evaluation.SYSTEMS]
        assert min(right) > 0 and max(right) < 1, "one of the systems is not told from the others"


def test_accents_are_scored_apart_and_none_is_lost(known, tasks, expected, report):
    items = evaluation.read_items(known, "test", tasks)
    for system in evaluation.SYSTEMS:
        parts = report["tasks"]["spoken_qa"][system]["accents"]
        assert list(parts) == ["England English", "Scottish English"]
        for accent, part in parts.items():
            right = [
                said[system] == item.answer
                for item, said in zip(items, expected, strict=True)
                if item.task == "spoken_qa" and item.accent == accent
            ]
            assert part["n"] == len(right) == 3
            assert part["score"] == pytest.approx(np.mean(right))
            assert {"low", "high"} <= part.keys() and ("p" in part) == (system != "diva")


def test_a_clip_without_an_accent_is_counted_as_unknown():
    tasks = {"spoken_qa": evaluation.Task(None)}
    items = [item_of(accent="Scottish English"), item_of()]
    answers = {system: ["red", "blue"] for system in evaluation.SYSTEMS}
    parts = evaluation.score(tasks, items, answers)["spoken_qa"]["diva"]["accents"]
    assert {name: part["score"] for name, part in parts.items()} == {
        "unknown": 0.0,
        "Scottish English": 1.0,
    }


def test_the_limit_is_for_each_task(root, known, report):
    """A random but fixed part of the items, told in the report."""
    part = evaluation.evaluate(root / "diva", known, limit=2, batch_size=4)
    assert part["limit"] == 2 and report["limit"] == 0
    assert {systems["text"]["n"] for systems in part["tasks"].values()} == {2}
    assert part["tasks"].keys() == METRICS.keys()
    again = evaluation.evaluate(root / "diva", known, limit=2, batch_size=4)
    assert again["tasks"] == part["tasks"]


def test_a_model_that_is_loaded_already_is_the_one_that_is_scored(root, known, report):
    """As at the end of training; all other systems are as they were, on one encoder."""
    diva = connector.DiVA.load(root / "diva")
    deaf = eqx.tree_at(lambda d: d.connector, diva, jax.tree.map(jnp.zeros_like, diva.connector))
    shared = evaluation.Models.load(root / "diva", deaf)
    for a, b in zip(*map(jax.tree.leaves, (shared.asr.model.encoder, deaf.encoder)), strict=True):
        assert a is b
    scored = evaluation.evaluate(root / "diva", known, batch_size=4, diva=deaf)["tasks"]
    for name, systems in report["tasks"].items():
        for system in ("untrained", "cascade", "text"):
            assert scored[name][system]["score"] == systems[system]["score"], (name, system)
    assert any(
        scored[name]["diva"]["score"] != report["tasks"][name]["diva"]["score"] for name in scored
    )


@pytest.fixture(scope="module")
def spoilt(root) -> tuple[Path, list[str]]:
    """A copy of the tasks in which four clips cannot be decoded, each for a reason of its own."""
    folder = shutil.copytree(root / "tasks", root / "spoilt")
    (folder / "0.wav").write_bytes(b"RIFF, but not really")
    (folder / "4.wav").unlink()
    soundfile.write(folder / "7.wav", np.zeros(WINDOW + 1), 16000)
    soundfile.write(folder / "11.wav", np.zeros(0), 16000)
    return folder, [str(folder / f"{n}.wav") for n in (0, 4, 7, 11)]


def test_clips_that_cannot_be_decoded_count_as_wrong_and_are_listed(
    root, spoilt, tasks, expected, capsys
):
    """The run goes on; each is named with its reason; all other clips get their own answers."""
    folder, bad = spoilt
    answers = []
    plain = evaluation.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation, "answer", lambda *args: answers.append(plain(*args)) or answers[0]
        )
        report = evaluation.evaluate(root / "diva", folder, batch_size=4)
    items = evaluation.read_items(folder, "test", tasks)
    for system in ("untrained", "diva", "cascade"):
        for item, reply, said in zip(items, answers[0][0][system], expected, strict=True):
            assert reply == (None if item.audio in bad else said[system]), (system, item)
    assert answers[0][0]["text"] == [said["text"] for said in expected]
    assert sorted(report["errors"]) == sorted(bad)
    reasons = dict(zip(bad, ("not audio", "missing", "window", "no samples"), strict=True))
    assert all(reason in report["errors"][clip] for clip, reason in reasons.items())
    counted = {name: systems["diva"]["errors"] for name, systems in report["tasks"].items()}
    assert counted["spoken_qa"] == 2 and counted["translation"] == counted["emotion"] == 1
    assert {name: systems["diva"]["n"] for name, systems in report["tasks"].items()} == METRICS
    shown = capsys.readouterr()
    assert "4 clips could not be decoded" in shown.out
    assert all(f"counted as wrong: {clip}" in shown.out + shown.err for clip in bad)


def test_a_task_of_which_no_clip_can_be_decoded_scores_zero(root, parts, tasks, tmp_path):
    rows = [GOOD | {"audio": f"{n}.wav", "answer": ""} for n in range(5)]
    write_tasks(tmp_path, rows)
    items = evaluation.read_items(tmp_path, "test", {"spoken_qa": tasks["spoken_qa"]})
    answers, failed = evaluation.answer(parts, tasks, items, batch_size=4)
    assert len(failed) == 5 and answers["diva"] == [None] * 5
    entry = evaluation.score(tasks, items, answers)["spoken_qa"]["diva"]
    assert (entry["score"], entry["errors"], entry["n"]) == (0.0, 5, 5)


# ---------------------------------------------------------------------------------------- the table


def test_the_table_has_a_row_for_every_task_and_accent(report, capsys):
    text = evaluation.table(report)
    assert max(map(len, text.splitlines())) <= 100
    names = [line[:24].strip() for line in text.splitlines()]
    for name, systems in report["tasks"].items():
        line = text.splitlines()[names.index(name)]
        cells = line[24:].replace("*", " ").split()
        scale = 1 if name == "translation_bleu" else 100
        wanted = [f"{scale * systems[system]['score']:.1f}" for system in evaluation.SYSTEMS]
        assert cells[::2] == wanted, line
        low, high = (scale * systems["text"][key] for key in ("low", "high"))
        assert cells[-1] == f"{low:.1f}-{high:.1f}", line
    at = names.index("spoken_qa")
    assert names[at + 1 : at + 3] == ["England English", "Scottish English"]
    header = text.splitlines()[0].split()
    assert header == ["untrained", "diva", "cascade", "text"]
    assert all(f"emotion as {system} names it: red " in text for system in header)


def entry_of(score: float, p: float | None = 1.0, **more) -> dict:
    entry = {"score": score, "low": 0.97 * score, "high": 1.03 * score, "n": 4} | more
    return entry | ({} if p is None else {"p": p})


def test_the_table_marks_what_differs_and_stays_narrow_for_extreme_scores():
    """64 words for one are 6,400 %; accents may have long names and labels be many."""
    counts = {f"label{n}": n for n in range(40)}
    accent = {"A very long name of an accent that nobody uses": entry_of(1.0)}
    rows = {
        "spoken_qa": entry_of(1.0, accents=accent),
        "repeat_wer": entry_of(64.0),
        "emotion": entry_of(0.5, predicted=counts),
    }
    systems = {name: dict.fromkeys(evaluation.SYSTEMS, entry) for name, entry in rows.items()}
    systems["emotion"] = systems["emotion"] | {
        "cascade": entry_of(0.4, p=0.049, predicted=counts),
        "text": entry_of(0.4, p=0.05, predicted=counts),
    }
    lines = evaluation.table({"tasks": systems, "errors": {}}).splitlines()
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    emotion = next(line for line in lines if line.startswith("emotion "))
    assert emotion.count("*") == 1 and "40.0* 38.8-41.2" in emotion
    assert "  A very long name of an " in "\n".join(lines)
    assert sum(line.count("label39 39") for line in lines) == 4
    wide = next(line for line in lines if line.startswith("repeat_wer "))
    assert wide.split()[1:3] == ["6400.0", "6208-6592"]
