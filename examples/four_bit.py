"""A 4-bit base model (bitsandbytes, here on the CPU) trained by transformers' Trainer, then merged.

python examples/four_bit.py                                   a tiny model and data set, seconds on a CPU
python examples/four_bit.py --model Qwen/Qwen3-0.6B           the same with a real model
"""

import argparse

import tiny
import torch
from transformers import BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from veralib import VeraConfig, attach

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="", help="a hub id or folder; without it, a tiny random model")
parser.add_argument("--output", default="out/four_bit", help="folder for checkpoints, the adapter and the merged model")
parser.add_argument("--epochs", type=float, default=20)
parser.add_argument("--lr", type=float, default=5e-2, help="of the vectors; large models want less, 1e-3 to 1e-2")
options = parser.parse_args()

tokenizer = tiny.tokenizer(options.model)
base = options.model
if not base:  # a folder to quantise from
    base = f"{options.output}/base"
    tiny.causal().save_pretrained(base)
model = tiny.causal(
    base,
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    device_map=None if torch.cuda.is_available() else "cpu",
)
vera = attach(model, VeraConfig(rank=64, targets="all-linear"))
trainer = Trainer(
    model,
    TrainingArguments(
        f"{options.output}/run",
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        learning_rate=options.lr,
        logging_strategy="epoch",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=[tiny.answered(tokenizer, **row) for row in tiny.questions()],
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # it pads the labels too
)
trainer.train()
file = vera.save(f"{options.output}/adapter")
prompt = tokenizer("what says the duck ?", return_tensors="pt").to(model.device)


@torch.no_grad()
def logits(model):
    return model.eval()(**prompt).logits[0, -1].float().cpu()


trained = logits(model)
print("4-bit base and adapter:", tokenizer.decode(trained.argmax()))

# Merged into 4 bits, ΔW is rounded with the weights: the report says how much of it is left, and how much noise comes with it.
report = vera.merge()
print(f"merged into 4 bits: {report.surviving:.0%} of ΔW, rounding error {report.error:.0%}")
print("the logits move by", f"{(logits(model) - trained).abs().max():.3f}")
vera.unmerge()  # the 4-bit weights as they were, bit for bit
assert torch.equal(logits(model), trained)

# To deploy a plain model, merge into the full-precision base.
full = tiny.causal(base, dtype=torch.float32)
vera = attach(full)
vera.load(file, name="trained")  # warns that the base is stored otherwise
report = vera.merge("trained")
full.save_pretrained(f"{options.output}/merged")
print(f"merged into float32: {report.surviving:.0%} of ΔW, rounding error {report.error:.0%}")
