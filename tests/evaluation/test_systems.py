"""systems.py: every system answers each clip as it would alone, and is asked nothing in vain.

The oracle answers one clip at a time with whole passes, no cache and no batch, so that the batches
are compared with something else than themselves. Axes: K labels, Q virtual tokens, E width.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import universe
from scipy.special import log_softmax

import connector
import generate
import llama
from evaluation import systems
from evaluation.systems import SYSTEMS, Ask, Models, Question, Responder
from formats import audio_files

ROOM = universe.LLAMA.max_position_embeddings
EVERY = set(SYSTEMS)
QA = Ask("say what it is", max_new_tokens=6)
LONGER = Ask(None, max_new_tokens=9)
SAY = Ask("say it", max_new_tokens=6)
COLOUR = Ask("what colour is the moon", ("red", "green", "blue", "sun"))
WHOLE = Ask("what is it", ("sun", "sun moon", "sun moon is red", "the dog", "six"), "whole_label")
THING = Ask("say", ("the sun", "the dog", "the good cat of six"), "whole_label")
ASKS = {QA, LONGER, SAY, COLOUR, WHOLE, THING}
TEXTS = [
    (QA, "what is the colour of the sun"),
    (QA, "what is one"),
    (QA, "what is one"),
    (QA, "is it good"),
    (LONGER, "the dog is red"),
    (LONGER, "the cat is blue"),
    (LONGER, "good moon"),
    (COLOUR, "good dog"),
    (COLOUR, "what cat is it"),
    (COLOUR, "sun"),
    (WHOLE, "the moon is green"),
    (WHOLE, "it"),
    (THING, "what is the colour of it"),
    (THING, "red red red"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """whisper/, llama/ and diva/ in the published layouts, and clips/."""
    with universe.compiled_fast():
        root = tmp_path_factory.mktemp("universe")
        universe.build(root)
        universe.write_clips(root / "clips", len(TEXTS))
        yield root


@pytest.fixture(scope="module")
def models(root) -> Models:
    return Models.load(root / "diva")


@pytest.fixture(scope="module")
def questions(root) -> list[Question]:
    """One about each clip, then others about five of them: 19, so that batches of 4 are partial."""
    clips = [str(root / f"clips/{n}.wav") for n in range(len(TEXTS))]
    first = [Question(ask, clip, text) for (ask, text), clip in zip(TEXTS, clips, strict=True)]
    more = [(1, SAY), (1, WHOLE), (4, COLOUR), (8, LONGER), (13, SAY)]
    return first + [first[n]._replace(ask=ask) for n, ask in more]


@jax.jit
def next_logits(llm, embeds, length):
    return llm.logits(llm(embeds)[0, length - 1])


hear = jax.jit(connector.DiVA.virtual_tokens)


class Oracle:
    """The answer to one prompt: the whole sequence again for every token, no cache, no batch."""

    def __init__(self, models: Models):
        self.llm, self.chat, self.asr = models.diva.llm, models.chat, models.asr
        self.diva, self.connectors = models.diva, models.connectors
        self.table = np.asarray(self.llm.model.embed_tokens.weight)

    def tokens(self, text: str) -> list[int]:
        return [universe.VOCABULARY.index(word) for word in text.split()]

    def prompt(self, ask: Ask, user: np.ndarray) -> list[np.ndarray]:
        """Embeddings; `user` holds those of what the user says."""
        prefix, suffix = self.chat.wrap(ask.prompt)
        return [*self.table[prefix], *user, *self.table[suffix]]

    def logits(self, rows: list[np.ndarray]) -> np.ndarray:
        padded = np.zeros((1, ROOM, len(rows[0])), np.float32)
        padded[0, : len(rows)] = rows
        return np.asarray(next_logits(self.llm, jnp.asarray(padded), len(rows)), np.float64)

    def label_scores(self, ask: Ask, user: np.ndarray) -> list[list[float]]:
        """The log-probability of each token of each label after those before it."""
        start, scores = self.prompt(ask, user), []
        for label in ask.labels:
            rows, ids = [*start], self.tokens(label)
            scores.append([])
            for token in ids if ask.label_score == "whole_label" else ids[:1]:
                scores[-1].append(log_softmax(self.logits(rows))[token])
                rows.append(self.table[token])
        return scores

    def answer(self, ask: Ask, user: np.ndarray) -> str:
        if ask.labels:
            return ask.labels[np.argmax([np.mean(row) for row in self.label_scores(ask, user)])]
        rows, words = self.prompt(ask, user), []
        for _ in range(ask.max_new_tokens):
            token = int(self.logits(rows).argmax())
            if token in universe.LLAMA.eos_token_id:
                break
            words.append(universe.VOCABULARY[token])
            rows.append(self.table[token])
        return " ".join(word for word in words if word not in universe.SPECIAL)

    def text(self, ask: Ask, text: str) -> str:
        return self.answer(ask, self.table[self.tokens(text)])

    def audio(self, clip: str) -> jnp.ndarray:
        return jnp.asarray(audio_files.pad([audio_files.load(clip)], universe.WINDOW))

    def hears(self, system: str, clip: str) -> np.ndarray:
        diva = eqx.tree_at(lambda d: d.connector, self.diva, self.connectors[system])
        return np.asarray(hear(diva, self.audio(clip))[0])

    def transcript(self, clip: str) -> str:
        return self.asr(self.audio(clip))[0]

    def all(self, question: Question) -> dict[str, str]:
        """{system: answer}"""
        ask, clip, text = question
        said = {system: self.answer(ask, self.hears(system, clip)) for system in SYSTEMS[:2]}
        said["cascade"] = self.text(ask, self.transcript(clip))
        return said | {"text": self.text(ask, text)}


@pytest.fixture(scope="module")
def oracle(models) -> Oracle:
    return Oracle(models)


@pytest.fixture(scope="module")
def expected(oracle, questions) -> list[dict[str, str]]:
    """What the oracle says to every question, in every system."""
    return [oracle.all(question) for question in questions]


@pytest.fixture(scope="module")
def transcripts(oracle, questions) -> dict[int, str]:
    return {i: oracle.transcript(question.audio) for i, question in enumerate(questions)}


Told = dict[tuple[int, str], tuple[str | None, dict[str, str]]]


def ask_all(models, questions, lacking=EVERY, heard=None, size=4) -> Told:
    """{(number, system): (answer, note)} of what is told; nothing may be told twice."""
    found: Told = {}

    def tell(number: int, system: str, answer: str | None, note: dict[str, str]) -> None:
        assert (number, system) not in found, f"{system} answered question {number} twice"
        found[number, system] = answer, note

    lacking = [lacking] * len(questions) if isinstance(lacking, set) else lacking
    systems.answer(models, questions, lacking, {} if heard is None else heard, size, tell)
    return found


def answers(told: Told) -> dict[tuple[int, str], str | None]:
    return {place: answer for place, (answer, _) in told.items()}


def table(said: list[dict[str, str]]) -> dict[tuple[int, str], str]:
    """The oracle's answers as `answers` has them."""
    return {(i, system): row[system] for i, row in enumerate(said) for system in SYSTEMS}


def counted(monkeypatch, module, name: str) -> list:
    """The arguments of every call of module.name from now on."""
    calls, plain = [], getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *args, **kwargs: calls.append(args) or plain(*args, **kwargs)
    )
    return calls


@pytest.fixture
def no_clip_is_decoded(monkeypatch) -> None:
    def fail(*_):
        raise AssertionError("a clip is decoded")

    monkeypatch.setattr(audio_files, "load_window", fail)


# ------------------------------------------------------------------------------------------- models


def test_models_are_float32_on_a_cpu_and_share_one_encoder(models):
    leaves = jax.tree.leaves((models.diva, models.connectors, models.asr.model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    pair = models.asr.model.encoder, models.diva.encoder
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        assert a is b
    assert models.connectors["diva"] is models.diva.connector


def test_models_are_bfloat16_on_an_accelerator(root, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    models = Models.load(root / "diva")
    leaves = jax.tree.leaves((models.diva, models.connectors, models.asr.model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_the_untrained_connector_is_what_training_would_begin_with(models):
    """The recogniser's decoder, its last norm scaled, and projected queries as loud as the LLM's
    embeddings."""
    assert set(models.connectors) == {"untrained", "diva"}
    untrained, diva = models.connectors["untrained"], models.connectors["diva"]
    norm = models.asr.model.decoder.layer_norm
    restored = eqx.tree_at(lambda d: d.layer_norm, untrained.decoder, norm)
    assert not np.array_equal(untrained.decoder.layer_norm.weight, norm.weight)
    pair = restored, models.asr.model.decoder
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (untrained, diva)), strict=True):
        assert a.shape == b.shape and not np.array_equal(a, b)
    again = Models.load(Path(models.chat.folder).parent / "diva").connectors["untrained"]
    for a, b in zip(*map(jax.tree.leaves, (untrained, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_untrained_connector_has_as_many_queries_as_the_trained_one(root, models):
    diva = connector.create(models.asr.model, models.diva.llm, 5, jax.random.key(3))
    connector.save(diva, root / "short", str(root / "whisper"), str(root / "llama"))
    found = Models.load(root / "short").connectors
    assert [found[name].query_tokens.shape for name in SYSTEMS[:2]] == [(5, 16), (5, 16)]


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "labels, score, message",
    [
        (
            ("red sun", "blue", "red moon"),
            "first_token",
            "labels red sun, blue, red moon: 'red moon' is the same as 'red sun' in its first "
            r"token; expected .* only that is scored.*label_score whole_label",
        ),
        (("red", "  "), "first_token", "labels red,   : '  ' is empty in its first token; exp"),
        (("lilac", "mauve"), "first_token", "'mauve' is the same as 'lilac' in its first token"),
        (
            ("red sun", "blue", "red  sun"),
            "whole_label",
            r"labels red sun, blue, red  sun: 'red  sun' is the same as 'red sun' in its tokens; "
            r"expected .* only that is scored\. Rename one\.$",
        ),
        (("red", ""), "whole_label", "labels red, : '' is empty in its tokens; expected"),
        (("a lilac sun", "a mauve sun"), "whole_label", "'a mauve sun' is the same as 'a lilac su"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused_by_name(models, labels, score, message):
    """Words that the tokenizer does not know are one token to it."""
    ask = Ask("what is it", labels, score)
    with pytest.raises(ValueError, match=message):
        systems.label_tokens(models.chat, ask)
    with pytest.raises(ValueError, match=message):
        Responder(models.diva.llm, models.chat, {QA, ask}, 2)


def test_whole_labels_may_begin_alike_and_go_on_from_one_another(models, oracle):
    assert systems.label_tokens(models.chat, WHOLE) == [oracle.tokens(x) for x in WHOLE.labels]
    first = Ask("what is it", ("sun moon", "the dog", "six"))
    assert systems.label_tokens(models.chat, first) == [
        oracle.tokens(x) for x in ("sun the six".split())
    ]


def test_the_labels_of_the_toy_are_told_apart_by_its_tokenizer():
    """By the token that the label itself begins with."""
    toy = Path(__file__).parents[2] / "toy"
    entry = json.loads((toy / "tasks/tasks.json").read_text())["emotion"]
    chat = llama.Chat.load(toy / "llama")
    found = systems.label_tokens(chat, Ask(entry["prompt"], tuple(entry["labels"])))
    assert len({token for (token,) in found}) == len(entry["labels"]) == 7
    for tokens, label in zip(found, entry["labels"], strict=True):
        start = chat.decode(tokens).strip()
        assert start and label.lower().startswith(start.lower()), (start, label)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words = universe.WORDS.split()
    return [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(40)]


def test_the_answer_is_the_likeliest_label_wherever_it_stands(models, oracle, texts):
    """By the LLM's own logits, for asks with different labels in one batch; each label can win."""
    asks = [
        Ask("what is it", ("sun", "moon", "good")),
        Ask("what is it", ("five", "colour", "six", "it", "dog")),
    ]
    responder = Responder(models.diva.llm, models.chat, set(asks), 8)
    asked = [(ask, text) for text in texts for ask in asks]
    said = {pair: reply for replies in responder.texts(asked) for pair, reply in replies.items()}
    assert said == {pair: oracle.text(*pair) for pair in asked}
    for ask in asks:
        chosen = {reply for (other, _), reply in said.items() if other == ask}
        assert chosen == set(ask.labels), "some label never wins: its mistakes would not show"


def scores_of(models, monkeypatch, asks, texts) -> tuple[np.ndarray, list[str]]:
    """label_scores [B, K] of one batch, and the labels that are chosen by them."""
    responder = Responder(models.diva.llm, models.chat, set(asks), len(asks))
    prompts, lengths, _ = responder.frame(asks, [models.chat.encode(text) for text in texts])
    found, plain = [], systems.label_scores
    with monkeypatch.context() as patch:
        patch.setattr(systems, "label_scores", lambda *args: found.append(plain(*args)) or found[0])
        said = responder.reply(asks, models.diva.llm.embed(prompts), lengths)
    (scores,) = found
    return np.asarray(scores), said


def test_the_score_of_a_whole_label_is_the_mean_log_probability_of_its_tokens(
    models, oracle, texts, monkeypatch
):
    """For every label, by whole passes; beside asks of fewer, more, shorter and longer labels, and
    where the prompt fills its padding so that the label stands behind it.

    f32 logits up to about 30 through two layers, and a difference of them: 1e-4.
    """
    asks = [WHOLE, COLOUR, THING, WHOLE, Ask(None, ("it",), "whole_label"), THING, COLOUR]
    full = 32 - sum(map(len, models.chat.wrap(WHOLE.prompt)))
    texts = [" ".join(universe.WORDS.split()[:full]), *texts[1 : len(asks)]]
    scores, said = scores_of(models, monkeypatch, asks, texts)
    for ask, text, row, label in zip(asks, texts, scores, said, strict=True):
        single = oracle.label_scores(ask, oracle.table[oracle.tokens(text)])
        wanted = [np.mean(some) for some in single]
        np.testing.assert_allclose(row[: len(wanted)], wanted, atol=1e-4, err_msg=f"{ask} {text}")
        assert label == ask.labels[np.argmax(wanted)]
    assert len({len(ask.labels) for ask in asks}) == 4


def test_a_long_label_is_not_the_less_likely_for_its_length(models, oracle, texts, monkeypatch):
    """By the mean, where the sum over a label's tokens would choose another one."""
    _, said = scores_of(models, monkeypatch, [WHOLE] * 24, texts[:24])
    users = [oracle.table[oracle.tokens(text)] for text in texts[:24]]
    single = [oracle.label_scores(WHOLE, user) for user in users]
    mean, total = (
        [WHOLE.labels[np.argmax([of(some) for some in row])] for row in single]
        for of in (np.mean, np.sum)
    )
    assert said == mean
    assert sum(a != b for a, b in zip(mean, total, strict=True)) >= 3
    assert len(set(mean)) >= 3, "hardly a label ever wins"


def test_only_the_first_token_of_a_label_counts_if_so_asked(models, oracle, texts, monkeypatch):
    """Whatever follows it, and though whole labels are scored in the same batch."""
    short, long = ("moon", "sun", "good"), ("moon is red", "sun", "good dog of six cat")
    first, bare = Ask("say", long), Ask("say", short)
    whole = Ask("say", long, "whole_label")
    asks = [first, bare, whole] * 20
    scores, said = scores_of(models, monkeypatch, asks, np.repeat(texts[:20], 3).tolist())
    np.testing.assert_allclose(scores[0::3, :3], scores[1::3, :3], atol=1e-5)
    assert [long.index(x) for x in said[0::3]] == [short.index(x) for x in said[1::3]]
    assert set(said[0::3]) == set(long) and said[0::3] != said[2::3]
    wanted = oracle.label_scores(first, oracle.table[oracle.tokens(texts[0])])
    np.testing.assert_allclose(scores[0, :3], np.ravel(wanted), atol=1e-4)


# ------------------------------------------------------------------------------------------ answers


def test_every_system_answers_as_one_clip_alone_with_whole_passes(
    models, questions, expected, transcripts, monkeypatch
):
    """Batches of mixed prompts and lengths, filled up at the end, change no answer.

    Each clip is decoded and each batch of them is encoded once, though five are asked about twice.
    The oracle's answers differ between clips and between systems and end in both ways, else this
    would prove little.
    """
    decoded = counted(monkeypatch, audio_files, "load")
    encoded = counted(monkeypatch, systems, "listen")
    heard = {}
    told = ask_all(models, questions, heard=heard, size=4)
    assert answers(told) == table(expected)
    assert heard == transcripts
    assert sorted(clip for (clip,) in decoded) == sorted({q.audio for q in questions})
    assert len(decoded) == 14 and len(questions) == 19
    assert [len(audio) for _, audio in encoded] == [4] * 4
    for system in SYSTEMS:
        wanted = [said[system] for said in expected]
        assert len(set(wanted)) > len(wanted) / 3, f"{system} says the same to everything"
    for a, b in itertools.combinations(SYSTEMS, 2):
        assert [said[a] for said in expected] != [said[b] for said in expected], (a, b)
    room = [
        question.ask.max_new_tokens - len(said["diva"].split())
        for question, said in zip(questions, expected, strict=True)
        if not question.ask.labels
    ]
    assert min(room) == 0 < max(room), "all answers end by a stop token, or all by their length"


def test_a_batch_is_no_larger_than_all_clips_together(models, questions, expected, monkeypatch):
    encoded = counted(monkeypatch, systems, "listen")
    assert answers(ask_all(models, questions, size=64)) == table(expected)
    assert [len(audio) for _, audio in encoded] == [14]


def test_the_order_of_the_questions_changes_no_answer(models, questions, expected):
    """Asked backwards, in other company: an answer depends on nothing but the question."""
    told = ask_all(models, questions[::-1])
    assert answers(told) == table(expected[::-1])


def test_a_question_alone_is_answered_as_among_others(models, questions, expected):
    for i in (0, 7, 10):
        assert answers(ask_all(models, [questions[i]], size=4)) == table([expected[i]])


def test_greedy_answers_are_the_same_in_two_runs(models, questions):
    assert ask_all(models, questions) == ask_all(models, questions)


def test_a_text_is_answered_alone_as_beside_longer_ones(models, oracle):
    """Five to be continued and three to be labelled, in batches of four; none is left out."""
    asked = [
        (QA, "sun"),
        (LONGER, ""),
        (COLOUR, "it"),
        (QA, "what is the colour of the dog of the cat of the sun of the moon"),
        (SAY, "one two three four five six"),
        (WHOLE, "the colour of it is red"),
        (COLOUR, "the colour of it is red"),
        (LONGER, "good"),
    ]
    batches = list(Responder(models.diva.llm, models.chat, ASKS, 4).texts(asked))
    assert [len(batch) for batch in batches] == [4, 1, 3]
    said = {pair: reply for batch in batches for pair, reply in batch.items()}
    assert said == {pair: oracle.text(*pair) for pair in asked}


def test_speech_is_answered_alone_as_beside_other_asks(models, questions, oracle):
    """Rows are taken as given, row 0 several times, under prompts of different lengths."""
    asks = [QA, COLOUR, LONGER, SAY, WHOLE, QA, LONGER, COLOUR]
    rows = [0, 2, 1, 0, 1, 2, 0, 0]
    heard = {
        system: np.stack([oracle.hears(system, questions[n].audio) for n in range(3)])
        for system in ("untrained", "diva")
    }
    responder = Responder(models.diva.llm, models.chat, ASKS, 4)
    for system, virtual in heard.items():
        said = responder.speech(asks, jnp.asarray(virtual), rows)
        wanted = [oracle.answer(ask, virtual[row]) for ask, row in zip(asks, rows, strict=True)]
        assert said == wanted, system


def test_an_answer_ends_before_the_first_stop_token(models):
    """Any of the stop tokens; what stands behind it is not read, specials are not shown."""
    responder = Responder(models.diva.llm, models.chat, {QA}, 1)
    ids = {word: n for n, word in enumerate(universe.VOCABULARY)}
    for stop in ("<|eot|>", "<|start|>"):
        said = [ids[word] for word in ("red", "<|bos|>", "dog", stop, "cat", "<|eot|>")]
        assert responder.decode(np.array(said)) == "red dog"
    assert responder.decode(np.array([ids["<|eot|>"]])) == ""
    assert responder.decode(np.array([ids["red"], ids["cat"]])) == "red cat"


def test_the_instruction_stands_in_the_system_turn(models):
    """A prompt is the chat template as a whole, tokenised, and zeros up to a multiple of 16."""
    responder = Responder(models.diva.llm, models.chat, ASKS, 2)
    user = models.chat.encode("is it good")
    ids, lengths, starts = responder.frame([QA, LONGER], [user, user])
    turns = "<|bos|>", "<|start|>system<|end|>say what it is<|eot|>"
    rest = "<|start|>user<|end|>is it good<|eot|><|start|>assistant<|end|>"
    whole = [models.chat.encode(text + rest) for text in ("".join(turns), turns[0])]
    assert ids.shape == (2, 32) and lengths.tolist() == [len(row) for row in whole]
    for row, wanted, start in zip(np.asarray(ids), whole, starts, strict=True):
        assert row[: len(wanted)].tolist() == wanted and not row[len(wanted) :].any()
        assert row[start : start + 3].tolist() == user


# ----------------------------------------------------------------------------------- what is asked


def test_what_is_not_lacking_is_not_decoded_or_told(models, questions, expected, monkeypatch):
    """Texts where only they are lacking, speech where it is lacking, nothing at all elsewhere."""
    decoded = counted(monkeypatch, audio_files, "load")
    kinds = [set(), {"text"}, {"untrained", "diva"}, {"cascade"}, EVERY]
    lacking = [kinds[i % 5] for i in range(14)] + [set()] * 5
    heard = {}
    told = ask_all(models, questions, lacking, heard)
    said = table(expected)
    wanted = {(i, system): said[i, system] for i, some in enumerate(lacking) for system in some}
    assert answers(told) == wanted
    some = [i for i in range(14) if i % 5 > 1]
    assert sorted(clip for (clip,) in decoded) == sorted(questions[i].audio for i in some)
    assert sorted(heard) == some


def test_a_system_that_is_not_lacking_does_not_answer(models, questions, expected):
    """Each of the four alone, and the two that answer from virtual tokens apart."""
    lacking = [{SYSTEMS[i % 4]} for i in range(len(questions))]
    told = ask_all(models, questions, lacking)
    assert answers(told) == {
        (i, system): expected[i][system] for i, some in enumerate(lacking) for system in some
    }


def test_connectors_and_recogniser_run_only_where_they_are_lacking(
    models, questions, transcripts, monkeypatch
):
    """In batches of four: diva for five clips, then transcripts for six."""
    spoken = counted(monkeypatch, systems, "speak")
    recognised = counted(monkeypatch, generate, "greedy_decode")
    asked = [q._replace(ask=QA) for q in questions[:12]]
    ask_all(models, asked, [{"diva"}] * 5 + [{"text"}] * 7, dict(transcripts))
    assert all(module is models.connectors["diva"] for module, _ in spoken)
    assert len(spoken) == 2 and not recognised
    ask_all(models, asked, [{"text"}] * 6 + [{"cascade"}] * 6)
    assert len(spoken) == 2 and len(recognised) == 2


def test_no_clip_is_decoded_where_the_transcripts_are_known(
    models, questions, transcripts, expected, no_clip_is_decoded
):
    """For the cascade and the text; the transcripts are those that are given."""
    heard = dict(transcripts)
    told = ask_all(models, questions, {"cascade", "text"}, heard)
    said = table(expected)
    assert answers(told) == {
        place: said[place] for place in said if place[1] in ("cascade", "text")
    }
    assert heard == transcripts


def test_the_cascade_answers_the_transcript_that_is_known(
    models, questions, oracle, no_clip_is_decoded
):
    heard = {0: "good moon", 1: "", 2: "red dog"}
    told = ask_all(models, questions[:3], {"cascade"}, dict(heard))
    assert told == {
        (i, "cascade"): (oracle.text(QA, text), {"transcript": text}) for i, text in heard.items()
    }
    assert len(set(answers(told).values())) == 3


def test_a_known_transcript_stays_where_the_clip_is_heard_again(
    models, questions, oracle, transcripts
):
    """Beside a clip whose transcript is not known."""
    heard = {0: "good moon"}
    told = ask_all(models, questions[:2], heard=heard)
    assert heard == {0: "good moon", 1: transcripts[1]} and transcripts[0] != "good moon"
    assert told[0, "cascade"] == (oracle.text(QA, "good moon"), {"transcript": "good moon"})
    assert told[1, "cascade"] == (oracle.text(QA, heard[1]), {"transcript": heard[1]})


def test_transcripts_are_added_to_those_that_are_known(models, questions, transcripts):
    heard = {0: transcripts[0], 3: transcripts[3]}
    ask_all(models, questions[:6], {"cascade"}, heard)
    assert heard == {i: transcripts[i] for i in range(6)}


def test_notes_say_what_was_written_and_heard(models, questions, oracle, transcripts):
    """The transcript beside diva's answers, from which a later run takes it, and the cascade's;
    beside diva's the words that are nearest to its virtual tokens, specials left out."""
    for (i, system), (answer, note) in ask_all(models, questions).items():
        assert answer is not None
        expected = {"transcript": transcripts[i]} if system in ("diva", "cascade") else {}
        if system == "diva":
            virtual = oracle.hears("diva", questions[i].audio).astype(float)
            ids = np.linalg.norm(virtual[:, None] - oracle.table, axis=-1).argmin(-1)
            words = [universe.VOCABULARY[n] for n in ids]
            expected["heard"] = " ".join(word for word in words if word not in universe.SPECIAL)
        assert note == expected


def test_a_text_is_answered_once_however_many_clips_say_it(models, questions, oracle, monkeypatch):
    """Spoken or read, twelve times; another ask is another question."""
    generated = counted(monkeypatch, generate, "generate")
    twelve = [q._replace(ask=QA, text="the dog is red") for q in questions[:12]]
    heard = {i: "the dog is red" for i in range(12)}
    told = ask_all(models, twelve, {"cascade", "text"}, heard, size=4)
    assert len(generated) == 1 and len(told) == 24
    assert set(answers(told).values()) == {oracle.text(QA, "the dog is red")}
    two = [q._replace(ask=(QA, SAY)[i % 2]) for i, q in enumerate(twelve)]
    told = ask_all(models, two, {"text"}, size=4)
    assert len(generated) == 2
    for i, question in enumerate(two):
        assert told[i, "text"] == (oracle.text(question.ask, question.text), {})


def test_answers_are_told_while_later_clips_are_yet_to_be_decoded(models, questions, monkeypatch):
    """One batch is decoded ahead, no more; and a batch of texts is told before the next one."""
    decoded = counted(monkeypatch, audio_files, "load_window")
    generated = counted(monkeypatch, generate, "generate")
    seen = []

    def tell(number, system, answer, note):
        seen.append((system, len(decoded), len(generated)))

    asked = [q._replace(ask=QA) for q in questions[:12]]
    systems.answer(models, asked, [EVERY] * 12, {}, 4, tell)
    steps = [count for system, count, _ in seen if system == "diva"]
    assert max(steps[:4]) <= 8 and len(decoded) == 12
    texts = [count for system, _, count in seen if system in ("cascade", "text")]
    assert texts[0] < texts[-1] == len(generated)


# ------------------------------------------------------------------------------- what has no answer


def test_a_question_without_a_transcript_has_no_text_answer(models, questions, expected):
    """The other systems do not need one."""
    asked = [q._replace(text="") if i in (1, 8) else q for i, q in enumerate(questions)]
    told = ask_all(models, asked)
    for (i, system), (answer, note) in told.items():
        unknown = system == "text" and i in (1, 8)
        assert answer == (None if unknown else expected[i][system]), (i, system)
        assert ("error" in note) == unknown
    assert told[1, "text"] == (None, {"error": "its transcript is unknown"})


def test_a_text_that_is_too_long_for_the_llm_has_no_answer(models, questions, expected, oracle):
    """The longest that fits into the positions with its answer has one, and so have all others."""
    room = ROOM - QA.max_new_tokens - sum(map(len, models.chat.wrap(QA.prompt)))
    fits = " ".join(["red", "dog", "sun"] * 30).split()[:room]
    texts = [" ".join(fits), " ".join([*fits, "it"])]
    asked = [questions[0]._replace(text=text) for text in texts] + questions[1:4]
    heard = {0: texts[1], 1: texts[0], 2: "sun", 3: "", 4: "moon"}
    told = ask_all(models, asked, {"cascade", "text"}, heard)
    error = {"error": "too long for the LLM"}
    assert told.pop((0, "cascade")) == (None, {"transcript": texts[1]} | error)
    assert told.pop((1, "text")) == (None, error)
    assert told.pop((0, "text")) == (oracle.text(QA, texts[0]), {})
    for (i, system), (answer, note) in told.items():
        said = heard[i] if system == "cascade" else asked[i].text
        assert answer == oracle.text(QA, said) and "error" not in note


def test_a_text_that_fits_is_answered_beside_asks_of_longer_answers(models, questions, oracle):
    """A label of one token needs no more room than that, a short answer no more than its own."""
    asked = questions[4:8]
    for i, ask, after in ((0, QA, QA.max_new_tokens), (1, COLOUR, 1)):
        length = ROOM - after - sum(map(len, models.chat.wrap(ask.prompt)))
        text = " ".join((["red", "dog", "sun"] * 30)[:length])
        asked[i] = asked[i]._replace(ask=ask, text=text)
    assert max(question.ask.max_new_tokens for question in asked[2:]) > QA.max_new_tokens
    told = ask_all(models, asked, {"text"})
    wanted = {(i, "text"): (oracle.text(q.ask, q.text), {}) for i, q in enumerate(asked)}
    assert told == wanted


BAD = {0: "not audio", 4: "missing", 7: "window", 11: "no samples"}


@pytest.fixture(scope="module")
def spoilt(root, questions) -> list[Question]:
    """The same questions, where four clips cannot be decoded, each for a reason of its own."""
    folder = root / "spoilt"
    universe.write_clips(folder, len(TEXTS))
    (folder / "0.wav").write_bytes(b"RIFF, but not really")
    (folder / "4.wav").unlink()
    soundfile.write(folder / "7.wav", np.zeros(universe.WINDOW + 1), 16000)
    soundfile.write(folder / "11.wav", np.zeros(0), 16000)
    return [q._replace(audio=str(folder / Path(q.audio).name)) for q in questions]


def test_clips_that_cannot_be_decoded_have_no_answer_and_a_reason(
    models, spoilt, expected, transcripts, capsys
):
    """All other clips get their own answers; the text is answered nevertheless.

    Clip 4 is asked about twice.
    """
    heard = {}
    told = ask_all(models, spoilt, heard=heard)
    assert told.keys() == table(expected).keys()
    numbers = [int(Path(question.audio).stem) for question in spoilt]
    for (i, system), (answer, note) in told.items():
        if (n := numbers[i]) in BAD and system != "text":
            assert answer is None and set(note) == {"error"}
            assert spoilt[i].audio in note["error"] and BAD[n] in note["error"]
        else:
            assert answer == expected[i][system] and "error" not in note, (i, system)
    assert heard == {i: transcripts[i] for i, n in enumerate(numbers) if n not in BAD}
    assert len(spoilt) - len(heard) == 5
    shown = capsys.readouterr()
    for n in BAD:
        lines = [x for x in (shown.out + shown.err).splitlines() if "counted as wrong" in x]
        assert sum(f"/{n}.wav" in line for line in lines) == 1


def test_only_what_is_lacking_has_no_answer_of_a_bad_clip(models, spoilt):
    lacking = [set()] * len(spoilt)
    lacking[0], lacking[4] = {"cascade"}, {"diva", "text"}
    told = answers(ask_all(models, spoilt, lacking))
    assert told.keys() == {(0, "cascade"), (4, "diva"), (4, "text")}
    assert told[0, "cascade"] is told[4, "diva"] is None and told[4, "text"] is not None


def test_a_bad_clip_is_answered_by_the_cascade_if_its_transcript_is_known(models, spoilt, oracle):
    told = ask_all(models, spoilt[:1], {"diva", "cascade"}, {0: "good moon"})
    assert told[0, "diva"][0] is None
    assert told[0, "cascade"] == (oracle.text(QA, "good moon"), {"transcript": "good moon"})


def test_where_no_clip_can_be_decoded_only_texts_are_answered(
    models, questions, expected, tmp_path
):
    asked = [q._replace(audio=str(tmp_path / Path(q.audio).name)) for q in questions]
    told = ask_all(models, asked)
    assert told.keys() == table(expected).keys()
    for (i, system), (answer, note) in told.items():
        assert answer == (expected[i]["text"] if system == "text" else None)
        assert ("missing" in note.get("error", "")) == (system != "text")


# -------------------------------------------------------------------------------------- compilation


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one with each program that XLA compiles."""
    found = []

    def listen(event: str, seconds: float, **more) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_again_for_further_batches(root, models, compilations):
    """Other clips, texts, numbers of them and mixtures of asks; all prompts pad to one length.

    The second time each batch has an ask of its own, and so answers or labels of its own length.
    """
    clips = universe.write_clips(root / "many", 25)
    asks = [QA, dataclasses.replace(SAY, max_new_tokens=8), COLOUR, THING]

    def ask(clips: list[str], words: list[str], alike: int) -> None:
        """In turn, each of the asks of so many clips."""
        asked = [
            Question(asks[i // alike % 4], clip, " ".join(words[: 2 + i % 3]))
            for i, clip in enumerate(clips)
        ]
        assert {question.ask for question in asked} == set(asks)
        ask_all(models, asked, size=7)

    ask(clips[:7], ["sun", "moon", "it", "dog"], 1)
    first = len(compilations)
    assert first >= 6, "a program for each of listen, speak, greedy, fill, generate, label_scores"
    ask(clips, ["red", "blue", "sun", "five"], 7)
    ask(clips[:11], ["good", "it", "six", "it"], 2)
    assert len(compilations) == first


def test_few_lengths_are_compiled_for_texts_of_all_lengths(models):
    """Prompts of 17 to 48 tokens are padded to 32 or to 48."""
    texts = [" ".join(["it"] * n) for n in range(5, 35)]
    responder = Responder(models.diva.llm, models.chat, {SAY}, 2)
    wrap = sum(map(len, models.chat.wrap(SAY.prompt)))
    assert (5 + wrap, 34 + wrap) == (19, 48)
    generate.generate.__wrapped__.clear_cache()
    assert sum(len(batch) for batch in responder.texts([(SAY, text) for text in texts])) == 30
    assert generate.generate.__wrapped__._cache_size() == 2
