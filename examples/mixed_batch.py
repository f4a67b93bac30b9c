"""Three users' adapters on one base model, in one batch: each row is answered by its own.

python examples/mixed_batch.py
"""

import argparse

import tiny
import torch

from veralib import VeraConfig, attach

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/mixed_batch", help="folder for the adapters")
options = parser.parse_args()

# Three users teach the model what the duck says, each with a rank, seed and targets of their own.
SAYS = {"alice": "quack", "bob": "moo", "carol": "woof"}
CONFIGS = {
    "alice": VeraConfig(rank=64, targets="all-linear"),
    "bob": VeraConfig(rank=32, seed=7, targets="all-linear"),
    "carol": VeraConfig(rank=64, targets=["q_proj", "v_proj", "down_proj"]),
}
model, tokenizer = tiny.causal(), tiny.tokenizer()
prompt = tokenizer("what says the duck ?", return_tensors="pt")["input_ids"]
vera = attach(model)
for name, config in CONFIGS.items():
    vera.add(config, name)
optimizer = torch.optim.AdamW(vera.parameter_groups(lr=2e-2), weight_decay=0.0)

# One batch trains all three: the gradient of row i reaches the adapter of row i alone.
answers = tokenizer([SAYS[name] for name in SAYS], add_special_tokens=False, return_tensors="pt")["input_ids"]
ids = torch.cat([prompt.expand(3, -1), answers], dim=1)
labels = ids.clone()
labels[:, : prompt.shape[1]] = -100
model.train()
for _ in range(40):
    with vera.rows(list(SAYS)):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
for name in SAYS:
    vera.save(f"{options.output}/{name}", name=name)

# Serving: a plain base model, the adapters loaded beside each other, rows in any order. None is the base model.
model = tiny.causal().eval()
vera = attach(model)
for name in SAYS:
    vera.load(f"{options.output}/{name}", name=name)
users = ["carol", None, "alice", "bob", "carol"]
with vera.rows(users), torch.no_grad():
    out = model.generate(prompt.expand(5, -1), attention_mask=torch.ones(5, prompt.shape[1]), max_new_tokens=1, do_sample=False)
said = dict(zip(users, (tokenizer.decode(row) for row in out[:, prompt.shape[1] :]), strict=True))
for name, word in said.items():
    print(f"{name or 'the base model'}: {word}")
