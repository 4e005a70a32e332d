"""The objective as pure tensors: randomness, noise, orders, rows and sums, against obvious oracles."""

import math

import pytest
import torch

from megatron_eso.config.schema import ObjectiveConfig
from megatron_eso.objective.build import Draw, build_rows, predicted
from megatron_eso.objective.deal import MicroBatch, deal
from megatron_eso.objective.losses import TokenCounts, loss_sums, mean_loss
from megatron_eso.objective.noise import (
    _GOLDEN,
    _coprime_near,
    keep_probability,
    loss_weight,
    stratified_times,
)
from megatron_eso.objective.order import invert, likelihood_order, prediction_order
from megatron_eso.objective.randomness import Stream, uniform
from megatron_eso.objective.rows import filled_up, sequential_rows

MASK = 50


def tokens_of(num_rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, MASK, (num_rows, length + 1), generator=generator)


def everything_valid(tokens):
    return torch.ones_like(tokens, dtype=torch.bool)


def build(objective, rows=4, length=32, step=0, tokens=None, valid=None):
    tokens = tokens_of(rows, length) if tokens is None else tokens
    valid = everything_valid(tokens) if valid is None else valid
    numbers = list(range(rows))
    split = rows if objective.name != "eso" or objective.alpha_0 == 1 else rows // 2
    if objective.name == "eso" and objective.alpha_0 == 0:
        split = 0
    batch = MicroBatch(numbers[:split], numbers[split:])
    return build_rows(tokens, valid, batch, objective, Draw(7, step, max(split, 1)), mask_id=MASK)


def test_random_numbers_are_a_function_of_seed_step_row_stream_and_draw():
    first = uniform(1, 2, 3, Stream.MASK, 100)
    assert torch.equal(first, uniform(1, 2, 3, Stream.MASK, 100))
    others = [
        uniform(2, 2, 3, Stream.MASK, 100), uniform(1, 3, 3, Stream.MASK, 100),
        uniform(1, 2, 4, Stream.MASK, 100), uniform(1, 2, 3, Stream.ORDER, 100),
        uniform(1, 2, 3, Stream.MASK, 100, draw=1),
    ]  # fmt: skip
    assert not any(torch.equal(first, other) for other in others)


def test_random_numbers_are_uniform():
    numbers = uniform(5, 0, 0, Stream.ORDER, 100_000).sort().values
    expected = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert (numbers - expected).abs().max() < 0.006  # Kolmogorov-Smirnov at about 0.1 %


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 512])
def test_times_fill_every_stratum_once(num_rows):
    times = stratified_times(3, 5, list(range(num_rows)), num_rows=num_rows, eps=0.0)
    strata = (times * num_rows).floor().long().sort().values
    assert torch.equal(strata, torch.arange(num_rows))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_every_rank_gets_times_from_the_whole_interval(num_ranks):
    times = stratified_times(3, 5, list(range(96)), num_rows=96, eps=0.0)
    means = [float(times[rank::num_ranks].mean()) for rank in range(num_ranks)]
    assert max(means) - min(means) < 0.13  # the official dealing: 1 - 1 / num_ranks


def test_a_time_does_not_depend_on_which_rows_are_asked_together():
    whole = stratified_times(3, 5, list(range(12)), num_rows=12, eps=1e-3)
    assert torch.equal(whole[5:7], stratified_times(3, 5, [5, 6], num_rows=12, eps=1e-3))


def test_times_begin_at_eps():
    unit = stratified_times(3, 5, list(range(12)), num_rows=12, eps=0.0)
    times = stratified_times(3, 5, list(range(12)), num_rows=12, eps=0.25)
    torch.testing.assert_close(times, 0.25 + 0.75 * unit)


@pytest.mark.parametrize("by", ["step", "draw"])
def test_the_times_of_one_row_are_uniform_over_steps_and_over_draws(by):
    """Otherwise evaluation would see each of its rows at one share of masks only."""
    drawn = [
        stratified_times(3, 5 if by == "draw" else i, [4], num_rows=7, eps=0.0, draw=i * (by == "draw"))
        for i in range(1000)
    ]  # fmt: skip
    expected = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    distance = (torch.cat(drawn).sort().values - expected).abs().max()
    assert distance < 0.062  # Kolmogorov-Smirnov at 0.1 %
    within = (torch.cat(drawn) * 7 % 1).sort().values  # place in the stratum
    assert (within - expected).abs().max() < 0.062


def test_the_stride_through_the_strata_is_the_first_of_all_by_distance():
    def first_by_distance(number):
        target = round(number * _GOLDEN)
        near = sorted(range(1, max(number, 2)), key=lambda stride: abs(stride - target))
        return next(stride for stride in near if math.gcd(stride, number) == 1)

    numbers = [*range(1, 1200), 2310, 30030, 65536, 100_000]
    assert [_coprime_near(n) for n in numbers] == [first_by_distance(n) for n in numbers]


def test_the_stride_of_a_batch_of_millions_is_found_near_the_target(monkeypatch):
    tried, gcd = [], math.gcd
    monkeypatch.setattr(math, "gcd", lambda *numbers: tried.append(numbers) or gcd(*numbers))
    for num_rows in range(4_000_000, 4_000_100):
        stratified_times(1, 0, [0, 1, 2], num_rows=num_rows, eps=0.0)
    assert 100 <= len(tried) < 1000  # of 4 million strides each


def test_the_weight_is_one_over_t_for_pure_diffusion():
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(loss_weight(t, alpha_0=1.0, eps=0.0), 1 / t)
    derivative = (
        keep_probability(t + 1e-6, alpha_0=0.3, eps=0.1) - keep_probability(t, alpha_0=0.3, eps=0.1)
    ) / 1e-6
    expected = -derivative / (1 - keep_probability(t, alpha_0=0.3, eps=0.1))
    assert torch.allclose(loss_weight(t, alpha_0=0.3, eps=0.1), expected, atol=1e-5)


def test_orders_put_clean_before_masked_before_padding():
    masked = torch.tensor([[True, False, True, False, False, True]])
    valid = torch.tensor([[True, True, True, True, False, False]])
    key = torch.rand(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = prediction_order(masked & valid, valid, key, masked_in_reading_order=True)
    assert set(order[0, :2].tolist()) == {1, 3}
    assert order[0, 2:4].tolist() == [0, 2]
    assert set(order[0, 4:].tolist()) == {4, 5}
    assert torch.equal(invert(order).gather(1, order), torch.arange(6)[None])


@pytest.mark.parametrize("in_reading_order", [True, False], ids=["sequential", "diffusion"])
def test_padding_comes_last_wherever_it_stands(in_reading_order):
    drawn, valid, key = (uniform(1, 0, row, Stream.ORDER, 200).view(5, 40) for row in range(3))
    masked, valid = drawn < 0.5, valid < 0.7
    order = prediction_order(masked & valid, valid, key, masked_in_reading_order=in_reading_order)
    group = torch.where(valid, masked.long(), 2).gather(1, order)
    assert torch.equal(group, group.sort(dim=1).values)


def test_the_order_at_alpha_zero_is_reading_order_and_at_one_is_random():
    valid = torch.ones(2, 40, dtype=torch.bool)
    key = torch.rand(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(likelihood_order(~valid, valid, key), torch.arange(40).expand(2, 40))
    assert torch.equal(likelihood_order(valid, valid, key), key.argsort(dim=1))


def test_a_diffusion_row_predicts_its_masked_tokens_in_place():
    objective = ObjectiveConfig(alpha_0=1.0)
    tokens = tokens_of(4, 32)
    rows = build(objective, tokens=tokens)
    assert (rows.num_diffusion, rows.num_pairs) == (4, 0)
    row, slot = rows.loss_entries // 32, rows.loss_entries % 32
    assert (rows.tokens[row, slot] == MASK).all()
    assert torch.equal(rows.loss_targets, tokens[row, rows.positions[row, slot]])
    is_mask = rows.tokens == MASK
    assert int(is_mask.sum()) == len(rows.loss_entries)
    assert torch.equal(is_mask, is_mask.sort(dim=1).values)  # clean first


def test_the_shifted_copies_hold_the_next_entry_and_the_first_one_last():
    tokens = tokens_of(1, 6)[:, :-1]
    valid = torch.ones_like(tokens, dtype=torch.bool)
    masked = torch.tensor([[False, True, True, False, True, False]])
    order = torch.tensor([[3, 0, 5, 1, 2, 4]])
    rows = sequential_rows(tokens, valid, masked, order, mask_id=MASK)
    assert rows.tokens[0].tolist() == tokens[0, order[0]].tolist()
    assert (rows.tokens[1] == MASK).all()
    assert rows.positions[1].tolist() == [0, 5, 1, 2, 4, 3]
    assert rows.loss_positions.tolist() == [1, 2, 4]
    assert rows.loss_targets.tolist() == tokens[0, [1, 2, 4]].tolist()
    assert (rows.loss_entries - 6).tolist() == [2, 3, 4]


@pytest.mark.parametrize("weighting", ["elbo", "constant"])
@pytest.mark.parametrize(("name", "size"), [("eso", 64), ("mdlm", 64), ("bd3lm", 4)])
def test_masks_and_weights_follow_from_each_rows_own_numbers(name, size, weighting):
    """Rows 3 and 8 of 16 in the diffusion pass, and 17 and 20 in the sequential one, repeat 2."""
    objective = ObjectiveConfig(
        name=name, alpha_0=0.3, block_size=4, noise_eps=0.1, loss_weight=weighting
    )
    batch = MicroBatch([3, 8], [17, 20] if name == "eso" else [])
    tokens, alpha_0 = tokens_of(len(batch.rows), 64), 0.3 if name == "eso" else 1.0
    rows = build_rows(
        tokens, everything_valid(tokens), batch, objective, Draw(7, 5, 16, repeat=2), mask_id=MASK
    )
    blocks = 64 // size
    strata = [row * blocks + block for row in (3, 8) for block in range(blocks)]
    times = stratified_times(7, 5, strata, num_rows=16 * blocks, eps=0.1, draw=2)
    keep = keep_probability(times, alpha_0=alpha_0, eps=0.1).view(2, blocks)
    weight = loss_weight(times, alpha_0=alpha_0, eps=0.1).view(2, blocks)
    weight = torch.ones_like(weight) if weighting == "constant" else weight
    if name == "eso":
        keep, weight = (
            torch.cat([keep, torch.full((2, 1), 0.3)]),
            torch.cat([weight, torch.ones(2, 1)]),
        )
    keep, weight = keep.repeat_interleave(size, dim=1), weight.repeat_interleave(size, dim=1)
    u = torch.stack([uniform(7, 5, row, Stream.MASK, 64, draw=2) for row in batch.rows])
    found = torch.zeros(len(u), 64)
    found[rows.loss_rows, rows.loss_positions] = rows.loss_weights
    torch.testing.assert_close(found, torch.where(u >= keep, weight, 0.0).float())
    if name == "eso":
        for index, row in enumerate(batch.rows):
            key = uniform(7, 5, row, Stream.ORDER, 64, draw=2)
            order, num_masked = rows.positions[index], int((u >= keep)[index].sum())
            clean, masked = order[: 64 - num_masked], order[64 - num_masked :]
            assert torch.equal(clean, clean[key[clean].argsort()])
            by = key if index < 2 else torch.arange(64)
            assert torch.equal(masked, masked[by[masked].argsort()])


@pytest.mark.parametrize("alpha_0", [0.0, 0.25, 0.5, 1.0])
def test_masks_come_at_the_rate_of_alpha_0(alpha_0):
    length = 4000
    rows = build(ObjectiveConfig(alpha_0=alpha_0, noise_eps=0.0), rows=8, length=length)
    if alpha_0 < 1:
        sequential = int(rows.loss_is_sequential.sum()) / (8 - rows.num_diffusion) / length
        assert abs(sequential - (1 - alpha_0)) < 0.02
    if alpha_0 > 0:
        diffusion = int((~rows.loss_is_sequential).sum()) / rows.num_diffusion / length
        assert abs(diffusion - (1 - alpha_0 / 2)) < 0.1


def test_padding_never_carries_loss_and_is_not_counted():
    tokens = tokens_of(4, 32)
    valid = everything_valid(tokens)
    valid[:, 20:] = False
    for objective in (
        ObjectiveConfig(alpha_0=0.5), ObjectiveConfig(name="mdlm"), ObjectiveConfig(name="ar"),
        ObjectiveConfig(name="bd3lm", block_size=4),
    ):  # fmt: skip
        rows = build(objective, tokens=tokens, valid=valid)
        assert int(rows.loss_positions.max()) < 20
        assert rows.num_diffusion_tokens + rows.num_sequential_tokens == 80


@pytest.mark.parametrize("name", ["mdlm", "bd3lm"])
def test_rows_that_look_ahead_say_what_is_padding(name):
    tokens = tokens_of(4, 32)
    valid = everything_valid(tokens)
    objective = ObjectiveConfig(name=name, block_size=4)
    assert build(objective, tokens=tokens).is_valid is None
    valid[1, 20:] = False
    rows = build(objective, tokens=tokens, valid=valid)
    copies = 2 if name == "bd3lm" else 1
    assert torch.equal(rows.is_valid, valid[:, :-1].repeat(copies, 1))
    filled = filled_up(rows, 10)
    assert filled.num_diffusion - rows.num_diffusion == 10 - len(rows.tokens)
    for before, after in ((rows.tokens, filled.tokens), (rows.positions, filled.positions)):
        assert torch.equal(
            after.flatten()[filled.loss_entries], before.flatten()[rows.loss_entries]
        )
    assert filled.is_valid[: -len(rows.tokens)].all()
    assert torch.equal(filled.is_valid[-len(rows.tokens) :], rows.is_valid)


@pytest.mark.parametrize("leading_mask", [True, False])
def test_the_tokens_counted_are_those_that_ar_rows_predict(leading_mask):
    tokens = tokens_of(3, 32)
    valid = torch.arange(33) < torch.tensor([33, 32, 5])[:, None]
    objective = ObjectiveConfig(name="ar", leading_mask=leading_mask)
    rows = build(objective, rows=3, tokens=tokens, valid=valid)
    counted = predicted(valid, objective).sum(dim=1)
    assert torch.equal(counted, torch.bincount(rows.loss_rows, minlength=3))
    assert int(counted.sum()) == rows.num_sequential_tokens


def test_the_loss_at_a_uniform_model_is_the_log_of_the_vocabulary():
    """E[sum of weights] of the diffusion term is alpha_0 and of the sequential term 1 - alpha_0."""
    for alpha_0 in (0.0, 0.3, 1.0):
        totals = []
        for step in range(40):
            rows = build(
                ObjectiveConfig(alpha_0=alpha_0, noise_eps=1e-3), rows=16, length=64, step=step
            )
            log_probs = torch.full((len(rows.loss_entries),), -math.log(MASK))
            counts = TokenCounts(rows.num_diffusion_tokens, rows.num_sequential_tokens)
            totals.append(float(mean_loss(loss_sums(log_probs, rows), counts)))
        assert abs(sum(totals) / 40 / math.log(MASK) - 1) < 0.03


def test_sums_do_not_depend_on_how_rows_are_split():
    objective = ObjectiveConfig(alpha_0=0.5)
    tokens = tokens_of(8, 32)
    whole = build_rows(
        tokens, everything_valid(tokens), MicroBatch([0, 1, 2, 3], [4, 5, 6, 7]), objective,
        Draw(7, 0, 4), mask_id=MASK,
    )  # fmt: skip
    total = loss_sums(-whole.loss_targets.float(), whole)
    parts = torch.zeros(2)
    for diffusion, sequential in (([0, 1], [4]), ([2, 3], [5]), ([], [6, 7])):
        numbers = diffusion + sequential
        part = build_rows(
            tokens[numbers], everything_valid(tokens[numbers]), MicroBatch(diffusion, sequential),
            objective, Draw(7, 0, 4), mask_id=MASK,
        )  # fmt: skip
        parts += loss_sums(-part.loss_targets.float(), part)
    assert torch.allclose(parts, total)


@pytest.mark.parametrize(
    ("diffusion", "sequential", "micro", "ranks"),
    [(8, 8, 4, 2), (8, 12, 2, 4), (16, 0, 1, 4), (0, 8, 8, 1)],
)
def test_every_row_is_dealt_once_and_evenly(diffusion, sequential, micro, ranks):
    seen, sizes, mixes = [], set(), []
    for rank in range(ranks):
        for batch in deal(
            num_diffusion_rows=diffusion, num_sequential_rows=sequential,
            micro_batch_rows=micro, rank=rank, num_ranks=ranks,
        ):  # fmt: skip
            seen += batch.rows
            sizes.add(len(batch.diffusion_rows) + 2 * len(batch.sequential_rows))
            mixes.append(len(batch.diffusion_rows))
            assert all(row < diffusion for row in batch.diffusion_rows)
            assert all(row >= diffusion for row in batch.sequential_rows)
    assert sorted(seen) == list(range(diffusion + sequential))
    assert sizes == {micro}
    assert max(mixes) - min(mixes) <= 2  # one slot


@pytest.mark.parametrize(
    ("diffusion", "sequential", "micro", "message"),
    [(4, 4, 8, "do not divide"), (4, 4, 3, "do not divide"), (3, 5, 2, "must be even")],
)
def test_rows_that_cannot_be_dealt_evenly_are_refused(diffusion, sequential, micro, message):
    with pytest.raises(ValueError, match=message):
        deal(
            num_diffusion_rows=diffusion, num_sequential_rows=sequential,
            micro_batch_rows=micro, rank=0, num_ranks=1,
        )  # fmt: skip


def test_autoregressive_rows_with_a_leading_mask_predict_the_whole_row():
    tokens = tokens_of(2, 8)
    rows = build(ObjectiveConfig(name="ar"), rows=2, tokens=tokens)
    assert (rows.tokens[:, 0] == MASK).all()
    assert torch.equal(rows.tokens[:, 1:], tokens[:, :7])
    assert torch.equal(rows.loss_targets.view(2, 8), tokens[:, :8])
    plain = build(ObjectiveConfig(name="ar", leading_mask=False), rows=2, tokens=tokens)
    assert torch.equal(plain.loss_targets.view(2, 8), tokens[:, 1:])
    assert torch.equal(plain.loss_positions.view(2, 8), torch.arange(1, 9).expand(2, 8))
