# shellcheck shell=bash disable=SC2154
# What train.sbatch and sweep.sbatch have in common; both read it before env.sh. Nothing to edit here.

EXIT_STOPPED=75 # mltfr_dist/errors.py

# This job. The first task of an array shares its number with the whole array, and would speak for all.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# A field of this job as Slurm has it.
job_field() {
    scontrol show job "$job" | sed -n "s|^ *$1=||p"
}

cd "$(job_field WorkDir)" || exit # where it was submitted, or sbatch's --chdir; Slurm takes /tmp where a node lacks it
export logs=slurm-logs/$SLURM_JOB_ID/start${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"

# srun reads its options from here too, and what it finds may be those of the session that submitted this job: a mask
# of that session's cores, or memory a core beside memory a node, which it refuses. Steps have the job's memory and
# cores without. And with GPUs given to tasks, a rank would see one alone: rank i of a node takes its GPU i.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_MEM_PER_@}" \
    SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPU_BIND

# Where a site submits with --export=NONE, or one gives --export=NAME, srun is told the same, and
# would hide from its tasks what this script exports: where they meet, above all.
export SLURM_EXPORT_ENV=ALL

# Since Slurm 22.05 srun does not take --cpus-per-task from the job by itself: each task would be
# bound to one core.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# env.sh, and the interpreter that it describes as one program, `python`: `wrap` before `PYTHON`.
read_environment() {
    wrap=() srun_more=()
    set +u # modules and conda read variables that may not be set
    # shellcheck source=slurm/env.sh
    source "$repository/slurm/env.sh"
    set -u
    python=$PWD/$logs/python
    printf '#!/bin/sh\nexec %s "$@"\n' "$(printf '%q ' "${wrap[@]}" "$PYTHON")" >"$python"
    chmod +x "$python"
}

# Tasks on each node, one a line. Slurm writes 4, 4, 1 as "4(x2),1".
tasks_of_nodes() {
    local part
    for part in ${SLURM_TASKS_PER_NODE//,/ }; do
        [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]]
        for _ in $(seq "${BASH_REMATCH[3]:-1}"); do
            echo "${BASH_REMATCH[1]}"
        done
    done
}

# Where ranks meet, on the first node, where this script runs: the address of the interface that env.sh names, or the
# one by which Slurm knows the node.
meeting_address() {
    local first interface=${GLOO_SOCKET_IFNAME:-} address
    interface=${interface%%,*}
    if [[ ! $interface ]]; then
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        scontrol show node "$first" --oneliner | sed 's/.* NodeAddr=\([^ ]*\).*/\1/'
        return
    fi
    address=$(ip -oneline -4 address show dev "$interface" 2>/dev/null | sed -n '1s|.* inet \([^/ ]*\).*|\1|p') || true
    if [[ ! $address ]]; then
        echo "GLOO_SOCKET_IFNAME=$interface: $(hostname) has no IPv4 address there. \`ip -brief address\` lists" \
            "the interfaces; slurm/env.sh names the one between the nodes." >&2
        return 2
    fi
    echo "$address"
}

# A port on which nothing of this node listens, below those that connections are given by themselves.
free_port() {
    local port=$((16384 + RANDOM % 16384))
    while (: <"/dev/tcp/127.0.0.1/$port" || : <"/dev/tcp/$1/$port") 2>/dev/null; do
        port=$((16384 + RANDOM % 16384))
    done
    echo "$port"
}

# Wait for a process in the background; the first wait ends where a signal comes, whose trap sets `stopping`.
stopping=
code=0
wait_for() {
    wait "$1" || code=$?
    if [[ $stopping ]]; then
        code=0
        wait "$1" || code=$?
    fi
}

# The exit code is the highest of all tasks. Where one fails, srun asks the others to stop, and one that has only begun
# says so by its code: that of the failed one counts.
code_of_failure() {
    local own
    own=$(sed -n 's/.*Exited with exit code //p' "$logs/launcher.log" | grep -vx "$EXIT_STOPPED" | head -n 1) || true
    if [[ ! $stopping && $code == "$EXIT_STOPPED" && $own ]]; then
        code=$own
    fi
}

# End the job with the exit code; where it was asked to stop and has saved, put it back into the queue first.
finish() {
    echo "$(date --iso-8601=seconds) ended with exit code $code; logs: $logs"
    local state
    state=$(job_field JobState)
    if ((code)) && [[ $stopping || $code == "$EXIT_STOPPED" ]] && [[ $state == RUNNING* ]]; then # not where it was cancelled
        echo "requeued: it goes on from its last checkpoint"
        scontrol requeue "$job"
    fi
    exit "$code"
}
