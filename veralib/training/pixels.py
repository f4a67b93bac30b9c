"""Images as a model reads them: transformers' own preparation, and random crops and flips without torchvision."""

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, VeraWarning
from .data import Row, label_ids
from .images import Picture
from .settings import Settings

AREA = (0.25, 1.0)
"""A random crop's share of the image."""
ASPECT = (3 / 4, 4 / 3)
"""Its width over its height."""
Example = dict[str, Any]


class Pixels(Dataset):
    """One example a picture, prepared when asked for. augment: a seed; the view is a function of (seed, epoch, row) alone."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        prepare: Callable[[Any], Tensor],
        labels: Sequence[int] | None = None,
        augment: int | None = None,
    ) -> None:
        self.pictures, self.prepare, self.labels, self.augment, self.epoch = pictures, prepare, labels, augment, 0

    def __len__(self) -> int:
        return len(self.pictures)

    def set_epoch(self, epoch: int) -> None:
        """Draws other views from here on; without augmentation nothing changes."""
        self.epoch = epoch

    def __getitem__(self, i: int) -> Example:
        pixels = self.prepare(self.pictures[i].decode())
        if self.augment is not None:
            pixels = apply_views(pixels[None], draw_views(1, generator_of(self.augment, self.epoch, i)))[0]
        return {"pixel_values": pixels} | ({} if self.labels is None else {"labels": self.labels[i]})


def pixel_set(
    rows: Sequence[Row], processor: Any, settings: Settings, labels: Sequence[str], where: str, train: bool = False
) -> Pixels:
    """The examples of one split; training rows alone are augmented."""
    ids = label_ids([row[settings.label] for row in rows], labels, where)
    pictures = [row[settings.text_columns[0]] for row in rows]
    return Pixels(pictures, preparation(processor), ids, settings.seed if train and settings.augment else None)


def collator(dtype: torch.dtype) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """The function that makes a batch of some examples; dtype: the model's, since not every model casts what it reads."""
    return functools.partial(_collate, dtype=dtype)  # so that a loader's worker processes can have it


def _collate(examples: Sequence[Example], dtype: torch.dtype) -> dict[str, Tensor]:
    """pixel_values (n, 3, height, width), and labels (n) if they have any."""
    batch = {"pixel_values": torch.stack([e["pixel_values"] for e in examples]).to(dtype)}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([e["labels"] for e in examples])
    return batch


def is_image_model(config: Any) -> bool:
    """Whether transformers classifies images with models of this config."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def load_processor(model: str, revision: str | None, config: Any) -> Any:
    """The image processor of a model, on Pillow; where it has none, ViT's: config.image_size, mean and deviation 0.5.

    Always on Pillow: torchvision would resize a little differently, so a run would depend on what else is installed.
    Errors: ConfigError where the processor can't be loaded, or the model reads no RGB.
    """
    from transformers import ViTImageProcessorPil

    # its own module, since transformers 5.17 itself has the class only where there is torchvision
    from transformers.models.auto.image_processing_auto import AutoImageProcessor, get_image_processor_config

    channels = getattr(config, "num_channels", 3)
    if channels != 3:
        raise ConfigError(f'the model "{model}" reads images of {channels} channels; expected 3 (red, green, blue)')
    if get_image_processor_config(model, revision=revision):
        return AutoImageProcessor.from_pretrained(model, revision=revision, backend="pil")
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    warnings.warn(
        f'the model "{model}" has no image processor (preprocessor_config.json): its images are resized to {height} × {width} '
        "and normalised with mean 0.5 and deviation 0.5",
        VeraWarning,
    )
    return ViTImageProcessorPil(size={"height": height, "width": width})


def preparation(processor: Any) -> Callable[[Any], Tensor]:
    """A function: Pillow's image -> pixel_values (3, height, width)."""
    return _Preparation(processor)


class _Preparation:
    """A class, so that a loader's worker processes can have it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]


def draw_views(count: int, generator: torch.Generator) -> Tensor:
    """Random crops, every second one flipped, as affine maps (count, 2, 3) from the view's coordinates to the image's.

    A crop has AREA of the image and ASPECT, as far as it fits. Source: Szegedy et al. 2015, section 6.
    """
    area, aspect, x, y, flip = torch.rand(5, count, generator=generator)
    area = AREA[0] + (AREA[1] - AREA[0]) * area
    low, high = (math.log(a) for a in ASPECT)
    ratio = torch.exp(low + (high - low) * aspect).sqrt()
    width, height = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
    # The image reaches from -1 to 1; a crop of width w has its centre within ±(1 - w).
    views = torch.zeros(count, 2, 3)
    views[:, 0, 0] = torch.where(flip < 0.5, -width, width)
    views[:, 1, 1] = height
    views[:, 0, 2], views[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    return views


def apply_views(pixels: Tensor, views: Tensor) -> Tensor:
    """Each image (n, 3, height, width) as its view shows it, in its old size, bilinear; a view never looks past the border."""
    grid = torch.nn.functional.affine_grid(views.to(pixels), list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator that is a function of some numbers, seed, epoch and row say; hashed, since torch takes one number."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
