"""Weights of transformers' own models, in and out again, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Words
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.cli import import_, verify
from megatron_eso.cli.model_loading import describe
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.export import import_hf as module
from megatron_eso.export.exporter import export
from megatron_eso.export.import_hf import import_hf
from megatron_eso.export.inspect_tensors import inspect
from megatron_eso.export.streamed import StreamedModel
from megatron_eso.export.verify_export import verify_folder
from tests.test_export import small_tokenizer

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "initializer_range": 0.3, "rms_norm_eps": 1e-5,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 50000.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=THETA)),
    "llama-tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, rope_parameters=THETA, tie_word_embeddings=True)
    ),
    "llama-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, rope_parameters=THETA, attention_bias=True, mlp_bias=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters=THETA)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, rope_parameters=THETA, tie_word_embeddings=True)
    ),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Return a function that saves a kind's stock model, random in bfloat16, and returns its folder."""
    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(len(kind))
            model = MODELS[kind]()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name or name.endswith("bias"):
                        parameter.normal_(1.0, 0.3)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.bfloat16().save_pretrained(made[kind])
        return made[kind]

    return get


def change_config(folder, tmp_path, **values):
    target = tmp_path / "changed"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | values
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind", MODELS)
def test_in_and_out_again_is_bit_exact(stock, tmp_path, kind):
    import_hf(stock(kind), tmp_path / "ours")
    facts = export(tmp_path / "ours", tmp_path / "out", dtype="bf16", kind="backbone")
    assert facts["verification"]["canvas_relative_logits"] < 1e-5
    before, after = (load_file(f / "model.safetensors") for f in (stock(kind), tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        assert len(after[name]) - len(tensor) == (61 in tensor.shape[:1])


@pytest.mark.parametrize("kind", ["llama", "qwen3-tied"])
def test_the_backbone_is_the_stock_model_plus_a_mask_row(stock, tmp_path, kind):
    """Loaded by transformers' own class; logits of the old tokens are the old logits, bit for bit."""
    from transformers import AutoModelForCausalLM

    import_hf(stock(kind), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out", kind="backbone", verify=False)
    before, after = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)
        for f in (stock(kind), tmp_path / "out")
    )
    assert type(before) is type(after)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        old, new = before(input_ids=tokens).logits, after(input_ids=tokens).logits
    assert torch.allclose(new[..., :61], old, rtol=1e-6, atol=1e-5)
    embedding = after.get_input_embeddings().weight
    assert torch.allclose(embedding[61], embedding[:61].mean(0), atol=1e-6)


def test_our_own_export_comes_back_unchanged(stock, tmp_path):
    import_hf(stock("qwen3"), tmp_path / "first")
    export(tmp_path / "first", tmp_path / "out", verify=False)
    import_hf(tmp_path / "out", tmp_path / "second")
    export(tmp_path / "second", tmp_path / "again", verify=False)
    first, again = (f / "model.safetensors" for f in (tmp_path / "out", tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()
    assert StreamedModel(tmp_path / "out").config.mask_token_id == 61


def as_trained_for(folder, **objective):
    """Change the objective for which a checkpoint says it was trained."""
    sidecar = json.loads((folder / "esolm.json").read_text())
    sidecar["objective"] |= objective
    (folder / "esolm.json").write_text(json.dumps(sidecar))
    CheckpointFolder(folder).commit()


@pytest.mark.parametrize("objective", [{"alpha_0": 0.25, "noise_eps": 0.01}, {"name": "ar"}])
def test_a_backbone_export_comes_back_with_its_mask_row_and_objective(stock, tmp_path, objective):
    import_hf(stock("llama"), tmp_path / "first")
    as_trained_for(tmp_path / "first", **objective)
    export(tmp_path / "first", tmp_path / "out", kind="backbone", verify=False)
    found = import_hf(tmp_path / "out", tmp_path / "second")
    assert (found.model.vocab_size, found.has_mask, len(found.remarks)) == (62, True, 1)
    sidecars = [json.loads((tmp_path / x / "esolm.json").read_text()) for x in ("first", "second")]
    assert sidecars[0]["objective"] == sidecars[1]["objective"]
    export(tmp_path / "second", tmp_path / "again", kind="backbone", verify=False)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def export_as(stock, tmp_path, *, tokenizer=None, kind="backbone", **objective):
    """Export a stock model's weights as a run of this objective."""
    import_hf(stock("llama"), tmp_path / "run")
    as_trained_for(tmp_path / "run", **objective)
    export(tmp_path / "run", tmp_path / "out", kind=kind, tokenizer=tokenizer, verify=False)
    return tmp_path / "out"


@pytest.mark.parametrize("leading_mask", [True, False])
def test_an_autoregressive_export_says_how_it_is_read(stock, tmp_path, leading_mask):
    tokenizer = small_tokenizer(tmp_path / "t.json", 61)
    out = export_as(stock, tmp_path, tokenizer=tokenizer, name="ar", leading_mask=leading_mask)
    card = " ".join((out / "README.md").read_text().split())
    assert "next-token model: the logits at a token are those of the token behind it" in card
    assert ("prompts start with it" in card) is leading_mask
    for wrong in ("garbage", "AT a mask", "alpha_0", "diffusion", "Eso-LM"):
        assert wrong not in card
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["bos_token_id"] == (61 if leading_mask else 0)
    words = json.loads((out / "tokenizer_config.json").read_text())
    assert (words["bos_token"] is None) is leading_mask


def test_an_autoregressive_export_draws_no_mask(stock, tmp_path):
    """The mask's logit is not trained. Here all logits are equal, so 640 draws would hit the mask."""
    out = export_as(stock, tmp_path, name="ar")
    model = LlamaForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.manual_seed(0)
    first = torch.full((16, 1), model.config.bos_token_id)
    rows = model.generate(
        first, max_new_tokens=40, do_sample=True, top_k=0, pad_token_id=0,
        attention_mask=torch.ones_like(first),
    )  # fmt: skip
    assert (rows[:, 0] == 61).all()
    assert not (rows[:, 1:] == 61).any()


ENDS = ("w2", 2), ("w1", 1)
BYTES = processors.ByteLevel(trim_offsets=True)
TEMPLATE = processors.TemplateProcessing(
    single="w1 $A", pair="w1 $A w1 $B", special_tokens=[("w1", 1)]
)
ADDERS = {
    "template": TEMPLATE,
    "bert": processors.BertProcessing(*ENDS),
    "roberta": processors.RobertaProcessing(*ENDS),
    "sequence": processors.Sequence([BYTES, TEMPLATE]),
}


@pytest.mark.parametrize("kind", ["esolm", "backbone"])
@pytest.mark.parametrize("adder", ADDERS)
def test_the_exported_tokenizer_adds_no_tokens(stock, tmp_path, kind, adder):
    """Rows of training and of ``sample --prompt`` have no added tokens."""
    file = small_tokenizer(tmp_path / "t.json", 61)
    words = Words.from_file(str(file))
    words.post_processor = ADDERS[adder]
    words.save(str(file))
    assert 1 in words.encode("w5 w6").ids
    out = export_as(stock, tmp_path, tokenizer=file, kind=kind)
    found = AutoTokenizer.from_pretrained(out)
    assert found("w5 w6").input_ids == Tokenizer(file).encode("w5 w6") == [5, 6]
    assert found("w5", "w6").input_ids == [5, 6]
    left = json.loads((out / "tokenizer.json").read_text())["post_processor"]
    assert ("ByteLevel" in json.dumps(left)) is (adder == "sequence")


def test_a_tokenizer_that_adds_nothing_is_exported_as_it_is(stock, tmp_path):
    file = small_tokenizer(tmp_path / "t.json", 61)
    words = Words.from_file(str(file))
    words.post_processor = processors.Sequence([BYTES])
    words.save(str(file), pretty=False)
    out = export_as(stock, tmp_path, tokenizer=file)
    assert (out / "tokenizer.json").read_bytes() == file.read_bytes()


def test_an_eso_backbone_says_how_it_is_read(stock, tmp_path):
    out = export_as(stock, tmp_path, alpha_0=0.25)
    card = (out / "README.md").read_text()
    assert "garbage" in card
    assert "alpha_0 = 0.25" in card
    assert "suppress_tokens" not in (out / "generation_config.json").read_text()


def test_an_objective_that_is_not_written_down_is_remarked(stock, tmp_path):
    """A folder that transformers saved again lacks our notes but still has the mask token."""
    import_hf(stock("llama"), tmp_path / "first")
    export(tmp_path / "first", tmp_path / "out", kind="backbone", verify=False)
    (tmp_path / "out" / "esolm_export.json").unlink()
    found = import_hf(tmp_path / "out", tmp_path / "second")
    assert found.model.vocab_size == 62
    assert any("taken to be eso" in remark for remark in found.remarks)


def test_notes_of_another_version_are_refused(stock, tmp_path):
    import_hf(stock("llama"), tmp_path / "first")
    export(tmp_path / "first", tmp_path / "out", kind="backbone", verify=False)
    facts = json.loads((tmp_path / "out" / "esolm_export.json").read_text())
    facts["objective"]["beta"] = 1
    (tmp_path / "out" / "esolm_export.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"objective\.beta"):
        import_hf(tmp_path / "out", tmp_path / "second")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"], ["parallel.pipeline=2"]])
def test_an_imported_model_trains_at_any_layout(stock, tmp_path, two_ranks, layout):
    found = import_hf(stock("qwen3"), tmp_path / "ours")
    settings = ["model.head_size=16", "model.ffn_size=64", "model.vocab_size=62", "model.qk_norm=true",
                "model.vocab_padding_multiple=128", "model.rotary_base=50000", *layout]  # fmt: skip
    losses = two_ranks.run("train_from", str(found.folder.path), settings)
    assert losses[0] == losses[1]
    assert all(0 < loss < 100 for loss in losses[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_theta": 10000.0}, "disagree"),
        ({"model_type": "mistral"}, "mistral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 5}, r"layers\.4\.input_layernorm\.weight is missing"),
        ({"num_hidden_layers": 3}, r"layers\.3\.\S+ has no place"),
        ({"intermediate_size": 32}, r"gate_proj.*\(64, 32\).*by config.json \[\(32, 32\)"),
        (
            {"vocab_size": 40},
            r"embed_tokens.*\(61, 32\).*by config.json \[\(40, 32\)\].*vocab_size",
        ),
        ({"vocab_size": 70}, r"embed_tokens.*\(61, 32\).*by config.json \[\(70, 32\)\]"),
        ({"num_key_value_heads": 1}, r"k_proj.*by config.json .*\(16, 32\).*num_key_value_heads"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
        ),
        ({"head_dim": 8}, r"q_proj.*\(64, 32\).*by config.json \[\(32, 32\).*head_dim"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"use_sliding_window": True}, "sliding"),
        ({"mask_token_id": 7}, "mask_token_id=7 with vocab_size=61"),
    ],
)
def test_what_has_no_counterpart_is_refused_and_nothing_is_left(stock, tmp_path, values, message):
    source = change_config(stock("llama"), tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        import_hf(source, tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_heads"])
def test_a_size_that_is_not_written_down_is_as_transformers_takes_it(tmp_path, name):
    """Qwen3's defaults are independent numbers, not quotients."""
    sizes = {"head_dim": 128, "num_key_value_heads": 32, "num_attention_heads": 64}
    shape = SHAPE | sizes | {"num_hidden_layers": 1}
    Qwen3ForCausalLM(Qwen3Config(**shape)).bfloat16().save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    del config[name]
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    model = import_hf(tmp_path / "whole", tmp_path / "ours").model
    assert (model.head_size, model.num_kv_heads) == (128, 32)


def test_a_head_norm_of_another_size_is_refused(stock, tmp_path):
    source = change_config(stock("qwen3"), tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.self_attn.k_norm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.self_attn\.k_norm\.weight: shapes \[\(8,\)\]"
    ):
        import_hf(source, tmp_path / "ours")


def test_a_tokenizer_that_is_given_is_kept(stock, tmp_path):
    source = change_config(stock("llama"), tmp_path)
    small_tokenizer(source / "tokenizer.json", 50)
    given = small_tokenizer(tmp_path / "given.json", 61)
    found = import_hf(source, tmp_path / "ours", tokenizer=given)
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert found.remarks == []


def test_a_tokenizer_with_more_ids_than_the_embedding_is_not_to_be_cut_for(stock, tmp_path):
    given = small_tokenizer(tmp_path / "given.json", 70)
    (remark,) = import_hf(stock("llama"), tmp_path / "ours", tokenizer=given).remarks
    assert "70 ids, but the embedding 61" in remark
    assert "--cut-vocabulary" not in remark


def test_rows_longer_than_the_model_knows_are_refused(stock, tmp_path):
    with pytest.raises(CheckpointError, match=r"--sequence-length 65.*=64"):
        import_hf(stock("llama"), tmp_path / "ours", sequence_length=65)


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("hf", ["--weights", "raw"], "--weights is an option of --from official"),
        ("hf", ["--weights", "ema", "--num-heads", "2"], "--num-heads is an option of"),
        ("official", ["--cut-vocabulary"], "--cut-vocabulary is an option of --from hf"),
    ],
)
def test_options_of_the_other_format_are_refused(tmp_path, source, words, message):
    with pytest.raises(ConfigError, match=message):
        command(["in", "--out", str(tmp_path / "out"), "--from", source, *words])


def test_the_command_keeps_the_tokenizer_that_is_given(stock, tmp_path, capsys):
    given = small_tokenizer(tmp_path / "given.json", 61)
    words = [str(stock("llama")), "--out", str(tmp_path / "out"), "--from", "hf"]
    command([*words, "--tokenizer", str(given)])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert "the mask token, id 61, is new" in capsys.readouterr().out


def command(words):
    import_.app(words, standalone_mode=False)


def test_a_theta_in_either_spelling_is_read(stock, tmp_path):
    source = change_config(stock("llama"), tmp_path, rope_parameters=None, rope_theta=50000.0)
    assert import_hf(source, tmp_path / "ours").model.rotary_base == 50000.0


def test_the_vocabulary_is_cut_only_when_asked(stock, tmp_path):
    source = change_config(stock("llama"), tmp_path)
    small_tokenizer(source / "tokenizer.json", 50)
    whole = import_hf(source, tmp_path / "whole")
    assert whole.model.vocab_size == 62
    assert any("--cut-vocabulary" in remark for remark in whole.remarks)
    assert import_hf(source, tmp_path / "cut", cut_vocabulary=True).model.vocab_size == 51
    export(tmp_path / "cut", tmp_path / "out")
    again = import_hf(tmp_path / "out", tmp_path / "again")
    assert (again.model.vocab_size, again.has_mask) == (51, True)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"]


@pytest.mark.parametrize("kind", ["esolm", "backbone"])
def test_cutting_the_vocabulary_keeps_the_mask_row(stock, tmp_path, kind):
    import_hf(stock("llama"), tmp_path / "first")
    export(tmp_path / "first", tmp_path / "out", kind=kind, verify=False)
    small_tokenizer(tmp_path / "out" / "tokenizer.json", 50)
    assert import_hf(tmp_path / "out", tmp_path / "cut", cut_vocabulary=True).remarks == []
    export(tmp_path / "cut", tmp_path / "small", kind=kind, verify=False)
    name = "model.embed_tokens.weight"
    whole, cut = (load_file(tmp_path / x / "model.safetensors")[name] for x in ("out", "small"))
    assert torch.equal(cut, torch.cat([whole[:50], whole[61:]]))


def test_a_head_that_is_not_the_embedding_is_not_dropped(stock, tmp_path):
    """transformers does not tie the two if a file holds both and they differ."""
    folder = change_config(stock("llama"), tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_more_room_is_asked_for_than_the_checkpoint_takes(stock, tmp_path, monkeypatch, dtype):
    folder = change_config(stock("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors")
    asked = []
    monkeypatch.setattr(module, "require_room", lambda out, needed: asked.append(needed))
    import_hf(folder, tmp_path / "out")
    taken = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.distcp"))
    assert 0.5 * taken < asked[0] < taken


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"step": "one"}'], ids=["cut off", "list", "types"]
)
def test_damaged_notes_of_an_export_are_a_message(stock, tmp_path, content):
    folder = change_config(stock("llama"), tmp_path)
    (folder / "esolm_export.json").write_text(content)
    reads = (
        inspect,
        describe,
        lambda path: import_hf(path, tmp_path / "out"),
        lambda path: verify_folder(path, None),
    )
    for read in reads:
        with pytest.raises(CheckpointError, match=r"esolm_export\.json .*export again"):
            read(folder)


def test_a_hugging_face_folder_needs_from_hf(stock, tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder.*--from hf"):
        command([str(stock("llama")), "--out", str(tmp_path / "out")])


def test_verify_names_the_option_that_is_missing_or_has_no_effect(stock, tmp_path):
    import_hf(stock("llama"), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out", kind="backbone", verify=False)
    (tmp_path / "ours").rename(tmp_path / "moved")
    for words, message in (
        (["out"], r"ours, which no longer exists; .*--against"),
        (["moved"], "--expected"),
        (["out", "--tensor", "2"], "apply only to --expected"),
        (["out", "--against", "moved", "--expected", "e.safetensors"], "give one of them"),
    ):
        paths = [str(tmp_path / w) if w in ("out", "moved") else w for w in words]
        with pytest.raises((ConfigError, CheckpointError), match=message):
            verify.app(paths, standalone_mode=False)
    verify.app([str(tmp_path / "out"), "--against", str(tmp_path / "moved")], standalone_mode=False)
