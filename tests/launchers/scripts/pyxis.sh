#!/bin/bash
#SBATCH --job-name=mmlg-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR2@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me/work
#SBATCH --output=/runs/ancestor.launch/batch.txt

trap '' USR2
told=; trap 'told=1' TERM

export OMP_NUM_THREADS=1

folder=/runs/ancestor.launch checkpoints=/runs/ancestor/checkpoints
set -- /venv/bin/python -m mmlg_scale train 'my recipe.yaml' --data.path '/data/it'"'"'s here' --out /runs/ancestor

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$first}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))

rm -f -- "$folder"/exit_code "$folder"/srun.txt
srun --kill-on-bad-exit=1 --nodes=4 --ntasks-per-node=8 --ntasks=32 --open-mode=append '--container-image=/images/my image.sqsh' --container-mounts=/data:/data,/home:/home --output="${folder//%/%%}"/rank-%t.txt sh -c 'trap "" USR2
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
