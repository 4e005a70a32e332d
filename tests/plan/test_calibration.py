"""The speed model against published runs it has not seen."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_eso.config.load import save_config
from megatron_eso.errors import DataError
from megatron_eso.plan.calibrate import Measured, calibrate, fit_constants
from megatron_eso.plan.hardware import Constants, load_hardware
from megatron_eso.plan.measured import read_measured
from megatron_eso.plan.memory import stage_memory
from megatron_eso.plan.step_time import step_time
from tests.plan.jobs import job

PUBLISHED = Path(__file__).parents[2] / "configs" / "calibration" / "h100_published.yaml"
H100 = load_hardware("h100")


@pytest.fixture(scope="module")
def published():
    return calibrate(read_measured(PUBLISHED), H100)


def test_left_out_runs_are_predicted_within_ten_percent_on_average(published):
    assert len(published.left_out) == 14
    assert published.mean_error <= 0.10


def test_no_left_out_run_is_off_by_more_than_twenty_percent(published):
    assert published.worst_error <= 0.20


def test_the_profile_holds_what_the_calibration_gives(published):
    for name, value in vars(published.constants).items():
        assert getattr(H100.constants, name) == pytest.approx(value, rel=0.02), name


@pytest.mark.parametrize("name", ["7.1B", "462B"])
def test_published_runs_fit_in_memory(name):
    run = next(r for r in read_measured(PUBLISHED) if r.name == name)
    assert max(stage.total for stage in stage_memory(run.job, H100)) < 80e9


def test_synthetic_runs_are_reproduced_but_for_the_pull_of_the_prior():
    truth = replace(Constants(), gemm_efficiency=0.6, straggler=0.02, memory_efficiency=0.4)
    hardware = replace(H100, constants=truth)
    cases = [
        job(gpus=n, **layout)
        for n in (8, 64, 512)
        for layout in ({}, {"tensor": 2}, {"tensor": 8}, {"pipeline": 2, "tensor": 2})
    ]
    runs = [Measured(str(i), c, step_time(c, hardware).total) for i, c in enumerate(cases)]
    fitted = replace(H100, constants=fit_constants(runs, H100))
    errors = [step_time(r.job, fitted).total / r.step_seconds - 1 for r in runs]
    assert np.abs(errors).max() < 0.03


def test_a_run_folder_gives_its_median_step_without_the_first_line(tmp_path):
    config = job(gpus=1).config
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "run.json").write_text(json.dumps({"num_ranks": 4}))
    lines = [{"step": i, "seconds_per_step": s} for i, s in enumerate((9.0, 1.0, 1.2, 1.1))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_measured(tmp_path)[0]
    assert (run.step_seconds, run.job.num_gpus) == (1.1, 4)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        read_measured(tmp_path)
