"""From a sweep file to a report, with a stand-in trainer that obeys a known law."""

import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from megatron_eso.cli.main import app as main_app
from megatron_eso.config import load_config
from megatron_eso.data.fits import unseen_data
from megatron_eso.data.manifest import Manifest
from megatron_eso.errors import ClusterError, ConfigError, DataError, UserError
from megatron_eso.scaling import commands
from megatron_eso.scaling.collect import collect, read_table, tensorboard_steps, write_table
from megatron_eso.scaling.doubts import doubts, why_diverged
from megatron_eso.scaling.grid import grid_table, make_grid
from megatron_eso.scaling.report import study_figure, write_report
from megatron_eso.scaling.runner import (
    read_metrics,
    read_state,
    run_cells,
    slurm_array_script,
    states_table,
    submit,
)
from megatron_eso.scaling.study import fit_study, recommendation, study_text

ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "configs" / "sweep" / "laptop.yaml"

# Writes what the trainer writes; the loss follows E + A / N^a + B / D^b in its own configuration.
STAND_IN = """
import json, sys, time, pathlib
from megatron_eso.config.load import load_config
from megatron_eso.plan.parameters import num_parameters
config = load_config(sys.argv[1], sys.argv[2:])
time.sleep(DELAY)
folder = pathlib.Path(config.folder); folder.mkdir(parents=True, exist_ok=True)
if FAIL in config.name: sys.exit(5)
tokens = config.train.steps * config.train.global_batch_rows * config.train.sequence_length
loss = 1 + 30 / num_parameters(config.model) ** 0.3 + 100 / tokens ** 0.3
lines = [{"step": s, "tokens": s, "loss": loss + 1 - s / config.train.steps, "seconds_per_step": 1.0}
         for s in (1, config.train.steps)]
(folder / "metrics.jsonl").write_text("\\n".join(map(json.dumps, lines)) + "\\n{cut off")
score = {"metric": "nelbo", "nats_per_token": loss, "standard_error": 0.01, "num_tokens": 100}
(folder / "evaluation.json").write_text(json.dumps({"v": [score]}))
(folder / "status.json").write_text(json.dumps({"state": "finished"}))
with open(folder / "starts", "a") as starts: starts.write("x")
"""


def trainer(tmp_path, *, fail="nothing", delay=0.0) -> tuple[str, ...]:
    script = tmp_path / "trainer.py"
    script.write_text(STAND_IN.replace("FAIL", repr(fail)).replace("DELAY", str(delay)))
    return (sys.executable, str(script))


@pytest.fixture(autouse=True)
def package_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def grid(tmp_path, *overrides):
    sweep, cells = make_grid(LAPTOP, [f"folder={tmp_path}/sweep", *overrides])
    return Path(sweep.folder), cells


def one_cell(tmp_path, *overrides):
    """Return the folder and the cells of a grid that is made in no time."""
    one = ["models=['../model/ladder/s1.yaml']", "objectives=[{name: ar}]", "budgets=[5.0e10]"]
    return grid(tmp_path, *one, *overrides)


def test_every_cell_spends_its_budget_to_half_a_step(tmp_path):
    for cell in grid(tmp_path)[1]:
        per_step = cell.flops / cell.run.train.steps
        assert abs(cell.flops - cell.budget) <= 0.5 * per_step * 1.0001


def test_alpha_0_changes_what_a_token_costs(tmp_path):
    cells = {c.name: c for c in grid(tmp_path)[1]}
    cost = {n: c.flops / c.tokens for n, c in cells.items()}
    # At alpha_0 = 1 the head runs on half the entries; at 0.25 a row takes one and a half stack rows.
    assert cost["eso-1_s4_2e11"] < cost["ar_s4_2e11"] < cost["eso-0.25_s4_2e11"]


def test_rules_are_printed_beside_their_values(tmp_path):
    cells = grid(tmp_path)[1]
    first, table = next(cell.name for cell in cells if not cell.problems), grid_table(cells)
    assert f"rule of optimizer.learning_rate, {first}: " in table and "GPU hours" in table


def test_a_token_ladder_gives_tokens_by_parameters(tmp_path):
    _, cells = grid(tmp_path, "budgets=[]", "tokens_per_parameter=[20.0]")
    cell = cells[-1]
    assert cell.tokens == pytest.approx(20 * cell.num_parameters_without_embeddings, rel=0.01)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models=[]", "empty"),
        ("budgets=[1.0e11,1.0e11]", "duplicate"),
        ("budgets=[1.001e11,1.002e11]", "or budgets that differ in their first three digits"),
        ("budgets=[1.0]", "less than one; raise budgets or lower batch_rows"),
        ("tokens_per_parameter=[20.0]", "exactly one"),
        ("budgets=[1.0e11,-1.0]", "budgets .* positive and finite, not -1"),
        ("budgets=[.inf]", "positive and finite, not inf"),
        ("num_gpus=0", "num_gpus=0 must be at least 1"),
        ("batch_rows=0", "batch_rows=0 must be at least 1"),
        ("learning_rate.reference_parameters=0", "reference_parameters=0.0 must be positive"),
    ],
)
def test_bad_grids_are_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        grid(tmp_path, override)


def test_a_token_ladder_too_short_for_a_step_names_its_own_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"raise tokens_per_parameter or lower"):
        grid(tmp_path, "budgets=[]", "tokens_per_parameter=[1.0e-6]")


def test_illegal_cells_stay_with_their_reason(tmp_path):
    _, cells = grid(tmp_path, "budgets=[2.0e9,2.0e11]")
    illegal = [c for c in cells if c.problems]
    assert illegal and all("less than one" in c.problems[0] for c in illegal)
    assert "not run" in grid_table(cells)


def test_a_cell_trains_on_the_gpus_it_is_priced_for(tmp_path):
    for number in (1, 2):
        folder, [cell] = one_cell(tmp_path, f"num_gpus={number}")
        assert cell.run.parallel.local_ranks == number
    # Folders of sweeps from before, whose cells trained on one GPU whatever num_gpus said, still count.
    assert cell.fingerprint == one_cell(tmp_path)[1][0].fingerprint
    run_cells(folder, [cell], trainer=trainer(tmp_path), say=lambda line: None)
    stored = load_config(folder / "cells" / cell.name / "cell.yaml")
    assert stored.parallel.local_ranks == 2


def test_a_base_that_contradicts_num_gpus_is_refused(tmp_path):
    (tmp_path / "base.yaml").write_text(
        (LAPTOP.parent / "laptop_base.yaml").read_text() + "parallel: {local_ranks: 2}\n"
    )
    base = f"base={tmp_path}/base.yaml"
    assert one_cell(tmp_path, base, "num_gpus=2")[1][0].run.parallel.local_ranks == 2
    with pytest.raises(
        ConfigError, match="local_ranks=2, but the sweep trains each cell on num_gpus=4"
    ):
        one_cell(tmp_path, base, "num_gpus=4")


def test_a_base_without_a_decay_gives_cells_without_one(tmp_path):
    text = (LAPTOP.parent / "laptop_base.yaml").read_text()
    assert one_cell(tmp_path)[1][0].run.optimizer.min_learning_rate > 0
    (tmp_path / "base.yaml").write_text(text.replace("schedule: cosine", "schedule: constant"))
    _, [cell] = one_cell(tmp_path, f"base={tmp_path}/base.yaml")
    assert (cell.run.optimizer.min_learning_rate, cell.problems) == (0, ())


def test_a_base_without_held_out_rows_is_refused_before_anything_trains(tmp_path):
    text = (LAPTOP.parent / "laptop_base.yaml").read_text()
    (tmp_path / "base.yaml").write_text(
        text.replace("  validation:\n    stdlib: runs/data/stdlib256/validation\n", "")
    )
    with pytest.raises(ConfigError, match=r"base\.yaml: data\.validation"):
        one_cell(tmp_path, f"base={tmp_path}/base.yaml")


def test_objectives_that_differ_in_a_detail_are_named_by_it(tmp_path):
    listed = (
        "objectives=[{name: ar}, {name: eso, alpha_0: 0.5}, {name: eso, alpha_0: 0.25},"
        " {name: eso, alpha_0: 0.25, diffusion_fraction: 0.75}, {name: bd3lm, block_size: 4},"
        " {name: bd3lm, block_size: 8}]"
    )
    _, cells = one_cell(tmp_path, listed)
    assert [cell.objective for cell in cells] == [
        "ar", "eso-0.5", "eso-0.25-diffusion_fraction-null", "eso-0.25-diffusion_fraction-0.75",
        "bd3lm-block_size-4", "bd3lm-block_size-8",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="duplicate cells ar_"):
        one_cell(tmp_path, "objectives=[{name: ar}, {name: ar}]")


def test_finished_cells_are_kept_and_failed_ones_retried_to_the_limit(tmp_path):
    folder, cells = grid(tmp_path)
    cells = [c for c in cells if c.objective == "ar" and c.size in ("s1", "s2")]
    quiet = dict(workers=2, max_attempts=2, say=lambda line: None)
    states = run_cells(folder, cells, trainer=trainer(tmp_path, fail="s2_2e11"), **quiet)
    by_name = {s.cell.name: s for s in states}
    assert by_name["ar_s2_2e11"].state == "given-up" and by_name["ar_s2_2e11"].attempts == 2
    assert by_name["ar_s1_5e10"].state == "finished"
    run_cells(folder, cells, trainer=trainer(tmp_path), **quiet)
    assert (folder / "cells" / "ar_s1_5e10" / "run" / "starts").read_text() == "x"
    assert "given-up" in states_table(states)


def test_a_cell_that_failed_says_why_and_where_its_log_is(tmp_path):
    folder, cells = one_cell(tmp_path)
    script, said = tmp_path / "failing.py", []
    endings = [
        "print('error: all is bad:\\n  - this\\n\\n  - that')",
        "print('step 1'); print('Killed')",
    ]
    for ending in endings:
        script.write_text(f"{ending}\nraise SystemExit(5)\n")
        run_cells(
            folder, cells, trainer=(sys.executable, str(script)), max_attempts=1, say=said.append
        )
        [state] = run_cells(folder, cells, max_attempts=1, say=said.append)
        log = f"log: {folder}/cells/{cells[0].name}/log.txt"
        words = (
            ["error: all is bad:", "  - this", "  - that"] if ending == endings[0] else ["Killed"]
        )
        assert list(state.reason) == [*words, log]
        assert [f"    {line}" for line in state.reason] == states_table([state]).splitlines()[2:]
        assert f"    {words[-1]}" in said and f"    {log}" in said
        (folder / "cells" / cells[0].name / "attempts").unlink()  # and once more


def test_the_data_are_looked_at_once_before_any_cell_starts(tmp_path):
    """The laptop study's data lie in no temporary folder."""
    where = f"folder={tmp_path}/sweep"
    base = tmp_path / "base.yaml"
    base.write_text(
        (LAPTOP.parent / "laptop_base.yaml").read_text().replace("runs/data", "nowhere")
    )
    one = ["models=['../model/ladder/s1.yaml']", "objectives=[{name: ar}]", "budgets=[5.0e10]"]
    words = ["sweep", "run", str(LAPTOP), where, f"base={base}", *one, "--max-attempts", "1"]
    done = CliRunner().invoke(main_app, words)
    assert isinstance(done.exception, DataError), done.output
    said = str(done.exception)
    assert said.startswith(f"{base}: data.sources[0].path: ") and "data prepare" in said
    assert not list((tmp_path / "sweep").rglob("attempts")) and "start" not in done.output


def test_a_folder_whose_name_holds_an_interpolation_is_that_folder(tmp_path):
    folder, cells = one_cell(tmp_path, "folder=" + str(tmp_path) + r"/a\${name} and b\${")
    assert folder == tmp_path / "a${name} and b${"
    [state] = run_cells(folder, cells, trainer=trainer(tmp_path), say=lambda line: None)
    assert state.state == "finished" and (folder / "cells" / cells[0].name / "run/starts").exists()


def test_a_vocabulary_that_is_not_the_datas_names_the_models_that_have_it(tmp_path):
    """Of the base, which the data are named in, nothing is to be changed."""
    split, base = tmp_path / "split", tmp_path / "base.yaml"
    split.mkdir()
    Manifest(
        split="train", tokenizer_file="t.json", tokenizer_sha256="a", vocab_size=300, sequence_length=256,
        dtype="uint16", packing="packed", end_of_document_id=0, num_samples=9, num_tokens=9,
        num_documents=1, text_bytes=9, num_skipped=0, num_shards=1, index_sha256="b",
    ).save(split)  # fmt: skip
    text = (LAPTOP.parent / "laptop_base.yaml").read_text()
    base.write_text(re.sub(r"runs/data/stdlib256/\w+", str(split), text))
    for name, size in (("small", "300"), ("s1", "2048"), ("s2", "2048")):
        text = (ROOT / "configs/model/ladder/s1.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("2048", size))
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"folder: {tmp_path}/sweep\nbase: base.yaml\nmodels: [small.yaml, s1.yaml, s2.yaml]\n"
        "objectives: [{name: ar}]\nbudgets: [5.0e10]\nhardware: cpu\nnum_gpus: 1\n"
    )
    for start in (
        partial(commands.run, sweep, None, 1, 2, None, say=print),
        partial(commands.submit_array, sweep, None, 1, 2, 8, []),
    ):
        with pytest.raises(DataError) as caught:
            start(look=unseen_data)
        said = str(caught.value)
        assert said.startswith(f"{base}: data.sources[0].path: {split} has a vocabulary of 300")
        assert said.endswith(f"model.vocab_size=2048 is of s1.yaml, s2.yaml (models in {sweep})")


def test_only_the_data_of_cells_that_are_to_run_are_looked_at(tmp_path):
    folder, cells = one_cell(tmp_path)
    looked = []
    for _ in range(2):
        run_cells(
            folder, cells, trainer=trainer(tmp_path), say=lambda line: None, look=looked.append
        )
    assert looked == [[cells[0].run], []]


def test_an_array_is_submitted_after_a_look_at_its_data(tmp_path):
    def look(runs):
        raise DataError(f"{len(runs)} runs have no data")

    with pytest.raises(DataError, match=r"laptop_base\.yaml: 36 runs have no data"):
        commands.submit_array(LAPTOP, None, 1, 2, 8, [], look=look)


ENDINGS = {
    "Ctrl-C": None,
    "stopped with a checkpoint": "sys.exit(75)",
    "a kill": "os.kill(os.getpid(), signal.SIGTERM)",
    "stopped, but not cleanly": "(run / 'status.json').write_text('{\"state\": \"stopped\"}'); sys.exit(1)",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_an_interrupted_cell_goes_on_however_often(tmp_path, ending):
    folder, cells = one_cell(tmp_path)
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "run = pathlib.Path(sys.argv[1]).parent / 'run'; run.mkdir(exist_ok=True)\n"
        + (ending or "time.sleep(60)")
    )

    said = []

    def interrupt(line):
        said.append(line)
        if not ending and line.startswith("start"):
            raise KeyboardInterrupt

    for _ in range(2):
        quiet = dict(max_attempts=1, trainer=(sys.executable, str(script)), say=interrupt)
        if ending:
            assert run_cells(folder, cells[:1], **quiet)[0].state == "stopped"
        else:
            with pytest.raises(KeyboardInterrupt):
                run_cells(folder, cells[:1], **quiet)
            assert said[-1] == "interrupted: 1 cell(s) save and end; the same command continues"
        assert read_state(folder, cells[0], max_attempts=1).state == "stopped"
    failing = trainer(tmp_path, fail=cells[0].name)  # a fault of its own still counts
    quiet = dict(max_attempts=1, say=lambda line: None)
    assert run_cells(folder, cells[:1], trainer=failing, **quiet)[0].state == "given-up"


def test_a_cell_whose_runner_died_with_it_is_not_given_up(tmp_path):
    folder, cells = one_cell(tmp_path)
    own = folder / "cells" / cells[0].name
    own.mkdir(parents=True)
    (own / "attempts").write_text("2026-11-27T09:00:00\n" * 3)
    assert read_state(folder, cells[0], max_attempts=2).state == "stopped"


@pytest.mark.parametrize(
    "age, status, state",
    [
        pytest.param(0, '{"state": "running"}', "running", id="fresh"),
        pytest.param(3600, '{"state": "running"}', "stopped", id="silent for an hour"),
        pytest.param(0, '{"state": "stopped"}', "stopped", id="says that it stopped"),
    ],
)
def test_a_cell_on_another_machine_is_judged_by_its_files(
    tmp_path, monkeypatch, age, status, state
):
    folder, cells = one_cell(tmp_path)
    own = folder / "cells" / cells[0].name
    (own / "run").mkdir(parents=True)
    changed = time.time() - age
    for name, text in (
        ("attempts", "2026-11-27T09:00:00\n"),
        ("pid", "3999999\nelsewhere\n17.0\n"),
        ("run/status.json", status),
    ):
        (own / name).write_text(text)
        os.utime(own / name, (changed, changed))
    assert read_state(folder, cells[0]).state == state
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # the job that Slurm has started again, here
    assert read_state(folder, cells[0]).state == "stopped"


def test_a_running_cell_says_where_it_runs(tmp_path):
    folder, cells = one_cell(tmp_path)
    said = []

    def look(line):
        if line.startswith("start"):
            said.append((folder / "cells" / cells[0].name / "pid").read_text().split())

    run_cells(folder, cells[:1], trainer=trainer(tmp_path), say=look)
    assert said[0][1] == platform.node()
    assert not (folder / "cells" / cells[0].name / "pid").exists()


@pytest.mark.parametrize("name", ["a #1", "a: b", "[a", "a=b"])
def test_a_cell_runs_in_its_folder_whatever_its_name_means_in_yaml(tmp_path, name):
    folder, cells = one_cell(tmp_path, f"folder='{tmp_path}/{name}'")
    run_cells(folder, cells, trainer=trainer(tmp_path), say=lambda line: None)
    assert folder.name == name
    assert (folder / "cells" / cells[0].name / "run" / "starts").read_text() == "x"


def test_a_changed_cell_is_noticed(tmp_path):
    folder, cells = grid(tmp_path)
    run_cells(folder, cells[:1], trainer=trainer(tmp_path), say=lambda line: None)
    changed = replace(
        cells[0], run=replace(cells[0].run, train=replace(cells[0].run.train, seed=9))
    )
    assert read_state(folder, changed).state == "changed"
    with pytest.raises(ConfigError, match="other settings"):
        run_cells(folder, [changed], trainer=trainer(tmp_path), say=lambda line: None)


def test_a_cell_whose_start_was_cut_off_before_it_was_one_is_to_be_started(tmp_path):
    """Its settings are nothing that it ran with."""
    folder, cells = one_cell(tmp_path)
    own = folder / "cells" / cells[0].name
    own.mkdir(parents=True)
    (own / "fingerprint").write_text("of other settings\n")
    assert read_state(folder, cells[0]).state == "waiting"
    [row], steps = collect(folder, cells)
    assert row["state"] == "waiting" and not steps
    [state] = run_cells(folder, cells, trainer=trainer(tmp_path), say=lambda line: None)
    assert state.state == "finished"


def test_the_settings_of_a_cell_are_written_before_their_fingerprint(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    folder, cells = one_cell(tmp_path)
    monkeypatch.setattr("megatron_eso.scaling.runner.save_config", fail)
    with pytest.raises(OSError, match="full"):
        run_cells(folder, cells, trainer=trainer(tmp_path), say=lambda line: None)
    assert not (folder / "cells" / cells[0].name / "fingerprint").exists()


def test_killing_the_runner_loses_no_finished_cell(tmp_path):
    folder, cells = grid(tmp_path)
    code = (
        "import sys; from pathlib import Path; from megatron_eso.scaling.grid import make_grid;"
        "from megatron_eso.scaling.runner import run_cells;"
        f"cells = make_grid(Path({str(LAPTOP)!r}), ['folder={tmp_path}/sweep'])[1][:6];"
        f"run_cells(Path({str(folder)!r}), cells, trainer={trainer(tmp_path, delay=0.3)!r})"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if sum(read_state(folder, c).state == "finished" for c in cells[:6]) >= 2:
            break
        time.sleep(0.05)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    kept = [c for c in cells[:6] if read_state(folder, c).state == "finished"]
    while any(read_state(folder, c).state == "running" for c in cells[:6]):
        time.sleep(0.05)  # the orphan finishes by itself and is not started twice
    states = run_cells(
        folder, cells[:6], max_attempts=3, trainer=trainer(tmp_path), say=lambda line: None
    )
    assert len(kept) >= 2 and all(s.state == "finished" for s in states)
    for cell in kept:
        assert (folder / "cells" / cell.name / "run" / "starts").read_text() == "x"


def test_a_slurm_array_has_a_task_per_legal_cell(tmp_path, monkeypatch):
    _, cells = grid(tmp_path)
    hostile = Path("a $(touch x) \"'sweep.yaml")
    script = slurm_array_script(
        hostile, cells, folder=tmp_path, throttle=4, extra=["--gpus-per-node=8"],
        workers=3, max_attempts=5,
    )  # fmt: skip
    words = shlex.split(script.splitlines()[-1])
    assert words[:6] == ["exec", sys.executable, "-m", "megatron_eso", "sweep", "run"]
    assert words[6] == str(hostile)
    assert words[7:] == ["--cell", "$SLURM_ARRAY_TASK_ID", "--workers", "3", "--max-attempts", "5"]
    assert f"{len(cells) - 1}%4" in script and "--cell" in script and "--gpus-per-node=8" in script
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="sbatch"):
        submit(tmp_path / "array.sbatch")


def test_a_study_goes_from_runs_to_a_page(tmp_path):
    folder, cells = grid(tmp_path)
    cells = [c for c in cells if c.objective == "ar"]
    run_cells(folder, cells, workers=2, trainer=trainer(tmp_path), say=lambda line: None)
    rows, steps = collect(folder, cells)
    paths = write_table(rows, tmp_path / "cells")
    assert len(steps) == 2 * len(cells)
    for path in paths:
        study = fit_study(read_table(path), budget=1e12)
    law = study.objectives[0].parametric
    assert max(map(abs, law.residuals)) < 0.01
    written = write_report(study, tmp_path / "report.html", note="A note <b>.")
    page = written[0].read_text()
    assert "data:image/png" in page and "&lt;b&gt;" in page and all(p.exists() for p in written)
    assert not re.search(r"<td>\d{10}", page)  # FLOPs that happen to be whole
    assert recommendation(study.objectives[0], 1e12) in study_text(study)


def row(size, budget, **changes):
    loss = 3 + 0.1 * abs(size - 2)
    base = {"cell": f"c{size}{budget}", "objective": "ar", "budget": budget, "parameters": 10.0**size,
            "tokens": budget / 6 / 10.0**size, "flops": budget, "loss": loss, "state": "finished",
            "data": "d", "vocab_size": 10, "sequence_length": 8, "steps_done": 1, "steps": 1}  # fmt: skip
    return base | changes


@pytest.mark.parametrize("key", ["vocab_size", "sequence_length", "data"])
def test_runs_that_do_not_compare_are_refused(key):
    with pytest.raises(DataError, match=key):
        fit_study([row(1, 1e9), row(2, 1e9, **{key: "other"})])


def test_unfinished_and_diverged_cells_are_left_out_and_make_it_provisional():
    rows = [row(s, b) for s in (1, 2, 3, 4) for b in (1e9, 2e9, 3e9)]
    rows += [row(5, 1e9, state="failed"), row(5, 2e9, state="diverged")]
    study = fit_study(rows)
    assert len(study.left_out) == 2
    assert any("2 cell(s) diverged" in reason for reason in study.objectives[0].provisional)
    assert "PROVISIONAL" in recommendation(study.objectives[0], 1e10)


def test_a_budget_that_is_refused_does_not_count_as_reached():
    rows = [row(size, budget) for size in (1, 2, 3) for budget in (1e9, 1e10)]
    rows += [row(size, 1e12, loss=3 - 0.1 * size + 0.001 * size**2) for size in (1, 2, 3)]
    fit = fit_study(rows).objectives[0]
    assert [m.parameters is None for m in fit.minima] == [False, False, True]
    assert "400 times the largest budget with a minimum" in recommendation(fit, 4e12)


def test_why_there_is_no_recommendation_is_said_once_beside_the_refused_budgets():
    table = read_table(ROOT / "docs/scaling-laptop/cells.csv")
    ar = study_text(fit_study(table, budget=1e13)).partition("eso-1:")[0]
    assert "ar: no recommendation: " in ar and "provisional:" not in ar
    assert ar.count("(2.25 parameters) is outside the measured sizes") == 2


# Logged every tenth step by cells of the laptop study: at rates 1.8 and 2.2, then at its own.
DIVERGED = {
    "ar": [7.63, 11.97, 11.32, 12.12, 9.1, 11.2, 10.59, 12.17, 12.43, 8.3, 6.74, 6.61, 7.28, 6.83, 6.47,
           6.39, 6.47, 6.85, 6.24, 6.53, 6.34],
    "short": [7.63, 24.55, 14.01, 7.78, 7.68, 7.26, 6.74, 6.73, 8.01, 6.47, 6.54, 6.46],
    "eso": [7.55, 27.52, 11.58, 6.98, 6.85, 6.6, 6.86, 6.7, 6.8, 6.4, 6.6],
    "late": [7.6, 6.0, 5.0, 4.5, 4.2, 4.0, 3.9, 3.8, 3.8, 3.8, 5.2, 5.3, 5.24],
    "above a guess": [7.6, 7.9],
}  # fmt: skip
HEALTHY = {
    "stuck": [7.63, 6.96, 6.79, 6.58, 6.5, 6.6, 6.49, 6.52, 6.29, 6.39, 6.43, 6.37, 6.27, 6.33, 6.19,
              6.17, 6.15, 6.56, 6.03, 6.22, 6.07],
    "noisy": [7.5, 6.8, 6.3, 7.0, 6.1, 6.9, 5.6, 6.6, 6.2, 6.8, 6.79],
    "one outlier": [7.6, 9.9, 6.0, 5.5, 5.0, 4.8, 9.0],
    "two lines": [7.6, 5.0],
    "one line": [7.6],
    "none": [],
}  # fmt: skip


@pytest.mark.parametrize("losses", DIVERGED.values(), ids=DIVERGED)
def test_a_training_loss_that_rose_is_noticed_also_where_it_came_down_again(losses):
    assert "its training loss" in why_diverged(losses)
    assert why_diverged([3.0 + 0.01 * loss for loss in losses]) == ""  # within what is noise


@pytest.mark.parametrize("losses", HEALTHY.values(), ids=HEALTHY)
def test_a_training_loss_that_falls_with_noise_has_not_diverged(losses):
    assert why_diverged(losses) == ""


def test_a_cell_that_diverged_is_left_out_by_its_curve_though_it_finished(tmp_path):
    folder, [cell] = one_cell(tmp_path)
    run_cells(folder, [cell], trainer=trainer(tmp_path), say=lambda line: None)
    lines = [{"step": i + 1, "loss": loss} for i, loss in enumerate(DIVERGED["ar"])]
    metrics = folder / "cells" / cell.name / "run" / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, lines)))
    [found], _ = collect(folder, [cell])
    assert found["state"] == "diverged"
    assert found["remark"] == "its training loss rose to 12.17, above the 7.63 that it began with"
    with pytest.raises(
        DataError, match=r"state diverged at step 21 of \d+: its training loss rose"
    ):
        fit_study([found])
    with pytest.raises(DataError, match=rf"rate \(0.00887 here; .*--keep {cell.name} fits it too"):
        fit_study([found])
    fit_study([found], keep=[cell.name])


def badly(rows, cell, loss=5.24):
    """Return rows in which a cell, whose training went wrong, has another loss."""
    return [
        r | {"learning_rate": 1.0} | ({"loss": loss} if r["cell"] == cell else {}) for r in rows
    ]


def test_a_cell_worse_than_a_smaller_one_on_fewer_tokens_is_left_out_and_what_it_changes_said():
    rows = badly(law_rows((1e17, 1e18, 1e19)), "1e+194.0", 4.2)
    study = fit_study(rows)
    [fit] = study.objectives
    assert [r["cell"] for r in fit.doubtful] == ["1e+194.0"] and len(fit.rows) == len(rows) - 1
    assert fit.parametric and fit.parametric.E == pytest.approx(1.7, rel=0.01)
    assert fit.size_law and fit.with_doubtful and fit.with_doubtful.size_law
    assert fit.with_doubtful.size_law.at(1e20) < 0.9 * fit.size_law.at(1e20)
    assert "1 cell(s) are left out as doubtful" in fit.provisional
    said = study_text(study)
    assert "if 1e+194.0 took part:" in said
    assert (
        "left out: 1e+194.0: loss 4.2, but 1e+18" in said and "no more weights and tokens" in said
    )
    assert "learning rate (1 here; learning_rate in the sweep file); --keep 1e+194.0 fits" in said


def test_a_doubtful_cell_that_is_kept_is_fitted():
    rows = badly(law_rows((1e17,)), "1e+171.0", 9.0)
    assert len(fit_study(rows).objectives[0].rows) == 4
    study = fit_study(rows, keep=["1e+171.0"])
    assert len(study.objectives[0].rows) == 5 and not study.left_out


def test_a_cell_above_a_smaller_and_a_larger_one_of_its_budget_is_doubtful():
    """At the smallest budget no smaller model has fewer tokens."""
    rows = badly(law_rows((1e17, 1e18)), "1e+171.0", 9.0)
    found = {row["cell"]: why for row, why in zip(rows, doubts(rows), strict=True) if why}
    assert list(found) == ["1e+171.0"]
    assert "at the same budget a smaller model (1e+170.5: " in found["1e+171.0"]


def test_noise_of_seeds_and_other_objectives_raise_no_doubt():
    rows = law_rows((1e17, 1e18, 1e19))
    noisy = [r | {"loss": r["loss"] * (1 + 0.02 * (-1) ** i)} for i, r in enumerate(rows)]
    noisy += [r | {"objective": "mdlm", "loss": 2 * r["loss"]} for r in rows]
    assert not any(doubts(noisy))
    assert not any(doubts(read_table(ROOT / "docs/scaling-laptop/cells.csv")))
    unsure = [r | {"loss_error": 2.0} for r in badly(rows, "1e+192.0")]
    assert not any(doubts(unsure)) and any(doubts(badly(rows, "1e+192.0")))


def test_a_cell_hardly_better_than_token_frequencies_is_named_and_fitted():
    rows = [r | {"unigram_loss": 4.0} for r in law_rows((1e17, 1e18, 1e19))]
    [fit] = fit_study(rows).objectives
    above = [r["cell"] for r in rows if r["loss"] > 3.8]
    assert 0 < len(above) < len(rows) == len(fit.rows)
    [line] = [line for line in fit.provisional if "hardly better than token frequencies" in line]
    assert line.startswith(f"{len(above)} of {len(rows)} cells") and line.endswith(", ".join(above))


def test_a_cell_to_keep_that_is_not_there_is_refused_with_the_nearest():
    rows = law_rows((1e17, 1e18))
    with pytest.raises(
        ConfigError, match=r"--keep 1e\+172.00 is no cell of the table; near: 1e\+172.0"
    ):
        fit_study(rows, keep=["1e+172.00"])


def test_the_commands_name_and_draw_the_cells_that_are_left_out(tmp_path):
    write_table(badly(law_rows((1e17,)), "1e+171.0", 9.0), tmp_path / "cells")
    table, page = tmp_path / "cells.csv", tmp_path / "page.html"
    assert "left out: 1e+171.0" in commands.fit(table, None)
    assert "left out" not in commands.fit(table, None, ["1e+171.0"])
    commands.report(table, page, None, None)
    assert "left out: doubtful" in page.read_text()
    [axis] = [a for a in study_figure(fit_study(read_table(table))).axes if a.get_title() == "ar"]
    labels = axis.get_legend_handles_labels()[1]
    assert "left out: doubtful" in labels


def test_collect_names_the_cells_that_a_fit_will_leave_out(tmp_path):
    few = ["models=['../model/ladder/s1.yaml']", "objectives=[{name: ar}]"]
    folder, cells = grid(tmp_path, *few)
    run_cells(folder, cells, workers=2, trainer=trainer(tmp_path), say=lambda line: None)
    scores = folder / "cells" / cells[-1].name / "run" / "evaluation.json"
    found = {"metric": "likelihood", "nats_per_token": 9.0, "standard_error": 0.1, "num_tokens": 10}
    unigram = {"metric": "unigram of the training data", "nats_per_token": 6.0, "num_tokens": 10}
    scores.write_text(json.dumps({"v": [found, unigram]}))
    said = commands.collect(LAPTOP, [f"folder={folder}", *few], None, "lm loss").splitlines()
    wanted = (
        f"will be left out: {cells[-1].name}: loss 9, but {cells[-2].name}, with no more weights"
    )
    assert any(line.startswith(wanted) for line in said)
    assert any(line.startswith(f"{cells[-1].name} is hardly better than") for line in said)
    assert read_table(folder / "cells.csv")[-1]["unigram_loss"] == 6.0


def test_a_changed_cell_has_the_flops_of_the_settings_it_ran_with(tmp_path):
    folder, ran = one_cell(tmp_path)
    run_cells(folder, ran, trainer=trainer(tmp_path), say=lambda line: None)
    before = collect(folder, ran)
    _, changed = one_cell(tmp_path, "batch_rows=16", "learning_rate.reference=1.0e-3")
    cells, steps = collect(folder, changed)
    assert changed[0].name == ran[0].name and changed[0].run.train.steps < ran[0].run.train.steps
    assert steps == before[1]
    assert cells == [before[0][0] | {"state": "changed"}]


def law_rows(budgets):
    """Return cells that obey a law with a floor, around each budget's best size."""
    rows = []
    for budget in budgets:
        for share in (0.25, 0.5, 1.0, 2.0, 4.0):
            size = share * 0.1 * budget**0.5
            tokens = budget / (6 * size)
            loss = 1.7 + 400 / size**0.34 + 410 / tokens**0.28
            rows.append(
                row(1, budget, cell=f"{budget}{share}", parameters=size, tokens=tokens, loss=loss)
            )
    return rows


def test_a_far_extrapolation_stands_beside_the_law_with_a_floor():
    """The power law of the loss has none: its narrow interval leaves the truth out."""
    [fit] = fit_study(law_rows((1e17, 1e18, 1e19))).objectives
    assert fit.parametric and fit.parametric.is_determined and fit.size_law and fit.token_law
    size, tokens = fit.size_law.at(1e22), fit.token_law.at(1e22)
    truth = 1.7 + 400 / size**0.34 + 410 / tokens**0.28
    assert fit.loss_law and fit.loss_law.at(1e22) < truth - 0.2
    assert fit.parametric.at(size, tokens) == pytest.approx(truth, abs=0.02)
    said = recommendation(fit, 1e22)
    assert "1e+03 times the largest budget with a minimum" in said
    assert f"without a floor, {fit.parametric.at(size, tokens):.3g} by E + A/N^a" in said
    assert "largest budget" not in recommendation(fit, 4e19)


def test_an_axis_without_data_has_no_numbers_and_says_why():
    study = fit_study([row(s, 1e9, loss=2.0 + s) for s in (1, 2, 3)])
    empty = study_figure(study).axes[1:]
    said = [text.get_text() for axis in empty for text in axis.texts]
    assert said == ["no interior minimum", "no interior minimum", "fewer than 6 runs: not fitted"]
    assert not any(len(a.get_xticks()) + len(a.get_yticks()) for a in empty)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_each_row_of_the_figure_is_filled_whatever_the_number_of_objectives(number):
    names = [f"objective {i}" for i in range(number)]
    figure = study_figure(fit_study([row(s, 1e9, objective=n) for n in names for s in (1, 2, 3)]))
    figure.draw_without_rendering()
    places = [axis.get_window_extent() for axis in figure.axes]
    assert len(places) == number + 3 and all(axis.get_visible() for axis in figure.axes)
    assert [axis.get_title() for axis in figure.axes[:number]] == names
    middle = figure.bbox.height / 2
    for in_row in ([p for p in places if p.y0 > middle], [p for p in places if p.y1 < middle]):
        widths = [place.width for place in in_row]
        assert sum(widths) > 0.75 * figure.bbox.width and max(widths) < 1.2 * min(widths)
        assert min(widths) > 350  # of the 500 that a panel has in the longer row


@pytest.mark.parametrize("decades", [0.3, 0.6, 0.9, 1.5, 4], ids=lambda d: f"{d} decades")
def test_the_numbers_at_an_axis_can_be_read(decades):
    """None lies on its neighbour, and a loss is 6.35, not 6.35 x 10^0."""
    rows = [
        row(5 + decades * s / 4, b, loss=6.35 + 0.001 * (s - 1 - b / 2e10) ** 2 - 1e-13 * b)
        for s in range(5)
        for b in (1e10, 2e10, 3e10)
    ]
    figure = study_figure(fit_study(rows))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis, begin, end in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            low, high = axis.get_view_interval()
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            labels = [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
            texts = [label.get_text() for label in labels]
            assert len(labels) >= 2 and not any("times10^{0}" in text for text in texts), texts
            boxes = sorted((t.get_window_extent() for t in labels), key=lambda b: getattr(b, begin))
            gaps = [getattr(b, begin) - getattr(a, end) for a, b in pairwise(boxes)]
            assert min(gaps) > 0, texts


def test_whole_numbers_of_a_table_stay_whole(tmp_path):
    write_table([row(1, 1e9, state="failed", steps_done=7, steps=53)], tmp_path / "cells")
    with pytest.raises(DataError, match=r"state failed at step 7 of 53$"):
        fit_study(read_table(tmp_path / "cells.csv"))


def test_a_table_whose_rows_do_not_fit_its_head_is_refused_with_the_line(tmp_path):
    table = tmp_path / "cells.csv"
    for wrong in ("1,2,3", "1"):
        table.write_text(f"cell,loss\na,2.0\n{wrong}\n")
        with pytest.raises(DataError, match=r"line 3: \d values for 2 columns"):
            read_table(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops": "gone"}, "no column flops"),
        ({"state": "gone"}, "no column state"),
        ({"parameters": 0.0}, r"c2.*: parameters is 0\.0"),
        ({"parameters": None}, "c2.*: parameters is None"),
        ({"tokens": "many"}, "c2.*: tokens is 'many'"),
        ({"loss": float("inf")}, "c2.*: loss is inf"),
        ({"loss": -1.0}, "c2.*: loss is -1"),
        ({"budget": -1e9}, "c2.*: budget is -1"),
        ({"objective": None}, "c2.*: objective is None"),
        ({"loss_error": -0.1}, r"c2.*: loss_error is -0\.1"),
    ],
)
def test_a_table_of_ones_own_is_refused_with_the_cell_and_the_column(changes, message):
    rows = [row(1, 1e9), row(2, 1e9) | changes, row(3, 1e9)]
    if "gone" in changes.values():
        rows = [{k: v for k, v in r.items() if k not in changes} for r in rows]
    with pytest.raises(DataError, match=message):
        fit_study(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cells.csv", b"cell,loss\n\xff,2.0\n", "cannot be read"),
        ("cells.parquet", b"PAR1 but no more", "cannot be read"),
        ("sweep.yaml", b"name: mine", "a sweep's configuration, not its table; .*sweep collect"),
    ],
)
def test_a_file_that_is_no_table_is_a_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name)


def test_the_page_s_name_is_looked_at_before_the_fit(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "page.pdf", tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match="--out"):
            commands.report(tmp_path / "no_table.csv", out, None, None)


def test_of_a_study_that_was_never_run_nothing_is_written(tmp_path):
    few = [
        f"folder={tmp_path}/sweep",
        "models=['../model/ladder/s1.yaml']",
        "objectives=[{name: ar}]",
    ]
    with pytest.raises(DataError, match=r"steps\.csv: no run has logged"):
        commands.collect(LAPTOP, few, None, "lm loss")
    with pytest.raises(DataError, match="--tensorboard"):
        commands.collect(LAPTOP, few, tmp_path / "none", "lm loss")
    assert not list(tmp_path.iterdir())


def test_a_sweep_below_a_file_is_a_message(tmp_path):
    (tmp_path / "file").write_text("mine")
    few = [f"folder={tmp_path}/file/x", "models=['../model/ladder/s1.yaml']"]
    with pytest.raises(ConfigError, match=r"folder=.*file/x cannot be made"):
        commands.run(LAPTOP, few, 1, 2, None, say=print)


def test_a_tag_without_tensorboard_is_refused():
    done = CliRunner().invoke(main_app, ["sweep", "collect", str(LAPTOP), "--tag", "loss"])
    assert isinstance(done.exception, ConfigError) and "--tensorboard" in str(done.exception)


def test_a_folder_in_the_place_of_a_table_and_runs_that_are_not_there_are_called_so(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; give the table in it, .*/cells\.csv"):
        commands.fit(tmp_path, None)
    with pytest.raises(DataError, match=r"--tensorboard .*/none is not a folder"):
        commands.collect(LAPTOP, [f"folder={tmp_path}"], tmp_path / "none", "loss")


def test_a_note_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--note .*missing"):
        commands.report(tmp_path / "cells.csv", tmp_path / "r.html", None, tmp_path / "missing")


def test_counts_below_one_are_refused():
    for counts in ((0, 2, 8), (1, 0, 8), (1, 2, -1)):
        with pytest.raises(ConfigError, match="must be at least 1"):
            commands.submit_array(LAPTOP, None, *counts, [])


def test_nothing_finished_is_refused():
    with pytest.raises(DataError, match="none of 1"):
        fit_study([row(1, 1e9, state="failed")])


def test_the_later_line_of_a_restarted_run_counts(tmp_path):
    lines = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [line["loss"] for line in read_metrics(tmp_path)] == [5.0, 3.0]


def test_the_commands_run_without_torch(tmp_path):
    table = tmp_path / "cells.csv"
    write_table([row(s, b) for s in (1, 2, 3, 4) for b in (1e9, 2e9, 3e9)], tmp_path / "cells")
    for arguments in (["plan", str(LAPTOP)], ["fit", str(table)]):
        code = (
            "import sys; sys.modules['torch'] = None; from megatron_eso.cli.main import main;"
            f"sys.argv = ['megatron-eso', 'sweep', *{arguments!r}]; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr


def test_another_trainers_tensorboard_folders_are_read(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for run, factor in (("small", 1.0), ("deep/large", 0.5)):
        with SummaryWriter(str(tmp_path / "logs" / run)) as writer:
            for step in (10, 20):
                writer.add_scalar("lm loss", factor * 100 / step, step)
                writer.add_scalar("lr", 0.1, step)
    rows = tensorboard_steps(tmp_path / "logs", "lm loss")
    assert [(r["cell"], r["step"], r["loss"]) for r in rows] == [
        ("deep/large", 10, 5.0), ("deep/large", 20, 2.5), ("small", 10, 10.0), ("small", 20, 5.0),
    ]  # fmt: skip
    with pytest.raises(DataError, match="there are: lm loss, lr"):
        tensorboard_steps(tmp_path / "logs", "loss")


def test_a_token_ladder_has_no_curves_of_equal_flops(tmp_path):
    few = ["models=['../model/ladder/s1.yaml']", "objectives=[{name: ar}]"]
    folder, cells = grid(tmp_path, "budgets=[]", "tokens_per_parameter=[10.0, 20.0]", *few)
    run_cells(folder, cells, workers=2, trainer=trainer(tmp_path), say=lambda line: None)
    write_table(collect(folder, cells)[0], tmp_path / "cells")
    study = fit_study(read_table(tmp_path / "cells.csv"))
    assert all(not fit.minima and fit.size_law is None for fit in study.objectives)
    assert "a token ladder has no IsoFLOP curves" in study_text(study)
    assert study.budget == pytest.approx(4 * max(cell.flops for cell in cells))
    axes = study_figure(study).axes
    assert axes[0].get_title() == "ar  (token ladder)" and axes[0].has_data()
    write_report(study, tmp_path / "report.html")  # without a warning


def test_two_runners_share_a_grid_and_start_each_cell_once(tmp_path):
    folder, cells = grid(tmp_path, "models=['../model/ladder/s1.yaml']", "objectives=[{name: ar}]")
    slow, said = trainer(tmp_path, delay=1.0), []

    def run_all():
        run_cells(folder, cells, trainer=slow, say=said.append)

    threads = [Thread(target=run_all) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    assert all((folder / "cells" / c.name / "run" / "starts").read_text() == "x" for c in cells)
    assert any("another runner has it" in line for line in said)
    assert {read_state(folder, cell).state for cell in cells} == {"finished"}


@pytest.mark.parametrize(
    "words", [["--slurm", "--cell", "1"], ["--sbatch=--partition=gpu"], ["--throttle", "8"]]
)
def test_options_that_contradict_each_other_are_refused(words):
    done = CliRunner().invoke(main_app, ["sweep", "run", str(LAPTOP), *words])
    assert "--slurm" in str(done.exception) and done.exception.exit_code == 2


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_without_a_meaning_is_refused(tmp_path, budget):
    with pytest.raises(ConfigError, match="--budget"):
        commands.fit(tmp_path / "cells.csv", budget)
