"""Submit a run: check, ask Slurm, snapshot, submit. A refused submission leaves no new run folder."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_eso.config import check_start
from megatron_eso.config.derive import total_steps
from megatron_eso.config.load import as_literal, load_config, load_run, to_yaml
from megatron_eso.config.schema import CheckpointConfig, RunConfig
from megatron_eso.errors import ClusterError
from megatron_eso.launch import slurm
from megatron_eso.launch.exclude import exclusions
from megatron_eso.launch.mounts import mounts_of
from megatron_eso.launch.profile import ClusterProfile, minutes_of
from megatron_eso.launch.records import Records
from megatron_eso.launch.script import ARRAY_OUTPUT, Job, identity, render

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Plan:
    """A checked submission."""

    config: RunConfig
    profile: ClusterProfile
    job: Job
    script: str
    tasks: list[RunConfig]
    """The run, or the run of each task of an array."""

    @property
    def folders(self) -> list[Path]:
        """The folder of each of ``tasks``."""
        run = self.job.run
        return [run] if self.job.sweep is None else [run / str(i) for i in range(len(self.tasks))]


def prepare(
    config_path: Path,
    overrides: list[str],
    profile: ClusterProfile,
    sweep: list[list[str]] | None = None,
) -> Plan:
    """Return what would be submitted, after every check that does not need Slurm.

    Raises:
        ConfigError: if a setting is wrong or does not fit the number of ranks.
        ClusterError: if the nodes do not see the folder, or cannot use it.
    """
    import shlex

    ranks = profile.nodes * profile.tasks_per_node
    config = load_run(config_path, overrides)
    every = [load_config(config_path, [*overrides, *one]) for one in sweep or [[]]]
    for one in every:
        check_start(one, ranks)
    run = Path(os.path.abspath(config.folder))
    shared = [os.path.abspath(folder) for folder in profile.shared_folders]
    if shared and not any(run.is_relative_to(folder) for folder in shared):
        raise ClusterError(
            f"folder={run} is not on a file system that the nodes of {profile.name} see "
            f"({', '.join(shared)}); set folder= to a place below one of them"
        )
    if not shared and _file_system(run) in ("tmpfs", "ramfs"):
        raise ClusterError(
            f"folder={run} is on a {_file_system(run)}, memory of this machine that no other node sees: "
            "set folder= to a shared file system, or name it in cluster.shared_folders"
        )
    config = replace(config, folder=str(run), checkpoint=_to_go_on(config, run))
    lines = None
    if sweep is not None:
        lines = [
            " ".join(shlex.quote(word) for word in [f"folder={_quoted_value(run / str(i))}", *one])
            for i, one in enumerate(sweep)
        ]
    job = Job(config.name, run, Path.cwd(), sweep=lines)
    container = profile.container
    if container.runtime != "none":
        more = mounts_of(every, container.mounts, [run, Path.cwd()])
        container = replace(container, mounts=[*container.mounts, *more])
        profile = replace(profile, container=container)
    return Plan(config, profile, job, render(profile, job), every)


def _to_go_on(config: RunConfig, run: Path) -> CheckpointConfig:
    """Return the checkpoint settings of the job: an attempt continues from what earlier ones saved.

    Raises:
        ClusterError: if the run must start from scratch (resume=never) and already holds checkpoints.
    """
    if config.checkpoint.resume == "never" and any(run.glob("**/checkpoints/step_*")):
        raise ClusterError(
            f"folder={run} holds checkpoints and checkpoint.resume=never; choose another folder or "
            "checkpoint.resume=auto"
        )
    return replace(config.checkpoint, resume="auto")


def test_only(plan: Plan) -> str:
    """Return Slurm's estimate of the start, without submitting anything.

    Raises:
        ClusterError: if the cluster could never run the job.
    """
    _check_partition(plan.profile)
    return slurm.command("sbatch", "--test-only", *_arguments(plan, throttle=0, chdir=False),
                         stdin=plan.script).strip()  # fmt: skip


def submit(plan: Plan, *, throttle: int = 0) -> str:
    """Submit and return the job id.

    Raises:
        ClusterError: if the run has a live job, or Slurm refuses.
    """
    run, records = plan.job.run, Records(plan.job.run)
    _refuse_live_job(run)
    test_only(plan)
    existed = run.exists()
    with records.submit_lock():
        try:
            _refuse_live_job(run)  # another submit may have finished since the first look
            _snapshot(plan)
            job = slurm.command("sbatch", "--parsable", *_arguments(plan, throttle=throttle),
                                str(records.script)).strip().split(";")[0]  # fmt: skip
        except BaseException:
            if not existed:
                shutil.rmtree(run, ignore_errors=True)
            raise
    facts = {"profile": plan.profile.name, "nodes": plan.profile.nodes,
             "boot_minutes": plan.profile.boot_minutes,
             "command": sys.argv, "submit_folder": str(plan.job.submit_folder)}  # fmt: skip
    tasks = plan.folders if plan.job.sweep is not None else []
    records.set_submission(job=job, num_tasks=len(tasks), **facts)
    for task in tasks:
        Records(task).set_submission(job=f"{job}_{task.name}", **facts)
    return job


def _refuse_live_job(run: Path) -> None:
    live = live_job(run)
    if live:
        raise ClusterError(
            f"job {live.job} ({live.state}) already works on {run}; `megatron-eso status` shows it, "
            "`megatron-eso cancel` ends it"
        )


def live_job(run: Path) -> slurm.QueuedJob | None:
    """Return the job in the queue that works on a run folder, or None."""
    for job in slurm.queue():
        if job.run == Path(os.path.realpath(run)):
            return job
    known = Records(run).submission().get("job")
    return next(iter(slurm.queue(job=known)), None) if known else None


def _check_partition(profile: ClusterProfile) -> None:
    groups = slurm.parse_nodes(slurm.command("sinfo", "-ah", "-o", slurm.SINFO_FORMAT))
    names = sorted({group.partition for group in groups})
    if not profile.partition:
        return
    mine = [group for group in groups if group.partition in profile.partition.split(",")]
    if not mine:
        raise ClusterError(
            f"partition={profile.partition} does not exist; this cluster has {', '.join(names)}"
        )
    most = max(group.gpus for group in mine)
    if profile.gpus_per_node > most:
        raise ClusterError(
            f"gpus_per_node={profile.gpus_per_node}, but nodes of partition {profile.partition} have "
            f"at most {most}; lower gpus_per_node and tasks_per_node, or choose another partition"
        )
    wanted = profile.nodes + profile.survival.spare_nodes
    number = sum(group.num_nodes for group in mine)
    if wanted > number:
        raise ClusterError(
            f"nodes={profile.nodes} and survival.spare_nodes={profile.survival.spare_nodes} make "
            f"{wanted}, but partition {profile.partition} has {number} nodes; lower them"
        )
    limit = mine[0].time_limit
    if limit != "infinite" and minutes_of(profile.time_limit) > minutes_of(limit):
        raise ClusterError(
            f"time_limit={profile.time_limit} is longer than the {limit} that partition "
            f"{profile.partition} allows; the job requeues itself, so a shorter limit is fine"
        )


def _arguments(plan: Plan, *, throttle: int, chdir: bool = True) -> list[str]:
    """Return the sbatch options that carry the user's names; no shell reads them."""
    arguments = identity(plan.job)
    if chdir:
        arguments.append(f"--chdir={plan.job.run}")
        profile = plan.profile
        nodes, said = exclusions(
            Records(plan.job.run), partition=profile.partition,
            need=profile.nodes + profile.survival.spare_nodes, always=profile.excluded(),
        )  # fmt: skip
        if said:
            print(said, file=sys.stderr)
        if nodes != profile.excluded():
            arguments.append(f"--exclude={nodes}")
    if plan.job.sweep is not None:
        limit = f"%{throttle}" if throttle else ""
        arguments.append(f"--array=0-{len(plan.job.sweep) - 1}{limit}")
        arguments.append(f"--output={ARRAY_OUTPUT}")
    return arguments


def _file_system(path: Path) -> str:
    """Return the type of the file system a path is on, or would be on; '' where /proc does not tell."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts:
        words, _, about = line.partition(" - ")
        if words.split()[2] == number:
            return about.split()[0]
    return ""


def _snapshot(plan: Plan) -> None:
    """Write configuration, script, code and commit into the run folder."""
    Records(plan.job.run).set_snapshot(
        config=to_yaml(plan.config), profile=to_yaml(plan.profile), script=plan.script,
        commit=_git("rev-parse", "HEAD") + _git("diff", "HEAD"), package=_PACKAGE,
    )  # fmt: skip
    survival = plan.profile.survival
    for folder, task in zip(plan.folders, plan.tasks, strict=True):
        records = Records(folder)
        records.clear_stop()
        records.set_state(
            total_steps=total_steps(task),
            without_progress=0,
            max_attempts=survival.max_attempts_without_progress,
            bad_node_hours=survival.bad_node_hours,
            exclude=plan.profile.excluded(),
        )


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=_PACKAGE, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _quoted_value(path: Path) -> str:
    """Return a path as a quoted YAML string for an override, so that no character has a special meaning."""
    return "'" + as_literal(str(path)).replace("'", "''") + "'"
