"""The model on Megatron against an independent forward pass with the official masks."""

import numpy as np
import pytest
import torch

from megatron_eso.eval.evaluate import _EVAL_SEED
from megatron_eso.objective.noise import keep_probability, loss_weight, stratified_times
from megatron_eso.objective.randomness import Stream, uniform
from tests.rank_jobs import LENGTH, VOCAB, assemble, read_rows
from tests.reference import ReferenceModel, diffusion_pass, sequential_pass

pytestmark = pytest.mark.slow
MASK = VOCAB - 1


def reference(parts):
    return ReferenceModel(assemble(parts), heads=4, groups=2, vocab=VOCAB)


@pytest.mark.parametrize("alpha_0", ["0.5", "1", "0"])
def test_both_passes_equal_the_official_scheme_in_float64(one_rank, alpha_0):
    reply = one_rank.run("model_pass", [f"objective.alpha_0={alpha_0}"], "fp64")[0]
    model = reference([reply["weights"]])
    checked = 0
    for rows, log_probs in zip(reply["rows"], reply["log_probs"], strict=True):
        first_z = rows["num_diffusion"] + rows["num_pairs"]
        expected = {}
        for entry, target in zip(rows["loss_entries"], rows["loss_targets"], strict=True):
            row, slot = divmod(int(entry), LENGTH)
            if row not in expected:
                expected[row] = expected_row(model, rows, row, first_z)
            index = slot if row < first_z else (slot + 1) % LENGTH
            expected_value = expected[row][index, target]
            np.testing.assert_allclose(
                log_probs[checked_index(rows, entry)], expected_value, atol=1e-9
            )
            checked += 1
    assert checked > 50


def checked_index(rows, entry):
    return int(np.flatnonzero(rows["loss_entries"] == entry)[0])


def expected_row(model, rows, row, first_z):
    """Return the reference log-probabilities of a stack row, in prediction order."""
    if row < rows["num_diffusion"]:
        order = torch.from_numpy(rows["positions"][row])
        inputs = torch.from_numpy(rows["tokens"][row])
        in_place = torch.empty_like(inputs).scatter(0, order, inputs)
        return diffusion_pass(model, in_place, in_place == MASK, order, MASK)
    x_row = row - rows["num_pairs"]
    order = torch.from_numpy(rows["positions"][x_row])
    tokens = torch.empty_like(order).scatter(0, order, torch.from_numpy(rows["tokens"][x_row]))
    # Which copies are masks does not affect the others, so all are masks; only masked ones are compared.
    return sequential_pass(model, tokens, torch.ones_like(tokens, dtype=torch.bool), order, MASK)


def test_one_pass_gives_probabilities_that_sum_to_one_for_every_order(one_rank):
    """All rows of length 3 over 4 tokens, under every order: the exact likelihood is a distribution."""
    import itertools

    small = ["model.vocab_size=5", "train.sequence_length=4", "model.init_std=0.5"]
    rows = np.array(list(itertools.product(range(4), repeat=4)))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 3, 1]):
        orders = np.tile(np.array(order), (len(rows), 1))
        log_probs = one_rank.run("sequence_log_probs", small, rows, orders, "fp64")[0]
        assert abs(np.exp(log_probs).sum() - 1) < 1e-9
        assert np.exp(log_probs).std() > 1e-4  # not simply uniform


def test_the_single_pass_is_the_chain_rule(one_rank):
    """log p(x | order) = sum of next-token log-probabilities with one mask at a time."""
    rows = read_rows(5, [0, 1]).tokens[:, :LENGTH]
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(2)])
    found = one_rank.run("sequence_log_probs", [], rows.numpy(), orders.numpy(), "fp64")[0]
    model = reference(one_rank.run("weights", []))
    for row, order, value in zip(rows, orders, found, strict=True):
        total = 0.0
        for place in range(LENGTH):
            seen = order[: place + 1]
            inputs = torch.cat([row[order[:place]], torch.tensor([MASK])])
            visible = torch.ones(place + 1, place + 1, dtype=torch.bool).tril()
            total += model.log_probs(inputs, seen, visible)[-1, row[order[place]]]
        assert abs(float(total) - value) < 1e-8


def test_the_bound_tightens_with_more_orders(one_rank):
    settings = ["eval.likelihood_orders=16", "objective.alpha_0=1"]
    found = one_rank.run("scores", settings, 6)[0]
    names = [name for name, _, _ in found]
    assert names == ["nelbo", *(f"likelihood bound, K = {k}" for k in (1, 10, 16))]
    assert found[1][1] > found[2][1] > found[3][1]
    fewer = one_rank.run("scores", [*settings[1:], "eval.likelihood_orders=10"], 6)[0]
    np.testing.assert_allclose(fewer[-1][1], found[2][1], rtol=1e-12)


@pytest.mark.parametrize(
    ("alpha_0", "others"), [(0.5, []), (1.0, ["objective.loss_weight=constant"])]
)
def test_the_nelbo_of_a_model_that_knows_nothing_follows_from_the_masks(one_rank, alpha_0, others):
    """Each row takes both passes in each repeat, with other times and masks; three at a time here."""
    settings = [f"objective.alpha_0={alpha_0}", "eval.nelbo_repeats=3", "eval.noise_eps=0.2"]
    blind = [*settings, *others, "model.init_std=1e-9", "eval.micro_batch_rows=6"]
    found = one_rank.run("scores", blind, 7)[0][0]
    valid = read_rows(99, list(range(7))).is_valid[:, :LENGTH]
    nats = 0.0
    for repeat in range(3):
        times = stratified_times(_EVAL_SEED, 0, list(range(7)), num_rows=7, eps=0.2, draw=repeat)
        keep = keep_probability(times, alpha_0=alpha_0, eps=0.2)
        weight = loss_weight(times, alpha_0=alpha_0, eps=0.2)
        for row in range(7):
            u = uniform(_EVAL_SEED, 0, row, Stream.MASK, LENGTH, draw=repeat)[valid[row]]
            nats += float((u >= keep[row]).sum() * weight[row] + (u >= alpha_0).sum())
    expected = nats / 3 / int(valid.sum()) * np.log(VOCAB - 1)
    assert found[0] == "nelbo" and found[2] == int(valid.sum())
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)


def test_at_alpha_zero_the_nelbo_is_the_exact_likelihood_and_scored_once(one_rank):
    settings = ["objective.alpha_0=0", "eval.likelihood_orders=1", "eval.nelbo_repeats=3"]
    found, bounds, num_passes = one_rank.run("scores_and_bounds", settings, 6)[0]
    assert [name for name, _, _ in found] == ["likelihood"]
    np.testing.assert_allclose(found[0][1], bounds[0][1], rtol=1e-6)
    assert num_passes == 1


@pytest.mark.parametrize(
    "objective",
    [
        ["objective.alpha_0=0.5"],
        ["objective.alpha_0=1"],
        ["objective.alpha_0=0"],
        ["objective.name=ar"],
        ["objective.name=mdlm"],
        ["objective.name=bd3lm", "objective.block_size=4"],
    ],
    ids=" ".join,
)
def test_rows_that_fill_a_micro_batch_change_no_score(one_rank, objective):
    """Five stack rows hold one row that takes three, or two rows that take two and an empty stack row."""
    plain = one_rank.run("scores", objective, 7)[0]
    filled = one_rank.run("scores_in_full_micro_batches", objective, 7, 5)[0]
    assert [name for name, _, _ in filled] == [name for name, _, _ in plain]
    np.testing.assert_allclose(
        [value for _, value, _ in filled], [value for _, value, _ in plain], rtol=1e-6
    )


@pytest.mark.parametrize(("leading_mask", "num_tokens"), [("true", 106), ("false", 104)])
def test_ar_scores_are_divided_by_the_tokens_predicted(one_rank, leading_mask, num_tokens):
    """Of 17 tokens, 16 are predicted; of the 13 of rows 2 and 5, 13 or, from the second on, 12."""
    objective = ["objective.name=ar", f"objective.leading_mask={leading_mask}"]
    found = one_rank.run("scores", objective, 7)[0]
    assert [(name, tokens) for name, _, tokens in found] == [("likelihood", num_tokens)]


def test_flex_attention_is_refused_on_a_cpu_where_it_cannot_train(one_rank):
    with pytest.raises(AssertionError, match=r"attention=flex: .* no backward pass on a CPU"):
        one_rank.run("weights", ["precision.attention=flex"])


@pytest.mark.parametrize(
    ("asked", "built"),
    [("auto", "split"), ("split", "split"), ("dense", "dense"), ("flex", "flex")],
)
def test_layers_hold_the_kernel_that_the_configuration_names(one_rank, asked, built):
    assert one_rank.run("attention_of_layers", asked) == [{built}]


def test_initial_weights_are_normal_and_smaller_where_they_add_to_the_residual_stream(one_rank):
    """Of four layers, each draws its own; scales are 1, biases 0."""
    settings = [
        "model.init_std=0.1",
        "model.num_layers=4",
        "model.mlp_bias=true",
        "model.qk_norm=true",
    ]
    found = assemble(one_rank.run("weights", settings))
    outputs = ("linear_proj.weight", "linear_fc2.weight")
    for name, value in found.items():
        if value.ndim == 1:
            assert (value == (0.0 if "bias" in name else 1.0)).all(), name
        else:
            std = 0.1 / np.sqrt(8) if name.split("[")[0].endswith(outputs) else 0.1
            assert abs(value.std() / std - 1) < 0.1, name
            assert abs(value.mean()) < 0.1 * std, name
    matrices = [value for value in found.values() if value.ndim > 1]
    assert len({value.flat[0] for value in matrices}) == len(matrices)


def test_dropout_is_for_residual_branches_alone(one_rank):
    embedded, changed = one_rank.run("zeros_of_dropout", ["model.dropout=0.5"])[0]
    assert embedded == 0.0
    assert changed


def test_no_tensor_rank_draws_in_a_step_what_another_draws_in_the_next(two_ranks):
    """Megatron adds the tensor rank to the seed, so the seeds of steps must not follow each other."""
    settings = ["model.dropout=0.1", "parallel.tensor=2"]
    ranks = two_ranks.run("states_of_dropout", settings, 3)
    states = [state for of_steps, _ in ranks for state in of_steps]
    assert len(set(states)) == len(states) == 6


def test_no_stage_or_data_parallel_rank_draws_what_another_draws(four_ranks):
    settings = ["model.dropout=0.1", "parallel.pipeline=2", "train.micro_batch_rows=2"]
    ranks = four_ranks.run("states_of_dropout", settings, 2)
    states = [state for of_steps, _ in ranks for state in of_steps]
    assert len(set(states)) == len(states) == 8


def test_dropout_of_tensor_ranks_fills_no_log(two_ranks):
    """On a CPU Megatron would warn in each pass that the CPU's random state has changed."""
    ranks = two_ranks.run("states_of_dropout", ["model.dropout=0.1", "parallel.tensor=2"], 1)
    assert [said for _, said in ranks] == [[], []]


@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"])
def test_variables_of_an_attention_that_is_not_used_are_no_obstacle(one_rank, name):
    assert one_rank.run("builds_with", name, "0")[0]
