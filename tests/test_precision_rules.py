"""Every rule of precision settings, against made-up machines: each breach is named, and nothing else."""

from dataclasses import replace

import pytest

from megatron_eso.config import load_config
from megatron_eso.config.check import check, violations
from megatron_eso.config.precision_rules import Machine, broken, process_environment
from megatron_eso.config.precision_table import MACHINE_RULES, SETTINGS_RULES, require_machine
from megatron_eso.errors import ConfigError
from megatron_eso.model.build import resolve_precision

BASE = [
    "model.hidden_size=1024", "model.num_layers=8", "model.num_heads=8", "model.num_kv_heads=4",
    "train.sequence_length=1024", "model.max_length=1024", "train.steps=10", "precision.dtype=bf16",
]  # fmt: skip
H100 = Machine("NVIDIA H100", (9, 0), (2, 11, 0), "", (9, 14, 0), "")
PRIMED = replace(H100, dpa_recipe="DelayedScaling")
TENSORWISE = ["precision.fp8=tensorwise"]
BUFFERS = ["parallel.tensor_overlap=true", "parallel.tensor=2", "train.micro_batch_rows=4"]
ATTENTION = [*TENSORWISE, "precision.fp8_attention=true"]

LEGAL = {
    "bf16": (["precision.backend=te"], H100),
    "bf16 te attention": (["precision.attention=te"], H100),
    "delayed": (["precision.fp8=delayed"], H100),
    "tensorwise": (TENSORWISE, H100),
    "bf16 ends": ([*TENSORWISE, "precision.bf16_first_layers=1", "precision.bf16_last_layers=2"], H100),
    "fp8 attention": (ATTENTION, PRIMED),
    "delayed attention": (["precision.fp8=delayed", "precision.fp8_attention=true"], H100),
    "fp8 parameters": ([*TENSORWISE, "precision.fp8_params=true"], H100),
    "tensor parallel": ([*ATTENTION, "parallel.tensor=4"], PRIMED),
    "older cudnn, whole tiles": (ATTENTION, replace(PRIMED, cudnn=(9, 2, 1))),
    "deterministic": (
        [*ATTENTION, "precision.deterministic=true"],
        replace(PRIMED, te=(2, 13), cudnn=(9, 19, 0)),
    ),
    "Blackwell": (ATTENTION, replace(PRIMED, gpu="B200", capability=(10, 0))),
    "no te asked for": ([], Machine()),
    "user buffers": (BUFFERS, H100),
}  # fmt: skip

SETTINGS_BREACHES = [
    ("user buffers: layers", [*BUFFERS, "precision.backend=torch"], "precision.backend=te"),
    ("user buffers: ranks", [*BUFFERS, "parallel.tensor=1"], "parallel.tensor > 1"),
    ("user buffers: ranks", [*BUFFERS, "parallel.sequence=false"], "parallel.sequence=true"),
    ("user buffers: bf16", [*BUFFERS, "precision.dtype=fp32"], "bf16"),
    (
        "user buffers: evaluation",
        [*BUFFERS, "train.micro_batch_rows=2", "objective.alpha_0=0.5"],
        "takes 3 stack rows",
    ),
    (
        "user buffers: evaluation",
        [*BUFFERS, "train.micro_batch_rows=1", "objective.alpha_0=1"],
        "takes 2 stack rows",
    ),
    ("torch layers", ["precision.backend=torch", *TENSORWISE], "precision.backend=te"),
    ("torch layers", ["precision.backend=torch", "precision.attention=te"], "attention=te"),
    ("FP8 over bf16", [*TENSORWISE, "precision.dtype=fp32"], "bf16"),
    ("FP8 region", ["precision.fp8_attention=true"], "precision.fp8=tensorwise"),
    ("FP8 attention: head size", [*ATTENTION, "model.head_size=64"], "exactly 128, not 64"),
    ("FP8 attention: kernel", [*ATTENTION, "precision.attention=split"], "attention=te"),
    ("FP8 attention: recomputation", [*ATTENTION, "parallel.recompute=attention"], "full"),
    ("TE attention: causal rows", ["precision.attention=te", "objective.name=mdlm"], "mdlm"),
    ("TE attention: bf16", ["precision.attention=te", "precision.dtype=fp32"], "fp32"),
    ("TE attention: head size", ["precision.attention=te", "model.head_size=100"], "100"),
    ("FP8 GEMM: tokens", [*TENSORWISE, "train.sequence_length=1020"], "multiple of 8"),
    ("FP8 GEMM: tokens", [*TENSORWISE, "train.sequence_length=1000", "parallel.tensor=2"], "16"),
    (
        "FP8 GEMM: tokens of a micro-batch",
        [*TENSORWISE, "train.sequence_length=1000", "train.micro_batch_rows=3"],
        "1000 / parallel.context=1 x train.micro_batch_rows=3 = 3000 tokens",
    ),
    ("FP8 GEMM: features", [*TENSORWISE, "model.ffn_size=1000"], "MLP width"),
    (
        "FP8 GEMM: features",
        [*TENSORWISE, "model.ffn_size=1040", "parallel.tensor=2"],
        "MLP width per tensor rank = 520",
    ),
    ("bf16 layers: recipe", ["precision.bf16_first_layers=1"], "tensorwise"),
    ("bf16 layers: recipe", ["precision.fp8=delayed", "precision.bf16_last_layers=1"], "delayed"),
    (
        "bf16 layers: number",
        [*TENSORWISE, "precision.bf16_last_layers=5", "parallel.pipeline=2"],
        "8 / 2",
    ),
    (
        "bf16 layers: number",
        [*TENSORWISE, "precision.bf16_first_layers=4", "precision.bf16_last_layers=4"],
        "leave a layer in FP8",
    ),
    ("FP8 parameters: recipe", ["precision.fp8_params=true"], "not off"),
    (
        "FP8 parameters: averages",
        [*TENSORWISE, "precision.fp8_params=true", "optimizer.ema_decay=0.9"],
        "eval.use_ema=false",
    ),
    (
        "FP8 parameters: initial weights",
        [*TENSORWISE, "precision.fp8_params=true", "checkpoint.init_from=x"],
        "init_from=x",
    ),
]

MACHINE_BREACHES = [
    ("GPU", ["precision.backend=te"], replace(H100, gpu=""), "there is no GPU"),
    ("Transformer Engine", TENSORWISE, replace(H100, te=None, te_failure="no libcudnn"), "no libcudnn"),
    ("Transformer Engine: version", TENSORWISE, replace(H100, te=(2, 8, 1)), "2.8.1 is too old: 2.9"),
    ("FP8: GPU", TENSORWISE, replace(H100, gpu="A100", capability=(8, 0)), "A100 .* 8.0; FP8 needs 9.0"),
    ("TE attention: GPU", ["precision.attention=te"], replace(H100, capability=(7, 5)), "7.5"),
    ("FP8 attention: GPU", ATTENTION, replace(PRIMED, capability=(12, 0)), "12.0"),
    ("FP8 attention: cuDNN", ATTENTION, replace(PRIMED, cudnn=(9, 2, 0)), "cuDNN 9.2.0"),
    ("TE attention: cuDNN", ATTENTION, replace(PRIMED, cudnn=(9, 10, 0)), "cuDNN 9.10.0"),
    ("TE attention: cuDNN", ["precision.attention=te"], replace(H100, cudnn=(9, 10, 1)), "cuDNN 9.10.1"),
    (
        "FP8 attention: cuDNN",
        ATTENTION,
        replace(PRIMED, cudnn=(9, 6, 0), capability=(10, 0)),
        "capability 10.0; it needs 9.7",
    ),
    (
        "FP8 attention: cuDNN",
        [*ATTENTION, "train.sequence_length=1000"],
        replace(PRIMED, cudnn=(9, 6, 0)),
        "cuDNN 9.6.0",
    ),
    (
        "FP8 attention: determinism",
        [*ATTENTION, "precision.deterministic=true"],
        replace(PRIMED, te=(2, 13)),
        "needs 2.13 with 9.19",
    ),
    (
        "FP8 attention: determinism",
        [*ATTENTION, "precision.deterministic=true"],
        replace(PRIMED, cudnn=(9, 19, 0)),
        "Transformer Engine 2.11.0 with cuDNN 9.19.0",
    ),
    ("FP8 attention: recipe", ATTENTION, H100, "NVTE_DPA_FP8_RECIPE=''"),
    ("FP8 attention: recipe", ATTENTION, replace(H100, dpa_recipe="F16"), "'F16'"),
    (
        "FP8 attention: recipe",
        ["precision.fp8=delayed", "precision.fp8_attention=true"],
        replace(H100, dpa_recipe="F16"),
        "'F16'",
    ),
]  # fmt: skip


def config_of(overrides):
    return load_config(None, [*BASE, *overrides])


def names_of_broken(rules, config, machine=None):
    return [rule.name for rule in rules if broken((rule,), config, machine)]


@pytest.mark.parametrize("case", LEGAL)
def test_what_is_legal_passes(case):
    overrides, machine = LEGAL[case]
    config = config_of(overrides)
    check(config)
    require_machine(config, machine)


@pytest.mark.parametrize(("name", "overrides", "words"), SETTINGS_BREACHES)
def test_a_breach_of_the_settings_is_named_alone(name, overrides, words):
    config = config_of(overrides)
    assert names_of_broken(SETTINGS_RULES, config) == [name]
    assert words in "\n".join(violations(config))


@pytest.mark.parametrize(("name", "overrides", "machine", "words"), MACHINE_BREACHES)
def test_a_breach_of_the_machine_is_named_alone(name, overrides, machine, words):
    config = config_of(overrides)
    check(config)
    assert names_of_broken(MACHINE_RULES, config, machine) == [name]
    with pytest.raises(ConfigError, match=words):
        require_machine(config, machine)


def test_every_rule_has_a_breach_here():
    tested = {name for name, *_ in [*SETTINGS_BREACHES, *MACHINE_BREACHES]}
    assert tested == {rule.name for rule in (*SETTINGS_RULES, *MACHINE_RULES)}


def test_all_breaches_are_listed_at_once():
    with pytest.raises(ConfigError, match=r"(?s)too old.*needs 9.0") as caught:
        require_machine(config_of(TENSORWISE), replace(H100, te=(2, 1), capability=(8, 9)))
    assert "A100" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "machine", "expected"),
    [
        pytest.param([], None, ("torch", "split"), id="no machine"),
        pytest.param([], Machine(), ("torch", "split"), id="no GPU"),
        pytest.param([], H100, ("te", "split"), id="H100"),
        pytest.param([], replace(H100, te=None), ("torch", "split"), id="not installed"),
        pytest.param([], replace(H100, te=(2, 1)), ("torch", "split"), id="too old"),
        pytest.param(["precision.backend=torch"], H100, ("torch", "split"), id="torch asked for"),
        pytest.param(ATTENTION, PRIMED, ("te", "te"), id="FP8 attention"),
    ],
)
def test_auto_takes_transformer_engine_where_it_works(overrides, machine, expected):
    precision = resolve_precision(config_of(overrides), "bf16", machine).precision
    assert (precision.backend, precision.attention) == expected


def test_auto_takes_plain_layers_in_fp32_which_transformer_engine_computes_in_tf32():
    assert resolve_precision(config_of([]), "fp32", H100).precision.backend == "torch"
    asked = config_of(["precision.backend=te"])
    assert resolve_precision(asked, "fp32", H100).precision.backend == "te"


def test_the_environment_forbids_silent_fallbacks_before_the_import():
    assert process_environment(config_of([])) == {}
    found = process_environment(config_of(ATTENTION))
    assert found["NVTE_UNFUSED_ATTN"] == "0"
    assert found["NVTE_DPA_FP8_RECIPE"] == "DelayedScaling"
    te_attention = process_environment(config_of(["precision.attention=te"]))
    assert "NVTE_DPA_FP8_RECIPE" not in te_attention


def test_nonsense_elsewhere_does_not_stop_the_rules_from_reporting():
    found = violations(config_of([*TENSORWISE, "parallel.tensor=0"]))
    assert any("parallel.tensor=0" in line for line in found)


def test_a_message_begins_with_a_setting_that_asks_for_it():
    """FP8 attention alone asks for FP8 and for Transformer Engine's attention."""
    odd = ["train.sequence_length=1020", "model.ffn_size=1000", "model.head_size=100"]
    asked = load_config(None, [*BASE, *odd, "precision.fp8_attention=true", "precision.dtype=fp32"])
    old = replace(H100, gpu="V100", capability=(7, 0), cudnn=(9, 10, 0))
    for rules in (SETTINGS_RULES, MACHINE_RULES):
        said = [line.split(":")[0] for line in broken(rules, asked, old)]
        unasked = [
            s for s in said if "fp8=off" in s or "attention=te" in s or "attention=auto" in s
        ]
        assert len(said) > 2 and all("fp8_attention=true" in s for s in unasked), said
