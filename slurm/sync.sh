#!/usr/bin/env bash
# Upload offline runs to W&B from a machine with internet (a login node). Again and again: a run that has gone on since
# is brought up to date, the pieces of a requeued run become one run.
#
#   slurm/sync.sh                    all runs of runs/
#   slurm/sync.sh runs/camvid        some
#   watch -n 600 slurm/sync.sh       while they run
set -euo pipefail
shopt -s nullglob
status=0
for run in "${@:-runs/*}"; do
  for folder in $run; do
    pieces=("$folder"/wandb/offline-run-*)
    [ ${#pieces[@]} -gt 0 ] || continue
    echo "$folder: ${#pieces[@]} piece(s)"
    wandb sync --yes --include-synced "${pieces[@]}" || { status=1; echo "error: $folder was not uploaded" >&2; }
  done
done
exit $status
