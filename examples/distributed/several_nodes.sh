#!/bin/sh
# DDP on several machines. On each of them: NODES=2 HEAD=host-of-the-first:29500 sh several_nodes.sh
exec torchrun --nnodes "$NODES" --nproc_per_node "${PROCESSES:-gpu}" --rdzv_id scalora --rdzv_backend c10d \
  --rdzv_endpoint "$HEAD" "$(dirname "$0")/train.py"
