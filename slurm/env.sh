# The environment of every rank, in one place; slurm/train.sbatch reads it. Edit for your cluster.

# The interpreter with mltfr_dist and its dependencies, the same on every node.
PYTHON=${PYTHON:-.venv/bin/python}

# One CPU thread a rank for the libraries; training.threads sets torch's own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The network interface between nodes, where there are several (`ip -brief address`). Without it gloo, and at times NCCL,
# take the first one, which may lead nowhere.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Compute nodes without internet.
# export HF_HUB_OFFLINE=1

# More options of srun, such as --mpi=none, or a container by Pyxis: --container-image=IMAGE
# --container-mounts="$PWD:$PWD" --container-workdir="$PWD"
srun_more=()
