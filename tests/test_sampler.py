"""The cached sampler: equal to uncached passes, correct in distribution, the same for a given seed."""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer as Core
from tokenizers import models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.errors import ConfigError, DataError
from megatron_eso.export.hf import decoding_esolm
from megatron_eso.sample import sampler
from megatron_eso.sample.cache import Cache
from megatron_eso.sample.choose import choose_tokens
from megatron_eso.sample.generate import Batch, check_request, plan_for
from megatron_eso.sample.live import LiveRow
from megatron_eso.sample.output import SampleFile, require_new
from megatron_eso.sample.plan import make_block_plan, make_plan
from megatron_eso.sample.prompt import rows_with_gaps, rows_with_prompts
from megatron_eso.sample.sampler import Choice, Sampled, _have_ended, check_choice
from megatron_eso.sample.settings import METHODS, PlanSettings
from tests.rank_jobs import LENGTH, VOCAB, assemble, read_rows
from tests.reference import ReferenceModel

MASK = VOCAB - 1


def open_rows(num_rows, given=()):
    is_given = torch.zeros(num_rows, LENGTH, dtype=torch.bool)
    is_given[:, list(given)] = True
    return is_given


@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("given", [(), (0, 1, 2), (3, 9)])
def test_a_plan_decides_every_open_position_once(alpha_0, given):
    plan = make_plan(open_rows(3, given), alpha_0=alpha_0, num_steps=4, seed=1)
    assert sum(plan.counts) == LENGTH - len(given)
    assert plan.num_given == len(given)
    for order in plan.order.tolist():
        assert sorted(order) == list(range(LENGTH))
        assert order[: len(given)] == list(given)
    if alpha_0 == 0:
        assert plan.order[0, len(given) :].tolist() == [p for p in range(LENGTH) if p not in given]
    if alpha_0 == 1:
        assert plan.num_evaluations <= 4


def test_the_share_decided_by_diffusion_is_alpha_0():
    is_given = torch.zeros(1, 4000, dtype=torch.bool)
    plan = make_plan(is_given, alpha_0=0.3, num_steps=10, seed=3)
    by_diffusion = sum(c for c in plan.counts if c > 1)
    assert abs(by_diffusion / 4000 - 0.3) < 0.03


def test_the_rest_after_diffusion_goes_left_to_right():
    plan = make_plan(open_rows(2), alpha_0=0.5, num_steps=2, seed=0)
    singles = plan.counts[::-1].index(next(c for c in plan.counts[::-1] if c > 1))
    for order in plan.order.tolist():
        assert order[LENGTH - singles :] == sorted(order[LENGTH - singles :])


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_tokens_are_chosen_with_their_probabilities(top_p):
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    number = 40_000
    u = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    picked = choose_tokens(logits.expand(number, 4), u, temperature=1.0, top_p=top_p)
    shares = torch.bincount(picked, minlength=4) / number
    expected = [0.4, 0.3, 0.2, 0.1] if top_p == 1 else [4 / 7, 3 / 7, 0, 0]
    torch.testing.assert_close(shares, torch.tensor(expected), atol=1e-3, rtol=0)


def test_a_temperature_raises_probabilities_to_its_inverse():
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    u = (torch.arange(46_000, dtype=torch.float64) + 0.5) / 46_000
    picked = choose_tokens(logits.expand(46_000, 3), u, temperature=0.5, top_p=1.0)
    shares = torch.bincount(picked, minlength=3) / 46_000
    torch.testing.assert_close(shares, torch.tensor([36, 9, 1]) / 46, atol=1e-3, rtol=0)


def test_a_nucleus_that_is_full_takes_no_further_token():
    """Of four tokens with a quarter each, two hold half of the probability."""
    u = torch.arange(100, dtype=torch.float64) / 100
    assert len(choose_tokens(torch.zeros(100, 4), u, temperature=1.0, top_p=0.5).unique()) == 2


@pytest.fixture(scope="module")
def large_vocabulary():
    """Return float64 probabilities of 50,258 tokens, evenly spread numbers in [0, 1), the chosen tokens."""
    logits = 2 * torch.randn(50258, generator=torch.Generator().manual_seed(0))
    logits = logits.sort(
        descending=True
    ).values  # surprise grows with the number: its mean is exact
    exact = np.exp(logits.numpy().astype(np.float64))
    u = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    chosen = [
        choose_tokens(logits.expand(64, -1), part, temperature=1.0, top_p=1.0)
        for part in u.split(64)
    ]
    return exact / exact.sum(), u.numpy(), torch.cat(chosen).numpy()


def test_tokens_of_a_large_vocabulary_are_those_of_a_float64_reference(large_vocabulary):
    exact, u, chosen = large_vocabulary
    assert np.array_equal(chosen, np.searchsorted(np.cumsum(exact), u, side="right"))


def test_the_entropy_of_a_large_vocabulary_is_not_lowered(large_vocabulary):
    """The mean surprise of tokens at evenly spread numbers is the entropy, up to their spacing."""
    exact, _, chosen = large_vocabulary
    entropy = -(exact * np.log(exact)).sum()
    assert entropy > 8
    assert abs(-np.log(exact[chosen]).mean() - entropy) < 0.005


class LargestInFloat64(TorchDispatchMode):
    """Notes the size of the largest float64 tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype is torch.float64:
                self.num_elements = max(self.num_elements, x.numel())
        return out


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_float64_copies_of_a_large_step_s_logits_are_made_piece_by_piece(top_p, monkeypatch):
    """A step that decides half a batch of rows has gigabytes of logits, and needs several copies."""
    monkeypatch.setattr(sampler, "_PIECE_ELEMENTS", 4 * 100)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 100, generator=generator)
    open_ = torch.arange(9).expand(2, 9)
    u = torch.rand(2, 9, dtype=torch.float64, generator=generator)
    with LargestInFloat64() as largest:
        tokens, log_probs = sampler.decide(logits, open_, u, Choice(top_p=top_p))
    assert largest.num_elements == 4 * 100
    flat = logits.view(18, 100)
    chosen = decoding_esolm.choose(flat, u.view(18), temperature=1.0, top_p=top_p)
    assert torch.equal(tokens.view(18), chosen)
    expected = torch.log_softmax(flat.double(), dim=1).gather(1, chosen[:, None])[:, 0]
    assert torch.equal(log_probs.view(18), expected)


def test_a_number_just_below_one_takes_no_token_of_weight_zero():
    """Where u times the total rounds up to the total, the search must not run past the last token."""
    u = torch.full((1,), 1 - 2.0**-53, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = torch.randn(1, 40, generator=generator)
        logits[:, 25:] = -torch.inf
        assert int(choose_tokens(logits, u, temperature=1.0, top_p=1.0)) < 25
    first = torch.tensor([[-torch.inf, 0.0]])
    assert int(choose_tokens(first, torch.zeros(1), temperature=1.0, top_p=1.0)) == 1


def test_the_exported_model_draws_the_same_numbers():
    from megatron_eso.export.hf import decoding_esolm as exported
    from megatron_eso.objective.randomness import Stream, uniform

    streams = (Stream.ORDER, Stream.EVAL_ORDER, Stream.SAMPLE_PLAN, Stream.SAMPLE_TOKEN)
    theirs = (exported.ORDER, exported.EVAL_ORDER, exported.PLAN, exported.TOKEN)
    assert theirs == tuple(map(int, streams))
    for arguments in ((7, 0, 0, 3), (2**40, 5, 9, 6)):
        ours = uniform(*arguments[:3], Stream(arguments[3]), 50, draw=2)
        assert np.array_equal(exported.uniform(*arguments, 50, draw=2), ours.numpy())


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert choose_tokens(logits, torch.zeros(1), temperature=0.0, top_p=1.0).tolist() == [1]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_next_to_zero_takes_it_too(top_p):
    """Scores divided by it overflow."""
    logits, u = torch.tensor([[0.0, 2.0, -torch.inf]]), torch.tensor([0.999])
    assert choose_tokens(logits, u, temperature=1e-307, top_p=top_p).tolist() == [1]


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        (list(range(9)), 8, "row of 8; shorten it or raise --length, to 64 at most$"),
        (list(range(64)), 64, "row of 64; shorten it$"),
        ([127], 8, "mask token"),
        ([1], 5000, "rotary table"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(ids, length, message):
    model = ModelConfig(vocab_size=128, max_length=64)
    with pytest.raises(ConfigError, match=message):
        rows_with_prompts([ids], length, model)


def test_text_with_gaps_becomes_a_row():
    model = ModelConfig(vocab_size=128, max_length=64)
    canvas = rows_with_gaps("ab[[3]]c", 2, model, lambda text: [ord(c) - 97 for c in text])
    assert canvas.tokens.tolist() == [[0, 1, 127, 127, 127, 2]] * 2
    assert canvas.is_given.tolist() == [[True, True, False, False, False, True]] * 2
    assert canvas.num_open == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", "no gap"),
        ("a[[0]]b", "no gap"),
        ("a[[99]]", "rotary"),
        ("~[[1]]", "mask token"),
        ("a[[3000000000000]]b", "rotary"),
        ("a[[" + "9" * 5000 + "]]", "rotary"),
    ],
)
def test_a_wrong_gap_is_refused(text, message):
    model = ModelConfig(vocab_size=100, max_length=64)
    with pytest.raises(ConfigError, match=message):
        rows_with_gaps(text, 1, model, lambda text: [min(ord(c), 99) for c in text])


def test_this_package_and_exported_models_have_the_same_plans():
    assert decoding_esolm.METHODS == METHODS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_0": 1.5, "num_steps": 2}, "alpha_0"),
        ({"alpha_0": 0.5, "num_steps": 99}, "num_steps"),
        ({"alpha_0": 0.5, "num_steps": 0}, "num_steps"),
    ],
)
def test_a_wrong_plan_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(open_rows(1), seed=0, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("alpha_0", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("given", [(), (2, 3, 11)])
@pytest.mark.parametrize("ranks", ["one", "tensor", "pipeline"])
def test_cached_equals_uncached(one_rank, two_ranks, alpha_0, given, ranks):
    """Teacher-forced log-probabilities equal those of passes over [clean; masks of the step]."""
    pool, layout = (one_rank, []) if ranks == "one" else (two_ranks, [f"parallel.{ranks}=2"])
    settings = {"alpha_0": alpha_0, "num_steps": 3, "seed": 5}
    check_against_uncached(pool, layout, given, settings)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["one", "tensor", "pipeline"])
def test_cached_equals_uncached_in_float32(one_rank, two_ranks, ranks):
    pool, layout = (one_rank, []) if ranks == "one" else (two_ranks, [f"parallel.{ranks}=2"])
    settings = {"alpha_0": 0.4, "num_steps": 3, "seed": 5}
    check_against_uncached(pool, layout, (2, 3, 11), settings, dtype="fp32", tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("given", [(), (2, 3, 11)])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fixed", "alpha_0": 0.6, "num_steps": 4},
        {"method": "strided", "alpha_0": 1.0, "num_steps": 5},
        {"method": "left-to-right", "alpha_0": 1.0},
    ],
)
def test_cached_equals_uncached_for_every_plan(one_rank, given, settings):
    check_against_uncached(one_rank, [], given, {**settings, "seed": 6})


def check_against_uncached(pool, layout, given, settings, *, dtype="fp64", tolerance=1e-10):
    rows = read_rows(3, [0, 1]).tokens[:, :LENGTH]
    replies = pool.run(
        "sample_rows", layout, dtype, open_rows(2, given).numpy(), rows.numpy(), settings,
        {"forced": rows.numpy()},
    )  # fmt: skip
    reply = replies[0]
    assert all(np.array_equal(r["log_probs"], reply["log_probs"]) for r in replies)
    model = ReferenceModel(
        assemble([r["weights"] for r in replies]), heads=4, groups=2, vocab=VOCAB
    )
    assert np.array_equal(reply["tokens"], rows.numpy())
    for row, order, found in zip(rows, reply["order"], reply["log_probs"], strict=True):
        done = reply["num_given"]
        order = torch.from_numpy(order)
        for count in reply["counts"]:
            seen, new = order[:done], order[done : done + count]
            inputs = torch.cat([row[seen], torch.full((count,), MASK)])
            total = done + count
            visible = torch.ones(total, total, dtype=torch.bool).tril()
            expected = model.log_probs(inputs, torch.cat([seen, new]), visible)[done:]
            np.testing.assert_allclose(
                found[new], expected.gather(1, row[new][:, None])[:, 0], atol=tolerance, rtol=0
            )
            done = total


@pytest.mark.slow
def test_sampled_rows_have_the_model_s_probabilities(one_rank):
    """Frequencies of all 27 rows of three tokens against exact probabilities: chi-squared."""
    import itertools

    small = ["model.vocab_size=4", "train.sequence_length=3", "model.init_std=0.5"]
    number = 3000
    given = np.zeros((number, 3), dtype=bool)
    rows = np.zeros((number, 3), dtype=np.int64)
    settings = {"alpha_0": 0.0, "num_steps": 1, "seed": 11}
    reply = one_rank.run(
        "sample_rows", small, "fp32", given, rows, settings, {"seed": 4, "top_p": 1.0}
    )[0]
    every = np.array(list(itertools.product(range(3), repeat=3)))
    orders = np.tile(np.arange(3), (27, 1))
    exact = np.exp(one_rank.run("sequence_log_probs", small, every, orders, "fp64")[0])
    codes = reply["tokens"] @ np.array([9, 3, 1])
    counts = np.bincount(codes, minlength=27)
    chi_squared = ((counts - number * exact) ** 2 / (number * exact)).sum()
    assert chi_squared < 54.1  # 0.1 % point of 26 degrees of freedom
    assert counts.std() > 20  # the model is not uniform


@pytest.mark.slow
def test_rows_of_parallel_steps_have_their_exact_probabilities(one_rank):
    """One token, then two at once, in each row's own random order: chi-squared against the exact sum."""
    import itertools

    small = ["model.vocab_size=4", "train.sequence_length=3", "model.init_std=0.7"]
    number = 3000
    given, rows = np.zeros((number, 3), dtype=bool), np.zeros((number, 3), dtype=np.int64)
    settings = {"alpha_0": 1.0, "num_steps": 2, "method": "fixed", "seed": 11}
    reply = one_rank.run(
        "sample_rows", small, "fp32", given, rows, settings, {"seed": 4, "top_p": 1.0}
    )[0]
    assert reply["counts"] == [1, 2]
    model = ReferenceModel(assemble([reply["weights"]]), heads=4, groups=2, vocab=4)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    expected = np.zeros(27)
    for order, count in zip(*np.unique(reply["order"], axis=0, return_counts=True), strict=True):
        expected += count * np.exp([_two_step_log_prob(model, row, order) for row in every])
    np.testing.assert_allclose(expected.sum(), number, rtol=1e-9)
    counts = np.bincount(reply["tokens"] @ np.array([9, 3, 1]), minlength=27)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 54.1  # 0.1 % point of 26 degrees of freedom
    assert counts.std() > 20


def _two_step_log_prob(model, row, order):
    """Return log p of a row in which step 1 decides one token and step 2 the other two."""
    order, total = torch.from_numpy(order), 0.0
    for done, count in ((0, 1), (1, 2)):
        seen, new = order[:done], order[done : done + count]
        inputs = torch.cat([row[seen], torch.full((count,), 3)])
        visible = torch.ones(done + count, done + count, dtype=torch.bool).tril()
        log_probs = model.log_probs(inputs, torch.cat([seen, new]), visible)[done:]
        total += float(log_probs.gather(1, row[new][:, None]).sum())
    return total


@pytest.mark.slow
def test_the_same_seed_gives_the_same_rows_whatever_the_batch(one_rank):
    rows = np.zeros((4, LENGTH), dtype=np.int64)
    given = np.zeros((4, LENGTH), dtype=bool)
    settings = {"alpha_0": 0.0, "num_steps": 1, "seed": 2}
    whole = one_rank.run("sample_rows", [], "fp64", given, rows, settings, {"seed": 8})[0]
    alone = one_rank.run(
        "sample_rows", [], "fp64", given[:1], rows[:1], settings, {"seed": 8, "first_row": 2}
    )[0]
    assert np.array_equal(whole["tokens"][2], alone["tokens"][0])
    other = one_rank.run("sample_rows", [], "fp64", given, rows, settings, {"seed": 9})[0]
    assert not np.array_equal(whole["tokens"], other["tokens"])


BASELINES = {
    "ar": (["objective.name=ar"], {"method": "left-to-right", "alpha_0": 0.0}),
    "mdlm": (["objective.name=mdlm"], {"alpha_0": 1.0, "num_steps": 4}),
    "bd3lm": (
        ["objective.name=bd3lm", "objective.block_size=4"],
        {"block_size": 4, "num_steps": 8},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_given", [0, 6])
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("ranks", ["one", "pipeline"])
def test_a_baselines_steps_equal_its_training_passes(one_rank, two_ranks, name, num_given, ranks):
    objective, settings = BASELINES[name]
    pool, layout = (one_rank, []) if ranks == "one" else (two_ranks, ["parallel.pipeline=2"])
    rows = read_rows(3, [0, 1]).tokens[:, :LENGTH].numpy()
    given = open_rows(2, range(num_given)).numpy()
    reply = pool.run("sample_rows", [*objective, *layout], "fp64", given, rows,
                     {**settings, "seed": 3}, {"forced": rows})[0]  # fmt: skip
    assert sum(reply["counts"]) == LENGTH - num_given
    expected = one_rank.run("uncached_log_probs", objective, rows, reply["order"], reply["counts"],
                            reply["num_given"])[0]  # fmt: skip
    np.testing.assert_allclose(reply["log_probs"], expected, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eso", {"alpha_0": 0.5, "num_steps": 3}),
        ("ar", {"method": "left-to-right", "alpha_0": 0.0}),
        ("mdlm", {"alpha_0": 1.0, "num_steps": 3}),
    ],
)
def test_a_left_padded_batch_gives_what_its_rows_give_alone(one_rank, name, settings):
    """Prompts of 5, 2 and 0 tokens, eight new ones; padding holds arbitrary tokens."""
    prompts = [[3, 1, 4, 1, 5], [9, 2], []]
    objective, settings = [f"objective.name={name}"], {**settings, "seed": 4}
    padding = np.array([5 - len(p) for p in prompts])
    rows = np.full((3, 13), 7)
    for row, prompt in enumerate(prompts):
        rows[row, 5 - len(prompt) : 5] = prompt
    given = np.tile(np.arange(13) < 5, (3, 1))
    batch = one_rank.run("sample_rows", objective, "fp64", given, rows, settings,
                         {"seed": 8, "padding": padding})[0]  # fmt: skip
    for row, prompt in enumerate(prompts):
        number = len(prompt)
        single = one_rank.run(
            "sample_rows", objective, "fp64", given[:1, 5 - number :], rows[row : row + 1, 5 - number :],
            {**settings, "first_row": row}, {"seed": 8, "first_row": row},
        )[0]  # fmt: skip
        assert np.array_equal(single["tokens"][0], batch["tokens"][row, 5 - number :])
        np.testing.assert_allclose(
            single["log_probs"][0], batch["log_probs"][row, 5 - number :], atol=1e-10, rtol=0
        )


@pytest.mark.slow
def test_rows_that_have_all_ended_are_not_continued(one_rank):
    rows, given = np.zeros((2, LENGTH), dtype=np.int64), np.zeros((2, LENGTH), dtype=bool)
    forced = np.full((2, LENGTH), 5)
    forced[0, 3] = forced[1, 6] = 9
    reply = one_rank.run(
        "sample_rows", [], "fp64", given, rows, {"alpha_0": 0.0, "num_steps": 1, "seed": 0},
        {"forced": forced, "stop_token": 9},
    )[0]  # fmt: skip
    assert reply["num_steps"] == 7
    assert reply["tokens"][1].tolist() == [5] * 6 + [9] * (LENGTH - 6)


def test_a_given_stop_token_ends_no_row():
    """Row 0 is [9, 9 | 5, ...], its given 9s a prompt; row 1 has a decided 9 before everything open."""
    tokens = torch.tensor([[9, 9, 5, MASK, MASK], [1, 2, 9, MASK, MASK]])
    given, still_open = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[3, 4], [3, 4]])
    assert not _have_ended(tokens, given, still_open, 9)
    tokens[0, 2] = 9
    assert _have_ended(tokens, given, still_open, 9)
    assert not _have_ended(tokens, given, still_open[:, :0], 9)  # nothing is left to end


def test_text_ends_at_the_first_stop_token_that_was_decided():
    """Prompts [9, 1] and [1] (padded): the text holds them, and what was decided up to a 9."""
    tokens = torch.tensor([[9, 1, 5, 9, 5], [9, 1, 5, 6, 7]])
    plan = make_plan(torch.arange(5).expand(2, 5) < 2, alpha_0=0.5, num_steps=2, seed=0)
    sampled = Sampled(tokens, torch.zeros(2, 5), 3)
    batch = Batch(0, plan, sampled, padding=torch.tensor([0, 1]))
    assert batch.token_rows(stop_token=9) == [[9, 1, 5], [1, 5, 6, 7]]
    assert batch.token_rows() == [[9, 1, 5, 9, 5], [1, 5, 6, 7]]


@pytest.mark.parametrize("method", ["fixed", "binomial"])
@pytest.mark.parametrize(
    ("num_given", "num_steps", "expected"),
    [
        (0, 8, [1] * 8), (0, 20, [2, 3] * 4), (64, 16, [4] * 4), (112, 4, [4]), (100, 14, [6, 8]),
        (100, 1, [1, 1]), (100, None, [12, 16]), (127, 1, [1]),
    ],
)  # fmt: skip
def test_blocks_share_the_steps_by_what_they_have_to_decide(method, num_given, num_steps, expected):
    is_given = torch.arange(128)[None] < num_given
    settings = {"block_size": 16, "num_steps": num_steps, "method": method, "seed": 1}
    plan = make_block_plan(is_given, **settings)
    assert sum(plan.counts) == 128 - num_given
    blocks = (plan.order[0, num_given:] // 16).split(plan.counts)
    numbers = [int(step[0]) for step in blocks]
    assert all(bool((step == step[0]).all()) for step in blocks)
    found = [numbers.count(block) for block in range(num_given // 16, 8)]
    if method == "fixed":
        assert found == expected
    else:  # steps that decide nothing are left out
        assert all(0 < here <= most for here, most in zip(found, expected, strict=True))


def test_blocks_of_one_row_and_rows_of_a_block_have_numbers_of_their_own():
    settings = {"block_size": 64, "num_steps": 64, "seed": 1}
    whole = make_block_plan(torch.zeros(3, 256, dtype=torch.bool), **settings)
    part = make_block_plan(torch.zeros(2, 256, dtype=torch.bool), **settings, first_row=1)
    assert torch.equal(part.order, whole.order[1:])
    ends = np.cumsum(whole.counts)
    blocks = [tuple(np.array(whole.counts)[(ends - 1) // 64 == block]) for block in range(4)]
    assert len(set(blocks)) == 4


@pytest.mark.parametrize(
    ("lengths", "size", "message"),
    [([4, 3], 4, "same number"), ([4, 4], 5, "does not divide"), ([4, 4], 4, "first ones")],
)
def test_rows_that_blocks_cannot_fill_are_refused(lengths, size, message):
    is_given = torch.arange(16) < torch.tensor(lengths)[:, None]
    if message == "first ones":
        is_given[1] = is_given[1].flip(0)
    with pytest.raises(ConfigError, match=message):
        make_block_plan(is_given, block_size=size, seed=0)


@pytest.mark.parametrize("name", ["eso", "mdlm"])
@pytest.mark.parametrize(
    "settings", [{"num_steps": 4}, {"tokens_per_step": 4}, {"alpha_0": 1.0}], ids=str
)
def test_what_a_left_to_right_plan_would_ignore_is_refused(name, settings):
    canvas = rows_with_prompts([[1] * 8], 16, ModelConfig(vocab_size=128, max_length=64))
    asked = PlanSettings(method="left-to-right", **settings)
    with pytest.raises(ConfigError, match="left-to-right decides one token at a time"):
        plan_for(ObjectiveConfig(name=name, alpha_0=0.5), canvas, asked, Choice())
    plain = PlanSettings(method="left-to-right")
    assert plan_for(ObjectiveConfig(name=name), canvas, plain, Choice()).counts == [1] * 8
    with pytest.raises(ConfigError, match=f"--{next(iter(settings)).replace('_', '-')}"):
        plan_for(ObjectiveConfig(name="ar"), canvas, PlanSettings(**settings), Choice())


@pytest.mark.parametrize("amount", [{"num_steps": 4}, {"tokens_per_step": 2}], ids=str)
@pytest.mark.parametrize(
    ("alpha_0", "said"), [(None, r"alpha_0 = 0 \(as trained\)"), (0.0, "alpha_0 = 0 ")]
)
def test_without_diffusion_there_are_no_steps_to_count(amount, alpha_0, said):
    canvas = rows_with_prompts([[1] * 8], 16, ModelConfig(vocab_size=128, max_length=64))
    trained = ObjectiveConfig(alpha_0=0.0 if alpha_0 is None else 0.5)
    with pytest.raises(ConfigError, match=said):
        plan_for(trained, canvas, PlanSettings(alpha_0=alpha_0, **amount), Choice())
    assert plan_for(trained, canvas, PlanSettings(alpha_0=0.0), Choice()).counts == [1] * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=str,
)
def test_a_choice_without_a_meaning_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_choice(Choice(**settings))
    check_choice(Choice(temperature=0.0, seed=2**64 - 1))


def test_a_strided_plan_keeps_tokens_of_a_step_apart():
    plan = make_plan(open_rows(1, (0,)), alpha_0=1.0, num_steps=5, method="strided", seed=0)
    assert plan.counts == [3] * 5
    assert plan.order[0].tolist() == [0, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14, 5, 10, 15]
    full = open_rows(1, range(LENGTH))
    assert make_plan(full, alpha_0=1.0, method="strided", seed=0).counts == []


def test_a_fixed_plan_has_steps_of_equal_size():
    plan = make_plan(open_rows(2), alpha_0=0.75, num_steps=4, method="fixed", seed=0)
    assert plan.counts == [3, 3, 3, 3, 1, 1, 1, 1]
    plan = make_plan(open_rows(2), alpha_0=0.3, num_steps=1, method="fixed", seed=0)
    assert plan.counts == [5] + [1] * 11  # of 4.8


@pytest.mark.parametrize(
    ("name", "prompts", "message"),
    [
        ("bd3lm", [[1, 2], [1]], "prompts of different lengths"),
        ("ar", [[1, 2], []], "its first token must be given"),
    ],
)
def test_prompts_that_an_objective_cannot_begin_with_are_refused(name, prompts, message):
    objective = ObjectiveConfig(name=name, leading_mask=False, block_size=4)
    canvas = rows_with_prompts(prompts, LENGTH, ModelConfig(vocab_size=VOCAB, max_length=LENGTH))
    with pytest.raises(ConfigError, match=message):
        check_request(objective, canvas, PlanSettings(), Choice())
    even = rows_with_prompts([[1, 2], [3, 4]], LENGTH, ModelConfig(vocab_size=VOCAB))
    check_request(objective, even, PlanSettings(), Choice())


@pytest.mark.parametrize("first_row", [0, 5])
def test_a_row_has_its_order_whatever_the_batch(first_row):
    settings = {"alpha_0": 0.6, "num_steps": 3, "seed": 1}
    whole = make_plan(open_rows(8, (1,)), **settings)
    part = make_plan(open_rows(2, (1,)), **settings, first_row=first_row)
    assert torch.equal(part.order, whole.order[first_row : first_row + 2])
    assert part.counts == whole.counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("ar", {"alpha_0": 1.0, "num_steps": 2}, "one token at a time"),
        ("bd3lm", {"alpha_0": 1.0, "num_steps": 2}, "blocks of 4"),
    ],
)
def test_a_plan_that_an_objective_cannot_follow_is_refused(one_rank, objective, settings, message):
    rows, given = np.zeros((1, LENGTH), dtype=np.int64), np.zeros((1, LENGTH), dtype=bool)
    with pytest.raises(AssertionError, match=message):
        one_rank.run("sample_rows", [f"objective.name={objective}", "objective.block_size=4"],
                     "fp32", given, rows, {**settings, "seed": 2}, {})  # fmt: skip


def test_a_live_row_shows_no_padding():
    words = Core(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    live = LiveRow(Console(file=io.StringIO()), words, num_steps=1, mask_id=2)
    with live:
        live.begin(torch.tensor([2, 2, 0, 2]), padding=2)
        live.on_step(0, torch.tensor([[2, 2, 0, 1]]))
    assert live._text([2, 2, 0, 1], 0).plain == "ab\n[step 1 of 1]"


def test_a_live_row_colors_a_token_by_the_step_that_decided_it():
    live = LiveRow(Console(file=io.StringIO()), None, num_steps=4, mask_id=2)
    live._text = lambda row, step: ""
    with live:
        live.begin(torch.tensor([0, 2, 2, 2, 2]))
        for step, row in enumerate(([0, 1, 2, 2, 2], [0, 1, 1, 2, 2], [0, 1, 1, 1, 2])):
            live.on_step(step, torch.tensor([row]))
        live.on_step(4, torch.tensor([[0, 1, 1, 1, 1]]))  # beyond the diffusion steps
    assert [live._style(column) for column in range(5)] == ["", "blue", "cyan", "yellow", "red"]


def test_a_cache_has_room_for_whole_chunks_of_keys():
    assert [Cache(n).capacity for n in (1, 256, 257)] == [256, 256, 512]


def test_samples_that_find_no_room_are_counted_and_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(DataError, match=r"\.s\.jsonl\.partial holds those of the .* that fitted"):
        with SampleFile(tmp_path / "s.jsonl", total=100) as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            try:
                for _ in range(100):
                    file.add(text="x" * 200)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "s.jsonl").exists()


def test_a_place_that_takes_no_file_is_found_before_anything_is_loaded():
    with pytest.raises(DataError, match="cannot write /proc/none"):
        require_new(Path("/proc/none/s.jsonl"))
