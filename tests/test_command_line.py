"""Every command as a user runs it: real processes, real ranks, its own small text.

Each of the main commands starts once in a new Python, then in forked ones (tests/forked.py).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_eso.cli import bench_sample as bench_module
from megatron_eso.cli import model_loading
from megatron_eso.cli.evaluate import evaluate
from megatron_eso.cli.sample import sample
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig, RunConfig
from megatron_eso.data.text_rows import TextRows
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_eso.eval import frontier
from megatron_eso.eval.evaluate import check_request, unused_options
from megatron_eso.eval.frontier import Point, hugging_face_judge, our_judge, windows
from tests.forked import run, start
from tests.replaced import replaced
from tests.test_export import small_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SETTINGS = [
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=300",
    "train.sequence_length=32", "train.steps=6", "train.global_batch_rows=8", "train.micro_batch_rows=2",
    "train.log_every_steps=1", "objective.alpha_0=0.5", "optimizer.ema_decay=0.9", "eval.num_rows=4",
    "precision.dtype=fp32", "train.eval_every_steps=3",
]  # fmt: skip


def new_python(*arguments, folder):
    """Run a command as a user does; the tests below fork, which saves the imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_eso", *map(str, arguments)],
        cwd=folder, env=environment, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a prepared data set, a configuration, and a finished run of six steps."""
    folder = tmp_path_factory.mktemp("user")
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * i) % 97} is {i % 7}" for i in range(1, 80))
        (text / f"{number}.txt").write_text(f"document {number}\n{words}\n")
    new_python("data", "prepare", text, "--out", "data", "--sequence-length", 32, "--vocab-size", 300,
               "--validation-fraction", 0.2, folder=folder)  # fmt: skip
    (folder / "run.yaml").write_text(
        "data:\n  sources: [{path: data/train}]\n  validation: {text: data/validation}\n"
    )
    arguments = ("train", "run.yaml", "name=first", "parallel.local_ranks=2", *SETTINGS)
    new_python(*arguments, folder=folder)
    return folder


def test_a_run_leaves_everything_needed_to_run_it_again(place):
    folder = place / "runs/first"
    for name in ("config.yaml", "run.json", "log.txt", "metrics.jsonl", "status.json"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").glob("events*"))
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    metrics = {s["metric"] for s in json.loads((folder / "evaluation.json").read_text())["text"]}
    assert metrics == {"nelbo", "likelihood bound, K = 1", "unigram of the training data"}


def test_a_finished_run_is_not_trained_again(place):
    before = (place / "runs/first/metrics.jsonl").read_text()
    out = run(
        "train", "run.yaml", "name=first", *SETTINGS, "train.micro_batch_rows=2", folder=place
    )
    assert "runs/first has finished already" in out
    assert (place / "runs/first/metrics.jsonl").read_text() == before


def test_a_longer_run_continues_where_the_shorter_ended(place):
    shutil.copytree(place / "runs/first", place / "runs/longer")
    run("train", "run.yaml", "name=longer", *SETTINGS, "train.steps=8", "train.profile_steps=[7]",
        "train.profile_ranks=[0,1]", "train.save_every_steps=7", "parallel.local_ranks=2",
        "parallel.context=2", folder=place)  # fmt: skip
    lines = [json.loads(s) for s in (place / "runs/longer/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_profiled_step_leaves_a_trace_and_a_table_that_adds_up(place):
    """The run is that of the previous test."""
    folder = place / "runs/longer/profile"
    names = [f"step_0000007_rank_0000{rank}" for rank in (0, 1)]
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{name}.{suffix}" for name in names for suffix in ("json", "txt")
    ]
    trace = json.loads((folder / f"{names[0]}.json").read_text())["traceEvents"]
    assert any("scaled_dot_product" in event.get("name", "") for event in trace)
    seconds, shares = {}, {}
    for line in (folder / f"{names[0]}.txt").read_text().splitlines()[1:]:
        words = line.split()
        *name, whole, share, _, _ = words
        seconds[" ".join(name)], shares[" ".join(name)] = float(whole), float(share.rstrip("%"))
    expected = {"data", "rows", "forward", "backward", "gradient sum", "optimizer", "checkpoint"}
    assert set(seconds) == expected | {"other", "step"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(2 * seconds["step"], abs=0.002)
    assert shares["other"] < 50


def test_eval_prints_a_table_and_writes_json(place):
    out = new_python("eval", "runs/first", "data/validation", "--rows", 4, "--orders", 2, "--json",
                     "s.json", folder=place)  # fmt: skip
    assert "nelbo" in out
    scores = json.loads((place / "s.json").read_text())
    trained = json.loads((place / "runs/first/evaluation.json").read_text())["text"]
    assert scores[0]["nats_per_token"] == pytest.approx(trained[0]["nats_per_token"], rel=1e-5)


def test_eval_asks_nothing_of_the_batches_a_checkpoint_was_trained_with(place):
    """0.6 of 10 rows is a whole number of rows; 0.6 of the default batch is not."""
    run("train", "run.yaml", "name=uneven", *SETTINGS, "objective.diffusion_fraction=0.6", "train.steps=1",
        "train.global_batch_rows=10", "data.validation={}", folder=place)  # fmt: skip
    out = run("eval", "runs/uneven", "data/validation", "--rows", 2, folder=place)
    assert "nelbo" in out
    refused = run("eval", "runs/uneven", "data/validation", "--eps", 2, folder=place, code=2)
    assert "eval.noise_eps=2.0 must be in [0, 1)" in refused


def test_eval_scores_raw_text_as_it_scores_the_same_text_prepared(place):
    """Packed alone and in order, the text gives the rows that data prepare would write."""
    text = place / "held-out.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    run("data", "prepare", text, "--out", "held-out", "--sequence-length", 32,
        "--tokenizer", "data/tokenizer.json", "--validation-fraction", 0, folder=place)  # fmt: skip
    found = []
    for data, more in ((text, ["--ranks", 2, "--tensor", 2]), ("held-out/train", [])):
        run("eval", "runs/first", data, "--metric", "likelihood", "--orders", 3, "--json", "t.json",
            *more, folder=place)  # fmt: skip
        found.append(json.loads((place / "t.json").read_text()))
    assert [s["metric"] for s in found[0]] == [f"likelihood bound, K = {k}" for k in (1, 3)]
    for raw, prepared in zip(*found, strict=True):
        assert raw["num_tokens"] == prepared["num_tokens"] > 100
        assert raw["nats_per_token"] == pytest.approx(prepared["nats_per_token"], rel=1e-5)
        assert raw["bits_per_byte"] == pytest.approx(prepared["bits_per_byte"], rel=1e-5)


def test_eval_leaves_bad_documents_out_only_if_told_to_and_counts_them(place):
    lines = [json.dumps({"text": f"document {n}: word{n} is {n}. " * 9}) for n in range(6)]
    (place / "good.jsonl").write_text("\n".join(lines))
    (place / "bad.jsonl").write_text("\n".join([*lines[:3], "oops", *lines[3:], '{"text": ""}']))
    (place / "worst.jsonl").write_text("{}\noops\n")
    words = ("--orders", 0, "--json", "b.json")
    out = run("eval", "runs/first", "bad.jsonl", *words, folder=place, code=3)
    assert re.search(r"bad\.jsonl, line 4: the document is not JSON.*--bad-documents skip", out)
    out = run("eval", "runs/first", "bad.jsonl", *words, "--bad-documents", "skip", folder=place)
    assert "rows, 2 bad documents left out" in out
    (score,) = json.loads((place / "b.json").read_text())
    out = run("eval", "runs/first", "good.jsonl", *words, folder=place)
    assert "left out" not in out
    assert score == {**json.loads((place / "b.json").read_text())[0], "num_skipped": 2}
    words = ("worst.jsonl", "--bad-documents", "skip")
    out = run("eval", "runs/first", *words, folder=place, code=3)
    assert "worst.jsonl holds no text to score: 2 bad documents were left out" in out


def test_sample_prints_the_prompt_and_text_and_repeats_itself(place):
    arguments = ("sample", "runs/first", "--prompt", "document", "--num-samples", 1, "--seed", 3)
    first = new_python(*arguments, folder=place)
    assert first.split("---\n")[1].startswith("document")
    assert first.split("--- ")[:2] == run(*arguments, folder=place).split("--- ")[:2]


def test_an_exported_folder_samples_and_scores_as_its_checkpoint_does(place):
    new_python("export", "runs/first", "--out", "exported", "--no-verify", folder=place)
    text, scores = {}, {}
    for source in ("runs/first", "exported"):
        out = run("sample", source, "--prompt", "word", "--num-samples", 3, folder=place)
        text[source] = out.partition("--- sample 1")[2].partition("tokens in")[0]
        layout = ["--ranks", 2, "--tensor", 2] if source == "exported" else []
        run("eval", source, "data/validation", "--rows", 6, *layout, "--json", f"{source[:3]}.json",
            folder=place)  # fmt: skip
        scores[source] = [
            s["nats_per_token"] for s in json.loads((place / f"{source[:3]}.json").read_text())
        ]
    assert text["exported"] == text["runs/first"] != ""
    assert scores["exported"] == pytest.approx(scores["runs/first"], abs=1e-6)
    assert "step 6 (exported)" in out


def test_sample_fills_gaps_and_writes_the_same_rows_at_any_batch_and_layout(place):
    arguments = ("sample", "runs/first", "--infill", "document[[6]] is 3", "--num-samples", 3)
    for name, more in (
        ("one.jsonl", ["--batch", 3]),
        ("two.jsonl", ["--batch", 2, "--ranks", 2, "--tensor", 2]),
        ("pipe.jsonl", ["--batch", 1, "--ranks", 2, "--pipeline", 2]),
    ):
        run(*arguments, *more, "--out", name, folder=place)
    found = [(place / f"{n}.jsonl").read_text().splitlines() for n in ("one", "two", "pipe")]
    samples = [[json.loads(line)["text"] for line in lines] for lines in found]
    assert samples[0] == samples[1] == samples[2]
    assert all(text.startswith("document") and text.endswith(" is 3") for text in samples[0])
    assert len(set(samples[0])) > 1
    assert "exists" in run(*arguments, "--out", "one.jsonl", folder=place, code=3)
    assert "needed, but --ranks is 1: set --ranks 2" in run(
        *arguments, "--tensor", 2, folder=place, code=2
    )


def test_a_run_that_was_moved_has_its_tokenizer_with_it(place, tmp_path):
    shutil.copytree(place / "runs/first", tmp_path / "moved")
    words = ("--prompt", "document", "--num-samples", 1, "--seed", 3)
    moved = run("sample", "moved", *words, folder=tmp_path)
    stayed = run("sample", "runs/first", *words, folder=place)
    assert moved.split("--- ")[:2] == stayed.split("--- ")[:2]


def test_eval_says_which_split_and_takes_no_tokenizer_beside_one(place):
    out = run("eval", "runs/first", "data", "--rows", 2, folder=place, code=3)
    assert "name one split, such as data/train" in out
    words = ("data/validation", "--tokenizer", "nowhere.json", "--rows", 2)
    assert "--tokenizer nowhere.json applies only to raw text" in run(
        "eval", "runs/first", *words, folder=place, code=2
    )


def test_eval_says_what_to_do_about_a_tokenizer_of_another_size(place, tmp_path):
    given = small_tokenizer(tmp_path / "given.json", 280)
    words = ("runs/first", place / "text", "--tokenizer", given, "--rows", 2)
    out = run("eval", *words, folder=place, code=4)
    assert (
        "has 280 ids, but the model of" in out
        and "Use the tokenizer the model was trained with" in out
    )
    assert "set model.vocab_size" not in out


def test_the_tokens_of_another_tokenizer_are_not_taken_for_the_models(place):
    """The number of ids is the same, so nothing but the hash would tell."""
    (place / "text2").mkdir()
    for number in range(40):
        words = " ".join(f"other{(number * i) % 89} was {i % 5}" for i in range(1, 80))
        (place / f"text2/{number}.txt").write_text(f"page {number}\n{words}\n")
    run("data", "prepare", "text2", "--out", "data2", "--sequence-length", 32, "--vocab-size", 300,
        "--validation-fraction", 0.2, folder=place)  # fmt: skip
    out = run("eval", "runs/first", "data2/validation", "--rows", 2, folder=place, code=3)
    assert "made with another tokenizer" in out
    out = run("train", "run.yaml", "name=mixed", *SETTINGS, "data.validation={v: data2/validation}",
              folder=place, code=3)  # fmt: skip
    assert "made with another tokenizer" in out
    shutil.copytree(place / "runs/first", place / "runs/robbed")
    shutil.copy(place / "data2/tokenizer.json", place / "runs/robbed/tokenizer.json")
    run("sample", "runs/robbed", folder=place)  # the data folder still has the right tokenizer
    shutil.move(place / "runs/first", place / "runs/away")
    out = run("sample", "runs/robbed", folder=place, code=4)
    shutil.move(place / "runs/away", place / "runs/first")
    assert "is not the tokenizer that" in out


def test_bench_sample_compares_methods_under_a_judge(place):
    settings = [*SETTINGS, "train.micro_batch_rows=4", "objective.name=ar"]
    run("train", "run.yaml", "name=judge", *settings, folder=place)
    out = run("bench-sample", "runs/first", "runs/judge", "--judge", "runs/judge", "--rows", 3, "--batch",
              2, "--steps", 4, "--alpha-0", 1, "--alpha-0", 0, "--out", "front", folder=place)  # fmt: skip
    assert "judge perplexity" in out
    points = json.loads((place / "front/frontier.json").read_text())
    assert [p["method"] for p in points] == ["eso alpha_0=1", "eso alpha_0=0", "ar"]
    assert points[0]["evaluations"] <= 4 and points[2]["evaluations"] == 32
    assert all(p["judge_perplexity"] > 1 and 0 < p["entropy"] < 3.5 for p in points)
    assert (place / "front/frontier.png").stat().st_size > 5000
    refused = run("bench-sample", "runs/judge", "--judge", "runs/first", folder=place, code=2)
    assert "objective.name=eso" in refused
    run("export", "runs/first", "--out", "esolm", "--no-verify", folder=place)
    run("export", "runs/judge", "--out", "ar", "--format", "backbone", "--no-verify", folder=place)
    asked = ("bench-sample", "runs/first", "--rows", 3, "--steps", 4, "--alpha-0", 1)
    refused = run(*asked, "--judge", "esolm", folder=place, code=2)
    assert "trained with objective.name=eso" in refused
    found = []
    for judge in ("runs/judge", "ar"):  # the exported one also reads behind its mask
        run(*asked, "--judge", judge, "--out", "again", folder=place)
        found += json.loads((place / "again/frontier.json").read_text())
    assert found[0]["judge_perplexity"] == pytest.approx(found[1]["judge_perplexity"], rel=1e-4)
    # The second checkpoint and its steps are checked before the first one is sampled.
    refused = run("bench-sample", "runs/judge", "runs/first", "--rows", 1, "--steps", 33, folder=place,
                  code=2)  # fmt: skip
    assert "--num-steps 33 is more than the 32 tokens" in refused
    assert "tokens/s" not in refused


def test_bench_sample_keeps_what_was_measured_before_a_failure(tmp_path):
    point = Point("eso", 4, 4.0, 1.0, 8.0, 2.0, None, 1, 1)
    measured = iter([point])
    loaded = SimpleNamespace(replica=None, tokenizer=None)
    stand_ins = (
        (bench_module, "_checked", lambda *known, **numbers: [(None, 8, ["one", "two"])]),
        (model_loading, "load", lambda *path, **settings: loaded),
        (frontier, "measure", lambda *settings, **numbers: next(measured)),
    )
    with replaced(stand_ins), pytest.raises(StopIteration):
        bench_module.bench_sample([Path("run")], out=tmp_path / "new")
    assert json.loads((tmp_path / "new/frontier.json").read_text()) == [point.as_dict()]
    assert "| eso | 4 |" in (tmp_path / "new/frontier.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": -1}, "--rows -1"),
        ({"batch": 0}, "--batch 0"),
        ({"orders": 0, "metric": "likelihood"}, "--orders 0"),
        ({"orders": 4, "metric": "nelbo"}, "--orders 4 applies to the likelihood"),
        ({"repeats": 4, "metric": "likelihood"}, "--repeats 4 applies to the NELBO"),
        ({"eps": 0.1, "metric": "likelihood"}, "--eps 0.1 applies to the NELBO"),
        ({"eps": 2.0}, "noise_eps=2.0"),
        ({"json_file": Path(__file__) / "scores.json"}, "cannot write --json"),
        ({"json_file": ROOT}, "is a folder"),
    ],
    ids=[
        "rows",
        "batch",
        "orders",
        "no-bound",
        "no-nelbo",
        "no-times",
        "eps",
        "no-folder",
        "no-file",
    ],
)
def test_eval_refuses_what_is_wrong_before_it_looks_for_a_model(settings, message):
    with pytest.raises(UserError, match=message):
        evaluate(Path("no-checkpoint"), __file__, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"live": True}, "--live draws in a terminal"),
        ({"prompt": ["caf\udce9"]}, "--prompt .* not UTF-8"),
        ({"infill": "caf\udce9[[2]]"}, "--infill .* not UTF-8"),
    ],
)
def test_sample_refuses_what_is_wrong_before_it_looks_for_a_model(settings, message):
    with pytest.raises(ConfigError, match=message):
        sample(Path("no/such/run"), **settings)


def prepared_split(folder):
    (folder / "train").mkdir()
    (folder / "train/manifest.json").write_text("{}")
    return folder / "train"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_key": "body"}, "--text-key body applies only to records"),
        ({"tokenizer": Path("t.json")}, r"--tokenizer t\.json applies only to raw text"),
        ({"bad_documents": "skip"}, "--bad-documents skip applies only to raw text"),
        ({"bad_documents": "drop"}, "--bad-documents drop must be error or skip"),
    ],
)
def test_eval_refuses_options_of_raw_text_beside_a_prepared_split(tmp_path, settings, message):
    """It refuses them before it looks for a model."""
    with pytest.raises(ConfigError, match=message):
        evaluate(Path("no-checkpoint"), str(prepared_split(tmp_path)), **settings)


def test_eval_says_that_data_are_missing_whatever_options_are_given(tmp_path):
    with pytest.raises(DataError, match="no-data does not exist"):
        evaluate(tmp_path, str(tmp_path / "no-data"), tokenizer=Path("t.json"))


def test_a_text_key_beside_files_that_have_no_keys_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 9)
    given = small_tokenizer(tmp_path / "t.json", 280)
    shape = {"sequence_length": 8, "vocab_size": Tokenizer(given).vocab_size}
    TextRows(tmp_path / "a.txt", given, **shape)
    with pytest.raises(DataError, match="--text-key body names a key or column"):
        TextRows(tmp_path / "a.txt", given, **shape, text_key="body")


@pytest.mark.parametrize(
    ("objective", "given", "said"),
    [
        (ObjectiveConfig(), {"orders": 4, "repeats": 2, "eps": 0.1}, []),
        (ObjectiveConfig(), {}, []),
        (ObjectiveConfig(name="mdlm"), {"orders": 4, "repeats": 2, "eps": 0.1}, ["--orders 4"]),
        (ObjectiveConfig(name="bd3lm"), {"orders": 0}, []),
        (ObjectiveConfig(name="ar"), {"orders": 4}, ["--orders 4"]),
        (ObjectiveConfig(alpha_0=0), {"repeats": 2, "eps": 0.1}, ["--repeats 2", "--eps 0.1"]),
    ],
    ids=["eso", "nothing given", "mdlm", "no bound asked", "ar", "alpha_0 = 0"],
)
def test_eval_says_which_of_its_options_do_nothing_for_a_model(objective, given, said):
    lines = unused_options(objective, **{"orders": None, "repeats": None, "eps": None, **given})
    assert [line.partition(" does nothing: ")[0] for line in lines] == said


def test_eval_makes_the_folder_of_its_scores_first(tmp_path):
    with pytest.raises(CheckpointError, match="no-checkpoint"):
        evaluate(Path("no-checkpoint"), __file__, json_file=tmp_path / "new" / "scores.json")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


@pytest.mark.parametrize("name", ["ar", "mdlm", "bd3lm"])
def test_eval_takes_alpha_0_for_eso_alone(name):
    check_request(ObjectiveConfig(), ["nelbo"], 0.5)
    with pytest.raises(ConfigError, match=rf"--alpha-0 0\.5: .* objective\.name={name} has no"):
        check_request(ObjectiveConfig(name=name), ["nelbo"], 0.5)


def test_a_judge_scores_a_long_text_in_windows():
    """With a table of next-token probabilities, the windows sum to the whole text; none is too long."""
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))

    def model(ids):
        assert ids.shape[1] <= model.config.max_position_embeddings
        return SimpleNamespace(logits=logits[ids])

    model.config, model.device = SimpleNamespace(max_position_embeddings=5), torch.device("cpu")

    def tokenizer(text, return_tensors):
        return SimpleNamespace(input_ids=torch.tensor([[int(letter) for letter in text]]))

    judge, texts = hugging_face_judge(model, tokenizer), ["0123456012345", "01234", "01", "0"]
    expected, count = 0.0, 0
    for text in texts:
        for before, after in pairwise(text):
            expected -= float(logits[int(before)].log_softmax(dim=0)[int(after)])
            count += 1
    nats, found = judge(torch.zeros(1), texts)
    assert found == count
    assert nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("longest", [2, 3, 8])
def test_windows_score_every_token_once_with_half_a_window_before_it(longest):
    scored = []
    for begin, first, end in windows(20, longest):
        assert end - begin <= longest and 0 <= begin < first
        assert first - begin >= min(first, longest // 2)
        scored += range(first, end)
    assert scored == list(range(1, 20))


def test_a_judge_is_refused_for_rows_beyond_its_positions():
    config = RunConfig(objective=ObjectiveConfig(name="ar"), model=ModelConfig(max_length=128))
    replica = SimpleNamespace(config=config)
    our_judge(replica, longest=128)
    with pytest.raises(ConfigError, match=r"rows of 129 tokens .*model\.max_length=128"):
        our_judge(replica, longest=129)


def test_config_show_and_doctor_explain_themselves(place):
    out = run("config", "show", "run.yaml", *SETTINGS, "--ranks", 2, folder=place)
    assert "num_stack_rows = 12" in out
    assert "matmul bf16" in run("doctor", folder=place)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "data",
        "data prepare",
        "train",
        "eval",
        "sample",
        "export",
        "import",
        "inspect",
        "verify",
        "config show",
        "doctor",
    ],
)
def test_every_command_has_help_with_examples(command, tmp_path):
    out = run(*command.split(), "--help", folder=tmp_path)
    assert "megatron-eso" in out
    if command and " " in command:
        assert "Examples:" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_and_the_same_command_continues(place, number):
    name = f"stopped{int(number)}"
    arguments = (
        "train",
        "run.yaml",
        f"name={name}",
        "parallel.local_ranks=2",
        *SETTINGS,
        "train.steps=4000",
    )
    process = start(*arguments, folder=place)
    metrics = place / f"runs/{name}/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size > 0):
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    status = json.loads((place / f"runs/{name}/status.json").read_text())
    assert status["state"] == "stopped"
    stopped_at = status["step"]
    out = run(*arguments[:-1], f"train.steps={stopped_at + 2}", folder=place)
    assert f"step {stopped_at + 1}/{stopped_at + 2}" in out
    assert "finished" in out


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["data.sources=[{path: nowhere}]"], 3, "data prepare"),
        (["train.sequence_length=16"], 3, "rows of 32 tokens"),
        (["model.vocab_size=400"], 3, "vocabulary of 300"),
        (["model.hidden=3"], 2, "did you mean hidden_size"),
        (["parallel.tensor=3"], 2, "parallel.tensor=3"),
        (["name=first", "model.num_layers=3"], 2, "model.num_layers: 2 there, 3 asked"),
        (["optimizer.learning_rate=1e30", "optimizer.clip_grad_norm=0"], 5, "not finite"),
    ],
    ids=["no-data", "length", "vocabulary", "unknown-key", "layout", "other-run", "nan"],
)
def test_bad_input_is_a_message_that_says_what_to_change(place, overrides, code, message):
    out = run(
        "train",
        "run.yaml",
        f"name=bad{abs(hash(message))}",
        *SETTINGS,
        *overrides,
        folder=place,
        code=code,
    )
    assert message in out
    assert "Traceback" not in out


def test_a_set_up_that_fails_tells_our_job_script_why(place):
    """Without a status, the script would take the ranks for crashed and restart them again and again."""
    words = ("train", "run.yaml", *SETTINGS, "data.sources=[{path: nowhere}]")
    attempt = {"SLURM_JOB_ID": "5", "MEGATRON_ESO_ATTEMPT": "5.0"}
    run(*words, "name=job", folder=place, code=3, environment=attempt)
    status = json.loads((place / "runs/job/status.json").read_text())
    assert status["state"] == "failed" and "data prepare" in status["reason"]
    run(*words, "name=here", folder=place, code=3)
    assert not (place / "runs/here/status.json").exists()


def test_a_missing_checkpoint_is_a_message(place):
    assert "does not exist" in run("sample", "runs/none", folder=place, code=4)


def test_a_layout_that_does_not_fit_the_model_is_a_message(place):
    out = run("eval", "runs/first", "data/validation", "--tensor", 3, folder=place, code=2)
    assert "not divisible by parallel.tensor=3" in out
    assert "--ranks" in out
    assert "Traceback" not in out
