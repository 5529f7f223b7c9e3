"""The original's data and recipe: Stanford Dogs from a folder, on the network of 2021.

    FOLDER/Images/n02085620-Chihuahua/n02085620_10074.jpg ...
    FOLDER/train_list.mat, FOLDER/test_list.mat        (or in FOLDER/lists)

as the two archives `images.tar` and `lists.tar` of the data set's page unpack.

The author's notebook (Joy-Lunkad/AiM, `AiM_resnet_1024_training.ipynb`): images resized to 224x224
whatever their shape, pixels 0 ... 255; rotation by up to ±0.15 of a turn, shift by up to a tenth,
both mirrored at the edges, flips both ways, contrast 0.9 ... 1.1; Adam at 1e-3, batch 16; the
learning rate a tenth after 3 epochs without a gain of 1e-4, the end after 7 without one of 1e-3, 50
epochs at most; both steered by the *test* set, whose best epoch is the figure that was published.
`AUTHOR` does that to the letter; `HELD_OUT` holds 10 images a class back to steer by and looks at
the test set once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

FILE = "stanford-dogs.jsonl"
REMEDY = "get images.tar and lists.tar from the data set's page and unpack both into one folder"


@dataclass(frozen=True)
class DogsRecipe:
    """How the networks are trained.

    Attributes:
        name: Of the study.
        held_out_per_class: Training images of each class that steer; 0: the test set steers.
        size: Height and width of an image.
        epochs: At most.
        batch_size: Images a step; the last, smaller batch is left out.
        rate: Adam's, at the beginning.
        factor: Of the rate, on a plateau.
        plateau: Epochs without a gain of `plateau_gain` until then.
        plateau_gain: In accuracy.
        stop: Epochs without a gain of `stop_gain` until the end.
        stop_gain: In accuracy.
    """

    name: str
    held_out_per_class: int
    size: int = 224
    epochs: int = 50
    batch_size: int = 16
    rate: float = 1e-3
    factor: float = 0.1
    plateau: int = 3
    plateau_gain: float = 1e-4
    stop: int = 7
    stop_gain: float = 1e-3


AUTHOR = DogsRecipe("stanford-dogs", 0)
HELD_OUT = DogsRecipe("stanford-dogs-held-out", 10)
RECIPES = {recipe.name: recipe for recipe in (AUTHOR, HELD_OUT)}


@dataclass(frozen=True)
class Files:
    """Images by path.

    Attributes:
        paths: One file each.
        labels: From 0.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    @property
    def classes(self) -> int:
        """How many."""
        return max(self.labels) + 1


def read_lists(folder: Path) -> tuple[Files, Files]:
    """Read the official lists.

    Args:
        folder: The unpacked data set.

    Returns:
        Training and test images.

    Raises:
        SystemExit: Lists or images are missing; the message says what to do.
    """
    return _read_list(folder, "train_list.mat"), _read_list(folder, "test_list.mat")


def hold_out(files: Files, per_class: int, seed: int) -> tuple[Files, Files]:
    """Take some images of each class away.

    Args:
        files: All.
        per_class: How many of each class.
        seed: Of the draw.

    Returns:
        Those that are left, and those that were taken.

    Raises:
        ValueError: A class would have none left.
    """
    order = torch.randperm(
        len(files.labels), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    taken: set[int] = set()
    for label in range(files.classes):
        mine = [index for index in order if files.labels[index] == label]
        if len(mine) <= per_class:
            raise ValueError(f"class {label} has {len(mine)} images, {per_class} to hold out")
        taken |= set(mine[:per_class])
    every = range(len(files.labels))
    return _chosen(files, [i for i in every if i not in taken]), _chosen(files, sorted(taken))


class Photographs(Dataset):
    """Images of files, (3, size, size) in 0 ... 255, augmented or not.

    Args:
        files: Which.
        size: Height and width that each is resized to, whatever its shape.
        augmented: Whether the author's augmentation is drawn anew each time.
    """

    def __init__(self, files: Files, size: int, *, augmented: bool) -> None:
        from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision

        import_torchvision()
        from torchvision.transforms import v2

        steps: list[Any] = [
            v2.ToImage(),
            v2.Resize((size, size), antialias=False),
            v2.ToDtype(torch.float32),
        ]
        if augmented:
            margin = size // 2  # mirrored pixels, enough for the corners of a turned image
            steps += [
                v2.Pad(margin, padding_mode="reflect"),
                v2.RandomAffine(
                    degrees=[-0.15 * 360, 0.15 * 360],
                    translate=(0.1 * size / (size + 2 * margin),) * 2,
                    interpolation=v2.InterpolationMode.BILINEAR,
                ),
                v2.CenterCrop(size),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                _contrast,
            ]
        self._files, self._transform = files, v2.Compose(steps)

    def __len__(self) -> int:
        return len(self._files.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self._files.paths[index]) as image:
            pixels = self._transform(image.convert("RGB"))
        return torch.as_tensor(pixels), self._files.labels[index]


def _contrast(image: Tensor) -> Tensor:
    """(x - mean) · f + mean, f in 0.9 ... 1.1, each channel about its own mean, as in Keras."""
    factor = 0.9 + 0.2 * torch.rand(())
    mean = image.mean((-2, -1), keepdim=True)
    return ((image - mean) * factor + mean).clamp(0, 255)


def report(folder: Path) -> list[str]:
    """The page's section about these runs; nothing where there are none."""
    from benchmarks.zoo.summary import table

    path = folder / FILE
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    cells = [
        (
            row["recipe"]["name"],
            row["arm"],
            str(row["seed"]),
            f"{row['parameters']:,}",
            f"{100 * row['best']:.2f} % (epoch {row['best_epoch']} of {len(row['curve'])})",
            "-" if row["test"] is None else f"{100 * row['test']:.2f} %",
            f"{row['seconds'] / max(len(row['curve']), 1):.0f}",
        )
        for row in rows
    ]
    header = ("study", "arm", "seed", "parameters", "best where it was steered", "test", "s/epoch")
    return ["## Stanford Dogs", table(header, cells)]


def _read_list(folder: Path, name: str) -> Files:
    from scipy.io import loadmat

    places = (folder / name, folder / "lists" / name)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise SystemExit(f"{name} is neither in {folder} nor in {folder / 'lists'}: {REMEDY}")
    content = loadmat(path)
    names = [str(entry.item()) for entry in content["file_list"].flat]
    labels = tuple(int(label) - 1 for label in content["labels"].flat)
    paths = tuple(folder / "Images" / entry for entry in names)
    absent = [image for image in paths if not image.is_file()]
    if absent:
        raise SystemExit(
            f"{len(absent)} of {len(paths)} images of {path} are missing, such as {absent[0]}: "
            f"{REMEDY}"
        )
    return Files(paths, labels)


def _chosen(files: Files, indices: Sequence[int]) -> Files:
    return Files(
        tuple(files.paths[index] for index in indices),
        tuple(files.labels[index] for index in indices),
    )
