"""A classifier trained with transformers' Trainer: attach, Trainer, save.

python examples/trainer.py                                      a tiny model and data set, seconds on a CPU
python examples/trainer.py --model FacebookAI/roberta-base      the same with a real model
"""

import argparse

import tiny
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from veralib import VeraConfig, attach

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="", help="a hub id or folder; without it, a tiny random model")
parser.add_argument("--output", default="out/trainer", help="folder for checkpoints and the adapter")
parser.add_argument("--epochs", type=float, default=15)
parser.add_argument("--lr", type=float, default=5e-2, help="of the vectors; large models want less, 1e-3 to 1e-2")
options = parser.parse_args()

model, tokenizer = tiny.classifier(options.model), tiny.tokenizer(options.model)
data = [{**tokenizer(row["text"]), "labels": row["label"]} for row in tiny.reviews()]

# The head is new, so it is trained in full and saved with the adapter; the vectors want a larger learning rate than LoRA.
vera = attach(model, VeraConfig(rank=64, train_modules=["classifier"]))
vera.print_trainable_parameters()
optimizer = torch.optim.AdamW(vera.parameter_groups(lr=options.lr, lr_head=1e-2))
trainer = Trainer(
    model,
    TrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorWithPadding(tokenizer),
    optimizers=(optimizer, None),  # Trainer makes its usual schedule
)
trainer.train()
file = vera.save(f"{options.output}/adapter")
print(f"{file}: {file.stat().st_size:,} bytes")
