"""A language model tuned on preferences with TRL's DPOTrainer; the reference is the base model itself, not a second copy.

python examples/dpo.py                                   a tiny model and data set, seconds on a CPU
python examples/dpo.py --model Qwen/Qwen3-0.6B           the same with a real model
"""

import argparse

import tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from veralib import VeraConfig, attach

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="", help="a hub id or folder; without it, a tiny random model")
parser.add_argument("--output", default="out/dpo", help="folder for checkpoints and the adapter")
parser.add_argument("--epochs", type=float, default=12)
parser.add_argument("--lr", type=float, default=5e-2, help="of the vectors; large models want less, 1e-3 to 1e-2")
options = parser.parse_args()

model, tokenizer = tiny.causal(options.model), tiny.tokenizer(options.model)
vera = attach(model, VeraConfig(rank=64, targets="all-linear"))
trainer = DPOTrainer(
    model,
    ref_model=vera.reference(),  # without it TRL would load the base a second time
    args=DPOConfig(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        learning_rate=options.lr,  # TRL's default of 1e-6 would not move the vectors
        logging_strategy="epoch",
        save_strategy="no",
        bf16=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_list(tiny.preferences()),
    processing_class=tokenizer,
)
trainer.train()
vera.save(f"{options.output}/adapter")
