"""A small ViT of our own and ten-shot data for it, from tiny-ImageNet.

    VERALIB_DATA=… python -m experiments.vit --output out/vit [--epochs 30] [--minutes 60] [--patch 4]

Trains the ViT from nothing on the 100 classes of even index, 32 × 32 pixels, and writes it to the folder with odd.npz, the other
classes. Stopped by --minutes or killed, it goes on when started again and ends with the same weights. They come from data for
research alone and don't belong in the repository. `vera sweep experiments/images.yaml` adapts the ViT to the other classes.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from .vit_pretrain import classes, pretrain


def main(arguments: list[str] | None = None) -> None:
    """Pretrains, or goes on with it, and writes the other classes beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("VERALIB_DATA", ""))
    parser.add_argument("--data", type=Path, default=home / "tiny_imagenet32" / "tiny_imagenet32.npz", help="the .npz file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; checkpoints lie beside it")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="pause after so many of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patch", type=int, choices=(4, 8), default=4, help="8 trains four times as fast")
    chosen = parser.parse_args(arguments)
    pretrain(chosen.data, chosen.output, chosen.epochs, chosen.minutes, chosen.seed, chosen.patch)
    if chosen.output.exists():
        np.savez(chosen.output / "odd.npz", **classes(chosen.data, odd=True))


if __name__ == "__main__":
    main()
