#!/bin/bash
# The graph on a Slurm cluster: a scheduler beside this script, one worker a GPU, and the runner that gives them work.
#   sbatch --ntasks=8 recipes/slurm.sh all --scale paper --seeds 3
# Submit from the checkout, which lies, like VLKD_RUNS and VLKD_DATA, on a file system that all nodes see under the same path. When the time is over or a
# node fails, nothing is lost: the same sbatch line goes on from the checkpoints (--requeue does it by itself).
#SBATCH --job-name=vlkd
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --mem-per-cpu=4G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
bin=${VLKD_BIN:-$PWD/.venv/bin}
export VLKD_RUNS=${VLKD_RUNS:-$PWD/runs}
mkdir -p "$VLKD_RUNS"
file=$VLKD_RUNS/scheduler-$SLURM_JOB_ID.json
rm -f "$file"
trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null || true; rm -f "$file"; wait' EXIT
trap 'exit 143' TERM

"$bin/dask" scheduler --port 0 --no-dashboard --scheduler-file "$file" &
# --gpus-per-task gives each task a GPU of its own; --kill-on-bad-exit=0 lets the others go on when one ends.
srun --kill-on-bad-exit=0 "$bin/dask" worker --scheduler-file "$file" --nthreads 1 --resources vlkd=1 --memory-limit 0 --no-dashboard --death-timeout 120 &
until [ -s "$file" ]; do sleep 1; done
"$bin/vlkd" reproduce "$@" --scheduler "$file" &
wait $!
