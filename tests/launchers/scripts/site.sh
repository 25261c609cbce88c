#!/bin/bash
#SBATCH --job-name=mmlg-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=a100:8
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --qos=long
#SBATCH --constraint='a100&ib'
#SBATCH --exclude=node17,node23
#SBATCH --reservation=mine
#SBATCH --mail-type=FAIL
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me/work
#SBATCH --output=/runs/ancestor.launch/batch.txt

trap '' USR2
told=; trap 'told=1' TERM

module load cuda/12.8 'gcc 13'
export OMP_NUM_THREADS=1
export GREETING='it'"'"'s $HOME'
export EMPTY=''
export NCCL_SOCKET_IFNAME=ib0
export MINE='a b'
export TMPDIR=/scratch/me/"$SLURM_JOB_ID"/tmp
export XDG_CACHE_HOME=/scratch/me/cache
export HF_HOME=/scratch/me/cache/huggingface
export TRITON_CACHE_DIR=/scratch/me/cache/triton
export TORCHINDUCTOR_CACHE_DIR=/scratch/me/cache/inductor
srun --ntasks-per-node=1 --ntasks=4 mkdir -p -- "$TMPDIR" "$XDG_CACHE_HOME" "$HF_HOME" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"

ulimit -n 65536

folder=/runs/ancestor.launch checkpoints=/runs/ancestor/checkpoints
set -- /opt/mmlg/bin/python -m mmlg_scale train 'my recipe.yaml' --data.path '/data/it'"'"'s here' --out /runs/ancestor

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$first}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))

rm -f -- "$folder"/exit_code "$folder"/srun.txt
srun --kill-on-bad-exit=1 --nodes=4 --ntasks-per-node=8 --ntasks=32 --open-mode=append --output="${folder//%/%%}"/rank-%t.txt sh -c 'trap "" USR2
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE=8
exec "$@"' mmlg "$@" 2> "$folder"/srun.txt &
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done  # a signal ended wait, not the ranks
cat -- "$folder"/srun.txt
first=$(sed -n 's/^srun: error: .*tasks\{0,1\} [0-9,-]*: //p' "$folder"/srun.txt | head -n 1)
case "$first" in
"") ;;
"Exited with exit code "*) code=${first##* } ;;
Killed*) code=137 ;;
Terminated*) code=143 ;;
*) code=1 ;;
esac
again=
case "$code" in
0 | 2 | 76 | 130 | 143) ;;
75) again=1 ;;
*)
  crashes="$folder"/crashes
  if [ -n "$(find "$checkpoints" -mindepth 1 -maxdepth 1 -name 'step-*' -newer "$crashes" 2>/dev/null)" ]; then rm -f -- "$crashes"; fi
  echo "exit code $code at $(date)" >> "$crashes"
  if [ "$(wc -l < "$crashes")" -le 2 ]; then again=1; fi ;;
esac
if [ -n "$again" ] && [ -z "$told" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
printf '%s\n' "$code" > "$folder"/exit_code
exit "$code"
