#!/bin/bash
# One comparison on several machines: each gets a worker by ssh, which takes trials until none is left.
#
#   SCALORA_STORAGE=postgresql+psycopg://user@host:5432/trials ./ssh_workers.sh RECIPE.yaml NAME HOST...
#
# Recipe, data and scalora are on each machine, in the folder of the same path. The URL goes there by standard input:
# in a command, everyone on that machine could read it. Last, this machine makes its own report of what all have done.
set -euo pipefail
: "${SCALORA_STORAGE:?set it to the URL of the database}"
recipe=${1:?give RECIPE.yaml} study=${2:?give the NAME of the comparison}
shift 2

compare=(scalora compare "$recipe" --study "$study" --output "runs/$study"
  --methods lora,lora@16,scalora-i,white-lora --lr 3e-4,1e-3,3e-3 --seeds 3)
for host in "$@"; do
  remote=$(printf '%q ' cd "$PWD")"&& IFS= read -r SCALORA_STORAGE && export SCALORA_STORAGE && exec $(printf '%q ' "${compare[@]}")"
  ssh "$host" "$remote" <<<"$SCALORA_STORAGE" >"$study-$host.log" 2>&1 &
done
wait
"${compare[@]}"
