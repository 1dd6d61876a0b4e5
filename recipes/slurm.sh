#!/bin/bash
# The graph on a Slurm cluster: a scheduler beside this script, one worker a GPU, and the runner that gives them work.
#   sbatch --ntasks=8 recipes/slurm.sh all --scale paper --seeds 3
# Submit from the checkout, which lies, like VLKD_RUNS and VLKD_DATA, on a file system that all nodes see under the
# same path. When the time is over or a node fails, nothing is lost: the same sbatch line goes on from the checkpoints
# (--requeue does it by itself). Connections are encrypted with a certificate that is made for this job and that only
# its owner can read: whoever else reaches the scheduler's port cannot run anything on the workers.
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
private=$VLKD_RUNS/cluster-$SLURM_JOB_ID
rm -rf "$private"
mkdir -m 700 "$private"
file=$private/scheduler.json
trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$private"' EXIT
trap 'exit 143' TERM

openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=vlkd -keyout "$private/key.pem" -out "$private/cert.pem" 2>/dev/null
export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true DASK_DISTRIBUTED__COMM__TLS__CA_FILE=$private/cert.pem
for role in SCHEDULER WORKER CLIENT; do
  export "DASK_DISTRIBUTED__COMM__TLS__${role}__CERT=$private/cert.pem" "DASK_DISTRIBUTED__COMM__TLS__${role}__KEY=$private/key.pem"
done

# --no-dashboard leaves an HTTP server with status pages; --dashboard-address keeps it on the machine itself.
"$bin/dask" scheduler --protocol tls --port 0 --no-dashboard --dashboard-address 127.0.0.1:0 --scheduler-file "$file" &
# --gpus-per-task gives each task a GPU of its own; --kill-on-bad-exit=0 lets the others go on when one ends.
srun --kill-on-bad-exit=0 "$bin/dask" worker --protocol tls --scheduler-file "$file" --nthreads 1 --resources vlkd=1 --memory-limit 0 --no-dashboard --dashboard-address 127.0.0.1:0 --death-timeout 120 &
until [ -s "$file" ]; do sleep 1; done
"$bin/vlkd" reproduce "$@" --scheduler "$file" &
wait $!
