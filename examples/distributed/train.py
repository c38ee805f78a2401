"""ScaLoRA on many devices with accelerate: torchrun gives DDP; accelerate launch with fsdp2.yaml shards the model.

The launch files beside this script show how: one_node.sh, several_nodes.sh, ddp.yaml, fsdp2.yaml, fsdp2_two_nodes.yaml.
"""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import scalora

torch.manual_seed(0)  # the same model on every process
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
loader = DataLoader([torch.randint(0, 100, (16,)) for _ in range(400)], batch_size=4)

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
scalora.prepare(model)  # before the model is sharded
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
handle = scalora.attach(model, optimizer)  # after

for ids in loader:
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()

handle.check_ranks()  # not needed: shows that the processes agree
scalora.save_plain_lora(model, "runs/distributed/adapter")  # every process calls it, the first one writes
if accelerator.is_main_process:
    print(accelerator.num_processes, "processes:", handle.stats[-1])
accelerator.end_training()
