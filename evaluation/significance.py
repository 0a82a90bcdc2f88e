"""Significance: how far a score, or a difference between two systems, could be chance.

    paired bootstrap     draw the clips anew, with replacement: the spread of a score
    paired permutation   swap the two systems' answers at random: the spread of a difference
                         if it were none

Both are a matrix of weights times the table of each sentence's numbers, [R, K] @ [K, Y C], since
every score is a function of sums (metrics.py). Clips of one sentence stand or fall together, so
whole sentences are drawn and swapped: taking each clip for itself would make all too sure.

Axes: N clips, K sentences, Y systems, C numbers of a metric, R resamples.
Source: Koehn 2004 (bootstrap), Riezler and Maxwell 2005 (approximate randomisation), Phipson and
Smyth 2010 (why p is never 0), Holm 1979.
Reads: nothing of ours.   Read next: report.py.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
BLOCK = 500  # resamples at a time: [BLOCK, K] numbers in memory
ALPHA = 0.05
ROUNDING = 1e-9  # sums of the same numbers in another order are not a difference

Combine = Callable[[np.ndarray], np.ndarray]  # sums [..., C] -> scores [...]


def sample(groups: Sequence[str], most: int) -> list[int]:
    """The numbers of at most `most` items at random, in order, given the group of each: of every
    group its share, so that all items are equally likely and no score needs weights."""
    if most >= len(groups):
        return [*range(len(groups))]
    rng = np.random.default_rng(0)
    order = sorted(rng.permutation(len(groups)).tolist(), key=lambda i: groups[i])
    at = (np.arange(most) + rng.random()) * len(groups) / most
    return sorted(order[i] for i in at.astype(int))


def by_sentence(
    columns: Float[np.ndarray, "N Y C"], sentences: Sequence[str], strata: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "K Y C2"]:
    """Sums over the clips of each sentence. Numbers of different strata (languages) stay apart,
    in columns of their own: C2 is C times the number of strata."""
    names, rows = np.unique(np.asarray(sentences), return_inverse=True)
    sums = np.zeros((strata.max() + 1, len(names), *columns.shape[1:]))
    np.add.at(sums, (strata, rows), columns)
    return np.moveaxis(sums, 0, 2).reshape(len(names), columns.shape[1], -1)


def bootstrap(sums: Float[np.ndarray, "K Y C"]) -> Float[np.ndarray, "R Y C"]:
    """The sums of as many sentences as there are, drawn with replacement; the same draws for all
    systems, which makes them paired."""

    def weights(rng: np.random.Generator, rows: int) -> np.ndarray:
        draws = rng.integers(len(sums), size=(rows, len(sums)))
        draws += len(sums) * np.arange(rows)[:, None]
        return np.bincount(draws.ravel(), minlength=rows * len(sums)).reshape(rows, -1)

    return np.concatenate(list(_blocks(sums, weights)))


def permutation(
    sums: Float[np.ndarray, "K Y C"], system: int, combine: Combine
) -> Float[np.ndarray, "Y"]:
    """p of each system's difference from `system`, two-sided: how often it is at least as large
    after the two have swapped their answers to a random half of the sentences."""
    gap, total = sums - sums[:, [system]], (sums + sums[:, [system]]).sum(0)
    scores = combine(sums.sum(0))
    observed = np.abs(scores - scores[system])

    def signs(rng: np.random.Generator, rows: int) -> np.ndarray:
        return 1 - 2 * rng.integers(2, size=(rows, len(sums)), dtype=np.int8)

    extreme = np.zeros(len(scores))
    for swapped in _blocks(gap, signs):
        moved = combine((total + swapped) / 2) - combine((total - swapped) / 2)
        extreme += (np.abs(moved) >= observed - ROUNDING).sum(0)
    return (extreme + 1) / (RESAMPLES + 1)


def _blocks(table: np.ndarray, weights: Callable) -> Iterator[np.ndarray]:
    """weights @ table, some rows of weights at a time; the same ones every time."""
    rng, flat = np.random.default_rng(0), table.reshape(len(table), -1)
    for start in range(0, RESAMPLES, BLOCK):
        rows = weights(rng, min(BLOCK, RESAMPLES - start)).astype(float)
        yield (rows @ flat).reshape(-1, *table.shape[1:])


def compare(
    sums: Float[np.ndarray, "K Y C"],
    system: int,
    rivals: Sequence[int],
    sign: int,
    combine: Combine,
) -> list[dict[str, float]]:
    """Of each system score, 95 % bootstrap interval (low, high), p of its difference from `system`
    by both tests, and of the best of the `rivals` p_best: the largest of its p against the others.

    `sign` is 1 if more is better, -1 if less is.
    """
    scores, replicates = combine(sums.sum(0)), combine(bootstrap(sums))
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    gain = replicates - replicates[:, [system]]
    tail = np.minimum((gain <= ROUNDING).sum(0), (gain >= -ROUNDING).sum(0))
    drawn = np.minimum(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
    swapped = permutation(sums, system, combine)
    entries = [
        {"score": scores[y], "low": low[y], "high": high[y]}
        | ({} if y == system else {"p_bootstrap": drawn[y], "p_permutation": swapped[y]})
        for y in range(len(scores))
    ]
    best = max(rivals, key=lambda y: sign * scores[y])
    against = swapped if best == system else permutation(sums, best, combine)
    entries[best]["p_best"] = max((against[y] for y in rivals if y != best), default=1.0)
    return [{key: float(value) for key, value in entry.items()} for entry in entries]


def holm(p: Sequence[float]) -> list[float]:
    """p values of several tests, so that one of them is below 5 % by chance in 5 % of the cases."""
    corrected, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


def against_chance(right: int, clips: int, labels: int) -> float:
    """p of as many right answers by guessing among the labels: exact binomial test, two-sided."""
    import scipy.stats  # takes a second, which a wrong flag need not wait for

    return float(scipy.stats.binomtest(right, clips, 1 / labels).pvalue)
