"""What doctor says about Transformer Engine on made-up machines."""

import os
import re

import pytest

from megatron_eso.cli.doctor import doctor
from megatron_eso.cli.main import app
from megatron_eso.config import load_config
from megatron_eso.config.precision_rules import ASKED, DPA_RECIPE, FUSED_ATTENTION, Machine
from megatron_eso.errors import ConfigError
from megatron_eso.parallel import te_adapter, te_diagnosis
from megatron_eso.parallel.te_adapter import AttentionChoice, version_of

H100 = Machine("NVIDIA H100", (9, 0), (2, 11, 0), "", (9, 14, 0), "DelayedScaling")
UNFUSED = AttentionChoice("UnfusedDotProductAttention", ("Disabling FusedAttention for a reason",))


def said(machine, megatron=(0, 16, 1)):
    config = load_config(None, list(ASKED["te"]))
    return {
        f.what: (f.found, f.consequence)
        for f in te_diagnosis.te_findings(machine, megatron, config)
    }


def test_without_it_doctor_says_why_and_what_follows():
    found, follows = said(Machine(te_failure="no libcudnn"))["Transformer Engine"]
    assert found == "no libcudnn"
    assert "fp8 and attention=te are refused" in follows


def test_the_choice_and_the_reasons_are_shown(monkeypatch):
    monkeypatch.setattr(te_diagnosis, "attention_choice", lambda config: UNFUSED)
    found = said(H100)
    assert found["TE attention chooses"] == (UNFUSED.chosen, "attention=te is refused")
    assert found["  rejected"][0] == UNFUSED.reasons[0]
    assert found["cuDNN (TE's)"][0] == "9.14.0"


def test_without_a_gpu_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(te_diagnosis, "attention_choice", lambda config: 1 / 0)
    assert said(Machine(te=(2, 11)))["TE attention"][0] == "no GPU"


@pytest.mark.parametrize(
    ("te", "megatron", "is_named"),
    [
        ((2, 8), (0, 16, 1), False),
        ((2, 9), (0, 16, 1), True),
        ((2, 11, 0), (0, 16, 1), True),
        ((2, 20, 2), (0, 16, 1), True),
        ((2, 9), (0, 19, 2), True),
        ((2, 20, 2), (0, 19, 2), True),
        ((2, 21), (0, 19, 2), False),
        ((2, 11), (0, 17, 0), False),
    ],
)
def test_release_pairs(te, megatron, is_named):
    found = said(Machine(te=te), megatron)["release pair"][1]
    assert found.startswith("a pair") is is_named


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_for_is_legal_on_an_h100_and_refused_elsewhere(asked, monkeypatch):
    config = load_config(None, list(ASKED[asked]))
    fused = AttentionChoice("FusedAttention", ())
    monkeypatch.setattr("megatron_eso.parallel.te_adapter.attention_choice", lambda config: fused)
    assert te_diagnosis.refusals(H100, config) == []
    assert "no GPU" in te_diagnosis.refusals(Machine(), config)[0]
    monkeypatch.setattr("megatron_eso.parallel.te_adapter.attention_choice", lambda config: UNFUSED)
    refused = te_diagnosis.refusals(H100, config)
    assert "Disabling FusedAttention for a reason" in refused[0]


def test_the_check_command_fails_on_a_machine_without_a_gpu(monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setattr("megatron_eso.parallel.te_adapter.describe_machine", Machine)
    for name in (*FUSED_ATTENTION, DPA_RECIPE):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone after the test
    done = CliRunner().invoke(app, ["doctor", "--check", "fp8"])
    assert "there is no GPU" in str(done.exception)
    assert done.exception.exit_code == 2
    done = CliRunner().invoke(app, ["doctor", "--check", "fp9"])
    assert "te, fp8, fp8-attention" in str(done.exception)


def test_the_doctor_asks_as_a_run_would(monkeypatch):
    """If flash-attn is installed, Transformer Engine prefers it, which a run does not allow."""
    from typer.testing import CliRunner

    def diagnose():
        return [te_diagnosis.Finding(name, os.environ[name], "") for name in FUSED_ATTENTION]

    monkeypatch.setattr("megatron_eso.parallel.diagnosis.diagnose", diagnose)
    for name in FUSED_ATTENTION:
        monkeypatch.setenv(name, "")
    found = CliRunner().invoke(app, ["doctor"]).stdout
    assert all(re.search(f"{name} +. {value} ", found) for name, value in FUSED_ATTENTION.items())


def test_the_doctor_looks_at_the_cudnn_that_a_run_would_load(monkeypatch):
    seen = []

    def missing(name):
        seen.append(name)
        raise ImportError(f"no {name}")

    monkeypatch.setattr(te_adapter, "load_cudnn_of_torch", lambda *_: seen.append("cudnn"))
    monkeypatch.setattr(te_adapter.importlib, "import_module", missing)
    assert te_adapter.describe_machine().te_failure == "no transformer_engine"
    assert seen == ["cudnn", "transformer_engine"]


def test_overrides_without_a_run_are_refused():
    with pytest.raises(ConfigError, match="give either --run FILE or --check"):
        doctor(["precision.fp8=tensorwise"])


def test_versions_are_read_up_to_what_is_no_number():
    assert version_of("2.11.0+a1b2") == (2, 11, 0)
    assert version_of("2.17.0.dev3") == (2, 17, 0)
    assert version_of("2.9rc1") == (2, 9)
