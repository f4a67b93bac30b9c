"""A language model tuned on prompts and completions with TRL's SFTTrainer.

python examples/sft.py                                   a tiny model and data set, seconds on a CPU
python examples/sft.py --model Qwen/Qwen3-0.6B           the same with a real model
"""

import argparse

import tiny
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from veralib import VeraConfig, attach

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="", help="a hub id or folder; without it, a tiny random model")
parser.add_argument("--output", default="out/sft", help="folder for checkpoints and the adapter")
parser.add_argument("--epochs", type=float, default=20)
parser.add_argument("--lr", type=float, default=5e-2, help="of the vectors; large models want less, 1e-3 to 1e-2")
options = parser.parse_args()

model, tokenizer = tiny.causal(options.model), tiny.tokenizer(options.model)
vera = attach(model, VeraConfig(rank=64, targets="all-linear"))
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        learning_rate=options.lr,  # TRL's default of 2e-5 would hardly move the vectors
        lr_scheduler_type="cosine",
        logging_strategy="epoch",
        save_strategy="no",
        bf16=False,  # TRL's default is True; d and b stay in float32 either way
        report_to="none",
    ),
    train_dataset=Dataset.from_list(tiny.questions()),
    processing_class=tokenizer,
)
trainer.train()
vera.save(f"{options.output}/adapter")

model.eval()
prompt = tokenizer("what says the duck ?", return_tensors="pt")
with torch.no_grad():
    answer = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=1, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
