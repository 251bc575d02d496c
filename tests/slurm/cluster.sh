#!/usr/bin/env bash
# A real Slurm of two virtual nodes on this machine, for the tests; needs root and Debian's slurm-wlm and munge.
#
#   tests/slurm/cluster.sh up FOLDER      start it; then `export SLURM_CONF=FOLDER/slurm.conf` and use sbatch, squeue, ...
#   tests/slurm/cluster.sh down FOLDER    end every process of it
#
# Everything it writes lies in FOLDER; ports are free ones and munge has a socket and key of its own, so that several can
# run beside each other. Partition `high` preempts `low`, whose jobs have 60 s to save and are put back into the queue.
set -euo pipefail
action=${1:?up or down} folder=$(realpath -m "${2:?folder}")

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

up() {
    mkdir -p "$folder"/{state,run,log,spool/n1,spool/n2}
    chmod 755 "$folder"
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
    chmod 400 "$folder/munge.key"
    local host cpus memory
    host=$(hostname -s) cpus=$(nproc --all) memory=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 2048))
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as its old credential lives.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/builtin
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cpus RealMemory=$memory Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cpus RealMemory=$memory Gres=gpu:2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=off
CONF
    printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$folder/gres.conf" # devices that every machine has
    export SLURM_CONF=$folder/slurm.conf
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/run/munged.pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed"
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        if [[ $(sinfo --noheader --partition=low --states=idle --format=%D 2>/dev/null) == 2 ]]; then
            return
        fi
        sleep 0.5
    done
    echo "Slurm did not come up within 30 s; see $folder/log" >&2
    down
    exit 1
}

down() {
    local name pid
    if [[ -S $folder/munge.socket ]]; then
        SLURM_CONF=$folder/slurm.conf scancel --user=root --signal=KILL --full 2>/dev/null || true
        sleep 1
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        if [[ -f $folder/run/$name.pid ]]; then
            pid=$(<"$folder/run/$name.pid")
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 50); do
                kill -0 "$pid" 2>/dev/null || break
                sleep 0.1
            done
            kill -KILL "$pid" 2>/dev/null || true
        fi
    done
    for pid in $(pgrep slurmstepd); do # a step that waits for the controller that has gone
        if grep --quiet --null-data "^SLURM_CONF=$folder/slurm.conf$" "/proc/$pid/environ"; then
            kill -KILL "$pid" 2>/dev/null || true
        fi
    done
}

case $action in
    up | down) "$action" ;;
    *) echo "usage: $0 up|down FOLDER" >&2 && exit 2 ;;
esac
