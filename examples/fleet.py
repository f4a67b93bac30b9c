"""A hundred owners, one model, one run: each row of a batch trains its owner's adapter and nobody else's.

python examples/fleet.py
"""

import argparse
from pathlib import Path

import tiny
import torch

from veralib import VeraConfig, attach
from veralib.fleet import FleetAdamW, owner_loss

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/fleet", help="folder for the adapters")
parser.add_argument("--owners", type=int, default=100)
options = parser.parse_args()

# Each owner's duck says something of its own.
model, tokenizer = tiny.causal(), tiny.tokenizer()
sounds = sorted(set(tiny.ANIMALS.values()))
says = {f"owner {i}": sounds[i % len(sounds)] for i in range(options.owners)}
rows = {o: tokenizer(f"what says the duck ? {s}", return_tensors="pt")["input_ids"][0] for o, s in says.items()}

vera = attach(model)
fleet = vera.fleet(VeraConfig(rank=64, targets="all-linear"), slots=len(says)).add(says)
optimizer = FleetAdamW(fleet, lr=2e-2, max_norm=1.0, schedule="linear", total_steps=40)
generator = torch.Generator().manual_seed(0)
while all(optimizer.steps_of(o) < 40 for o in says):
    for owners in torch.randperm(len(says), generator=generator).split(20):
        names = [f"owner {i}" for i in owners]
        ids = torch.stack([rows[n] for n in names])
        with vera.rows(names):
            loss = owner_loss(model(input_ids=ids).logits[:, -2:], ids[:, -2:], names)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

question = torch.stack([row[:-1] for row in rows.values()])
with torch.no_grad(), vera.rows(list(says)):
    answers = tokenizer.convert_ids_to_tokens(model(input_ids=question).logits[:, -1].argmax(-1))
right = sum(a == s for a, s in zip(answers, says.values(), strict=True))
print(f"{right} of {len(says)} owners' ducks say their own sound, {fleet.parameters_per_owner:,} parameters each")
for name in list(says)[:3]:
    print(f"{name}: {answers[list(says).index(name)]}, {vera.save(Path(options.output) / f'{name}.safetensors', name=name)}")
