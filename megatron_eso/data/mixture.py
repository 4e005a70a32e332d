"""Which source each place of a mixture reads: a deterministic, stratified interleave without a table.

Places come in periods, in which every source gets exactly its share. If a source has a samples in a period,
the j-th falls in the j-th of a equal strata of the period, at a random point drawn from (seed, period).
So shares are exact after every period and close within it, in whatever order places are asked for.
"""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data.fork_lock import ForkLock
from megatron_eso.errors import DataError

LONGEST_PERIOD = 1 << 16
PERIODS_KEPT = 4
_MIXTURE_STREAM = 0x313


class Mixture:
    """Sources by weight; each gets its number in ``shares`` of every ``period`` places."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Turn weights into whole numbers of places in a period.

        Weights with a small common denominator (7 and 3; 0.25 and 0.75) are met exactly, others to
        one part in 65536.

        Raises:
            DataError: for a weight that is not positive or too small for the period.
        """
        if not weights or not all(weight > 0 for weight in weights):
            raise DataError(f"data.sources need weights above 0, not {list(weights)}")
        self.shares = _whole_shares(weights)
        self.period = sum(self.shares)
        self._seed = seed
        self._lock = ForkLock()
        self._patterns: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = (
            OrderedDict()
        )

    def split(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each place, its source and its place in that source's own order."""
        places = np.asarray(places, np.int64)
        if len(self.shares) == 1:
            return np.zeros_like(places), places
        periods, within = np.divmod(places, self.period)
        sources, ranks = np.empty_like(within), np.empty_like(within)
        for period in np.unique(periods):
            chosen = periods == period
            source_of, rank_of = self._pattern(int(period))
            sources[chosen] = source_of[within[chosen]]
            ranks[chosen] = rank_of[within[chosen]]
        return sources, periods * np.array(self.shares)[sources] + ranks

    def consumed(self, num_places: int) -> list[int]:
        """Return how many samples of each source the first ``num_places`` places use."""
        periods, rest = divmod(num_places, self.period)
        counts = [share * periods for share in self.shares]
        if rest:
            sources, _ = self.split(np.arange(periods * self.period, num_places))
            added = np.bincount(sources, minlength=len(self.shares))
            counts = [count + int(more) for count, more in zip(counts, added, strict=True)]
        return counts

    def _pattern(self, period: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        with self._lock:
            if period not in self._patterns:
                self._patterns[period] = self._make_pattern(period)
                while len(self._patterns) > PERIODS_KEPT:
                    self._patterns.popitem(last=False)
            return self._patterns[period]

    def _make_pattern(self, period: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        random = np.random.default_rng([_MIXTURE_STREAM, self._seed, period])
        ranks = np.concatenate([np.arange(share) for share in self.shares])
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        strata = np.repeat(1.0 / np.array(self.shares), self.shares)
        order = np.argsort((ranks + random.random(self.period)) * strata, kind="stable")
        return sources[order], ranks[order]


def _whole_shares(weights: Sequence[float]) -> list[int]:
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * denominator) for weight in exact]
    total = sum(whole)
    if total <= LONGEST_PERIOD:
        return [count * (LONGEST_PERIOD // total) for count in whole]
    quotas = [Fraction(count * LONGEST_PERIOD, total) for count in whole]
    shares = [int(quota) for quota in quotas]
    largest_rest = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])
    for index in largest_rest[: LONGEST_PERIOD - sum(shares)]:
        shares[index] += 1
    if 0 in shares:
        wrong = weights[shares.index(0)]
        raise DataError(
            f"a weight of {wrong} in data.sources is below 1/{LONGEST_PERIOD} of the mixture "
            f"{list(weights)}; raise it or leave the source out"
        )
    return shares
