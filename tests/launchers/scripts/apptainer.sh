#!/bin/bash
#SBATCH --job-name=mmlg-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
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

rm -f -- "$folder"/exit_code "$folder"/srun.txt
srun --kill-on-bad-exit=1 --nodes=1 --ntasks-per-node=1 --ntasks=1 --open-mode=append --output="${folder//%/%%}"/rank-%t.txt apptainer exec --nv --bind /data:/data /images/mmlg.sif sh -c 'trap "" USR2
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
