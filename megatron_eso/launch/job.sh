# ----- below this line every job is the same text: megatron_eso/launch/job.sh -----
# No `set -e`: the script must live to decide about the requeue.
set -uo pipefail
started=$(LC_ALL=C date +%s.%N) # EPOCHREALTIME: not before bash 5, and with the locale's decimal sign
ATTEMPT="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export MEGATRON_ESO_ATTEMPT="$ATTEMPT" PYTHONPATH="$CODE" PYTHONSAFEPATH=1
export SLURM_EXPORT_ENV=ALL # whatever sbatch's --export was, ranks get this script's environment
# The bare number of an array's last task is the whole array's to Slurm.
THIS_TASK=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
THIS_TASK=${THIS_TASK:-$SLURM_JOB_ID}
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
say() { echo "[job $ATTEMPT $(date +%H:%M:%S)] $*"; }
helper() { "$HOST_PYTHON" -m megatron_eso.launch.attempt "$@" --run "$RUN" --attempt "$ATTEMPT"; }

# TERM to this script means that Slurm has decided (scancel, limit, preemption's end, node failure):
# requeueing here would bring a cancelled job back. In a preemption's grace only the ranks get TERM.
# USR1 comes before the time limit and goes on to srun. Never send srun TERM: it kills the ranks at once.
term=0 usr1=0 srun_pid=
trap 'term=1; say "TERM: the rest is up to Slurm"' TERM
trap 'usr1=1; say "USR1: save and stop"; [ -n "$srun_pid" ] && kill -USR1 "$srun_pid"' USR1

requeue() { # $1: requeue or requeuehold; $2: nodes to exclude
    trap '' TERM # the children ignore it too: Slurm ends this script while they run
    if [ "$REQUEUE" = chain ] && [ "$1" = requeue ]; then
        successor=$(sbatch --parsable --dependency="afterany:$THIS_TASK" "${CHAIN_OPTIONS[@]}" \
            ${2:+--exclude="$2"} "$JOB_SCRIPT") || { say "sbatch refused the successor"; exit 1; }
        helper chained --job "$successor"
        say "successor: job $successor"
        exit 0
    fi
    [ "$REQUEUE" = requeue ] || { say "no requeue on this cluster; submit again to continue"; exit 1; }
    scontrol "$1" "$THIS_TASK" || { say "Slurm refused to requeue; submit again to continue"; exit 1; }
    scontrol update jobid="$THIS_TASK" excnodelist="${2:-}" # empty: those of before may come back
    sleep 300 & # Slurm ends this script now
    wait $!
    exit 1
}
act() { # a decision of the helper: done | leave | requeue [NODES] | hold [NODES]
    say "decision: $*"
    case ${1:-} in
    done) exit 0 ;;
    requeue) requeue requeue "${2:-}" ;;
    hold) requeue requeuehold "${2:-}" ;;
    *) exit 1 ;;
    esac
}

"$HOST_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "host_python $HOST_PYTHON must be Python 3.11 or newer; set cluster.host_python"
    exit 1
}
cd "$SUBMIT_FOLDER" || { say "the node cannot see $SUBMIT_FOLDER"; exit 1; }
# The order of the ranks' nodes is the topology's: Slurm's own, or a site's file (one line a node or a task).
mapfile -t hosts < <(if [ -n "${SLURM_HOSTFILE:-}" ]; then awk '!seen[$0]++' "$SLURM_HOSTFILE"; else scontrol show hostnames "$SLURM_JOB_NODELIST"; fi)
has_order=${SLURM_HOSTFILE:+1}
unset SLURM_HOSTFILE
all_hosts=$(IFS=,; echo "${hosts[*]}")
say "nodes $all_hosts"
begun=$(helper begin --nodes "$all_hosts" --started "$started") || { say "cannot begin"; exit 1; }
[ "$begun" = go ] || act "$begun"

# The network plugin's libraries, set inside the container.
# shellcheck disable=SC2016
library_script='
[ -z "${RANK_LIBRARY_PATH:-}" ] || export LD_LIBRARY_PATH=$RANK_LIBRARY_PATH${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
'
prepare_ranks() { # network and container of what srun starts next
    set_network || {
        choice=$(helper unfit --nodes "${SLURMD_NODENAME:-$(hostname -s)}" \
            --why "no $network_file: $network_lacks") || exit 1
        # shellcheck disable=SC2086
        act $choice
    }
    set_container
}
measure_pairs() { # all-reduces between neighbours, in the ranks' own container and network
    prepare_ranks
    timeout --kill-after=10 "$HEALTH_TIMEOUT" srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
        --ntasks-per-node=1 --kill-on-bad-exit=0 "${SRUN_ARGUMENTS[@]}" "${CONTAINER[@]}" \
        bash -c "$library_script exec \"\$@\"" pair "${WRAP[@]}" "$PYTHON" -m megatron_eso.parallel.pair_bandwidth \
        --run "$RUN" --attempt "$ATTEMPT" --nodes "$all_hosts" --port "$((20000 + SLURM_JOB_ID * 13 % 10000))"
}

choose_nodes() { # sets chosen; sick nodes stay out
    chosen=$all_hosts
    local network_check=()
    [ "$TRAIN_NODES" = 1 ] || [ -z "$network_file" ] ||
        network_check=(--file="$network_file" --file-lacks="$network_lacks")
    if [ "$HEALTH" = 1 ]; then
        rm -rf "$RUN/slurm/health/$ATTEMPT" # of the round before: a node that is silent now was well then
        timeout --kill-after=10 "$HEALTH_TIMEOUT" srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
            --ntasks-per-node=1 --kill-on-bad-exit=0 \
            "$HOST_PYTHON" -m megatron_eso.launch.health --run "$RUN" --attempt "$ATTEMPT" "${HEALTH_ARGUMENTS[@]}" "${network_check[@]}"
    fi
    [ "$HEALTH" = 0 ] || [ "$MIN_PAIR_SPEED" = 0 ] || [ "${#hosts[@]}" = 1 ] || measure_pairs
    choice=$(helper choose --nodes "$all_hosts" --need "$TRAIN_NODES" --checked "$HEALTH" \
        --min-gb-per-second "$MIN_PAIR_SPEED") || { say "cannot choose nodes"; exit 1; }
    read -r verb chosen <<<"$choice"
    # shellcheck disable=SC2086
    [ "$verb" = run ] || { [ "$term" = 1 ] && exit 1; act $choice; }

    rank_0_host=${chosen%%,*}
    MASTER_ADDR=$rank_0_host # a name that does not resolve: the address that Slurm knows
    getent hosts "$MASTER_ADDR" >/dev/null ||
        MASTER_ADDR=$(scontrol show node -o "$rank_0_host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    # Another port each time: a socket of the ranks before may linger.
    export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} + in_job * 1009) % 10000))
    prepare_ranks
}

# One rank. Exit code 75 (stopped with a checkpoint) becomes 0: srun would take it for a failure and
# kill the ranks that are still saving. Signals are ignored until the trainer catches them (it would
# die of them), and repeated, so that one that came too early is not lost.
# shellcheck disable=SC2016
rank_script=$library_script'
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
(trap "" TERM USR1; exec "$@") & pid=$!
pass_on() { while kill -s "$1" "$pid" 2>/dev/null; do sleep 5; done & }
trap "pass_on TERM" TERM; trap "pass_on USR1" USR1
if [ "${POLL_METADATA:-0}" = 1 ] && [ "$LOCAL_RANK" = 0 ]; then
    "$RANK_PYTHON" -m megatron_eso.launch.metadata --pid "$pid" --run "$RANK_RUN" &
fi
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
wait "$pid"; code=$?
[ "$code" = 75 ] && code=0
exit "$code"'
export POLL_METADATA RANK_PYTHON="$PYTHON" RANK_RUN="$RUN"
place_ranks() { # sets placement
    # Block after block of a node's CPUs: a task's are of one socket, as its GPU is, not dealt over both.
    placement=(--ntasks-per-node="$TASKS_PER_NODE" --nodelist="$chosen" --distribution=block:block)
    [ -n "$has_order" ] || return 0
    local file=$RUN/slurm/hosts.$ATTEMPT host task
    for host in ${chosen//,/ }; do
        for ((task = 0; task < TASKS_PER_NODE; task++)); do echo "$host"; done
    done >"$file"
    placement=(--distribution=arbitrary --nodelist="$file")
}
run_ranks() { # sets code
    code=1
    if [ "$usr1" = 0 ] && [ "$term" = 0 ]; then
        helper launching --nodes "$chosen"
        place_ranks
    fi
    if [ "$usr1" = 0 ] && [ "$term" = 0 ]; then # none came meanwhile
        srun --nodes="$TRAIN_NODES" --ntasks="$((TRAIN_NODES * TASKS_PER_NODE))" \
            "${placement[@]}" --kill-on-bad-exit=1 --wait=120 \
            "${SRUN_ARGUMENTS[@]}" "${CONTAINER[@]}" bash -c "$rank_script" rank "${WRAP[@]}" "${TRAIN[@]}" &
        srun_pid=$!
        while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid"; done # a trapped signal ends `wait` early
        wait "$srun_pid"
        code=$?
        srun_pid=
        for _ in 1 2 3; do sleep 1; done # a TERM that is on its way shall arrive
    fi
    say "ranks ended, srun's code $code"
}

# The ranks start again in this job after a fault, a few times; then the job is requeued.
in_job=0
while :; do
    choose_nodes
    run_ranks
    decision=$(helper end --nodes "$chosen" --code "$code" --term "$term" --usr1 "$usr1" \
        --in-job-left "$((IN_JOB_RESTARTS - in_job))" \
        --max-attempts "$MAX_ATTEMPTS" --bad-node-hours "$BAD_NODE_HOURS") || decision=leave
    [ "$decision" = again ] || break
    in_job=$((in_job + 1))
    say "decision: again, restart $in_job of $IN_JOB_RESTARTS in this job"
done
# shellcheck disable=SC2086
act $decision
