"""metrics.py: the scores are those of the published scripts, and no answer is never a right one.

Every metric is measured clip by clip and combined from sums. The oracles are sacrebleu itself, and
definitions that are written out here with lists.
"""

import collections
import functools
import itertools
import logging
import string
import sys
import types
import unicodedata

import numpy as np
import pytest
import sacrebleu.tokenizers.tokenizer_ja_mecab as japanese
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from evaluation import metrics
from evaluation.metrics import METRICS, contains, exact_match, f1, ignores_prompt, wrong_script
from evaluation.suites import LANGUAGES, Example

EMOTIONS = ("Anger", "Joy", "Neutral", "Surprise")


def clip(*answers: str, text: str = "what is it", language: str = "") -> Example:
    return Example("1", "a.wav", text, answers, language=language)


def sums(name: str, said: list, examples: list[Example], labels=()) -> np.ndarray:
    """[C]: the numbers of a corpus."""
    measure = METRICS[name].measure
    return np.sum([measure(a, e, labels) for a, e in zip(said, examples, strict=True)], axis=0)


def score(name: str, said: list, examples: list[Example], labels=()) -> float:
    """The score of a corpus."""
    (found,) = METRICS[name].combine(sums(name, said, examples, labels)[None])
    return float(found)


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    "text, plain",
    [
        ("  Paris,\n is THE capital!  ", "paris is the capital"),
        ("It's 3.5 -- really?", "its 35 really"),
        ("snake_case", "snakecase"),
        ("GRÖSSE", "grösse"),
        (unicodedata.normalize("NFD", "größe"), unicodedata.normalize("NFC", "größe")),
        ("你好。", "你好"),
        ("...", ""),
    ],
)
def test_case_punctuation_space_and_unicode_form_do_not_count(text, plain):
    assert metrics.normalise(text) == plain


@pytest.mark.parametrize("one, other", [("கி", "கு"), ("की", "का"), ("ก็", "กี")])
def test_vowel_signs_tell_words_apart(one, other):
    """Unicode calls them marks, not letters: Tamil, Hindi and Thai words differ in nothing else."""
    assert metrics.normalise(one) == one != metrics.normalise(other)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("The cat, a dog and AN ape!", "cat dog and ape"),
        ("Athens, theatre, Ana", "athens theatre ana"),  # words that begin like articles
        ("a the an", ""),
        ("an-other a.m.", "another am"),  # punctuation goes first, and no space takes its place
    ],
)
def test_articles_do_not_count_where_whole_words_are_articles(text, plain):
    assert metrics.without_articles(text) == plain


def squad(text: str) -> str:
    """SQuAD's normalisation, told of ASCII: lower case, no punctuation, no articles, one space."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.text(st.sampled_from("aAnNtThHeE x0 .,'-_!\n\t"), max_size=30))
def test_texts_are_normalised_as_squad_does(text):
    assert metrics.without_articles(text) == squad(text)


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
        found = metrics.edits(" ".join(a), " ".join(b), substitution)
        assert found == slow_edits(a, b, substitution), (a, b)


def test_edits_count_words_and_not_letters():
    assert metrics.edits("the cat sat", "a cat sat down") == 2
    assert metrics.edits("The cat, sat.", "the cat sat") == 0
    assert metrics.edits("", "three new words") == 3


# --------------------------------------------------------------------------------- all the metrics

VOICEBENCH = {"pedant_right", "judged"}  # have tests there
GAINS = [n for n, metric in METRICS.items() if not metric.lower_is_better and n not in VOICEBENCH]


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("reference", ["red", "", "the"])
def test_no_answer_scores_zero_even_where_the_reference_is_empty(name, reference):
    """Of every metric of which more is better; "the" is empty once its articles are gone."""
    assert score(name, [None], [clip(reference)], ("red", "blue")) == 0


@pytest.mark.parametrize("name", ["exact_match", "contains", "f1", "accuracy"])
def test_a_clip_without_an_answer_is_counted_and_not_left_out(name):
    assert score(name, ["red", None], [clip("red"), clip("red")]) == 50


@pytest.mark.parametrize("name", GAINS)
def test_the_right_answer_scores_a_hundred(name, stand_in):
    stand_in("pedant", "PEDANT", {"red": {"red": 1.0}})
    words = "one two three four five six" if name in ("bleu", "chrf") else "red"
    found = score(name, [words, words], [clip(words), clip(words)], ("blue", "red"))
    assert found == pytest.approx(100, rel=1e-12)


def test_less_is_better_of_errors_of_repeated_questions_and_of_wrong_letters():
    worse = {name for name, metric in METRICS.items() if metric.lower_is_better}
    assert worse == {"wer", "prompt_ignoring", "wrong_script"}
    assert {name for name, m in METRICS.items() if m.by_language} == {"bleu", "chrf"}


SAID = ["one two three four x", None, "five", "seven two one three four five six", "", "nine"]
WANTED = ["one two three four five", "two", "five", "one two three four five six", "a b", "ten"]


@pytest.mark.parametrize("name", ["f1", "wer", "bleu", "chrf", "weighted_f1"])
def test_many_corpora_at_once_score_as_each_alone(name):
    """numpy may add in another order: a few roundings of float64, 1e-12."""
    parts = [[0], [1], [2, 3], [4, 5], [0, 3], [0, 1, 2, 3, 4, 5]]
    corpora = np.stack(
        [
            sums(name, [SAID[i] for i in part], [clip(WANTED[i]) for i in part], WANTED)
            for part in parts
        ]
    )
    combine = METRICS[name].combine
    together = combine(corpora.reshape(2, 3, -1))
    assert together.shape == (2, 3)
    alone = [combine(corpus[None])[0] for corpus in corpora]
    np.testing.assert_allclose(together.ravel(), alone, rtol=1e-12)
    assert len(set(alone)) > 2, "the corpora score alike, which would hide a mix-up"


# ----------------------------------------------------------------------------------------- shares


def test_a_share_is_pooled_over_clips_and_not_averaged():
    """2 errors in 2 words and 0 in 8 are 20 %, not the mean of 100 % and 0 %."""
    texts = ("a b", "c d e f g h i j")
    assert score("wer", ["x y", texts[1]], [clip(t) for t in texts]) == pytest.approx(20)


def test_a_share_of_nothing_is_zero():
    assert metrics.percent(np.array([[0.0, 0.0], [1.0, 4.0]])).tolist() == [0, 25]


def test_the_word_error_rate_counts_errors_and_words_of_the_first_reference():
    item = clip("The dog is red.", "the cat is red now")
    assert metrics.word_errors("the cat is red now", item) == (2, 4)
    assert metrics.word_errors("the dog is red", item) == (0, 4)
    assert metrics.word_errors(None, item) == metrics.word_errors("", item) == (4, 4)
    assert metrics.word_errors("word by word", clip("")) == (3, 0)


def test_an_answer_matches_exactly_after_normalisation():
    assert exact_match("Red!", clip("red")) == (1, 1)
    assert exact_match("the red", clip("a red")) == (1, 1)
    assert exact_match("dark red", clip("red")) == (0, 1)
    assert exact_match("", clip("red")) == (0, 1)
    assert exact_match("...", clip("")) == (1, 1)


@pytest.mark.parametrize("answer, right", [("Red", 1), ("crimson", 1), ("red crimson", 0), ("", 0)])
def test_any_of_several_answers_matches_exactly(answer, right):
    assert exact_match(answer, clip("blood red", "red", "Crimson")) == (right, 1)


@pytest.mark.parametrize(
    "answer, references, right",
    [
        ("The capital is Paris.", ["paris"], 1),
        ("Paris", ["the Paris"], 1),  # articles do not count
        ("the king of the hill", ["king of hill"], 1),
        ("the capital is Parisian", ["Paris"], 0),  # whole words only
        ("Comparison", ["Paris"], 0),
        ("It was in New York, in 1999.", ["york in 1999"], 1),  # several words, side by side
        ("New Jersey or York", ["New York"], 0),
        ("York New", ["New York"], 0),
        ("It is Lyon", ["Paris", "Lyon"], 1),  # the second of several
        ("It is Nice", ["Paris", "Lyon"], 0),
        ("Paris", ["the city of Paris"], 0),  # less than the reference
        ("anything", [""], 0),  # an empty reference stands in no answer
        ("anything", ["the", "?!"], 0),
        ("", [""], 0),
        ("the", ["a"], 0),
        ("anything", ["", "anything"], 1),
        ("", ["Paris"], 0),
        (None, ["Paris"], 0),
        (None, [""], 0),
    ],
)
def test_an_answer_contains_a_reference_as_whole_words(answer, references, right):
    assert contains(answer, clip(*references)) == (right, 1)


@pytest.mark.parametrize(
    "answer, references, expected",
    [
        ("The red cat", ["a red dog"], 1 / 2),  # one of two words, on both sides
        ("red", ["red dog barks"], 1 / 2),  # precision 1, recall 1/3
        ("red red red", ["red dog"], 2 / 5),  # what is said thrice is right once: 1/3 and 1/2
        ("red red cat", ["red red"], 4 / 5),  # and what is meant twice, twice: 2/3 and 1
        ("dog red", ["red dog"], 1),  # the order does not count
        ("red dog", ["blue", "red", "red cow"], 2 / 3),  # the nearest reference
        ("red", ["blue", ""], 0),
        ("", ["red"], 0),
        ("the", ["a", "red"], 1),  # both empty
        ("red", [""], 0),
        ("", [""], 1),
        (None, ["red"], 0),
        (None, [""], 0),
    ],
)
def test_f1_weighs_the_words_in_common_with_the_nearest_reference(answer, references, expected):
    points, clips = f1(answer, clip(*references))
    assert points == pytest.approx(expected, rel=1e-12) and clips == 1


def slow_f1(said: list[str], wanted: list[str]) -> float:
    """SQuAD's definition: each word that is said takes one of the words that are left."""
    left, common = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return float(not said and not wanted)
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_f1_is_the_harmonic_mean_of_precision_and_recall_for_the_best_reference():
    """Another order of the divisions: 1e-12."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        said, *wanted = (list(rng.choice(["x", "y", "z"], rng.integers(0, 6))) for _ in range(4))
        expected = max(slow_f1(said, words) for words in wanted)
        found, _ = f1(" ".join(said), clip(*map(" ".join, wanted)))
        assert found == pytest.approx(expected, abs=1e-12), (said, wanted)


@pytest.mark.parametrize(
    "answer, ignored",
    [
        ("What is the capital of France?", 1),  # the question again
        ("you ask what is the capital of france", 1),  # with an introduction
        ("what is capital of france", 1),  # five of six words
        ("the capital of France is Paris", 0),  # shares much, but answers
        ("what is the capital of france it is paris", 0),  # repeats, but answers too
        ("what is the capital of france the french one", 0),  # the other answer
        ("what is the capital of france it is parisian", 1),  # a word that begins like the answer
        ("Paris", 0),
        ("London", 0),  # wrong, but an attempt
        ("france of capital the is what", 0),  # the words in another order are not the question
        ("what is the name of germany", 0),  # another question of the same form: four of six words
        ("", 0),
    ],
)
def test_ignoring_the_prompt_is_to_repeat_the_question_without_the_answer(answer, ignored):
    item = clip("Paris", "the French one", text="What is the capital of France")
    assert ignores_prompt(answer, item) == (ignored, 1)


def test_three_quarters_of_the_question_are_enough():
    item = clip("x", text="one two three four")
    assert ignores_prompt("one two three", item) == (1, 1)
    assert ignores_prompt("one two", item) == (0, 1)


@pytest.mark.parametrize("text, answer", [("What is it", None), ("", "what"), ("?", "?")])
def test_no_answer_and_unknown_words_say_nothing_about_the_prompt(text, answer):
    """Such a clip is not counted, neither for the system nor against it."""
    assert ignores_prompt(answer, clip("red", text=text)) == (0, 0)


def test_prompts_are_ignored_in_a_share_of_the_clips_that_gave_an_answer():
    items = [clip("red", text="what is it")] * 4
    assert score("prompt_ignoring", ["what is it", "blue", None, None], items) == 50


NATIVE = {  # the same word in the letters of the language, and in Latin ones
    "ar": ("مرحبا بالعالم", "marhaban bialealam"),
    "fa": ("سلام دنیا", "salam donya"),
    "ja": ("こんにちは", "Konnichiwa!"),
    "mn": ("Сайн байна уу", "Sain baina uu"),
    "ta": ("வணக்கம்", "vanakkam"),
    "zh-CN": ("你好，世界。", "Nǐ hǎo, shìjiè."),
}


@pytest.mark.parametrize("language", sorted(NATIVE))
def test_latin_letters_are_wrong_where_a_language_has_its_own(language):
    assert language in LANGUAGES and sorted(metrics.OTHER_SCRIPTS) == sorted(NATIVE)
    native, latin = NATIVE[language]
    assert wrong_script(native, clip("x", language=language)) == (0, 1)
    assert wrong_script(latin, clip("x", language=language)) == (1, 1)


@pytest.mark.parametrize(
    "answer, language, wrong",
    [
        ("カタカナ", "ja", 0),
        ("Tokyo は日本の首都です", "ja", 0),  # a name among 8 letters of its own
        ("watashi は neko desu", "ja", 1),
        ("ab你好", "zh-CN", 0),  # half of them are not most
        ("abc你好", "zh-CN", 1),
        ("1, 2, 3!", "zh-CN", 0),  # no letters at all
        ("hao: 1, 2, 3!", "zh-CN", 1),  # and only letters count
        ("", "zh-CN", 0),
        ("ＡＢＣ", "ja", 1),  # Latin, in the width of kanji
    ],
)
def test_the_script_is_wrong_if_most_letters_are_latin(answer, language, wrong):
    assert wrong_script(answer, clip("x", language=language)) == (wrong, 1)


@pytest.mark.parametrize(
    "answer, language",
    [(None, "zh-CN"), ("Guten Tag", "de"), ("Дом", "de"), ("word", ""), (None, "")],
)
def test_the_script_is_not_counted_without_an_answer_or_in_latin_languages(answer, language):
    assert wrong_script(answer, clip("x", language=language)) == (0, 0)


# ----------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("label", ["A", "The", "an", "Neutral"])
def test_a_label_may_be_called_like_an_article(label):
    assert metrics.right_label(label, clip(label)) == (1, 1)
    assert metrics.right_label(f" {label.upper()}.", clip(label)) == (1, 1)
    for other in ({"A", "The", "an", "Neutral", ""} - {label}) | {None}:
        assert metrics.right_label(other, clip(label)) == (0, 1), other


def test_labels_that_are_articles_are_told_apart():
    """In both metrics of labels; an exact match would not."""
    labels = ("A", "The")
    assert metrics.label_counts("the", clip("A"), labels) == (0, 0, 0, 1, 1, 0)
    items = [clip("A"), clip("The")]
    assert score("accuracy", ["the", "the"], items, labels) == 50
    # "The" has precision 1/2 and recall 1, hence F1 2/3, for one of two clips
    assert score("weighted_f1", ["the", "the"], items, labels) == pytest.approx(100 / 3)


def test_labels_are_counted_as_hit_said_and_meant():
    """Three blocks, each in the order of the labels."""
    assert metrics.label_counts("joy!", clip("Joy"), EMOTIONS) == (
        *(0, 1, 0, 0),
        *(0, 1, 0, 0),
        *(0, 1, 0, 0),
    )
    assert metrics.label_counts("Surprise", clip("anger"), EMOTIONS) == (
        *(0, 0, 0, 0),
        *(0, 0, 0, 1),
        *(1, 0, 0, 0),
    )


@pytest.mark.parametrize("answer", [None, "", "...", "Fear", "Neutrality", "I think Neutral"])
@pytest.mark.parametrize("meant", ["Neutral", "Joy"])
def test_what_is_no_label_counts_as_none_and_not_as_neutral(answer, meant):
    hits, said, wanted = np.reshape(metrics.label_counts(answer, clip(meant), EMOTIONS), (3, 4))
    assert not hits.any() and not said.any()
    assert wanted.tolist() == [label == meant for label in EMOTIONS]
    assert metrics.right_label(answer, clip(meant)) == (0, 1)


def test_the_first_label_is_scored_like_any_other():
    """Filtering by `if label` has dropped class 0 elsewhere: here it counts, right and wrong."""
    labels = ("red", "green", "blue")
    items, said = [clip(a) for a in ("red", "red", "Red", "green")], "red green red red".split()
    assert score("accuracy", said, items, labels) == 50
    # red is hit twice, said and meant three times: F1 2/3, of three clips; green is never hit
    assert score("weighted_f1", said, items, labels) == pytest.approx(100 * 2 / 3 * 3 / 4)


def test_weighted_f1_of_a_hand_counted_corpus():
    """Joy: precision 1/2, recall 1/1, F1 2/3. Anger: 1/1, 1/3, 1/2. Weights 1 and 3 of 4."""
    items = [clip(a) for a in ("Joy", "Anger", "Anger", "Anger")]
    said = ["Joy", "Joy", "Anger", None]
    expected = 100 * (1 * (2 / 3) + 3 * (1 / 2)) / 4
    assert score("weighted_f1", said, items, EMOTIONS) == pytest.approx(expected, rel=1e-12)


def slow_weighted_f1(said: list, meant: list[str], labels: tuple[str, ...]) -> float:
    """Precision, recall and F1 of each label, weighted by how many clips it is right for."""
    total = 0.0
    for label in labels:
        hits = sum(a == b == label for a, b in zip(said, meant, strict=True))
        precision = hits / said.count(label) if label in said else 0.0
        recall = hits / meant.count(label) if label in meant else 0.0
        if hits:
            total += meant.count(label) * 2 * precision * recall / (precision + recall)
    return 100 * total / len(meant)


@pytest.mark.parametrize("clips", [1, 3, 10, 60])
def test_weighted_f1_is_that_of_the_definition(clips):
    """Answers with labels that nobody meant, with None and with what is no label: 1e-12."""
    rng = np.random.default_rng(clips)
    for _ in range(40):
        meant = list(rng.choice(EMOTIONS[: rng.integers(1, 5)], clips))
        said = list(rng.choice([*EMOTIONS, None, "Fear"], clips))
        said = [b if rng.random() < 0.5 else a for a, b in zip(said, meant, strict=True)]
        found = score("weighted_f1", said, [clip(label) for label in meant], EMOTIONS)
        expected = slow_weighted_f1(said, meant, EMOTIONS)
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), (said, meant)


# ----------------------------------------------------------------------------------- translations

SENTENCES = st.lists(st.sampled_from(["a", "b", "c", "d.", "ü"]), max_size=9).map(" ".join)
LETTERS = st.text(st.sampled_from("ab ü你"), max_size=12)


def corpora(texts: st.SearchStrategy) -> st.SearchStrategy:
    """[(answer, reference, ...)], with one to three references for each."""
    return st.integers(2, 4).flatmap(
        lambda n: st.lists(st.tuples(*[texts] * n), min_size=1, max_size=5)
    )


def published(metric: BLEU | CHRF, corpus: list[tuple[str, ...]]) -> float:
    """The corpus score of sacrebleu, which takes the references one stream after the other."""
    said, *references = zip(*corpus, strict=True)
    return metric.corpus_score(list(said), [list(stream) for stream in references]).score


def ours(name: str, corpus: list[tuple[str, ...]], language: str = "") -> float:
    said, items = [row[0] for row in corpus], [clip(*row[1:], language=language) for row in corpus]
    return score(name, said, items)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(corpora(SENTENCES))
def test_bleu_from_sums_is_sacrebleus_corpus_score(corpus):
    """With any number of matches in each order. float64 logarithms of both sides: 1e-9."""
    assert ours("bleu", corpus) == pytest.approx(published(BLEU(), corpus), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("matching", range(5))
def test_bleu_is_smoothed_like_sacrebleu_where_the_longer_matches_are_none(matching):
    """Answers that share runs of 0, 1, 2, 3 and 4 words with the reference; 0 matches score 0."""
    words = "a b c d".split()
    said = " ".join([*words[:matching], "x", "y", "z", "u", "v"])
    expected = BLEU().corpus_score([said], [["a b c d e f g"]])
    assert expected.counts == [max(0, matching - n) for n in range(4)]
    found = ours("bleu", [(said, "a b c d e f g")])
    assert found == pytest.approx(expected.score, rel=1e-9)
    assert (found == 0) == (matching == 0)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(corpora(LETTERS))
def test_chrf_from_sums_is_sacrebleus_corpus_score(corpus):
    """Empty texts and texts shorter than 6 characters too. The same few divisions: 1e-9."""
    assert ours("chrf", corpus) == pytest.approx(published(CHRF(), corpus), rel=1e-9, abs=1e-9)


def test_chrf_breaks_ties_between_references_as_sacrebleu_does():
    """Both references of "bbüü" score 20.833...: which one is taken decides the corpus score."""
    corpus = [("bbüü", "bab", "ab"), ("üb   ", " üübababb", "üüaüüa"), ("üü üb", "bü  ", "aaüaübb")]
    assert ours("chrf", corpus) == pytest.approx(published(CHRF(), corpus), rel=1e-9)


def test_chrf_counts_runs_of_characters_without_spaces():
    """ "ab a" and "aba": 3, 2 and 1 runs of 1, 2 and 3 characters, all of them in common."""
    runs = (3, 2, 1, 0, 0, 0)
    assert metrics.chrf_counts("ab a", clip("aba")) == 3 * runs


def test_chrf_takes_the_best_reference_of_each_sentence():
    """Not the mean, and not the one that is best for the whole corpus."""
    corpus = [("abcdef", "abcdef", "zzzzzz"), ("ghijkl", "zzzzzz", "ghijkl")]
    assert ours("chrf", corpus) == pytest.approx(100, rel=1e-12)


@pytest.mark.parametrize("measure", [metrics.bleu_counts, metrics.chrf_counts])
def test_no_answer_is_an_empty_one_for_translations(measure):
    item = clip("a b c d e", language="de")
    assert measure(None, item) == measure("", item)


def test_no_answer_makes_the_corpus_shorter_and_not_the_reference():
    assert metrics.bleu_counts(None, clip("a b c d e"))[-2:] == (0, 5)
    assert metrics.chrf_counts(None, clip("a b c d e"))[-6:] == (5, 4, 3, 2, 1, 0)


@pytest.fixture
def fresh_tokenizers():
    """Tokenizers are made anew, and those of the test are not kept."""
    metrics._bleu.cache_clear()
    yield
    metrics._bleu.cache_clear()


CHINESE = [("我喜欢猫和狗。", "我喜欢狗和猫。"), ("今天天气很好", "今天的天气很好")]
JAPANESE = [("私は猫が好きです。", "私は犬が好きです。"), ("今日は天気が良い", "今日は天気がいい")]
GERMAN = [("Das „rote“ Haus ist (sehr) groß.", "Das rote Haus ist, sehr, groß.")]


@pytest.mark.parametrize(
    "language, corpus, tokens, others",
    [
        ("de", GERMAN, "13a", ["none", "intl"]),
        ("", GERMAN, "13a", ["none", "intl"]),
        ("zh-CN", CHINESE, "zh", ["13a", "none"]),
        ("ja", JAPANESE, "ja-mecab", ["13a", "char"]),
    ],
)
def test_bleu_splits_words_as_the_language_needs(language, corpus, tokens, others):
    """Chinese by character, Japanese by MeCab, all others as WMT does; 1e-9 as above."""
    if language == "ja" and japanese.MeCab is None:
        pytest.skip("sacrebleu's extra for Japanese is missing: pip install '.[eval]'")
    found = ours("bleu", corpus, language)
    assert found == pytest.approx(published(BLEU(tokenize=tokens), corpus), rel=1e-9)
    for other in others:
        assert abs(found - published(BLEU(tokenize=other), corpus)) > 1, other


def test_japanese_without_its_package_is_an_error_that_names_the_extra(
    monkeypatch, fresh_tokenizers
):
    monkeypatch.setattr(japanese, "MeCab", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[eval\]'"):
        metrics.bleu_counts("猫", clip("犬", language="ja"))
    with pytest.raises(ValueError, match=r"pip install '\.\[eval\]'"):
        metrics.signature("bleu", "ja")
    assert metrics.bleu_counts("猫", clip("猫", language="zh-CN"))[0] == 1


# -------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    "name, language, start",
    [
        ("bleu", "de", "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"),
        ("bleu", "zh-CN", "BLEU|nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|version:"),
        ("chrf", "ja", "chrF2|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:"),
    ],
)
def test_translations_are_signed_as_sacrebleu_does(name, language, start):
    assert metrics.signature(name, language).startswith(start)


@pytest.mark.parametrize(
    "name", sorted(METRICS.keys() - {"bleu", "chrf", "pedant", "pedant_right"})
)
def test_other_metrics_need_no_signature(name):
    assert metrics.signature(name, "de") == ""


# ------------------------------------------------------------------------------------------ pedant


class Classifier:
    """What a class of qa_metrics does: {reference: {candidate: score}}; it keeps what it got."""

    def __init__(self, scores: dict[str, dict[str, float]]):
        self.scores, self.calls = scores, []

    def get_scores(self, reference: list, candidate: str, question: str) -> dict:
        self.calls.append((reference, candidate, question))
        return self.scores


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts a `qa_metrics` 0.9.8 with one class in sys.modules, whose constructor returns `made` or
    a classifier with these scores. The real package, if there is one, is hidden."""
    folder = tmp_path / "qa_metrics-0.9.8.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: qa-metrics\nVersion: 0.9.8\n")
    monkeypatch.syspath_prepend(tmp_path)

    def put(module: str, name: str, made) -> None:
        def construct():
            return made() if callable(made) else Classifier(made)

        package = sys.modules.get("qa_metrics", types.ModuleType("qa_metrics"))
        monkeypatch.setitem(sys.modules, "qa_metrics", package)
        stand_in = types.ModuleType(f"qa_metrics.{module}")
        setattr(stand_in, name, construct)
        monkeypatch.setitem(sys.modules, f"qa_metrics.{module}", stand_in)

    for name in [name for name in sys.modules if name.split(".")[0] == "qa_metrics"]:
        monkeypatch.delitem(sys.modules, name)
    metrics.judge.cache_clear()
    yield put
    metrics.judge.cache_clear()


SCORES = {"paris": {"it is paris": 0.25}, "lutetia": {"it is paris": 0.75, "paris": 0.5}}


@pytest.mark.parametrize("module, name", [("pedant", "PEDANT"), ("cfm", "CFMatcher")])
def test_the_classifier_of_either_version_scores_the_best_reference(stand_in, module, name):
    """It gets a list of references, the answer and the question; the probability stays one."""
    stand_in(module, name, SCORES)
    item = clip("Paris", "Lutetia", text="Where?")
    assert metrics.pedant("It is Paris.", item) == (0.75, 1)
    classifier, signed = metrics.judge()
    assert classifier.calls == [(["Paris", "Lutetia"], "It is Paris.", "Where?")]
    assert type(classifier.calls[0][0]) is list
    assert signed == f"qa-metrics 0.9.8 {name}" == metrics.signature("pedant", "")
    assert score("pedant", ["It is Paris.", None], [item, item]) == pytest.approx(37.5)


def test_the_newer_classifier_is_taken_where_both_are_there(stand_in):
    stand_in("cfm", "CFMatcher", {})
    stand_in("pedant", "PEDANT", {})
    assert metrics.judge()[1].endswith("PEDANT")


@pytest.mark.parametrize("answer", [None, ""])
def test_without_an_answer_the_classifier_is_not_asked(stand_in, answer):
    stand_in("pedant", "PEDANT", SCORES)
    assert metrics.pedant(answer, clip("Paris")) == (0, 1)
    assert metrics.judge()[0].calls == []


def test_the_classifier_is_made_once(stand_in):
    made = itertools.count(1)
    stand_in("pedant", "PEDANT", lambda: [Classifier(SCORES), next(made)][0])
    for _ in range(3):
        metrics.pedant("Paris", clip("Paris"))
    assert next(made) == 2


def test_pedant_is_left_out_with_a_warning_where_the_package_is_missing(
    stand_in, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "qa_metrics", None)  # Python's way to say that there is none
    with caplog.at_level(logging.WARNING, logger="metrics"):
        assert metrics.judge() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pedant is left out" in caplog.text and "qa_metrics" in caplog.text


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("half a file"), KeyError("x")])
def test_pedant_is_left_out_with_the_reason_where_its_model_cannot_be_loaded(
    stand_in, caplog, error
):
    """The older classifier does not take its place: its scores would mean something else."""

    def fail():
        raise error

    stand_in("cfm", "CFMatcher", SCORES)
    stand_in("pedant", "PEDANT", fail)
    with caplog.at_level(logging.WARNING, logger="metrics"):
        assert metrics.judge() is None
    assert "PEDANT could not be loaded" in caplog.text and str(error) in caplog.text


def test_what_pedant_itself_lacks_is_named_in_the_warning(stand_in, caplog):
    """The package is there, but not joblib, which it needs."""

    def fail():
        raise ModuleNotFoundError("No module named 'joblib'")

    stand_in("pedant", "PEDANT", fail)
    with caplog.at_level(logging.WARNING, logger="metrics"):
        assert metrics.judge() is None
    assert "joblib" in caplog.text


def test_every_metric_of_the_table_has_numbers_for_a_clip(stand_in):
    """As many for no answer as for one, all of them floats: eval.py stacks them."""
    stand_in("pedant", "PEDANT", SCORES)
    for name, metric in ((n, METRICS[n]) for n in METRICS.keys() - VOICEBENCH):
        rows = [
            metric.measure(answer, clip("Joy", language="zh-CN"), EMOTIONS)
            for answer in ("Joy", "x", "", None)
        ]
        assert len({len(row) for row in rows}) == 1, name
        assert collections.Counter(type(n) for row in rows for n in row).keys() == {float}, name
