"""Official checkpoints: imported without running their pickle, equal to the official code's results."""

import itertools
import os
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eso.checkpoint.inert_pickle import Inert, plain, read_torch_file
from megatron_eso.errors import CheckpointError
from megatron_eso.export.official import read_official
from megatron_eso.export.official_layout import PREFIX
from tests import forked

DATA = Path(__file__).parent / "data" / "official_small"
CHECKPOINT, EXPECTED = DATA / "official.ckpt", DATA / "expected.safetensors"
LAYOUTS = {
    "one": {},
    "tensor": {"tensor": 2, "sequence": False},
    "tensor-sequence": {"tensor": 2},
    "pipeline": {"pipeline": 2},
}
CASES = ["diffusion", "sequential", "likelihood", "sampler"]
# Megatron's own saving would start a process that imports everything again.
STARTS_NONE = """
from multiprocessing.process import BaseProcess
from megatron_eso.cli.main import main
BaseProcess.start = None
main()
"""


@pytest.fixture(scope="module")
def imported(one_rank, tmp_path_factory):
    """Return a function that imports the small checkpoint, once per arguments, and returns its folder."""
    made = {}

    def get(mutation="", weights="ema"):
        key = (mutation, weights)
        if key not in made:
            out = str(tmp_path_factory.mktemp("official") / "checkpoint")
            settings = {"weights": weights}
            made[key] = (
                out,
                one_rank.run("import_official", str(CHECKPOINT), out, settings, mutation)[0],
            )
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_equal_the_official_ones(imported, one_rank, two_ranks, layout):
    pool = one_rank if layout == "one" else two_ranks
    replies = pool.run("verify_official", imported()[0], str(EXPECTED), LAYOUTS[layout], {})
    assert all(reply == replies[0] for reply in replies)
    found = dict(replies[0])
    assert list(found) == CASES
    if layout == "tensor-sequence":
        assert found.pop("sampler") is None
    assert max(found.values()) < 1e-4


def differences(one_rank, folder, **model):
    return dict(one_rank.run("verify_official", folder, str(EXPECTED), {}, model)[0])


@pytest.mark.slow
def test_raw_weights_are_other_weights(imported, one_rank):
    folder, raw = imported(weights="raw")
    averaged = imported()[1]["weights"]
    assert raw["weights"].keys() == averaged.keys()
    assert all(not np.array_equal(raw["weights"][name], averaged[name]) for name in averaged)
    assert min(differences(one_rank, folder).values()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["gates", "shifts", "heads"])
def test_a_conversion_with_a_step_left_out_is_noticed_in_every_case(imported, one_rank, mutation):
    assert min(differences(one_rank, imported(mutation)[0]).values()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"rotary_base": 5000.0}, {"norm_eps": 1e-2}])
def test_another_model_setting_is_noticed_in_every_case(imported, one_rank, model):
    assert min(differences(one_rank, imported()[0], **model).values()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.pipeline=2"]])
def test_training_goes_on_from_an_imported_checkpoint(imported, two_ranks, layout):
    folder, reply = imported()
    model = reply["model"]
    names = ("hidden_size", "num_layers", "num_heads", "vocab_size", "max_length", "norm", "activation",
             "mlp_bias", "head_bias", "vocab_padding_multiple")  # fmt: skip
    settings = [f"model.{name}={getattr(model, name)}" for name in names]
    losses = two_ranks.run("train_from", folder, [*settings, "model.num_kv_heads=null", *layout])
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0]).all()


@pytest.mark.slow
def test_an_official_model_is_exported_under_its_own_class(imported, tmp_path):
    """It is exported, loaded by transformers, and equals what the official code computed."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from megatron_eso.export.exporter import export

    facts = export(Path(imported()[0]), tmp_path / "out")
    assert facts["verification"]["canvas_relative_logits"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert model.config.model_type == "esolm_dit"
    case = {
        n.partition(".")[2]: t for n, t in load_file(EXPECTED).items() if n.startswith("diffusion.")
    }
    order, mask_id = case["order"], model.config.mask_token_id
    canvas = torch.empty_like(case["inputs_sorted"]).scatter(1, order, case["inputs_sorted"])
    with torch.no_grad():
        found = model(input_ids=canvas, order=order).logits.log_softmax(2)[..., :mask_id]
    expected = case["logprobs_sorted"][..., :mask_id]
    found = found.gather(1, order[:, :, None].expand_as(found))
    assert (found - expected).abs().max() < 1e-4
    with pytest.raises(CheckpointError, match="stock architectures"):
        export(Path(imported()[0]), tmp_path / "stock", kind="backbone")


@pytest.mark.slow
def test_a_full_folder_is_refused(imported, one_rank):
    with pytest.raises(AssertionError, match="is not empty"):
        one_rank.run("import_official", str(CHECKPOINT), imported()[0], {})


@pytest.mark.slow
def test_the_commands_import_and_verify_in_a_process_of_their_own(tmp_path):
    """The exit code tells: averaged weights are equal, raw ones are not."""
    words = [sys.executable, "-c", STARTS_NONE, "verify", CHECKPOINT, "--expected", EXPECTED]
    environment = {**os.environ, "PYTHONPATH": str(forked.ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*CASES, "equal"]
    command = partial(forked.run, folder=tmp_path)
    command("import", "--from", "official", CHECKPOINT, "--out", "raw", "--weights", "raw")
    assert "DIFFERENT" in command("verify", "raw", "--expected", EXPECTED, code=1)
    # The example's small tokenizer has no end-of-document token, so one of its words takes that role.
    tokenizer = (tmp_path / "raw" / "tokenizer.json").read_text()
    (tmp_path / "t.json").write_text(tokenizer.replace('"w96":96', '"<|endoftext|>":96'))
    (tmp_path / "words.txt").write_text(" ".join(f"w{i % 90}" for i in range(200)))
    out = command("eval", "raw", "words.txt", "--tokenizer", "t.json", "--orders", 2)
    assert "likelihood bound, K = 2" in out


def test_settings_and_tokenizer_are_read_from_the_file():
    official = read_official(CHECKPOINT)
    model = official.model
    assert (model.hidden_size, model.num_layers, model.num_heads, model.vocab_size) == (
        64,
        2,
        4,
        98,
    )
    assert (official.objective.alpha_0, official.objective.noise_eps) == (0.5, 1e-3)
    assert official.sequence_length == model.max_length == 48
    assert '"w96":96' in official.tokenizer_json


def test_padded_tokens_have_no_weights():
    weights = read_official(CHECKPOINT).weights
    for name in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"):
        assert len(weights[name]) == 128
        assert not weights[name][98:].any()
        assert weights[name][:98].any()


class Hostile:
    """Creates a folder when it is unpickled by a reader that runs what the pickle names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def content_of_small():
    """Return the small file as plain values that torch.save can write again."""
    read = read_torch_file(CHECKPOINT)
    return {
        "state_dict": OrderedDict(read["state_dict"]),
        "ema": {"shadow_params": list(read["ema"]["shadow_params"])},
        "hyper_parameters": {"config": plain(read["hyper_parameters"]["config"])},
        "global_step": 7,
    }


def saved(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    return tmp_path / "other.ckpt"


def test_a_hostile_pickle_is_read_without_running_it(tmp_path):
    content, trap = content_of_small(), tmp_path / "trap"
    content["hyper_parameters"]["tokenizer"] = Hostile(trap)
    content["callbacks"] = [Hostile(trap)]
    file = saved(tmp_path, content)
    weights = read_official(file).weights
    assert not trap.exists()
    expected = read_official(CHECKPOINT).weights
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    stand_in = read_torch_file(file)["callbacks"][0]
    assert isinstance(stand_in, Inert)
    assert stand_in.origin.endswith(".mkdir")
    with pytest.raises(FileExistsError):  # twice in the file: the trap works where a pickle is run
        torch.load(file, weights_only=False)
    assert trap.exists()


def test_a_hostile_class_among_the_tensors_is_refused(tmp_path):
    content, trap = content_of_small(), tmp_path / "trap"
    content["state_dict"][PREFIX + "vocab_embed.embedding"] = Hostile(trap)
    with pytest.raises(CheckpointError, match=r"vocab_embed\.embedding"):
        read_official(saved(tmp_path, content), weights="raw")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop(PREFIX + "blocks.1.norm2.weight"), r"blocks\.1\.norm2\.weight is missing"),
        (lambda d: d.update({PREFIX + "extra.bias": torch.ones(3)}), r"extra\.bias is unknown"),
        (lambda d: d.update({"metrics.total": torch.ones(3)}), r"unknown tensors.*metrics\.total"),
        (
            lambda d: d.update({PREFIX + "blocks.0.mlp.2.bias": torch.ones(3)}),
            r"blocks\.0\.mlp\.2\.bias has shape \(3,\) instead of \(64,\)",
        ),
        (lambda d: d[PREFIX + "rotary_emb.inv_freq"].mul_(0.9), r"not that of 4 heads of 16"),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_refused_by_name(tmp_path, change, message):
    content = content_of_small()
    change(content["state_dict"])
    with pytest.raises(CheckpointError, match=message):
        read_official(saved(tmp_path, content), weights="raw")


def test_a_file_that_is_no_torch_file_is_refused(tmp_path):
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match="not a zip archive"):
        read_official(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_official(tmp_path / "absent.ckpt")
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(CHECKPOINT.read_bytes()[:200_000])
    with pytest.raises(CheckpointError):
        read_official(damaged)


def test_a_model_with_other_passes_is_refused(tmp_path):
    content = content_of_small()
    content["hyper_parameters"]["config"]["algo"]["diffusion_attn_mode"] = "bidirectional"
    with pytest.raises(CheckpointError, match="diffusion_attn_mode='bidirectional'"):
        read_official(saved(tmp_path, content))


def test_a_file_without_average_or_settings_says_what_to_give(tmp_path):
    content = content_of_small()
    del content["ema"], content["hyper_parameters"]
    file = saved(tmp_path, content)
    with pytest.raises(CheckpointError, match="--weights raw"):
        read_official(file)
    with pytest.raises(CheckpointError, match="--sequence-length"):
        read_official(file, weights="raw")
    assert read_official(file, weights="raw", sequence_length=48).model.num_heads == 4


def random_official(vocab, hidden, inner, condition, embedding, blocks, seed=0):
    """Return tensors of the official format, of any size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = OrderedDict({"vocab_embed.embedding": draw(vocab, hidden)})
    for name, rows, columns in (("0", condition, embedding), ("2", condition, condition)):
        tensors[f"sigma_map.mlp.{name}.weight"] = draw(rows, columns)
        tensors[f"sigma_map.mlp.{name}.bias"] = draw(rows)
    for block in range(blocks):
        shapes = {
            "norm1.weight": (hidden,), "attn_qkv.weight": (3 * hidden, hidden),
            "attn_out.weight": (hidden, hidden), "norm2.weight": (hidden,),
            "mlp.0.weight": (inner, hidden), "mlp.0.bias": (inner,), "mlp.2.weight": (hidden, inner),
            "mlp.2.bias": (hidden,), "adaLN_modulation.weight": (6 * hidden, condition),
            "adaLN_modulation.bias": (6 * hidden,),
        }  # fmt: skip
        tensors.update({f"blocks.{block}.{name}": draw(*shape) for name, shape in shapes.items()})
    tensors["output_layer.norm_final.weight"] = draw(hidden)
    tensors["output_layer.linear.weight"] = draw(vocab, hidden)
    tensors["output_layer.linear.bias"] = draw(vocab)
    tensors["output_layer.adaLN_modulation.weight"] = draw(2 * hidden, condition)
    tensors["output_layer.adaLN_modulation.bias"] = draw(2 * hidden)
    return OrderedDict({PREFIX + name: tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("vocab", "hidden", "heads", "inner", "condition", "blocks"),
    [(131, 48, 3, 100, 8, 3), (257, 32, 8, 128, 16, 1)],
)
def test_any_width_depth_heads_and_vocabulary_is_folded_exactly(
    tmp_path, vocab, hidden, heads, inner, condition, blocks
):
    """An MLP branch computed with and without folding; heads found again in Megatron's order."""
    tensors = random_official(vocab, hidden, inner, condition, 12, blocks)
    official = read_official(
        saved(tmp_path, {"state_dict": tensors}), weights="raw", num_heads=heads, sequence_length=20
    )
    model, ours = official.model, official.weights
    assert (model.hidden_size, model.num_layers, model.num_heads) == (hidden, blocks, heads)
    assert (model.vocab_size, model.max_length) == (vocab, 20)
    assert model.ffn_size == (None if inner == 4 * hidden else inner)
    of = {name.removeprefix(PREFIX): tensor.double() for name, tensor in tensors.items()}
    block, functional = blocks - 1, torch.nn.functional
    owner = f"blocks.{block}."
    time = torch.cat([torch.ones(6), torch.zeros(6)]).double()
    first = of["sigma_map.mlp.0.weight"] @ time + of["sigma_map.mlp.0.bias"]
    second = of["sigma_map.mlp.2.weight"] @ functional.silu(first) + of["sigma_map.mlp.2.bias"]
    six = of[owner + "adaLN_modulation.weight"] @ functional.silu(second)
    shift, scale, gate = (six + of[owner + "adaLN_modulation.bias"]).view(6, hidden)[3:]
    x = torch.randn(5, hidden, dtype=torch.float64)
    normed = functional.layer_norm(x, [hidden]) * of[owner + "norm2.weight"] * (1 + scale) + shift
    inner_x = functional.linear(normed, of[owner + "mlp.0.weight"], of[owner + "mlp.0.bias"])
    act = functional.gelu(inner_x, approximate="tanh")
    expected = gate * functional.linear(act, of[owner + "mlp.2.weight"], of[owner + "mlp.2.bias"])

    def our(name):
        return ours[f"decoder.layers.{name}[{block}]"].double()

    normed = functional.layer_norm(
        x, [hidden], our("mlp.linear_fc1.layer_norm_weight"), our("mlp.linear_fc1.layer_norm_bias")
    )
    inner_x = functional.linear(normed, our("mlp.linear_fc1.weight"), our("mlp.linear_fc1.bias"))
    act = functional.gelu(inner_x, approximate="tanh")
    found = functional.linear(act, our("mlp.linear_fc2.weight"), our("mlp.linear_fc2.bias"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    size = hidden // heads
    qkv = our("self_attention.linear_qkv.weight").view(heads, 3, size, hidden)
    for head, part in itertools.product(range(heads), range(3)):
        rows = of[owner + "attn_qkv.weight"][part * hidden + head * size :][:size]
        torch.testing.assert_close(qkv[head, part], rows, rtol=0, atol=1e-7)
