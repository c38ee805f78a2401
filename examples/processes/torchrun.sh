#!/bin/sh
# A recipe by DDP on all GPUs of this machine, or on PROCESSES processes: sh torchrun.sh RECIPE.yaml [--resume]
exec torchrun --standalone --nproc_per_node "${PROCESSES:-gpu}" -m scalora train "$@"
