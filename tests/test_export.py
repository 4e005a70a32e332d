"""Exports: the same from every layout, equal to their source, refused when anything is wrong."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import save

from megatron_eso.checkpoint.compare import compare, tensors_of
from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.checkpoint.torch_dist import TorchDistReader, read_index
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.data.manifest import sha256_of
from megatron_eso.errors import CheckpointError
from megatron_eso.export import exporter
from megatron_eso.export.describe import config_json
from megatron_eso.export.exporter import export
from megatron_eso.export.inspect_tensors import inspect
from megatron_eso.export.mapping import QKV, inexpressible, no_backbone, rules, shape_of
from megatron_eso.export.source import open_source
from megatron_eso.export.streamed import _class_of, read_config
from megatron_eso.export.verify_export import verify_folder
from megatron_eso.export.watch import watch_run

QK = "model.qk_norm=true"
ROOT = Path(__file__).parent.parent
LAYOUTS = {
    "one": [],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}


@pytest.fixture(scope="module")
def checkpoints(two_ranks, tmp_path_factory):
    """Return the same weights saved at three layouts (``one`` is data parallel on two ranks)."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, layout in LAYOUTS.items():
        # The third save of a run, whose index holds more than that of the first.
        earlier = 2 if name == "tensor" else 0
        two_ranks.run("export_checkpoint", [QK, *layout], str(folder / name), earlier)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """Return the verified export of the tensor-parallel checkpoint's raw weights, and its report."""
    out = tmp_path_factory.mktemp("exported") / "model"
    return out, export(checkpoints / "tensor", out, use_ema=False)


def copy_of(folder, tmp_path):
    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    return target


def newest(root):
    return next(root.glob("step_*"))


def test_every_layout_gives_the_same_file(checkpoints, exported, tmp_path):
    files = [exported[0] / "model.safetensors"]
    for name in ("one", "pipeline", "interleaved"):
        export(checkpoints / name, tmp_path / name, use_ema=False, verify=False)
        files.append(tmp_path / name / "model.safetensors")
    assert len({file.read_bytes() for file in files}) == 1


def test_the_export_is_verified_far_below_its_limits(exported):
    found = exported[1]["verification"]
    assert found["canvas_relative_logits"] < 1e-5
    assert found["doubled_relative_logits"] < 1e-5
    assert found["canvas_same_argmax"] == found["doubled_same_argmax"] == 1
    assert found["tensors"] == exported[1]["num_tensors"]


def test_the_average_is_exported_unless_raw_weights_are_asked_for(checkpoints, exported, tmp_path):
    facts = export(checkpoints / "one", tmp_path / "ema", verify=False)
    assert facts["weights"] == "ema"
    raw, averaged = (load_file(f / "model.safetensors") for f in (exported[0], tmp_path / "ema"))
    assert all(torch.allclose(averaged[name], 0.5 * raw[name]) for name in raw)


def test_bfloat16_is_the_masters_rounded_and_verified(checkpoints, exported, tmp_path):
    out = tmp_path / "bf16"
    facts = export(checkpoints / "one", out, use_ema=False, dtype="bf16")
    assert facts["verification"]["canvas_relative_logits"] < 1e-5
    rounded, full = (load_file(f / "model.safetensors") for f in (out, exported[0]))
    assert all(torch.equal(rounded[name], full[name].bfloat16()) for name in full)


def test_many_shards_hold_the_same_tensors(checkpoints, exported, tmp_path):
    out = tmp_path / "shards"
    export(checkpoints / "one", out, use_ema=False, shard_bytes=40_000)
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3
    whole = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(exported[0] / "model.safetensors")
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_tensors_equal_what_torchs_own_reader_finds(checkpoints):
    import torch.distributed.checkpoint as dcp

    reader = TorchDistReader(newest(checkpoints / "tensor"))
    state = {name: torch.empty(t.shape) for name, t in reader.tensors.items()}
    dcp.load(state, checkpoint_id=str(reader.folder), no_dist=True)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in state.items())


# Mutations of an exported folder, each of which verification must detect.


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def swap(*names):
    def change(tensors):
        first, second = (f"model.layers.1.{name}.weight" for name in names)
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def megatron_order_of_heads(tensors):
    """Cut [q, k, v] out of the fused matrix as if its groups were not interleaved."""
    model = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2)
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    fused = QKV.join(model, [tensors[name] for name in names])
    for name, part in zip(names, fused.split([32, 16, 16]), strict=True):
        tensors[name] = part


MUTATIONS = {
    "norm-eps": lambda f: change_config(f, rms_norm_eps=1e-6),
    "rope-theta": lambda f: change_config(
        f, rope_theta=11000.0, rope_parameters={"rope_type": "default", "rope_theta": 11000.0}
    ),
    "gate-up": lambda f: change_tensors(f, swap("mlp.gate_proj", "mlp.up_proj")),
    "qkv-layout": lambda f: change_tensors(f, megatron_order_of_heads),
    "norms": lambda f: change_tensors(f, swap("input_layernorm", "post_attention_layernorm")),
    "head-norms": lambda f: change_tensors(f, swap("self_attn.q_norm", "self_attn.k_norm")),
    "lost-layer": lambda f: change_config(f, num_hidden_layers=3),
    "lost-tensor": lambda f: change_tensors(f, lambda t: t.pop("model.norm.weight")),
    "not-finite": lambda f: change_tensors(f, lambda t: t["lm_head.weight"][0].fill_(torch.nan)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_verification_sees(mutation, exported, tmp_path):
    folder = copy_of(exported[0], tmp_path)
    MUTATIONS[mutation](folder)
    try:
        failures = verify_folder(folder, None).failures()
    except CheckpointError as error:
        failures = [str(error)]
        assert mutation in ("lost-layer", "lost-tensor", "not-finite")
    assert failures


def test_a_layer_lost_on_both_sides_of_the_export_is_seen(exported, tmp_path):
    """Weights and config agree with each other, but not with the checkpoint."""
    folder = copy_of(exported[0], tmp_path)
    change_config(folder, num_hidden_layers=3)
    change_tensors(folder, lambda t: [t.pop(n) for n in list(t) if ".layers.3." in n])
    with pytest.raises(CheckpointError, match=r"layers\.3\."):
        verify_folder(folder, None)


def test_a_failed_verification_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    whole = exporter.rules
    monkeypatch.setattr(exporter, "rules", lambda model: [_swapped(r) for r in whole(model)])
    with pytest.raises(CheckpointError, match="canvas_relative_logits"):
        export(checkpoints / "one", tmp_path / "out", use_ema=False)
    assert list(tmp_path.iterdir()) == []


def _swapped(rule):
    if not rule.ours.endswith("linear_fc1.weight"):
        return rule
    from dataclasses import replace

    return replace(rule, theirs=rule.theirs[::-1])


# Bad input.


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile_was_here",))


@pytest.mark.parametrize("where", ["index", "chunk"])
def test_a_hostile_pickle_is_refused_and_not_run(checkpoints, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    folder = copy_of(newest(checkpoints / "one"), tmp_path)
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save(Hostile(), folder / "hostile.distcp")
        size = (folder / "hostile.distcp").stat().st_size
        index = pickle.loads((folder / ".metadata").read_bytes())
        for place in index.storage_data.values():
            place.relative_path, place.offset, place.length = "hostile.distcp", 0, size
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    CheckpointFolder(folder).commit()
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|os\.mkdir"):
        export(folder, tmp_path / "out", use_ema=False)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|os\.mkdir"):
        compare(CheckpointFolder(folder), CheckpointFolder(folder))
    if where == "index":
        with pytest.raises(CheckpointError, match=r"posix\.mkdir|os\.mkdir"):
            tensors_of(CheckpointFolder(folder))  # of `checkpoint inspect --tensors`
    assert not (tmp_path / "hostile_was_here").exists()
    assert not (tmp_path / "out").exists()


def test_an_index_cannot_point_outside_its_folder(checkpoints, tmp_path):
    folder = copy_of(newest(checkpoints / "one"), tmp_path)
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    index = pickle.loads((folder / ".metadata").read_bytes())
    for key in index.storage_data:
        index.storage_data[key] = _StorageInfo("../secret", 0, 10)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        read_index(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_index_with_entries_that_are_no_tensors_is_read(tmp_path):
    """Megatron-Core 0.19 keeps its common state there; such an entry has no offset."""
    weight = torch.arange(6.0).view(2, 3)
    state = {"weight": weight, "common_state/shard_0_1": {"step": 3}}
    save(state, checkpoint_id=tmp_path)
    assert list(read_index(tmp_path)) == ["weight"]
    assert torch.equal(TorchDistReader(tmp_path).read("weight"), weight)


def test_a_half_written_checkpoint_is_refused(checkpoints, tmp_path):
    folder = copy_of(newest(checkpoints / "one"), tmp_path)
    (folder / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match="never committed"):
        export(folder, tmp_path / "out")


def test_a_lost_file_is_refused(checkpoints, tmp_path):
    folder = copy_of(newest(checkpoints / "one"), tmp_path)
    next(folder.glob("*.distcp")).unlink()
    CheckpointFolder(folder).commit()
    with pytest.raises(CheckpointError, match="cannot be read"):
        export(folder, tmp_path / "out", use_ema=False)
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused(checkpoints, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export(checkpoints / "one", tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_space_is_said_before_anything_is_written(checkpoints, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"GiB.*--dtype bf16"):
        export(checkpoints / "one", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.SafetensorsWriter, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(checkpoints / "one", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_working_folder_is_written_and_an_error_names_the_file_it_met(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with exporter.scratch_beside(Path(".")) as scratch:
        (scratch / "a").write_text("whole")
    assert Path("a").read_text() == "whole"
    with (
        pytest.raises(
            CheckpointError, match=r"^lost\.json cannot be read or written: No such file"
        ),
        exporter.scratch_beside(tmp_path / "out"),
    ):
        Path("lost.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def small_tokenizer(path, size):
    from tokenizers import Tokenizer, models

    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_with_too_many_ids_is_refused(checkpoints, tmp_path):
    tokenizer = small_tokenizer(tmp_path / "t.json", 100)
    with pytest.raises(CheckpointError, match=r"ids up to 99.*mask token is id 60"):
        export(checkpoints / "one", tmp_path / "out", tokenizer=tokenizer)


def trained_with(folder, tokenizer, tmp_path):
    """Return a copy of a checkpoint that says its data were prepared with this tokenizer."""
    copy = copy_of(folder, tmp_path)
    sidecar = json.loads((copy / "esolm.json").read_text())
    sidecar["data"] = {"tokenizer": tokenizer and sha256_of(tokenizer)}
    (copy / "esolm.json").write_text(json.dumps(sidecar))
    CheckpointFolder(copy).commit()
    return copy


def test_a_tokenizer_with_fewer_ids_than_that_of_training_is_refused(checkpoints, tmp_path):
    own, given = (small_tokenizer(tmp_path / f"{n}.json", n) for n in (60, 50))
    folder = trained_with(newest(checkpoints / "one"), own, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has 50 ids, but the one that .* trained with has 60"
    ):
        export(folder, tmp_path / "out", tokenizer=given)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_remarked(checkpoints, tmp_path):
    own, fewer = (small_tokenizer(tmp_path / f"{n}.json", n) for n in (60, 50))
    other = tmp_path / "other.json"
    other.write_text(own.read_text().replace("w7", "v7"))
    folder = trained_with(newest(checkpoints / "one"), own, tmp_path)
    for given, remarks in ((own, 0), (other, 1)):
        facts = export(folder, tmp_path / given.stem, tokenizer=given, verify=False)
        assert len(facts["remarks"]) == remarks
    assert "not the file that the model was trained with" in facts["remarks"][0]
    shutil.rmtree(folder)
    folder = trained_with(newest(checkpoints / "one"), None, tmp_path)
    (remark,) = export(folder, tmp_path / "out", tokenizer=fewer, verify=False)["remarks"]
    assert "the tokenizer has 50 ids, but the embedding 60" in remark
    assert remark in inspect(tmp_path / "out").remarks


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        (ModelConfig(norm="layernorm"), "eso", "model.norm=layernorm"),
        (ModelConfig(head_bias=True), "eso", "model.head_bias"),
        (ModelConfig(), "mdlm", "objective.name=mdlm"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(model, objective, message):
    with pytest.raises(CheckpointError, match=message):
        exporter.require_expressible(model, ObjectiveConfig(name=objective), "esolm")
    assert inexpressible(model, objective)


def test_an_autoregressive_model_is_a_backbone_alone():
    objective = ObjectiveConfig(name="ar")
    exporter.require_expressible(ModelConfig(), objective, "backbone")
    with pytest.raises(CheckpointError, match="--format backbone"):
        exporter.require_expressible(ModelConfig(), objective, "esolm")
    assert no_backbone(ModelConfig(qk_norm=True, mlp_bias=True))


def test_the_table_splits_and_joins_without_loss():
    model = ModelConfig(
        hidden_size=32, num_heads=4, num_kv_heads=2, vocab_size=61, vocab_padding_multiple=64,
        attention_bias=True, mlp_bias=True, qk_norm=True, ffn_size=48,
    )  # fmt: skip
    for rule in rules(model):
        shape = {"mlp.linear_fc1.weight": (96, 32), "self_attention.linear_qkv.weight": (64, 32),
                 "self_attention.linear_qkv.bias": (64,), "mlp.linear_fc1.bias": (96,)}  # fmt: skip
        ours = torch.randn(shape.get(rule.ours.removeprefix("decoder.layers."), (64, 32)))
        if rule.ours.startswith(("embedding", "output")):
            ours[61:] = 0
        parts = rule.transform.split(model, ours)
        assert [tuple(p.shape) for p in parts] == rule.transform.shapes(model, tuple(ours.shape))
        assert torch.equal(rule.transform.join(model, parts), ours)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"qk_norm": True, "attention_bias": True, "mlp_bias": True}, id="rmsnorm"),
        pytest.param(
            {"norm": "layernorm", "activation": "gelu", "mlp_bias": True, "head_bias": True},
            id="layernorm",
        ),
    ],
)
def test_the_table_knows_the_shapes_of_the_exported_classes(tmp_path, settings):
    model = ModelConfig(
        hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_size=16, ffn_size=48,
        vocab_size=61, **settings,
    )  # fmt: skip
    config = config_json(model, ObjectiveConfig(), kind="esolm", dtype="fp32", end_id=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = read_config(tmp_path)
    theirs = {n: tuple(p.shape) for n, p in _class_of(settings)(settings).named_parameters()}
    found = {}
    for rule in rules(model):
        shapes = rule.transform.shapes(model, shape_of(rule, model))
        found |= dict(zip([name.format(0) for name in rule.theirs], shapes, strict=True))
    assert found == theirs


def test_inspect_says_what_becomes_of_every_tensor(checkpoints, exported):
    found = inspect(checkpoints / "tensor")
    by_name = {line.name: line for line in found.lines}
    qkv = by_name["weights.decoder.layers.self_attention.linear_qkv.weight"]
    assert qkv.shape == (4, 64, 32)
    assert "q_proj" in qkv.becomes
    assert "optimizer" in by_name["exp_avg.output_layer.weight"].becomes
    assert any("3 padded vocabulary rows" in remark for remark in found.remarks)
    # `export` takes the averages unless told otherwise.
    assert "not exported: weights: not the weights asked for" in found.remarks
    assert not any("ema:" in remark for remark in found.remarks)
    assert inspect(exported[0]).num_parameters == exported[1]["num_parameters"]


def test_watch_exports_each_committed_checkpoint_once(checkpoints, tmp_path):
    run = tmp_path / "run" / "checkpoints"
    shutil.copytree(newest(checkpoints / "one"), run / "step_0000000007")
    shutil.copytree(newest(checkpoints / "one"), run / "step_0000000009")
    (run / "step_0000000009" / "COMMITTED").unlink()
    done = []

    def one(source, target):
        done.append(source.name)
        export(source, target, verify=False)

    for _ in range(2):
        watch_run(tmp_path / "run", tmp_path / "out", one, poll_seconds=0, is_over=lambda: True)
    assert done == ["step_0000000007"]
    CheckpointFolder(run / "step_0000000009").commit()
    watch_run(tmp_path / "run", tmp_path / "out", one, poll_seconds=0, is_over=lambda: True)
    assert done == ["step_0000000007", "step_0000000009"]


def test_watch_finds_the_checkpoints_of_a_run_that_has_none_yet(tmp_path):
    (tmp_path / "run").mkdir()
    done = []

    def is_over():
        is_first_look = not (tmp_path / "run" / "checkpoints").exists()
        if is_first_look:
            folder = tmp_path / "run" / "checkpoints" / "step_0000000007"
            folder.mkdir(parents=True)
            CheckpointFolder(folder).commit()
        return not is_first_look

    watch_run(
        tmp_path / "run", tmp_path / "out", lambda source, target: done.append(source.name),
        poll_seconds=0, is_over=is_over,
    )  # fmt: skip
    assert done == ["step_0000000007"]


@pytest.mark.slow
def test_the_command_needs_no_megatron_and_no_process_group(checkpoints, tmp_path):
    script = (
        "import sys\nsys.modules['megatron'] = None\nimport torch.distributed as dist\n"
        "dist.init_process_group = None\nfrom megatron_eso.cli.main import main\nmain()\n"
    )

    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, words)],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    done = run("export", checkpoints / "tensor", "--out", tmp_path / "out", "--raw-weights")
    assert done.returncode == 0, done.stderr
    assert "canvas_relative_logits" in done.stdout
    assert open_source(checkpoints / "tensor", use_ema=False).folder.step == 7
    done = run("verify", tmp_path / "out")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "equal"), done.stderr
    change_config(tmp_path / "out", rms_norm_eps=1e-6)
    assert run("verify", tmp_path / "out").returncode == 1
    done = run("export", checkpoints / "tensor", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr[:6]) == (4, "error:")


def test_a_file_in_place_of_a_checkpoint_is_called_a_file(tmp_path):
    (tmp_path / "f").touch()
    for name, said in (("f", "f is a file"), ("g", "g does not exist")):
        with pytest.raises(CheckpointError, match=said):
            open_source(tmp_path / name, use_ema=False)
