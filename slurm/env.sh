# shellcheck shell=bash disable=SC2034
# The environment of every rank, in one place; train.sbatch and sweep.sbatch read it. Edit for your cluster.

# Modules and conda, where the interpreter comes from them (then PYTHON=$(command -v python)).
# source /etc/profile && module load cuda
# source ~/miniconda3/etc/profile.d/conda.sh && conda activate mltfr

# The interpreter with mltfr_dist and its dependencies, the same on every node.
PYTHON=${PYTHON:-$repository/.venv/bin/python}

# What starts it, such as a container: wrap=(apptainer exec --nv --bind "$PWD" IMAGE.sif)
wrap=()

# More options of srun, such as --mpi=none, or a container by Pyxis: --container-image=IMAGE
# --container-mounts="$PWD:$PWD" --container-workdir="$PWD"
srun_more=()

# One CPU thread a rank for the libraries; training.threads sets torch's own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The network interface between nodes, where there are several (`ip -brief address`): ranks then meet at its address.
# Without it gloo, and at times NCCL, take the one of the host's name, which may lead nowhere.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Compute nodes without internet.
# export HF_HUB_OFFLINE=1
