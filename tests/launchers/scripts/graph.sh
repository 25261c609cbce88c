# ---- family-ancestor
#!/bin/bash
#SBATCH --job-name=family-ancestor
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --signal=USR2@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me/work
#SBATCH --output=/runs/ancestor.launch/batch.txt

trap '' USR2
told=; trap 'told=1' TERM

export OMP_NUM_THREADS=1

folder=/runs/ancestor.launch checkpoints=
set -- mmlg ancestor

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$first}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))

rm -f -- "$folder"/exit_code "$folder"/srun.txt
srun --kill-on-bad-exit=1 --nodes=1 --ntasks-per-node=4 --ntasks=4 --open-mode=append --output="${folder//%/%%}"/rank-%t.txt sh -c 'trap "" USR2
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE=4
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

# ---- family-gene
#!/bin/bash
#SBATCH --job-name=family-gene
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --dependency=afterok:step:ancestor
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=USR2@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me/work
#SBATCH --output=/runs/gene.launch/batch.txt

trap '' USR2
told=; trap 'told=1' TERM

export OMP_NUM_THREADS=1

folder=/runs/gene.launch checkpoints=
set -- mmlg gene

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$first}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))

rm -f -- "$folder"/exit_code "$folder"/srun.txt
srun --kill-on-bad-exit=1 --nodes=1 --ntasks-per-node=4 --ntasks=4 --open-mode=append --output="${folder//%/%%}"/rank-%t.txt sh -c 'trap "" USR2
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE=4
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

# ---- family-i1+2
#!/bin/bash
#SBATCH --job-name=family-i1+2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --array=0-2
#SBATCH --dependency=afterok:step:gene
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=USR2@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me/work
#SBATCH --output=/runs/arrays/i1+2/batch-%a.txt

trap '' USR2
told=; trap 'told=1' TERM

export OMP_NUM_THREADS=1

case "$SLURM_ARRAY_TASK_ID" in
0)
  folder=/runs/descendants/i1.launch checkpoints=
  set -- mmlg i1 ;;
1)
  folder=/runs/descendants/i2.launch checkpoints=
  set -- mmlg i2 ;;
2)
  folder=/runs/descendants/i3.launch checkpoints=
  set -- mmlg i3 ;;
esac

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${address:-$first}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))

rm -f -- "$folder"/exit_code "$folder"/srun.txt
srun --kill-on-bad-exit=1 --nodes=1 --ntasks-per-node=4 --ntasks=4 --open-mode=append --output="${folder//%/%%}"/rank-%t.txt sh -c 'trap "" USR2
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE=4
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

# ---- family-report
#!/bin/bash
#SBATCH --job-name=family-report
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --dependency=afterok:step:ancestor:step:gene:step:i1:step:i2:step:i3
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=USR2@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me/work
#SBATCH --output=/runs.launch/batch.txt

trap '' USR2
told=; trap 'told=1' TERM

export OMP_NUM_THREADS=1

folder=/runs.launch checkpoints=
set -- mmlg report

rm -f -- "$folder"/exit_code "$folder"/srun.txt
srun --kill-on-bad-exit=1 --nodes=1 --ntasks-per-node=1 --ntasks=1 --open-mode=append --output="${folder//%/%%}"/rank-%t.txt sh -c 'trap "" USR2
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
