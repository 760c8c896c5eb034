#!/usr/bin/env bash
# Upload offline runs to W&B from a machine with internet (a login node), as often as you like: a run that has gone on
# since is brought up to date, the pieces of a requeued run become one run, what has not changed is left alone. Runs that
# were online but could not upload all of it before their end are among them.
#
#   slurm/sync.sh                    all runs of runs/, and of WANDB_DIR where that is set
#   slurm/sync.sh runs/camvid        some
#   watch -n 600 slurm/sync.sh       while they run; W&B shows such a run as crashed until its end has come
#
# One line a run. Exit status 1 if something was not uploaded.
set -euo pipefail
shopt -s nullglob
unset WANDB_MODE WANDB_SILENT
export WANDB__GRAPHQL_RETRY_MAX=${WANDB__GRAPHQL_RETRY_MAX:-3} # without an answer it would try for minutes
[ $# -gt 0 ] || set -- runs/* ${WANDB_DIR:+"$WANDB_DIR"}

records() { # of one run: its pieces by the time at which they began
  for record in "$1"/wandb/{offline-,}run-*/run-*.wandb; do
    piece=$(basename "$(dirname "$record")")
    [[ $piece == offline-* || -e $record.unsent ]] && echo "${piece#offline-} $record"
  done | sort | cut -d' ' -f2-
}

status=0
for run in "$@"; do
  mapfile -t pieces < <(records "$run")
  sent=0 empty=0
  for record in "${pieces[@]}"; do
    size=$(wc -c <"$record") # before it is read: what is written meanwhile is for the next time
    # A piece behind one that is sent goes again too, as the last one's summary is the run's. W&B keeps in .syncstate at
    # which step a piece begins, so that rows sent again are the same rows.
    [ $sent -gt 0 ] || [ "$size" != "$(cat "$record.sent" 2>/dev/null)" ] || continue
    said=$(wandb sync --yes --include-synced --include-online "$record" 2>&1 </dev/null) || true
    if [[ $said == *"Finished syncing"* && $said != *"wandb: ERROR"* ]]; then
      echo "$size" >"$record.sent"
      sent=$((sent + 1))
    elif [[ $said == *"Failed to read"*EOF* ]]; then
      empty=$((empty + 1)) # W&B writes every 15 seconds: it has just begun, or was killed then
    else
      error=$(grep -m1 -E 'ERROR Failed|^Error: ' <<<"$said" || tail -n1 <<<"$said")
      echo "error: $record: ${error#wandb: ERROR }" >&2
      status=1
      [[ $said == *"Failed to read"* ]] || exit 1 # no answer, or no key: it is so for all
    fi
  done
  [ ${#pieces[@]} -eq 0 ] || echo "$run: ${#pieces[@]} piece(s), $sent uploaded, $empty empty"
done
exit $status
