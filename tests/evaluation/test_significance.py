"""significance.py: intervals hold the truth, p is small by chance as often as it says.

The oracles are the tests written out with lists of clips, and the enumeration of every swap. Axes:
N clips, K sentences, Y systems, C numbers of a metric, R resamples.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from sacrebleu.metrics import BLEU

from evaluation import metrics, significance
from evaluation.metrics import percent
from evaluation.significance import (
    against_chance,
    bootstrap,
    by_sentence,
    compare,
    holm,
    permutation,
)
from evaluation.suites import Example


def one_stratum(columns: np.ndarray, sentences) -> np.ndarray:
    """[K, Y, C] of clips in one language."""
    return by_sentence(columns, list(map(str, sentences)), np.zeros(len(columns), int))


def shares(*systems) -> np.ndarray:
    """[K, Y, 2] of systems that are right (1) or wrong (0) about one clip of each sentence."""
    right = np.stack(systems, 1).astype(float)
    columns = np.stack([right, np.ones_like(right)], -1)
    return one_stratum(columns, range(len(right)))


def spoken(clips: int, sentences: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Word errors of four systems: columns [N, 4, 2], and the sentence of each clip."""
    rng = np.random.default_rng(seed)
    names = [f"sentence {i}" for i in rng.integers(0, sentences, clips)]
    words = rng.integers(3, 9, clips)
    errors = rng.binomial(words[:, None], [0.5, 0.35, 0.4, 0.3])
    columns = np.stack([errors, np.repeat(words[:, None], 4, 1)], -1)
    return columns.astype(float), names


# -------------------------------------------------------------------------------------- sentences


def test_the_clips_of_a_sentence_are_added():
    columns, names = spoken(clips=40, sentences=15, seed=0)
    found = one_stratum(columns, names)
    expected = {name: np.zeros((4, 2)) for name in sorted(set(names))}
    for row, name in zip(columns, names, strict=True):
        expected[name] += row
    assert found.shape == (len(expected), 4, 2)
    rows = [sums.tolist() for sums in expected.values()]
    assert sorted(found.tolist()) == sorted(rows)


def test_numbers_of_different_languages_stay_apart():
    """One sentence in two languages is one row, with each language in columns of its own."""
    columns = np.arange(1.0, 9.0).reshape(4, 1, 2)
    found = by_sentence(columns, ["yes", "no", "yes", "yes"], np.array([0, 1, 1, 0]))
    # "no" has clips of the second language alone; "yes" two of the first and one of the second
    assert sorted(found[:, 0].tolist()) == [[0, 0, 3, 4], [1 + 7, 2 + 8, 5, 6]]


def test_the_columns_of_a_language_sum_to_its_clips():
    """Whatever the sentences: the score of a language is that of its clips."""
    columns, names = spoken(clips=40, sentences=15, seed=1)
    strata = np.random.default_rng(2).integers(0, 3, 40)
    total = by_sentence(columns, names, strata).sum(0).reshape(4, 3, 2)
    for language in range(3):
        np.testing.assert_array_equal(total[:, language], columns[strata == language].sum(0))


# -------------------------------------------------------------------------------------- bootstrap


def test_the_bootstrap_draws_whole_sentences(monkeypatch):
    """Each resample holds as many sentences as there are, each with all of its clips.

    Drawn with equal chances: a sentence comes once on average, with variance 1 - 1/K. Of 4,100
    resamples the mean is off by 1/64 and the variance by about 1.7/64: four times that is 0.11.
    """
    monkeypatch.setattr(significance, "RESAMPLES", 4100)  # no multiple of a block
    sizes = np.array([3, 1, 4, 2])
    clusters = np.repeat(["b", "d", "a", "c"], sizes)
    order = np.random.default_rng(0).permutation(sizes.sum())
    membership = np.eye(4)[np.repeat(range(4), sizes)]  # [N, C]: one column for each sentence
    drawn = bootstrap(one_stratum(membership[order][:, None], clusters[order]))
    assert drawn.shape == (4100, 1, 4)
    times = drawn[:, 0] / sizes
    np.testing.assert_array_equal(times, times.round())
    np.testing.assert_array_equal(times.sum(1), 4)
    np.testing.assert_allclose(times.mean(0), 1, atol=0.11)
    np.testing.assert_allclose(times.var(0), 1 - 1 / 4, atol=0.11)


def test_the_bootstrap_is_paired_and_the_same_every_time():
    """All systems get the same draws, every call gives the same numbers. Whole numbers add up
    exactly in any order."""
    rng = np.random.default_rng(0)
    columns = np.repeat(rng.integers(-999, 999, (30, 1, 2)), 4, axis=1).astype(float)
    table = one_stratum(columns, rng.integers(0, 12, 30))
    drawn = bootstrap(table)
    np.testing.assert_array_equal(drawn, np.repeat(drawn[:, :1], 4, axis=1))
    np.testing.assert_array_equal(drawn, bootstrap(table))
    assert len(np.unique(drawn[:, 0, 0])) > 4000, "the resamples are one resample"


def test_intervals_and_p_are_those_of_a_slow_bootstrap():
    """Written out with lists of clips: draw sentences, pool their clips, score, sort.

    4,000 slow resamples: the share beyond an end of the interval is off by at most
    4 * sqrt(0.025 / 4000) = 1 %, and p, twice a share, by 2 * 4 * sqrt(0.25 / 4000) = 6.4 %.
    """
    columns, clusters = spoken(clips=40, sentences=15, seed=0)
    errors, words = columns[..., 0], columns[:, 0, 1]
    entries = compare(one_stratum(columns, clusters), 1, [0, 1, 2], -1, percent)
    rng = np.random.default_rng(0)
    names = sorted(set(clusters))
    members = {name: [n for n, c in enumerate(clusters) if c == name] for name in names}
    slow = []
    for _ in range(4000):
        clips = [n for i in rng.integers(0, len(names), len(names)) for n in members[names[i]]]
        slow.append(100 * errors[clips].sum(0) / words[clips].sum())
    slow = np.array(slow)
    for y, entry in enumerate(entries):
        assert entry["score"] == pytest.approx(100 * errors[:, y].sum() / words.sum())
        assert (slow[:, y] < entry["low"]).mean() == pytest.approx(0.025, abs=0.01)
        assert (slow[:, y] > entry["high"]).mean() == pytest.approx(0.025, abs=0.01)
        if y != 1:
            gain = slow[:, 1] - slow[:, y]
            share = min((gain <= 0).mean(), (gain >= 0).mean())
            assert entry["p_bootstrap"] == pytest.approx(min(1, 2 * share), abs=0.064)


# ------------------------------------------------------------------------------------ permutation


def slow_swaps(
    columns: np.ndarray, clusters: list[str], other: int, swaps: list[dict[str, bool]]
) -> float:
    """The share of these swaps after which the systems 0 and `other` differ at least as much."""

    def difference(swap: dict[str, bool]) -> float:
        ours, theirs = [], []
        for row, name in zip(columns, clusters, strict=True):
            a, b = (other, 0) if swap[name] else (0, other)
            ours.append(row[a])
            theirs.append(row[b])
        rates = [100 * sum(e for e, _ in rows) / sum(w for _, w in rows) for rows in (ours, theirs)]
        return abs(rates[0] - rates[1])

    observed = difference(dict.fromkeys(clusters, False))
    return float(np.mean([difference(swap) >= observed - 1e-6 for swap in swaps]))


def test_p_is_that_of_a_slow_permutation():
    """Written out with lists of clips: a coin for each sentence says whether all of its clips are
    swapped. 4,000 slow swaps and 10,000 fast ones differ by at most
    4 * sqrt(0.25 / 4000 + 0.25 / 10000) = 3.8 %.
    """
    columns, clusters = spoken(clips=40, sentences=15, seed=0)
    found = permutation(one_stratum(columns, clusters), 0, percent)
    rng = np.random.default_rng(0)
    names = sorted(set(clusters))
    coins = rng.integers(0, 2, (4000, len(names))).astype(bool)
    swaps = [dict(zip(names, row, strict=True)) for row in coins]
    expected = [slow_swaps(columns, clusters, y, swaps) for y in range(1, 4)]
    assert max(expected) > 0.05, "the differences are too clear to tell a wrong p"
    np.testing.assert_allclose(found[1:], expected, atol=0.038)


@pytest.mark.parametrize("sentences", [2, 3, 7])
def test_p_is_the_share_of_all_possible_swaps(sentences):
    """2^K of them; 10,000 random ones are off by at most 4 * sqrt(0.25 / 10000) = 2 %."""
    columns, clusters = spoken(clips=3 * sentences, sentences=sentences, seed=sentences)
    names = sorted(set(clusters))
    assert len(names) == sentences
    coins = itertools.product([False, True], repeat=sentences)
    swaps = [dict(zip(names, row, strict=True)) for row in coins]
    found = permutation(one_stratum(columns, clusters), 0, percent)
    expected = [slow_swaps(columns, clusters, y, swaps) for y in range(1, 4)]
    np.testing.assert_allclose(found[1:], expected, atol=0.02)


TRANSLATED = {  # of six sentences the reference and what two systems made of it
    "de": [
        ("das rote haus ist sehr groß", "das rote haus ist groß", "ein rotes haus ist sehr groß"),
        ("ich habe heute keine zeit", "ich habe heute keine zeit", "heute habe ich keine zeit"),
        ("wo ist der nächste bahnhof", "wo ist der bahnhof", "wo ist der nächste zug"),
        ("sie liest ein gutes buch", "sie liest ein gutes buch", "sie liest gute bücher"),
        ("wir gehen morgen ins kino", "morgen gehen wir", "wir gehen morgen ins kino"),
        ("es regnet seit drei tagen", "es regnet seit drei tagen", "es regnet drei tage lang"),
    ],
    "zh-CN": [
        ("红色的房子很大", "红房子很大", "红色的房子大"),
        ("我今天没有时间", "我今天没有时间", "今天我没时间"),
        ("最近的车站在哪里", "车站在哪里", "最近的车站在哪"),
        ("她在读一本好书", "她在读一本好书", "她读好书"),
        ("我们明天去看电影", "明天我们看电影", "我们明天去看电影"),
        ("雨下了三天", "雨下了三天", "下雨三天"),
    ],
}


@pytest.mark.parametrize("languages", [["de"], ["zh-CN"], ["de", "zh-CN"]])
def test_swaps_are_scored_by_corpus_bleu_and_not_by_the_mean_of_sentences(languages):
    """sacrebleu itself scores all 2^6 swaps; a sentence is swapped in all languages at once, and
    the score is the mean over the languages. Off by at most 4 * sqrt(0.25 / 10000) = 2 %.
    """
    rows = [(s, language, i) for s in range(6) for i, language in enumerate(languages)]
    columns = np.array(
        [
            [
                metrics.bleu_counts(answer, Example("", "", "", (wanted,), language=language))
                for answer in answers
            ]
            for s, language, _ in rows
            for wanted, *answers in [TRANSLATED[language][s]]
        ]
    )
    table = by_sentence(columns, [f"{s}" for s, _, _ in rows], np.array([i for _, _, i in rows]))

    def combine(sums: np.ndarray) -> np.ndarray:
        return metrics.bleu(sums.reshape(*sums.shape[:-1], len(languages), 10)).mean(-1)

    def published(swap: tuple[bool, ...], system: int) -> float:
        scores = []
        for language in languages:
            said = [TRANSLATED[language][s][1 + (system ^ swap[s])] for s in range(6)]
            wanted = [TRANSLATED[language][s][0] for s in range(6)]
            tokens = BLEU(tokenize="zh" if language == "zh-CN" else "13a")
            scores.append(tokens.corpus_score(said, [wanted]).score)
        return sum(scores) / len(scores)

    moved = [
        abs(published(swap, 0) - published(swap, 1)) for swap in itertools.product([0, 1], repeat=6)
    ]
    expected = np.mean(np.array(moved) >= moved[0] - 1e-6)
    assert 0.05 < expected < 0.95, "too clear to tell a wrong p"
    assert permutation(table, 0, combine)[1] == pytest.approx(expected, abs=0.02)


def test_a_score_may_be_any_function_of_sums():
    """Not only a ratio: the sums after a swap are those of whole corpora, neither twice nor half
    of them. All 2^8 swaps; off by at most 4 * sqrt(0.25 / 10000) = 2 %."""
    table = np.random.default_rng(0).integers(0, 9, (8, 2, 2)).astype(float)

    def combine(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] ** 2 - 30 * sums[..., 1]

    swaps = np.array(list(itertools.product([0, 1], repeat=8)))
    rows = np.arange(8)
    moved = [
        abs(combine(table[rows, swap].sum(0)) - combine(table[rows, 1 - swap].sum(0)))
        for swap in swaps
    ]
    expected = np.mean(np.array(moved) >= moved[0])
    assert 0.1 < expected < 0.9, "too clear to tell a wrong p"
    assert permutation(table, 0, combine)[1] == pytest.approx(expected, abs=0.02)


def test_one_sentence_can_tell_nothing(monkeypatch):
    """Swapped or not, the difference is as large: p is 1, whatever float64 makes of thirds."""
    monkeypatch.setattr(significance, "RESAMPLES", 50)
    rng = np.random.default_rng(0)
    for _ in range(200):
        table = np.stack([rng.random((1, 3)) / 3, np.full((1, 3), 7.0)], -1)
        assert permutation(table, 0, percent).tolist() == [1, 1, 1]


@pytest.mark.parametrize("resamples", [99, 1000])
def test_p_is_never_zero(monkeypatch, resamples):
    """60 sentences of 60: no swap of these is as good, and p is 1 / (R + 1)."""
    monkeypatch.setattr(significance, "RESAMPLES", resamples)
    table = shares(np.ones(60), np.zeros(60))
    assert permutation(table, 0, percent)[1] == 1 / (resamples + 1)
    (_, entry) = compare(table, 0, [0, 1], 1, percent)
    assert entry["p_permutation"] == 1 / (resamples + 1)
    assert entry["p_bootstrap"] == 2 / (resamples + 1)


def test_a_system_does_not_differ_from_itself():
    columns, clusters = spoken(clips=40, sentences=15, seed=3)
    for y in range(4):
        assert permutation(one_stratum(columns, clusters), y, percent)[y] == 1


def test_p_is_the_same_from_either_side():
    """Two-sided: whichever of the two systems is taken as the reference."""
    columns, clusters = spoken(clips=40, sentences=15, seed=4)
    table = one_stratum(columns, clusters)
    there = np.stack([permutation(table, y, percent) for y in range(4)])
    np.testing.assert_array_equal(there, there.T)
    assert len(np.unique(there)) == 7, "the six pairs are not told apart"


# ---------------------------------------------------------------------------------- claims of both


def test_intervals_hold_the_truth_and_p_is_small_by_chance_as_often_as_they_say(monkeypatch):
    """Of sentences spoken by three people each, where all clips of a hard sentence suffer.

    The four systems of a group share half of their noise. Counted as two of their own, 800
    intervals are off by at most 4 * sqrt(0.0475 / 800) = 3.1 %; counted as one, 400 p values by
    4 * sqrt(0.0475 / 400) = 4.4 %. A bootstrap of 50 sentences is 1 % too narrow besides; a
    permutation is exact: of 801 possible p, 40 are below 5 %. Drawing clips would give 75 %, an
    interval from 5 to 95 % gives 89 %; swapping clips would give 23 % instead of 5 %.
    """
    monkeypatch.setattr(significance, "RESAMPLES", 800)
    rng = np.random.default_rng(1)
    sentences = np.repeat(np.arange(50), 3)
    held, drawn, swapped = [], [], []
    for _ in range(400):
        hard = rng.normal(size=(50, 1))[sentences] + rng.normal(size=(50, 4))[sentences]
        values = 0.3 + hard + 0.5 * rng.normal(size=(150, 4))
        columns = np.stack([values, np.ones_like(values)], -1)
        entries = compare(one_stratum(columns, sentences), 1, [0, 1, 2], 1, percent)
        held += [entry["low"] <= 30 <= entry["high"] for entry in entries]
        drawn += [entry["p_bootstrap"] < 0.05 for y, entry in enumerate(entries) if y != 1]
        swapped += [entry["p_permutation"] < 0.05 for y, entry in enumerate(entries) if y != 1]
    assert np.mean(held) == pytest.approx(0.94, abs=0.031)
    assert np.mean(drawn) == pytest.approx(0.06, abs=0.044)
    assert np.mean(swapped) == pytest.approx(0.05, abs=0.044)


@pytest.mark.parametrize("gain", [1, -1])
def test_a_small_difference_that_always_points_one_way_is_significant(gain):
    """6 of 60 sentences: invisible beside the spread of a score of one half, clear in pairs.

    p of the bootstrap is 2 * 0.9^60 = 0.36 % (no such sentence is drawn); unpaired it would be
    about 27 %. p of the permutation is 2 / 2^6 = 3.1 % (all six or none are swapped), off by at
    most 4 * sqrt(0.031 / 10000) = 0.7 %.
    """
    diva = np.tile([0, 1], 30)
    other = diva.copy()
    flipped = np.flatnonzero(diva == (gain > 0))[:6]
    other[flipped] = 1 - other[flipped]
    diva_entry, entry = compare(shares(diva, other), 0, [0, 1], 1, percent)
    assert diva_entry["score"] - entry["score"] == pytest.approx(gain * 10)
    assert 1e-4 < entry["p_bootstrap"] < 0.01
    assert entry["p_permutation"] == pytest.approx(2 / 2**6, abs=0.007)


def test_equal_systems_do_not_differ():
    """The same answers: p is 1. As many better as worse: p is large."""
    diva = np.tile([0, 1], 30)
    entries = compare(shares(diva, diva, diva, np.roll(diva, 1)), 1, [0, 1, 2], 1, percent)
    for y in (0, 2):
        assert entries[y]["p_bootstrap"] == entries[y]["p_permutation"] == 1
    assert entries[3]["p_bootstrap"] > 0.5 and entries[3]["p_permutation"] > 0.5


def test_a_difference_by_rounding_is_none():
    """Two clips of each sentence with 0.1 and 0.2 are as good as 0.3 and 0, though float64 adds
    them to a little more."""
    points = np.tile([[0.1, 0.3], [0.2, 0.0]], (20, 1))
    assert points[:2, 0].sum() > points[:2, 1].sum()
    columns = np.stack([points, np.ones_like(points)], -1)
    entries = compare(one_stratum(columns, np.repeat(range(20), 2)), 0, [0, 1], 1, percent)
    assert entries[1]["p_permutation"] == entries[1]["p_bootstrap"] == 1


def test_the_same_table_gives_the_same_numbers_every_time():
    """Whatever else draws random numbers in between."""
    columns, clusters = spoken(clips=40, sentences=15, seed=5)
    table = one_stratum(columns, clusters)
    first = compare(table, 1, [0, 1, 2], -1, percent)
    np.random.seed(7)
    assert compare(table, 1, [0, 1, 2], -1, percent) == first


# ---------------------------------------------------------------------------------------- compare


def test_every_system_has_a_score_and_an_interval_and_only_others_a_p():
    columns, clusters = spoken(clips=40, sentences=15, seed=6)
    for system in range(4):
        entries = compare(one_stratum(columns, clusters), system, [0, 1, 2], -1, percent)
        for y, entry in enumerate(entries):
            assert entry["low"] < entry["score"] < entry["high"]
            named = {"p_bootstrap", "p_permutation"} & entry.keys()
            assert named == (set() if y == system else {"p_bootstrap", "p_permutation"})
            assert {type(value) for value in entry.values()} == {float}


def entries_of(right: list[int], system: int, rivals: list[int], sign: int) -> list[dict]:
    """Of systems that are right about the first so many of 40 sentences."""
    table = shares(*[np.arange(40) < count for count in right])
    return compare(table, system, rivals, sign, percent)


@pytest.mark.parametrize(
    "right, rivals, sign, best",
    [
        ([10, 30, 20, 40], [0, 1, 2], 1, 1),  # the last one is the upper bound, and not a rival
        ([10, 30, 20, 40], [0, 1, 2, 3], 1, 3),
        ([10, 30, 20, 5], [0, 1, 2], -1, 0),  # less is better
        ([10, 30, 20, 5], [1, 2, 3], -1, 3),
        ([10, 30, 30, 40], [0, 1, 2], 1, 1),  # the first of equal ones
        ([30, 10, 20, 40], [2, 1, 0], 1, 0),  # in any order
    ],
)
@pytest.mark.parametrize("system", [0, 1, 2])
def test_p_best_is_told_of_the_best_rival_alone(right, rivals, sign, best, system):
    """Whichever system the others are compared with."""
    entries = entries_of(right, system, rivals, sign)
    assert [y for y, entry in enumerate(entries) if "p_best" in entry] == [best]


@pytest.mark.parametrize("system", [0, 1, 2])
def test_p_best_is_the_largest_p_against_the_other_rivals(system):
    """The best (35) differs clearly from 10, and by 5 sentences from 30: 2 / 2^5 = 6.3 %, off by
    at most 4 * sqrt(0.063 / 10000) = 1 %. The upper bound (36, p = 1) does not count."""
    entries = entries_of([10, 35, 30, 36], system, [0, 1, 2], 1)
    assert entries[1]["p_best"] == pytest.approx(2 / 2**5, abs=0.01)
    table = shares(*[np.arange(40) < count for count in (10, 35, 30, 36)])
    against = permutation(table, 1, percent)
    assert entries[1]["p_best"] == max(against[0], against[2])
    assert against[3] == 1


def test_the_best_of_equal_rivals_is_not_better():
    assert entries_of([10, 30, 30, 40], 0, [0, 1, 2], 1)[1]["p_best"] == 1


def test_who_is_alone_is_not_better_than_anybody():
    assert entries_of([10, 30], 0, [1], 1)[1]["p_best"] == 1


# ---------------------------------------------------------------------------------- several tests


@pytest.mark.parametrize(
    "p, corrected",
    [
        # sorted: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not fall below the third
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.02], [0.02]),  # one test alone needs no correction
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.9, 0.6], [1.0, 1.0]),  # 2 * 0.6 is more than 1
        ([0.001, 0.8, 0.001], [0.003, 0.8, 0.003]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ([], []),
    ],
)
def test_holms_correction_of_hand_counted_examples(p, corrected):
    assert holm(p) == pytest.approx(corrected, rel=1e-12)


def test_holms_correction_keeps_the_order_and_stays_a_probability():
    rng = np.random.default_rng(0)
    for count in range(1, 12):
        p = rng.random(count) ** 3
        found = np.array(holm(list(p)))
        assert (found >= p).all() and found.max() <= 1
        assert (np.diff(found[np.argsort(p)]) >= 0).all()
        assert found[p.argmin()] == pytest.approx(min(1, count * p.min()))


def test_of_many_tests_without_a_difference_one_in_twenty_families_has_a_small_p():
    """The chance is 1 - (1 - 0.05 / 11)^11 = 4.9 %; of 2,000 families the share is off by at most
    4 * sqrt(0.0465 / 2000) = 1.9 %. Uncorrected it would be 43 %."""
    p = np.random.default_rng(0).random((2000, 11))
    assert np.mean([min(holm(list(row))) < 0.05 for row in p]) == pytest.approx(0.049, abs=0.019)


@pytest.mark.parametrize(
    "right, clips, labels, p",
    [
        (10, 10, 2, 2 / 2**10),  # all right or all wrong
        (0, 10, 2, 2 / 2**10),
        (5, 10, 2, 1.0),
        (9, 10, 2, 2 * 11 / 2**10),
        (3, 3, 4, 1 / 4**3),  # none right is no less likely: 27 of 64
        (0, 3, 4, 27 / 4**3 + 9 / 4**3 + 1 / 4**3),  # the mode, 27 like one right: everything
        (2, 3, 4, 9 / 4**3 + 1 / 4**3),
    ],
)
def test_guessing_among_the_labels_is_a_binomial_test(right, clips, labels, p):
    expected = 1.0 if (right, clips, labels) == (0, 3, 4) else p
    assert against_chance(right, clips, labels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("labels", [2, 4, 7])
def test_p_against_chance_adds_what_is_no_likelier_than_what_was_seen(labels):
    """The definition, as scipy and R have it; ties up to 1e-7 count."""
    clips, chance = 24, 1 / labels
    likely = [
        math.comb(clips, k) * chance**k * (1 - chance) ** (clips - k) for k in range(clips + 1)
    ]
    for right in range(clips + 1):
        expected = sum(value for value in likely if value <= likely[right] * (1 + 1e-7))
        found = against_chance(right, clips, labels)
        assert found == pytest.approx(expected, rel=1e-9), right
        assert found == scipy.stats.binomtest(right, clips, chance).pvalue
        assert type(found) is float
