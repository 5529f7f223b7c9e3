"""What is trained on: Fashion-MNIST from a Debian package, scikit-learn's digits; no downloads.

The official training images are cut once, by a fixed permutation, into a validation part and a
pool; each seed draws its training images from the pool. So no image that chooses a learning rate
is ever trained on, and the test images are in neither.
"""

from __future__ import annotations

import functools
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
DATASETS = ("fashion-mnist", "digits")
_CUT_SEED = 20_210_303  # of the one cut into validation part and pool: the article's day
_DIGITS_TEST_PER_CLASS = 40


@dataclass(frozen=True)
class Images:
    """Labelled images, as bytes.

    Attributes:
        pixels: (N, C, H, W), uint8.
        labels: (N,), int64.
    """

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, indices: Tensor) -> Images:
        return Images(self.pixels[indices], self.labels[indices])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set with its official parts.

    Attributes:
        name: As in `DATASETS`.
        classes: How many.
        train: For training and validation.
        test: Touched once a run, at its end.
        mean: Of the training pixels, in 0 ... 1.
        std: Likewise.
    """

    name: str
    classes: int
    train: Images
    test: Images
    mean: float
    std: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.train.pixels.shape
        return channels, height, width

    def inputs(self, images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalised images and labels on a device."""
        pixels = images.pixels.to(device).float().div_(255)
        return pixels.sub_(self.mean).div_(self.std), images.labels.to(device)


@functools.lru_cache(maxsize=2)
def load(name: str) -> Data:
    """Read a data set.

    Args:
        name: "fashion-mnist" or "digits".

    Returns:
        The data.

    Raises:
        SystemExit: It isn't there; the message says how to install it.
    """
    train, test = _fashion_mnist() if name == "fashion-mnist" else _digits()
    scaled = train.pixels.double() / 255
    classes = int(train.labels.max()) + 1
    return Data(name, classes, train, test, scaled.mean().item(), scaled.std().item())


@dataclass(frozen=True)
class Split:
    """Images of one run, as positions in the official training part.

    Attributes:
        train: What is trained on.
        validation: What chooses the learning rate and draws the curve.
    """

    train: Tensor
    validation: Tensor


def split(labels: Tensor, per_class: int | None, validation_per_class: int, seed: int) -> Split:
    """Draw the images of a run.

    Args:
        labels: Of the official training part.
        per_class: Training images of each class; None for the whole pool.
        validation_per_class: Validation images of each class, the same for all seeds.
        seed: Of the draw.

    Returns:
        Positions, in an order that the seed decides.

    Raises:
        ValueError: A class has too few images.
    """
    cut = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_CUT_SEED))
    draw = torch.Generator().manual_seed(seed)
    train, validation = [], []
    for label in range(int(labels.max()) + 1):
        of_class = cut[labels[cut] == label]
        pool = of_class[validation_per_class:]
        wanted = len(pool) if per_class is None else per_class
        if wanted > len(pool) or not wanted:
            raise ValueError(
                f"class {label} has {len(of_class)} training images: too few for "
                f"{validation_per_class} of validation and {wanted} of training"
            )
        validation.append(of_class[:validation_per_class])
        train.append(pool[torch.randperm(len(pool), generator=draw)[:wanted]])
    drawn = torch.cat(train)
    return Split(drawn[torch.randperm(len(drawn), generator=draw)], torch.cat(validation))


def only_classes(images: Images, classes: Tensor) -> Images:
    """Images of some classes, labelled by their place in `classes`."""
    place = torch.full((int(images.labels.max()) + 1,), -1)
    place[classes] = torch.arange(len(classes))
    labels = place[images.labels]
    return Images(images.pixels[labels >= 0], labels[labels >= 0])


def _fashion_mnist() -> tuple[Images, Images]:
    if not FASHION_MNIST.is_dir():
        raise SystemExit(
            f"Fashion-MNIST is not in {FASHION_MNIST}: on Debian and Ubuntu, "
            f"`apt-get install {PACKAGE}` puts it there; `--data digits` does without"
        )
    return _idx_images("train"), _idx_images("t10k")


def _idx_images(part: str) -> Images:
    """An IDX pair: a big-endian head of 16 (labels: 8) bytes, then one byte a value."""
    with gzip.open(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz") as file:
        content = np.frombuffer(file.read(), np.uint8, offset=16)
    with gzip.open(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    pixels = content.reshape(len(labels), 1, 28, 28)
    return Images(torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64)))


def _digits() -> tuple[Images, Images]:
    """There is no official test part: 40 images of each class, chosen once, are it."""
    from sklearn.datasets import load_digits

    values, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    pixels = torch.from_numpy(values.reshape(-1, 1, 8, 8) / 16 * 255).round().to(torch.uint8)
    images = Images(pixels, torch.from_numpy(labels.astype(np.int64)))
    cut = split(images.labels, None, _DIGITS_TEST_PER_CLASS, seed=0)
    return images[cut.train], images[cut.validation]
