#!/usr/bin/env bash
# One stage on several machines under Slurm, from the root of a checkout (not run on a cluster here):
#   sbatch accelerate_configs/slurm.sh ppo --config recipes/llava-1.5-7b-hf/ppo.yaml [--field value ...]
# One task per machine starts that machine's processes; SIGTERM two minutes before the time limit lets the run save.
#SBATCH --job-name=trl-llava
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
stage="$1"
shift
gpus="${SLURM_GPUS_ON_NODE:-8}"
export MAIN_PROCESS_IP MAIN_PROCESS_PORT
read -r MAIN_PROCESS_IP < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_PROCESS_PORT=$((20000 + SLURM_JOB_ID % 20000))
# SLURM_NODEID differs from task to task, so the task's own shell reads it.
exec srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$0" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" \
    -m "$@"
' "$((SLURM_NNODES * gpus))" "trl_llava.train_$stage" "$@"
