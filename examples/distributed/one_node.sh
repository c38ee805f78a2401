#!/bin/sh
# DDP on all GPUs of this machine, or on PROCESSES processes: sh one_node.sh
exec torchrun --standalone --nproc_per_node "${PROCESSES:-gpu}" "$(dirname "$0")/train.py"
