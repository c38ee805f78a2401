#!/bin/sh
# chats.jsonl has lines of {"messages": […]}. Of tuners only lora; no --use_dora, no unsloth, no --init_weights pissa.
exec swift sft \
  --model HuggingFaceTB/SmolLM2-135M-Instruct --use_hf true \
  --external_plugins "$(dirname "$0")/scalora_swift.py" --callbacks scalora \
  --tuner_type lora --lora_rank 8 --lora_alpha 16 --target_modules all-linear --use_dora false \
  --dataset chats.jsonl --max_length 1024 \
  --per_device_train_batch_size 4 --num_train_epochs 1 --learning_rate 1e-3 --optim adamw_torch \
  --output_dir runs/swift "$@"
