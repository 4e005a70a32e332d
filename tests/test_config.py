"""Configuration: includes, overrides, helpful errors, rules and derived numbers."""

import ast
import math
import re
import shutil
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from megatron_eso.cli import config as show
from megatron_eso.cli import evaluate, launch, sample, train
from megatron_eso.config import (
    RunConfig,
    check,
    check_start,
    derive,
    load_config,
    load_run,
    save_config,
    schema,
    to_yaml,
    violations,
)
from megatron_eso.config.paths import Place, mark, path_to, paths, place_of, with_paths
from megatron_eso.config.ranges import Range, range_of
from megatron_eso.errors import ConfigError
from megatron_eso.launch.profile import ClusterProfile

CONFIGS = Path(__file__).parent.parent / "configs"


def config(*overrides):
    return load_config(None, ["train.steps=10", *overrides])


def test_files_include_each_other_and_later_ones_win(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {hidden_size: 64, num_layers: 2}\n")
    (tmp_path / "run.yaml").write_text("include: [base.yaml]\nmodel: {num_layers: 3}\n")
    loaded = load_config(tmp_path / "run.yaml", ["model.num_heads=2"])
    assert (loaded.model.hidden_size, loaded.model.num_layers, loaded.model.num_heads) == (64, 3, 2)


def test_a_circle_of_includes_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(ConfigError, match="in a circle"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=3", "did you mean hidden_size"),
        ("train.hidden_size=3", "did you mean model.hidden_size"),
        ("modle.hidden_size=3", "did you mean model"),
        ("objective.name=foo", "expected one of"),
        ("train.steps=many", "could not be converted to Integer"),
        ("train.steps", "section.key=value"),
    ],
)
def test_a_wrong_setting_names_the_right_ones_and_where_it_stands(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert override.split("=")[0] in str(caught.value)


@pytest.mark.parametrize("written", ["4:00:00", "012345", "on", "010", "2026_11_27", "1.10", "1e3"])
def test_text_is_read_as_it_was_written(written, tmp_path):
    text = f"{{time_limit: {written}, environment: {{{written}: {written}}}, setup: [{written}]}}"
    (tmp_path / "profile.yaml").write_text(text)
    overrides = [f"time_limit={written}", f"environment.{written}={written}", f"setup=[{written}]"]
    if "." in written:
        overrides[1] = f"environment={{{written}: {written}}}"
    for arguments in ([tmp_path / "profile.yaml"], [None, overrides]):
        profile = load_config(*arguments, schema=ClusterProfile)
        assert profile.time_limit == written
        assert profile.environment == {written: written}
        assert profile.setup == [written]


@pytest.mark.parametrize("written", ["off", '"off"'])
def test_a_word_that_yaml_takes_for_a_boolean_is_a_choice(written, tmp_path):
    (tmp_path / "run.yaml").write_text(f"precision: {{fp8: {written}}}\n")
    assert load_config(tmp_path / "run.yaml").precision.fp8 == "off"
    assert load_config(None, [f"precision.fp8={written}"]).precision.fp8 == "off"
    with pytest.raises(ConfigError, match="'no', expected one of"):
        load_config(None, ["precision.fp8=no"])


def test_text_within_lists_merge_keys_and_aliases_is_read_as_it_was_written(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: &day 2026_11_27\n"
        "data:\n"
        "  sources: [&base {path: 010, weight: 2}, {<<: *base, weight: 010}, {<<: [*base]}]\n"
        "  validation: {on: *day, 'null': '${name}'}\n"
        "  cache_dir: ~\n"
    )
    data = load_config(tmp_path / "run.yaml").data
    assert [(source.path, source.weight) for source in data.sources] == [
        ("010", 2.0), ("010", 8.0), ("010", 2.0),
    ]  # fmt: skip
    assert data.validation == {"on": "2026_11_27", "null": "2026_11_27"}
    assert data.cache_dir is None


def test_values_that_are_not_text_are_read_as_yaml():
    loaded = config(
        "optimizer.eps=1e-4", "model.qk_norm=yes", "data.shuffle=off", "data.cache_dir=null",
        "train.tokens=null", "name=${objective.name}", r"data.validation.a\.b=c",
    )  # fmt: skip
    assert (loaded.optimizer.eps, loaded.model.qk_norm, loaded.data.shuffle) == (1e-4, True, False)
    assert (loaded.data.cache_dir, loaded.train.tokens, loaded.name) == (None, None, "eso")
    assert loaded.data.validation == {"a.b": "c"}
    with pytest.raises(ConfigError, match="Incompatible value 'None'"):
        load_config(None, ["name=null"])


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    (tmp_path / "run.yaml").write_text("train:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(ConfigError, match=r"(?s)duplicate key steps.*run.yaml\", line 3"):
        load_config(tmp_path / "run.yaml")


def test_a_mapping_that_contains_itself_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {validation: &a {<<: *a}}\n")
    with pytest.raises(ConfigError, match="recursive aliases"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.sources.0.weight=2",
            r"replaced whole.* data.sources=\[{path: ..., weight: ...}, ...]",
        ),
        ("data.sources[0].weight=2", r"replaced whole.* data.sources=\[{path: ..., weight: ...}"),
        ("train.profile_steps.0=2", r"replaced whole.* train.profile_steps=\[..., ...]"),
        ("data.validation=[a]", "named values, not a list: write data.validation={NAME: ..."),
        ("data.validation=d/v", "named values, not 'd/v': write data.validation={NAME: ..."),
        (
            "data.sources=d/train",
            r"is a list, not 'd/train': write data.sources=\[{path: ..., weight",
        ),
        ("data.sources=null", r"is a list, not null: write data.sources=\[{path: ..., weight"),
        (
            "data.sources=[d/train]",
            r"list of named values: write data.sources=\[{path: ..., weight",
        ),
        ("model=tiny", "'model' is a section, not 'tiny': write model.KEY=VALUE, or leave it out"),
        ("model=null", "'model' is a section, not null: write model.KEY=VALUE, or leave it out"),
    ],
)
def test_a_part_of_a_list_cannot_be_changed_and_the_error_says_how_to_write_it(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize("include", ["", "5", "[base.yaml, 5]", "{base: base.yaml}"])
def test_an_include_that_is_no_path_is_refused(include, tmp_path):
    (tmp_path / "base.yaml").write_text("")
    (tmp_path / "run.yaml").write_text(f"include: {include}\ntrain: {{steps: 1}}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: include is .*write include: \[FILE.yaml\]"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("content", [b"name: \xe4\n", "name: ä\n".encode("utf-16")])
def test_a_file_that_is_not_utf_8_is_refused(content, tmp_path):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run.yaml is not text in UTF-8 .*; save it as UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder.*config\.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", ["5", "hello", "[a, b]"])
def test_a_file_without_keys_is_refused(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match="expected sections with keys, found"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("ranks", ["-2", "0"])
@pytest.mark.parametrize(
    "command",
    [[train.app], [launch.app], [show.app, "show"], [evaluate.app], [sample.app]],
    ids=["train", "launch", "config", "eval", "sample"],
)
def test_less_than_one_rank_is_refused(command, ranks):
    app, *name = command
    result = CliRunner().invoke(app, [*name, "missing.yaml", "--ranks", ranks])
    assert result.exit_code == 2
    assert "Invalid value for '--ranks'" in result.output


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("trian: {steps: 1}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: unknown key 'trian'; did you mean train"):
        load_config(tmp_path / "run.yaml")


def test_the_resolved_configuration_loads_back_unchanged(tmp_path):
    original = load_config(CONFIGS / "run/quickstart.yaml", ["objective.alpha_0=0.125"])
    save_config(original, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == original


@pytest.mark.parametrize(
    "text", ["4:00:00", "on", "010", "1e3", "null", "~", "", "a: #b", "=", "ä\n"]
)
def test_any_text_of_a_saved_configuration_loads_back_unchanged(text, tmp_path):
    original = ClusterProfile(account=text, environment={"on": text}, setup=[text])
    save_config(original, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", schema=ClusterProfile) == original


def test_all_violations_are_reported_at_once():
    broken = config(
        "model.hidden_size=250", "parallel.tensor=3", "objective.alpha_0=0.5", "optimizer.beta1=1"
    )
    with pytest.raises(ConfigError) as caught:
        check(broken, 4)
    message = str(caught.value)
    for part in ("model.hidden_size=250", "parallel.tensor=3", "optimizer.beta1=1", "4 rank(s)"):
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.alpha_0=0.5", "objective.loss_weight=constant"], "balance of the two losses"),
        (["objective.alpha_0=1", "objective.diffusion_fraction=0.5"], "must be 1"),
        (["objective.alpha_0=0.5", "objective.diffusion_fraction=1"], "strictly between"),
        (["objective.alpha_0=0.5", "train.global_batch_rows=6"], "must be even"),
        (["objective.alpha_0=0.5", "train.micro_batch_rows=3"], "must be even"),
        (["objective.alpha_0=1.5"], "must be in"),
        (["train.sequence_length=2048"], "rotary table"),
        (["parallel.pipeline=3"], "not divisible by parallel.pipeline"),
        (["parallel.virtual_pipeline=2"], "virtual_pipeline=2 with parallel.pipeline=1"),
        (["parallel.context=3"], "not divisible by parallel.context"),
        (["parallel.context=8"], "share the heads of a tensor rank"),
        (
            [
                "model.num_heads=12",
                "model.hidden_size=384",
                "model.num_kv_heads=4",
                "parallel.context=6",
                "train.sequence_length=384",
            ],
            "neither a multiple nor a divisor",
        ),
        (["precision.deterministic=true", "precision.attention=flex"], "repeatable"),
        (["precision.fp8_attention=true"], "head size of exactly 128"),
        (
            ["precision.fp8=delayed", "precision.fp8_amax_history=0"],
            "fp8_amax_history=0 must be at least 1",
        ),
        (["precision.bf16_first_layers=-1"], "bf16_first_layers=-1 must be at least 0"),
        (["train.tokens=100"], "train.steps=10 and train.tokens=100 are both set"),
        (["train.steps=null"], "set train.steps or train.tokens"),
        (["objective.name=mdlm", "objective.diffusion_fraction=0.5"], "all take one pass"),
        (["objective.name=ar", "objective.loss_weight=constant"], "has no diffusion loss"),
        (["train.profile_steps=[3,0]"], "the run has no step 0, its steps are 1 to 10"),
        (["train.profile_steps=[11]"], "the run has no step 11, its steps are 1 to 10"),
        (["train.profile_ranks=[-1]"], "train.profile_ranks=[-1] must be at least 0"),
        (["objective.name=bd3lm", "objective.block_size=7"], "does not divide"),
        (["model.num_kv_heads=3"], "not a multiple"),
        (["resilience.timeout_factor=0.5"], "must be at least 1"),
        (["checkpoint.keep_every_steps=0"], "null keeps no milestones"),
        (["resilience.spike_deviations=0"], "spike_deviations=0.0 must be positive"),
        (["data.num_workers=-1"], "data.num_workers=-1 must be at least 0"),
        (["data.retries=0"], "data.retries=0 must be at least 1"),
        (["data.timeout_seconds=0"], "data.timeout_seconds=0.0 must be positive"),
        (["data.cache_limit_gib=0"], "null sets no bound"),
        (["resilience.on_nonfinite=rollback"], "resilience.on_nonfinite=rollback goes back"),
        (["resilience.on_spike=rollback"], "resilience.on_spike=rollback goes back"),
        (["checkpoint.local_every_steps=0"], "checkpoint.local_every_steps=0"),
        (["train.save_every_steps=0"], "null saves only at the end and on a signal"),
        (["train.save_every_steps=-2"], "save_every_steps=-2 must be at least 1"),
        (["train.eval_every_steps=0"], "null evaluates only at the end"),
        (["eval.micro_batch_rows=0"], "null takes train.micro_batch_rows"),
        (["optimizer.weight_decay=-0.1"], "weight_decay=-0.1 must be at least 0"),
        (["optimizer.weight_decay=nan"], "weight_decay=nan must be at least 0"),
        (["optimizer.clip_grad_norm=-1"], "0 sets no bound"),
        (["optimizer.eps=0"], "optimizer.eps=0.0 must be positive"),
        (["optimizer.warmup_steps=-1"], "warmup_steps=-1 must be at least 0"),
        (["optimizer.decay_steps=-5"], "decay_steps=-5 must be at least 1"),
        (["optimizer.decay_steps=0"], "schedule=constant has no decay"),
        (
            ["optimizer.decay_steps=5"],
            "optimizer.decay_steps=5 has no effect with optimizer.schedule=const",
        ),
        (
            ["optimizer.min_learning_rate=1e-5"],
            "optimizer.min_learning_rate=1e-05 has no effect with optimizer.schedule=constant, which has "
            "no decay; set it to 0, or choose cosine or wsd",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.warmup_steps=10"],
            "optimizer.decay_steps=null (wsd: a tenth of the steps, 1) take more than the run's 10 steps",
        ),
    ],
)
def test_a_broken_rule_says_what_to_change(overrides, message):
    found = violations(config(*overrides))
    assert any(message in line for line in found), found


def test_a_decay_that_the_schedule_lacks_is_the_only_thing_wrong_with_it():
    found = violations(config("optimizer.decay_steps=10", "optimizer.warmup_steps=1"))
    assert [line.split()[0] for line in found] == ["optimizer.decay_steps=10"]


def test_a_rank_to_profile_is_one_of_the_runs():
    settings = ["train.profile_steps=[1,10]", "train.profile_ranks=[0,2]", "parallel.local_ranks=2"]
    (found,) = violations(config(*settings), 2)
    assert found == "train.profile_ranks=[0, 2]: the run's ranks are 0 to 1"
    assert not violations(config(*settings), 4)


def test_a_run_that_is_about_to_start_needs_data():
    with pytest.raises(ConfigError, match=r"data.sources is empty: name at least one"):
        check_start(config(), 1)
    check_start(config("data.sources=[{path: a}]"), 1)
    check(config(), 1)  # as for a plan


def test_the_configuration_of_a_run_that_was_moved_starts_no_new_run(monkeypatch, tmp_path):
    """It names the folder in which the run was: a run from step 0 would begin there, unasked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there/checkpoints").mkdir(parents=True)
    stored = tmp_path / "there/config.yaml"
    stored.write_text("folder: runs/first\n")
    with pytest.raises(ConfigError, match=r"was moved.*folder=\S+/there to go on.*folder=runs/NEW"):
        load_run(stored, ["name=second"])
    assert load_run(stored, ["folder=there"]).folder == "there"
    assert load_run(stored, ["folder=runs/new"]).folder == "runs/new"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/first").symlink_to(tmp_path / "there")
    assert load_run(stored, []).folder == "runs/first"
    assert load_run(Path("runs/first/config.yaml"), []).folder == "runs/first"
    shutil.copy(stored, tmp_path / "template.yaml")
    assert load_run(tmp_path / "template.yaml", []).folder == "runs/first"


def test_a_path_may_begin_at_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "run.yaml").write_text("folder: ~/runs/${name}\ndata: {validation: {a: ~/v}}\n")
    loaded = load_config(
        tmp_path / "run.yaml",
        [
            "data.sources=[{path: ~/t},{path: 's3://b/~'}]",
            "checkpoint.init_from=~/c",
            "data.cache_dir=~/d",
        ],
    )
    assert loaded.folder == "/home/me/runs/run"
    assert loaded.data.validation == {"a": "/home/me/v"}
    assert [source.path for source in loaded.data.sources] == ["/home/me/t", "s3://b/~"]
    assert (loaded.checkpoint.init_from, loaded.data.cache_dir) == ("/home/me/c", "/home/me/d")
    assert loaded.checkpoint.local_folder is None


def test_a_setting_that_may_be_off_is_off_at_its_documented_value():
    """The value is 0 where the setting does not allow null, else null."""
    off = [
        "optimizer.weight_decay=0", "optimizer.clip_grad_norm=0", "optimizer.warmup_steps=0",
        "train.save_every_steps=null", "train.eval_every_steps=null", "eval.micro_batch_rows=null",
    ]  # fmt: skip
    assert not violations(config(*off))


def test_a_token_budget_must_be_whole_batches():
    loaded = load_config(None, ["train.tokens=1000000"])
    assert any("nearest below is 999424" in line for line in violations(loaded))
    exact = load_config(None, ["train.tokens=999424"])
    assert not violations(exact)
    assert derive.total_steps(exact) == 61


def test_stack_rows_count_sequential_rows_twice():
    numbers = derive.derive(config("objective.alpha_0=0.25"), 2)
    assert (numbers.num_diffusion_rows, numbers.num_sequential_rows) == (16, 16)
    assert numbers.num_stack_rows == 48
    assert numbers.num_micro_batches == 6
    assert derive.derive(config("objective.name=ar"), 1).num_stack_rows == 32
    assert derive.derive(config("objective.name=bd3lm"), 1).num_stack_rows == 64


def test_every_shipped_run_is_valid():
    for path in sorted((CONFIGS / "run").glob("*.yaml")):
        loaded = load_config(path)
        assert not violations(loaded, loaded.parallel.local_ranks), path


def test_every_field_is_documented():
    for node in ast.parse(Path(schema.__file__).read_text()).body:
        for setting, text in pairwise(getattr(node, "body", [])):
            if isinstance(setting, ast.AnnAssign):
                assert isinstance(text, ast.Expr), (node, ast.unparse(setting))


def test_every_number_has_a_range_that_holds_its_default():
    sections = [
        s for s in vars(schema).values() if is_dataclass(s) and s.__module__ == schema.__name__
    ]
    for section in sections:
        for setting in fields(section):
            allowed = range_of(setting)
            if allowed and setting.default is not None:
                assert allowed.holds(setting.default), setting.name
            is_number = set(str(setting.type).split(" | ")) & {"int", "float"}
            is_number = is_number or setting.type in (int, float, int | None, float | None)
            assert bool(allowed) == bool(is_number), setting.name


def test_every_setting_that_is_said_to_hold_a_path_is_marked():
    marked = set()
    for node in ast.parse(Path(schema.__file__).read_text()).body:
        for setting, text in pairwise(node.body if isinstance(node, ast.ClassDef) else []):
            if not isinstance(setting, ast.AnnAssign) or not isinstance(text, ast.Expr):
                continue
            name = ast.unparse(setting.target)
            section = getattr(schema, node.name)
            (item,) = (i for i in fields(section) if i.name == name)
            said = f"{name} {ast.literal_eval(text.value)}".lower().replace("_", " ")
            is_text = str(item.type) in (
                "<class 'str'>",
                "str | None",
                "dict[str, str]",
                "list[str]",
            )
            names_one = re.search(r"\b(folder|path|address|file|dir|directory)\b", said)
            assert bool(place_of(item)) == bool(is_text and names_one), f"{section}.{name}"
            marked |= {name} if place_of(item) else set()
    assert marked == {
        "path", "validation", "cache_dir", "local_folder", "init_from", "folder",
    }  # fmt: skip


@dataclass(frozen=True)
class Part:
    there: str | None = path_to(Place.NODE, None)
    name: str = "~"


@dataclass(frozen=True)
class Whole:
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict, metadata=mark(Place.DATA))
    empty: str = path_to(Place.SHARED, "")


def test_a_new_setting_with_the_mark_is_found_and_changed_wherever_it_stands():
    settings = Whole(Part("~/a"), [Part("b"), Part()], [3], {"c": "~/c"})
    found = [(one.setting, one.place, one.path) for one in paths(settings)]
    assert found == [
        ("part.there", Place.NODE, "~/a"),
        ("parts[0].there", Place.NODE, "b"),
        ("named.c", Place.DATA, "~/c"),
    ]
    expected = Whole(Part("/a"), [Part("b"), Part()], [3], {"c": "/c"})
    assert with_paths(settings, lambda path: path.removeprefix("~")) == expected


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        ({"at_least": 1}, (1, 5), (0, -1, math.nan), "at least 1"),
        ({"above": 0}, (1e-9, math.inf), (0, -1, math.nan), "positive"),
        ({"above": 0, "below": math.inf}, (1e9,), (0, math.inf, math.nan), "positive and finite"),
        ({"at_least": 0, "below": 1}, (0, 0.5), (1, -0.1, math.nan), "in [0, 1)"),
        ({"at_least": 0, "at_most": 1}, (0, 1), (1.1, -0.1), "in [0, 1]"),
        ({"above": 0, "at_most": 1}, (0.1, 1), (0, 1.1), "in (0, 1]"),
        ({"above": 2}, (3,), (2,), "above 2"),
    ],
)
def test_a_range_holds_what_it_says(bounds, inside, outside, words):
    allowed = Range(**bounds)
    assert str(allowed) == words
    assert all(allowed.holds(value) for value in inside)
    assert not any(allowed.holds(value) for value in outside)


def test_settings_within_lists_are_looked_at():
    beyond = config("data.sources=[{path: a}, {path: b, weight: 0}]")
    assert violations(beyond) == ["data.sources[1].weight=0.0 must be positive and finite"]


@pytest.mark.parametrize(
    "override",
    [
        "model.num_heads=0", "model.num_kv_heads=0", "model.head_size=0", "model.vocab_padding_multiple=0",
        "parallel.tensor=0", "parallel.pipeline=0", "parallel.virtual_pipeline=0", "parallel.context=0",
        "train.micro_batch_rows=0", "train.sequence_length=0", "train.steps=0", "objective.block_size=0",
    ],
)  # fmt: skip
def test_a_number_that_rules_divide_by_is_refused_before_they_are_asked(override):
    for name in ("eso", "bd3lm"):
        found = violations(config(f"objective.name={name}", override), 4)
        assert len(found) == 1 and found[0].startswith(f"{override} must be at least 1")


def test_the_configuration_is_frozen():
    with pytest.raises(AttributeError):
        RunConfig().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["a${b}", r"a\${b}", r"a\\${b}", "x${", r"a\b", "$a{b}", "it's ${q}"]
)
def test_a_saved_text_is_read_back_as_it_is_whatever_it_holds(tmp_path, text):
    config = RunConfig(
        folder=text, data=schema.DataConfig([schema.DataSourceConfig(text)], {"v": text})
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_saved_configuration_is_what_omegaconf_writes():
    """Folder names of sweeps and fingerprints of cells are derived from it."""
    config = load_config(CONFIGS / "run/quickstart.yaml")
    assert to_yaml(config) == OmegaConf.to_yaml(OmegaConf.structured(config))


def test_a_reference_to_no_setting_says_how_the_characters_are_written():
    with pytest.raises(
        ConfigError, match=r"'e' not found.*full_key: folder.*written \\\$\{\.\.\.\}"
    ):
        load_config(None, ["folder=w${e}"])
    assert load_config(None, [r"folder=w\${e}"]).folder == "w${e}"


@pytest.mark.parametrize("name", ["ar", "mdlm", "bd3lm"])
def test_the_rules_that_are_printed_are_those_of_the_objective(name):
    """Without an alpha_0 there is no share by it; rows of bd3lm are no diffusion rows at any share."""
    asked = config(f"objective.name={name}", "train.micro_batch_rows=2")
    lines = derive.derive(asked, 1).lines()
    (fraction,) = [line for line in lines if line.startswith("diffusion_fraction")]
    assert "alpha_0" not in fraction and f"objective.name={name}" in fraction
    (rows,) = [line for line in lines if line.startswith("num_diffusion_rows")]
    assert ("diffusion_fraction x" in rows) == (name != "bd3lm")
