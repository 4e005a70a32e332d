"""The order: a permutation every epoch, a pure function, streaming's own for one group."""

import numpy as np
import pytest

from megatron_eso.data.mixture import Mixture
from megatron_eso.data.order import SampleOrder
from megatron_eso.errors import DataError

SIZES = [70, 64, 64, 51, 64, 3]
TOTAL = sum(SIZES)


def order(**changes) -> SampleOrder:
    settings = {"shard_sizes": SIZES, "seed": 5, "block_size": 128, **changes}
    return SampleOrder(settings.pop("shard_sizes"), **settings)


@pytest.mark.parametrize("group_samples", [1 << 20, 100], ids=["one group", "several groups"])
def test_every_epoch_is_a_permutation_and_no_two_are_equal(group_samples):
    whole = order(group_samples=group_samples)
    epochs = [whole.samples_at(np.arange(TOTAL) + epoch * TOTAL) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(TOTAL))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


@pytest.mark.parametrize("group_samples", [1 << 20, 100], ids=["one group", "several groups"])
def test_places_asked_one_by_one_backwards_give_the_same_samples(group_samples):
    places = np.arange(2 * TOTAL)
    together = order(group_samples=group_samples).samples_at(places)
    alone = order(group_samples=group_samples)
    backwards = [int(alone.samples_at(places[p : p + 1])[0]) for p in reversed(range(len(places)))]
    assert together.tolist() == backwards[::-1]
    pairs = [alone.samples_at(places[p : p + 2]) for p in range(len(places) - 1)]
    assert np.array_equal(pairs, np.stack([together[:-1], together[1:]], axis=1))


def test_groups_deal_other_shards_together_every_epoch():
    whole = order(shard_sizes=[10] * 40, group_samples=100)
    first = [
        frozenset((whole.samples_at(np.arange(100) + epoch * 400) // 10).tolist())
        for epoch in range(5)
    ]
    assert len(set(first)) > 1


def test_groups_of_the_same_sizes_are_shuffled_differently():
    samples = order(shard_sizes=[10] * 40, group_samples=100).samples_at(np.arange(400))
    patterns = set()
    for group in samples.reshape(4, 100):
        _, shard = np.unique(group // 10, return_inverse=True)
        patterns.add(tuple(shard * 10 + group % 10))
    assert len(patterns) == 4


def test_more_canonical_nodes_than_samples_shuffled_at_once_are_refused_with_their_number():
    for nodes, most, group in ((TOTAL + 1, TOTAL, 1 << 20), (101, 100, 100)):
        with pytest.raises(DataError, match=f"nodes={nodes} is more than the {most} samples"):
            order(nodes=nodes, group_samples=group)


def test_without_shuffling_samples_come_as_written():
    places = np.arange(2 * TOTAL)
    assert np.array_equal(order(shuffle=False).samples_at(places), places % TOTAL)


def test_another_seed_is_another_order():
    places = np.arange(TOTAL)
    assert not np.array_equal(order().samples_at(places), order(seed=6).samples_at(places))
    assert order().fingerprint() != order(seed=6).fingerprint()
    assert order().fingerprint() == order().fingerprint()


def test_a_block_too_small_to_mix_shards_is_said_aloud():
    with pytest.warns(UserWarning, match=r"data\.shuffle_block_size=64 .* raise it to 140"):
        order(block_size=64)


def test_the_shards_ahead_are_those_the_next_places_touch():
    whole = order()
    starts = np.concatenate([[0], np.cumsum(SIZES)])
    expected = []
    for sample in whole.samples_at(np.arange(50, 50 + 40)):
        shard = int(np.searchsorted(starts, sample, side="right") - 1)
        expected += [shard] if shard not in expected else []
    assert whole.shards_ahead(50, 40) == expected


def test_a_mixture_is_exact_after_every_period():
    mixture = Mixture([7, 3], seed=1)
    counts = mixture.consumed(10 * mixture.period)
    assert counts[0] * 3 == counts[1] * 7


def test_a_mixture_stays_close_to_its_weights_everywhere():
    mixture = Mixture([0.5, 0.3, 0.2], seed=1)
    sources, _ = mixture.split(np.arange(20000))
    for weight, number in zip([0.5, 0.3, 0.2], range(3), strict=True):
        drift = np.cumsum(sources == number) - weight * np.arange(1, 20001)
        assert np.abs(drift).max() <= 2


def test_a_mixture_uses_every_place_of_every_source_once_in_order():
    mixture = Mixture([1, 2, 4.5], seed=1)
    places = np.arange(3 * mixture.period // 2)
    sources, within = mixture.split(places)
    for number in range(3):
        chosen = within[sources == number]
        assert np.array_equal(chosen, np.arange(len(chosen)))
        assert mixture.consumed(len(places))[number] == len(chosen)


def test_a_place_of_a_mixture_is_the_same_alone():
    mixture = Mixture([1, 3], seed=1)
    sources, within = mixture.split(np.arange(200000))
    for place in (0, 777, 65536, 199999):
        alone = Mixture([1, 3], seed=1).split(np.array([place]))
        assert (alone[0][0], alone[1][0]) == (sources[place], within[place])


def test_another_period_or_seed_is_another_interleave():
    mixture, other = Mixture([7, 3], seed=1), Mixture([7, 3], seed=2)
    sources, _ = mixture.split(np.arange(2 * mixture.period))
    first, second = sources.reshape(2, -1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.split(np.arange(mixture.period))[0])


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], []], ids=["zero", "negative", "none"])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(DataError, match="weights above 0"):
        Mixture(weights, seed=1)


def test_a_weight_too_small_to_be_met_is_refused():
    with pytest.raises(DataError, match="below 1/65536"):
        Mixture([1.0, 1.0, 1e-9], seed=1)


def test_a_last_group_smaller_than_the_nodes_is_shuffled_by_as_many_as_it_has():
    sizes = [64] * 8 + [5]
    whole = order(shard_sizes=sizes, group_samples=128, nodes=16)
    for epoch in range(12):  # in some of them the small shard is dealt alone
        places = whole.samples_at(np.arange(sum(sizes)) + epoch * sum(sizes))
        assert np.array_equal(np.sort(places), np.arange(sum(sizes)))
