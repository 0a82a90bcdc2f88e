"""Metrics: what an answer is worth.

    measure(answer, example, labels) -> a few numbers;  score = combine(their sums over clips)

Every score here is a function of sums: a share, a word error rate, BLEU, even a weighted F1. So a
bootstrap or a permutation of any of them is one matrix product (significance.py). Scores run from
0 to 100. No answer (None) is a wrong answer, and never one of the labels.

Axes: N clips, Y systems, C numbers of a metric, K labels, R resamples.
Source: SQuAD's evaluation script (normalisation, F1), Papineni et al. 2002 (BLEU), Popovic 2015
(chrF), with sacrebleu's settings; Li et al. 2024 (PANDA, later PEDANTS).
Reads: suites.py, voicebench.py.   Read next: significance.py.
"""

import collections
import functools
import importlib
import importlib.metadata
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sacrebleu.metrics import BLEU, CHRF

from evaluation import voicebench
from evaluation.suites import Example

NO_LABELS = ("other", "no answer")  # what histograms call answers that are none of the labels
CHARACTERS = 6  # chrF compares runs of 1 to 6 characters
OTHER_SCRIPTS = ("ar", "fa", "ja", "mn", "ta", "zh-CN")  # not written in Latin letters

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------
# Texts


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces. Marks stay: they are the vowels of Tamil."""
    plain = "".join(
        letter
        for letter in unicodedata.normalize("NFC", text).lower()
        if letter.isalnum() or letter.isspace() or unicodedata.category(letter)[0] == "M"
    )
    return " ".join(plain.split())


def without_articles(text: str) -> str:
    """Normalised as SQuAD does: also without a, an, the."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", normalise(text)).split())


def edits(a: str, b: str, substitution: int = 1) -> int:
    """The least cost of insertions, deletions (1 each) and substitutions of words from a to b."""
    source, target = normalise(a).split(), normalise(b).split()
    row = list(range(len(target) + 1))
    for i, word in enumerate(source, 1):
        above, row = row, [i]
        for j, other in enumerate(target, 1):
            change = above[j - 1] + substitution * (word != other)
            row.append(min(above[j] + 1, row[j - 1] + 1, change))
    return row[-1]


# ---------------------------------------------------------------------------------------------
# Shares: (points, out of)


def percent(sums: Float[np.ndarray, "*R 2"]) -> Float[np.ndarray, "*R"]:
    """The first number over the second; 0 where there is nothing to count."""
    return 100 * sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def exact_match(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Is it one of the answers, case, punctuation and articles aside?"""
    wanted = map(without_articles, example.answers)
    return float(answer is not None and without_articles(answer) in wanted), 1.0


def contains(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Does one of the answers stand in it, as whole words? Sentences are asked for, and whole
    sentences never match exactly; PEDANT too gives these the full score."""
    said = f" {without_articles(answer or '')} "
    wanted = [without_articles(reference) for reference in example.answers]
    return float(any(words and f" {words} " in said for words in wanted)), 1.0


def f1(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Harmonic mean of precision and recall of the words, for the nearest of the answers."""
    if answer is None:
        return 0.0, 1.0
    said = without_articles(answer).split()

    def score(reference: str) -> float:
        wanted = without_articles(reference).split()
        common = (collections.Counter(said) & collections.Counter(wanted)).total()
        if not said or not wanted:
            return float(said == wanted)
        return 2 * common / (len(said) + len(wanted))

    return max(map(score, example.answers)), 1.0


def ignores_prompt(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Does it repeat the question instead: does it hold at least three quarters of the question's
    words in their order (longest common subsequence), and none of the answers?

    "The capital of France is Paris" shares much with its question, but answers it. A clip that gave
    no answer, or whose words are unknown, says nothing about this and is not counted.
    """
    said, asked = normalise(answer or ""), normalise(example.text)
    words = len(asked.split())
    if answer is None or not words:
        return 0.0, 0.0
    # with substitutions at the price of a deletion and an insertion, only common words are free
    common = (len(said.split()) + words - edits(said, asked, substitution=2)) / 2
    answers = any(f" {normalise(wanted)} " in f" {said} " for wanted in example.answers)
    return float(common >= 0.75 * words and not answers), 1.0


def wrong_script(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Are most of its letters Latin, though the language is not written so? (Llama 3 likes to
    answer in pinyin and romaji.) Other languages, and clips without an answer, are not counted."""
    if answer is None or example.language not in OTHER_SCRIPTS:
        return 0.0, 0.0
    letters = [letter for letter in answer if letter.isalpha()]
    latin = sum("LATIN" in unicodedata.name(letter, "") for letter in letters)
    return float(2 * latin > len(letters)), 1.0


def word_errors(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Word edits from the answer to the reference, and the reference's words."""
    (reference,) = example.answers[:1]
    return float(edits(answer or "", reference)), float(len(normalise(reference).split()))


def pedant(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """The probability that a classifier gives to the answer's being right, as the paper scores it:
    the best over the references, not thresholded. Needs `judge()`."""
    if not answer:
        return 0.0, 1.0
    scores = judge()[0].get_scores(list(example.answers), answer, example.text)
    return max(float(score) for each in scores.values() for score in each.values()), 1.0


def pedant_right(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Does the classifier take it for right? As VoiceBench asks it: all in lower case."""
    wanted = [reference.lower() for reference in example.answers]
    right = answer and judge()[0].evaluate(wanted, answer.lower(), example.text.lower())
    return float(bool(right)), 1.0


@functools.cache
def judge() -> tuple[Any, str] | None:
    """The classifier of qa-metrics and its name with the version, or None, with a warning.

    It was called PANDA (CFMatcher) when the paper was written, and was trained anew since: scores
    of different versions cannot be compared.
    """
    for module, name in (("pedant", "PEDANT"), ("cfm", "CFMatcher")):
        try:
            classifier = getattr(importlib.import_module(f"qa_metrics.{module}"), name)()
            return classifier, f"qa-metrics {importlib.metadata.version('qa-metrics')} {name}"
        except ModuleNotFoundError as error:
            reason = str(error)
            if not (error.name or "").startswith("qa_metrics"):  # but what it needs itself
                break
        except Exception as error:  # it downloads its model, and says nothing if that fails
            reason = f"{name} could not be loaded: {error}"
            break
    log.warning("pedant is left out: %s (see README, Evaluate)", reason)
    return None


# ---------------------------------------------------------------------------------------------
# Labels


def right_label(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Is it the label? Articles count here: a label may be called A."""
    return float(answer is not None and normalise(answer) == normalise(example.answers[0])), 1.0


def label_counts(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Of each label: was it said rightly, was it said, was it meant. What is not a label, and no
    answer, counts for none: such a clip lowers the recall of what was meant."""
    names = np.array([normalise(label) for label in labels])
    meant = names == normalise(example.answers[0])
    said = (names == normalise(answer)) if answer is not None else np.zeros(len(names), bool)
    return (*map(float, (*(meant & said), *said, *meant)),)


def weighted_f1(sums: Float[np.ndarray, "*R C"]) -> Float[np.ndarray, "*R"]:
    """F1 of each label, weighted by how often it is right (scikit-learn's average="weighted")."""
    hits, said, meant = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    each = 2 * hits / np.maximum(said + meant, 1e-12)
    return 100 * (each * meant).sum(-1) / np.maximum(meant.sum(-1), 1e-12)


# ---------------------------------------------------------------------------------------------
# Translations, as sacrebleu counts: corpus scores, never means over sentences


@functools.cache
def _bleu(language: str, effective_order: bool = False) -> BLEU:
    """With the tokenizer of the language, as WMT does."""
    tokens = {"zh-CN": "zh", "ja": "ja-mecab"}.get(language, "13a")
    try:
        return BLEU(tokenize=tokens, effective_order=effective_order)
    except RuntimeError as error:  # sacrebleu's, if a package for Japanese is missing
        raise ValueError(
            "BLEU of Japanese needs a tokenizer that is not installed. Run pip install "
            "'sacrebleu[ja]', or install this project with its extra: pip install '.[eval]'"
        ) from error


def bleu_counts(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """n-gram matches (4), n-grams (4) and lengths of the answer and the reference."""
    # effective_order changes no count; without it single sentences are warned about
    metric = _bleu(example.language, effective_order=True)
    counts = metric.sentence_score(answer or "", list(example.answers))
    return (*map(float, (*counts.counts, *counts.totals, counts.sys_len, counts.ref_len)),)


def bleu(sums: Float[np.ndarray, "*R 10"]) -> Float[np.ndarray, "*R"]:
    """Corpus BLEU with sacrebleu's default smoothing, for many corpora at once.

    Orders without a match count as 1/2, 1/4, ... of a match, in turn (`smooth:exp`).
    """
    matches, totals, said, wanted = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    none = matches == 0
    smooth = np.where(none, 0.5 ** np.cumsum(none, -1), matches)
    precision = smooth / np.maximum(totals, 1)
    mean = np.exp(np.log(np.maximum(precision, 1e-300)).mean(-1))
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(said, 1e-9)))
    return np.where(none.all(-1) | (totals == 0).any(-1), 0.0, 100 * brevity * mean)


def chrf_counts(answer: str | None, example: Example, labels: Sequence[str] = ()) -> tuple:
    """Matches (6), runs in the answer (6) and in the reference (6) of 1 to 6 characters, spaces
    aside; for the reference that scores best."""

    def count(text: str) -> list[collections.Counter]:
        text = "".join(text.split())
        return [
            collections.Counter(text[i : i + n] for i in range(len(text) - n + 1))
            for n in range(1, CHARACTERS + 1)
        ]

    def against(reference: str) -> list[int]:
        wanted = count(reference)
        common = [(a & b).total() for a, b in zip(said, wanted, strict=True)]
        # as in sacrebleu, runs longer than the whole reference are not held against the answer
        runs = [a.total() if b else 0 for a, b in zip(said, wanted, strict=True)]
        return [*common, *runs, *(b.total() for b in wanted)]

    said = count(answer or "")
    found = [against(reference) for reference in example.answers]
    return (*map(float, found[chrf(np.array(found, float)).argmax()]),)


def chrf(sums: Float[np.ndarray, "*R 18"]) -> Float[np.ndarray, "*R"]:
    """Corpus chrF2: precision and recall averaged over the orders that both sides have."""
    matches, said, wanted = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    both = (said > 0) & (wanted > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision = np.where(both, matches / np.maximum(said, 1), 0).sum(-1) / orders
    recall = np.where(both, matches / np.maximum(wanted, 1), 0).sum(-1) / orders
    # in sacrebleu's order of multiplication, or two references may tie here and not there
    return 100 * (5 * precision * recall / np.maximum(4 * precision + recall, 1e-300))


# ---------------------------------------------------------------------------------------------
# The table


class Metric(NamedTuple):
    """A few numbers for each answer, and what their sums over the clips mean."""

    measure: Callable[[str | None, Example, Sequence[str]], tuple[float, ...]]
    combine: Callable[[np.ndarray], np.ndarray]
    lower_is_better: bool = False
    by_language: bool = False  # of several languages: each alone, then the mean


METRICS = {
    "exact_match": Metric(exact_match, percent),
    "contains": Metric(contains, percent),
    "f1": Metric(f1, percent),
    "pedant": Metric(pedant, percent),
    "prompt_ignoring": Metric(ignores_prompt, percent, lower_is_better=True),
    "bleu": Metric(bleu_counts, bleu, by_language=True),
    "chrf": Metric(chrf_counts, chrf, by_language=True),
    "wrong_script": Metric(wrong_script, percent, lower_is_better=True),
    "accuracy": Metric(right_label, percent),
    "weighted_f1": Metric(label_counts, weighted_f1),
    "wer": Metric(word_errors, percent, lower_is_better=True),
    # VoiceBench's
    "pedant_right": Metric(pedant_right, percent),
    "judged": Metric(voicebench.judged, percent),
}


def can_count(name: str, examples: Sequence[Example], answers: dict[str, list]) -> bool:
    """Is all there that a metric needs: a package, or a judge's word on every answer?"""
    if name == "pedant":
        return judge() is not None
    if name == "pedant_right":  # of which the older classifier says nothing
        return judge() is not None and hasattr(judge()[0], "evaluate")
    return name != "judged" or voicebench.all_judged(examples, answers)


def signature(name: str, language: str, references: int = 1) -> str:
    """What must be said beside a score so that it can be compared with others; often nothing."""
    if name in ("pedant", "pedant_right"):
        return judge()[1]
    if name not in ("bleu", "chrf"):
        return ""
    metric = CHRF() if name == "chrf" else _bleu(language)
    score = metric.corpus_score(["a"], [["a"]] * references)  # which the signature tells
    return f"{score.name}|{metric.get_signature()}"
