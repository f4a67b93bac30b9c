"""The base of experiments/vit.py: a small ViT, trained from nothing on half of tiny-ImageNet's classes.

Every step is a function of (seed, step), so a run that was paused or killed goes on to the same weights.
"""

import io
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODEL: dict[str, int] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
TRAINING: dict[str, float] = {"batch": 128, "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.05, "smoothing": 0.1}
SAVE_SECONDS = 120


def pretrain(data: Path, output: Path, epochs: int, minutes: float, seed: int, patch: int = MODEL["patch_size"]) -> None:
    """Trains the ViT and writes it to `output`, its checkpoints beside that; pauses after `minutes` of training."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = classes(data, odd=False)
    pixels, labels = decode_all(arrays), torch.from_numpy(arrays["labels"].astype(np.int64))
    held_out = torch.from_numpy(arrays["split"] == 1)
    train, train_labels = pixels[~held_out].to(device), labels[~held_out].to(device)
    names = [str(n) for n in arrays.get("wnids", arrays.get("names", np.arange(int(labels.max()) + 1)))]
    batch = min(int(TRAINING["batch"]), len(train))
    in_epoch = len(train) // batch
    steps = epochs * in_epoch

    torch.manual_seed(seed)
    shape = {**MODEL, "patch_size": patch}
    model = make_model(names, shape).to(device)
    optimizer = make_optimizer(model)
    checkpoint = output.with_name(output.name + "-work") / "checkpoint.pt"
    mark = {"seed": seed, "epochs": epochs, "model": shape, "training": TRAINING, "images": len(train)}
    state = load_state(checkpoint, mark, model, optimizer, device)
    before, first, saved, begun = state["seconds"], state["step"], time.monotonic(), time.monotonic()
    print(f"{steps - first} of {steps} steps to do, {len(train)} images of {len(names)} classes, {device}", flush=True)

    def keep() -> None:
        state.update(weights=model.state_dict(), optimizer=optimizer.state_dict(), seconds=before + time.monotonic() - started)
        save_state(state, checkpoint)

    def pace() -> str:
        if state["step"] == first:
            return ""
        speed = (state["step"] - first) * batch / (time.monotonic() - begun)
        return f", {speed:.0f} images/s, about {(steps - state['step']) * batch / speed / 60:.0f} minutes left"

    for step in range(first, steps):
        if time.monotonic() - begun > 60 * minutes:
            keep()
            print(f"paused after step {step} of {steps}{pace()}", flush=True)
            return
        epoch, place = divmod(step, in_epoch)
        rows = order(len(train), seed, epoch)[place * batch : (place + 1) * batch].to(device)
        for group in optimizer.param_groups:
            group["lr"] = TRAINING["lr"] * rate_at(step, steps)
        loss = one_step(model, optimizer, train[rows], train_labels[rows], seed, step)
        state["losses"].append(loss.cpu())
        state["step"] = step + 1
        if place == in_epoch - 1:
            line = {
                "epoch": epoch + 1,
                "loss": round(float(torch.stack(state["losses"]).mean()), 4),
                "accuracy": round(accuracy(model, pixels[held_out], labels[held_out], device), 4),
            }
            state["history"].append(line)
            state["losses"] = []
            score = f"loss {line['loss']}, val accuracy {line['accuracy']}"
            print(f"epoch {epoch + 1}/{epochs}: {score}{pace()}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            keep()
            saved = time.monotonic()
            print(f"  step {step + 1}/{steps}: loss {float(loss):.3f}{pace()}", flush=True)
    keep()
    write(model, output, state, {"classes": len(names), "device": device})


def classes(path: Path, odd: bool) -> dict[str, np.ndarray]:
    """The arrays of an .npz of images, cut to the classes of odd or even index, which keep their names."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    places = np.flatnonzero(arrays["labels"] % 2 == int(odd))
    offsets = arrays["offsets"]
    pieces = [arrays["data"][offsets[i] : offsets[i + 1]] for i in places]
    return {
        "data": np.concatenate(pieces),
        "offsets": np.cumsum([0, *(len(p) for p in pieces)]),
        "labels": arrays["labels"][places] // 2,
        "split": arrays["split"][places],
        **{name: arrays[name][int(odd) :: 2] for name in ("wnids", "names") if name in arrays},
    }


def decode_all(arrays: dict[str, np.ndarray]) -> Tensor:
    """Every image, (n, 3, 32, 32) in bytes."""
    from PIL import Image

    offsets, data, size = arrays["offsets"], arrays["data"], (MODEL["image_size"], MODEL["image_size"])
    images = [
        np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB").resize(size))
        for a, b in itertools.pairwise(offsets)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as the saved image processor gives them: mean 0.5, deviation 0.5."""
    return pixels.float() / 127.5 - 1


def make_model(names: list[str], shape: dict[str, int]) -> Any:
    """A ViTForImageClassification of this shape over these classes, with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**shape, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})  # type: ignore[arg-type]
    return ViTForImageClassification(config)


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW; biases, norms and other vectors don't decay."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    flat = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": TRAINING["weight_decay"]}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=TRAINING["lr"])


def order(rows: int, seed: int, epoch: int) -> Tensor:
    """The rows of one epoch in their order."""
    from veralib.training.pixels import generator_of

    return torch.randperm(rows, generator=generator_of(seed, epoch))


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate: up over the warm-up, then down a cosine."""
    warmup = max(1, round(TRAINING["warmup"] * steps))
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def one_step(model: Any, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    """Trains on one batch of random views; its loss."""
    from veralib.training.pixels import apply_views, draw_views, generator_of

    views = draw_views(len(pixels), generator_of(seed, step, 1))
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        logits = model.train()(pixel_values=apply_views(normalised(pixels), views)).logits
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=TRAINING["smoothing"])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def accuracy(model: Any, pixels: Tensor, labels: Tensor, device: str) -> float:
    """The share of right guesses."""
    model.eval()
    with torch.inference_mode():
        guesses = [model(pixel_values=normalised(part.to(device))).logits.argmax(-1).cpu() for part in pixels.split(250)]
    return float((torch.cat(guesses) == labels).double().mean())


def load_state(path: Path, mark: dict[str, Any], model: Any, optimizer: torch.optim.Optimizer, device: str) -> dict[str, Any]:
    """A checkpoint's state, written into model and optimiser; or a new one. Exits where it is another run's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {"mark": mark, "step": 0, "seconds": 0.0, "history": [], "losses": []}
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["mark"] != mark:
        raise SystemExit(f"{path} is of another run, {state['mark']}; this one is {mark}. Delete it, or name another output.")
    model.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint under another name, then renames it."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def write(model: Any, output: Path, state: dict[str, Any], more: dict[str, Any]) -> None:
    """The model, its image processor and training.json."""
    from transformers import ViTImageProcessorPil

    from veralib.training.loading import quiet_transformers

    size = MODEL["image_size"]
    with quiet_transformers():
        model.cpu().save_pretrained(output)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(output)
    facts = {
        "parameters": sum(p.numel() for p in model.vit.parameters()),
        "accuracy": state["history"][-1]["accuracy"],
        "seconds": round(state["seconds"]),
        "torch": torch.__version__,
        **state["mark"],
        **more,
        "history": state["history"],
    }
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{facts['parameters']:,} parameters, val accuracy {facts['accuracy']}, {facts['seconds']} s, in {output.name}")
