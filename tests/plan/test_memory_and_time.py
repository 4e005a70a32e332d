"""Published memory, and properties that any honest planner has."""

from dataclasses import replace

import pytest

from megatron_eso.checkpoint.state import EMA, MOMENTS, WEIGHTS
from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import ClusterError, ConfigError
from megatron_eso.parallel import vocabulary_loss
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.plan.estimate import make_plan, run_failures
from megatron_eso.plan.fit import require_time_for_a_checkpoint
from megatron_eso.plan.flops import matrix_parameters_per_layer
from megatron_eso.plan.hardware import load_hardware
from megatron_eso.plan.memory import CHUNK_LOGITS, layer_activation_bytes, stage_memory
from megatron_eso.plan.parameters import num_parameters
from megatron_eso.plan.step_time import step_time
from tests.plan.jobs import job, with_model

with importing_megatron():
    from megatron.core.parallel_state import RankGenerator

H100 = load_hardware("h100")
LAYOUTS = [
    pytest.param({}, id="data"),
    pytest.param({"tensor": 2}, id="tensor"),
    pytest.param({"pipeline": 4}, id="pipeline"),
    pytest.param({"pipeline": 4, "virtual_pipeline": 4}, id="interleaved"),
    pytest.param({"tensor": 4, "pipeline": 2, "recompute": "full"}, id="recompute"),
]


def fullest(case) -> float:
    return max(stage.total for stage in stage_memory(case, H100))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_add_up_to_the_total(layout):
    time = step_time(job(**layout), H100, checkpoint_stall_seconds=1.0)
    assert time.total == pytest.approx(sum(vars(time).values()))
    for stage in stage_memory(job(**layout), H100):
        assert stage.total == pytest.approx(sum(vars(stage).values()))


def test_activations_follow_korthikanti():
    # 34 s b h / t bytes at f = 4 h with sequence parallelism and a fused attention kernel.
    assert layer_activation_bytes(job(tensor=2)) == pytest.approx(34 * 4096 * 4096 / 2)
    full = stage_memory(job(tensor=2, recompute="full"), H100)[0].activations
    assert full == pytest.approx(32 * 2 * 4096 * 4096 / 2 + 34 * 4096 * 4096 / 2)


def test_graphs_of_a_second_kind_of_micro_batch_keep_their_layers_outputs():
    plain, graphed = (
        stage_memory(job(tensor=2, cuda_graphs=is_on), H100)[0].activations
        for is_on in (False, True)
    )
    assert graphed - plain == pytest.approx(32 * 2 * 4096 * 4096 / 2)


def test_states_take_six_plus_twelve_over_d_bytes_a_weight():
    case = job(gpus=16)
    memory = stage_memory(case, H100)[0]
    states = memory.weights + memory.gradients + memory.optimizer
    weights = num_parameters(case.config.model, padded=True)
    assert states == pytest.approx(weights * (6 + 12 / 16))


def test_fp32_weights_are_their_own_masters():
    """Megatron's optimizer steps on views of them: it has the two moments alone."""
    case = with_precision(job(gpus=16), dtype="fp32")
    memory = stage_memory(case, H100)[0]
    states = memory.weights + memory.gradients + memory.optimizer
    weights = num_parameters(case.config.model, padded=True)
    assert states == pytest.approx(weights * (8 + 8 / 16))


@pytest.mark.parametrize(("decay", "has_average"), [(0.0, False), (0.999, True)])
def test_a_checkpoint_has_the_bytes_of_the_tensors_it_holds(decay, has_average):
    """Both that the planner's stall and that submit's limit are taken from: float32, no bf16 weights."""
    case = with_model(job(gpus=16), vocab_size=131000, vocab_padding_multiple=1024)
    optimizer = replace(case.config.optimizer, ema_decay=decay)
    case = replace(case, config=replace(case.config, optimizer=optimizer))
    kinds = len([WEIGHTS, *MOMENTS, *([EMA] if has_average else [])])
    stored = 4 * kinds * num_parameters(case.config.model, padded=True)
    stall = run_failures(case, H100, 1.0).save_stall_seconds
    assert stall == pytest.approx(stored / 16 / (H100.host_copy_gb_per_second * 1e9))
    with pytest.raises(ClusterError, match=f"a checkpoint of {stored / 1e9:.1f} GB takes"):
        require_time_for_a_checkpoint(
            case.config, gb_per_second=1.0, signal_seconds=1.0, step_seconds=0.0
        )


def with_precision(case, **changes):
    precision = replace(case.config.precision, **changes)
    return replace(case, config=replace(case.config, precision=precision))


@pytest.mark.parametrize(
    ("changes", "bytes_more", "layers"),
    [
        ({"fp8": "tensorwise"}, 2, 32),  # bf16, and FP8 with its transpose
        ({"fp8": "tensorwise", "fp8_params": True}, 0, 32),  # FP8 with its transpose alone
        ({"fp8": "tensorwise", "bf16_first_layers": 3, "bf16_last_layers": 1}, 2, 28),
    ],
)
def test_fp8_layers_keep_their_copies_beside_the_weights(changes, bytes_more, layers):
    case = job(gpus=16, pipeline=2)
    plain, fp8 = (
        sum(stage.weights for stage in stage_memory(each, H100))
        for each in (case, with_precision(case, **changes))
    )
    matrices = matrix_parameters_per_layer(case.config.model)
    assert fp8 - plain == bytes_more * layers * matrices


def test_memory_falls_with_every_way_of_splitting():
    base = fullest(job(gpus=64))
    assert fullest(job(gpus=64, tensor=2)) < base
    assert fullest(job(gpus=64, pipeline=2)) < base
    assert fullest(job(gpus=128)) < base


def test_more_gpus_never_cost_more_time():
    times = [step_time(job(gpus=n), H100).total for n in (8, 16, 32, 64, 128, 256, 512)]
    assert times == sorted(times, reverse=True)


def test_where_communication_makes_more_ranks_slower_the_parts_say_so():
    # Tensor parallelism across nodes on the same GPUs only adds traffic.
    inside = step_time(job(gpus=64, tensor=8), H100)
    across = step_time(job(gpus=64, tensor=16), H100)
    assert across.total > inside.total
    assert across.tensor_parallel > inside.tensor_parallel
    assert any("spans nodes" in w for w in make_plan(job(gpus=64, tensor=16), H100).warnings)


def test_the_bubble_shrinks_with_interleaving():
    plain = step_time(job(pipeline=4), H100).pipeline_bubble
    assert step_time(job(pipeline=4, virtual_pipeline=4), H100).pipeline_bubble == pytest.approx(
        plain / 4
    )


@pytest.mark.parametrize(("alpha_0", "ratio"), [(1.0, 1.0), (0.25, 1.5), (0.0, 2.0)])
def test_an_eso_lm_step_takes_the_stack_rows_of_its_alpha(alpha_0, ratio):
    eso = step_time(job(objective="eso", alpha_0=alpha_0, micro=2), H100)
    assert eso.gemm == pytest.approx(ratio * step_time(job(micro=2), H100).gemm)


def test_mdlm_computes_all_pairs_and_half_the_head():
    mdlm, ar = step_time(job(objective="mdlm"), H100), step_time(job(), H100)
    assert mdlm.attention == pytest.approx(2 * ar.attention)
    assert mdlm.head == pytest.approx(ar.head / 2)


def test_the_parameter_count_agrees_with_a_published_model():
    llama_8b = ModelConfig(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        ffn_size=14336,
        vocab_size=128256,
    )
    assert num_parameters(llama_8b) == 8_030_261_248


def test_overflow_names_the_setting_to_change():
    warnings = make_plan(job(gpus=8), H100).warnings
    assert any("GB of 80 GB" in w and "parallel.tensor" in w for w in warnings)


def test_a_vocabulary_that_leaves_part_of_a_tile_to_a_rank_is_mentioned():
    case = with_model(job(tensor=4), vocab_size=128256)  # 32,064 columns a rank
    assert any("vocab_padding_multiple=512" in w for w in make_plan(case, H100).warnings)
    even = with_model(job(tensor=4), vocab_size=128256, vocab_padding_multiple=512)
    assert not any("columns" in w for w in make_plan(even, H100).warnings)


def test_what_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="multiple of"):
        make_plan(job(gpus=96), H100)
    with pytest.raises(ConfigError, match="num_layers=32"):
        make_plan(job(gpus=40, pipeline=5), H100)
    with pytest.raises(ConfigError, match="cannot hold"):
        make_plan(job(gpus=6, tensor=4), H100)


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(ConfigError, match="h100"):
        load_hardware("h1000")


def test_the_head_holds_one_chunk_of_logits_whatever_the_micro_batch():
    assert vocabulary_loss._CHUNK_ELEMENTS["cuda"] == CHUNK_LOGITS
    small, large = (stage_memory(job(micro=rows), H100)[-1].logits for rows in (1, 2))
    assert small == large == 8 * CHUNK_LOGITS + 4 * 4096 * 131072


@pytest.mark.parametrize(
    ("gpus", "tensor", "context", "pipeline"),
    [(8, 2, 1, 2), (8, 1, 1, 8), (16, 2, 1, 2), (16, 1, 2, 4), (64, 2, 2, 2), (64, 2, 2, 8)],
)
def test_a_link_leaves_the_node_where_megatron_puts_its_ranks_on_two(
    gpus, tensor, context, pipeline
):
    copies = gpus // (tensor * context * pipeline)
    order = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel, with which we call it
    ranks = RankGenerator(tensor, 1, copies, pipeline, context, order)
    case = job(gpus=gpus, tensor=tensor, context=context, pipeline=pipeline)
    slow = replace(H100, network_gb_per_second=H100.network_gb_per_second / 2)
    for part, kind in (("pipeline_transfer", "pp"), ("data_parallel", "dp-cp")):
        groups = ranks.get_ranks(kind)
        leaves = any(len({rank // H100.gpus_per_node for rank in group}) > 1 for group in groups)
        before, after = (getattr(step_time(case, each), part) for each in (H100, slow))
        assert after == pytest.approx(before * (2 if leaves else 1)), part


def test_without_sequence_parallelism_stages_pass_whole_activations():
    whole, split = (
        step_time(job(tensor=4, pipeline=2, sequence=is_split), H100).pipeline_transfer
        for is_split in (False, True)
    )
    assert whole == pytest.approx(4 * split)
    alone = step_time(job(pipeline=2, sequence=False), H100).pipeline_transfer
    assert alone == step_time(job(pipeline=2), H100).pipeline_transfer


@pytest.mark.parametrize(("recompute", "ratio"), [("none", 1), ("attention", 1.5), ("full", 1.5)])
def test_recomputed_attention_swaps_tokens_for_heads_again(recompute, ratio):
    base, again = (
        step_time(job(context=2, recompute=kind), H100).context_parallel
        for kind in ("none", recompute)
    )
    assert again == pytest.approx(ratio * base)
