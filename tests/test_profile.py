"""What a profile's table makes of a timeline, and against which GPU peaks speed is measured."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

from megatron_eso.config.schema import ModelConfig, ObjectiveConfig, TrainConfig
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.plan.peaks import Peak, peak_of
from megatron_eso.train.profile import Profile, phase_times, table, write_trace


def event(name, begin, end, device=DeviceType.CPU):
    times = SimpleNamespace(start=begin * 1e6, end=end * 1e6)
    return SimpleNamespace(name=name, time_range=times, device_type=device)


def found(*events):
    return {p.name: (p.seconds, p.communication) for p in phase_times(events)}


def test_an_inner_phase_counts_for_itself_alone():
    step = [
        event("phase: other", 0, 10),
        event("phase: data", 0, 1),
        event("phase: backward", 1, 8),
        event("phase: forward", 2, 3),
        event("phase: forward", 5, 6),
        event("aten::mm", 2, 3),
        event("gloo:all_reduce", 6.5, 7.5),
        event("gloo:all_gather", 7, 9),
    ]
    assert found(*step) == {
        "other": (pytest.approx(2), pytest.approx(1)),
        "data": (pytest.approx(1), 0),
        "backward": (pytest.approx(5), pytest.approx(1.5)),
        "forward": (pytest.approx(2), 0),
    }


def test_communication_that_a_gpu_hides_behind_kernels_does_not_count():
    gpu = DeviceType.CUDA
    step = [
        event("phase: other", 0, 10),
        event("phase: other", 0, 10, gpu),
        event("ncclDevKernel_AllReduce", 2, 6, gpu),
        event("gemm", 0, 5, gpu),
        event("nccl:all_reduce", 1, 9),
    ]
    assert found(*step) == {"other": (pytest.approx(10), pytest.approx(1))}


def test_the_table_ends_with_the_whole_step():
    lines = table(phase_times([event("phase: other", 0, 4), event("phase: data", 0, 1)]))
    assert [line.split()[0] for line in lines] == ["phase", "data", "other", "step"]
    assert lines[1].split()[1:3] == ["1.0000", "25.0%"]
    assert lines[-1].split()[1:3] == ["4.0000", "100.0%"]


class Exporter:
    """Leaves these files, as torch's profiler does, which does not report a full disk."""

    def __init__(self, **left):
        self.left = left

    def export_chrome_trace(self, path):
        for suffix, text in self.left.items():
            Path(f"{path.removesuffix('json')}{suffix.replace('_', '.')}").write_text(text)


@pytest.mark.parametrize(
    "left",
    [{}, {"json_tmp": "{"}, {"json": ""}, {"json": '{"traceEvents": [{'}],
    ids=["nothing", "a temporary file", "an empty file", "a part"],
)
def test_a_trace_that_was_not_written_whole_is_an_error_and_leaves_nothing(tmp_path, left):
    path = tmp_path / "trace.json"
    write_trace(Exporter(json='{"traceEvents": []}\n'), path)
    assert path.exists()
    with pytest.raises(OSError, match=r"trace.json was not written to its end"):
        write_trace(Exporter(**left), path)
    assert not list(tmp_path.iterdir())


def test_writing_a_profile_is_left_out_of_the_time_of_every_rank(tmp_path, monkeypatch):
    settings = TrainConfig(profile_steps=[2], profile_ranks=[1])
    monkeypatch.setattr(Profile, "_write", lambda self, number, profiler: time.sleep(0.2))
    waited = []
    monkeypatch.setattr("torch.distributed.barrier", lambda: waited.append(time.perf_counter()))
    for rank, at_least in ((0, 0.0), (1, 0.2)):
        told = []
        profile = Profile(settings, tmp_path, rank, told.append)
        with profile.step(1):
            pass
        assert not told
        with profile.step(2):
            pass
        assert len(told) == 1 and waited[-1] - told[0] >= at_least


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", Peak(989e12, 1979e12)),
        ("NVIDIA H100 PCIe", Peak(756e12, 1513e12)),
        ("NVIDIA H200", Peak(989e12, 1979e12)),
        ("NVIDIA A100-SXM4-80GB", Peak(312e12, 0.0)),
        ("NVIDIA L4", Peak(121e12, 242e12)),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, peak):
    assert peak_of(name) == peak


def test_recomputed_operations_are_the_forward_passes_done_again():
    flops = model_flops_per_step(ModelConfig(), ObjectiveConfig(), sequence_length=512, rows=8)
    again = {way: flops.hardware(way) - flops.training for way in ("none", "attention", "full")}
    assert again["none"] == 0
    assert again["attention"] == pytest.approx(flops.attention)
    assert again["full"] == pytest.approx(flops.layers + flops.attention)
