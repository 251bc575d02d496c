# What train.sbatch and sweep.sbatch have in common. Nothing to edit here.

EXIT_STOPPED=75 # mltfr_dist/errors.py
export logs=slurm-logs/$SLURM_JOB_ID/start${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"

# Where a site submits with --export=NONE, or one gives --export=NAME, srun is told the same, and
# would hide from its tasks what this script exports: where they meet, above all.
export SLURM_EXPORT_ENV=ALL

# Since Slurm 22.05 srun does not take --cpus-per-task from the job by itself: each task would be
# bound to one core.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

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

# The address of a node in the allocation's network.
address_of() {
    scontrol show node "$1" --oneliner | sed 's/.* NodeAddr=\([^ ]*\).*/\1/'
}

# A port of this node that is free now.
free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
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

# End the job with the exit code; where it was asked to stop and has saved, put it back into the queue first.
finish() {
    echo "$(date --iso-8601=seconds) ended with exit code $code; logs: $logs"
    local state
    state=$(scontrol show job "$SLURM_JOB_ID" --oneliner | sed 's/.* JobState=\([^ ]*\).*/\1/')
    if ((code)) && [[ $stopping || $code == "$EXIT_STOPPED" ]] && [[ $state == RUNNING ]]; then # not where it was cancelled
        echo "requeued: it goes on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
