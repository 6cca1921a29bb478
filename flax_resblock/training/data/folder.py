"""Image folders, one folder per class, below ``train`` and ``val`` or ``test`` or by themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flax_resblock.errors import InputError, some
from flax_resblock.training.data.dataset import (
    HELD_OUT,
    Splits,
    check_range,
    has_own_tests,
    held_out,
    normalise,
    set_aside,
)
from flax_resblock.training.data.images import damage, decode, fit, short_side

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
SUFFIXES = (".jpg", ".jpeg", ".png")
_PIECE = 1000
"""Files that are checked between two reports of progress."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderDataset:
    """Labelled image files, decoded at every access.

    Attributes:
      name: Its name in messages.
      files: Paths, one per image.
      labels: ``(N,)``, int32.
      class_names: One per class, in the order of the labels.
      size: Side in pixels of the evaluation images, see
        :func:`flax_resblock.training.data.images.fit`.
      mean, std: Per channel, for pixels from 0 to 255; by default ImageNet's.
      notes: What was left out, one sentence each.
    Raises:
      InputError: No files, or labels that do not fit them.
    """

    name: str
    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        labels = self.labels
        integers = np.issubdtype(labels.dtype, np.integer)
        if not self.files or labels.shape != (len(self.files),) or not integers:
            raise InputError(
                f"{self.name}: {len(self.files)} files and {labels.dtype} labels "
                f"{labels.shape}; expected an integer for each, at least one."
            )
        check_range(self.name, labels, self.num_classes)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(size, size, 3)``, of :meth:`fitted` images."""
        return self.size, self.size, 3

    def largest_side(self) -> int:
        """Pixels of the shorter side of the largest image; reads the headers alone."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return max(pool.map(short_side, self.files))

    def raw(self, index: int) -> np.ndarray:
        """One image as decoded, ``(h, w, 3)`` uint8."""
        return decode(self.files[index])

    def fitted(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices``, resized and cropped, ``(n, size, size, 3)`` uint8."""
        chosen = np.arange(len(self))[indices]
        images = np.empty((len(chosen), *self.shape), np.uint8)
        for image, index in zip(images, chosen, strict=True):
            image[:] = fit(self.raw(index), self.size)
        return images

    def normalised(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` as the network evaluates them, float32."""
        return normalise(self.fitted(indices), self.mean, self.std)


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in ``folder`` that are not hidden; empty if it does not exist."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(name for name in names if not name.startswith("."))


_PARTS = ("train", "val", "test")
"""Names of folders that are no classes."""


def holds_classes(root: Path) -> bool:
    """Whether a folder holds images in class folders, below ``train`` or directly."""
    if class_folders(root / "train"):
        return True
    classes = class_folders(root)
    return not set(classes) & set(_PARTS) and any(
        file.lower().endswith(SUFFIXES) for name in classes for file in _files(root / name)
    )


def image_folder(
    root: Path,
    *,
    strict: bool,
    size: int,
    val_fraction: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Splits[FolderDataset]:
    """Opens ``root/train/CLASS/...`` and ``root/val/CLASS/...`` (or ``test``): JPEG and PNG files,
    in the order of torchvision's ``ImageFolder``. Where there are training images alone, or
    ``root/CLASS/...``, ``val_fraction`` of each class become test images.

    Every file is decoded once. Damaged ones are left out and counted in ``notes``.

    Args:
      size: See :class:`FolderDataset`.
      val_fraction: Part of the images that is set aside; None where test images are there.
    Raises:
      InputError: A missing folder, an empty class, a class without training images, or with
        ``strict`` a damaged image.
    """
    tests = next((name for name in ("val", "test") if class_folders(root / name)), None)

    def part(name: str, classes: list[str]) -> FolderDataset:
        return _part(root, name, classes, strict, size, on_progress)

    if tests is None:
        return _split(root, val_fraction, part)
    if val_fraction is not None:
        raise has_own_tests(root, val_fraction)
    classes = class_folders(root / "train")
    unknown = [name for name in class_folders(root / tests) if name not in classes]
    if unknown:
        raise InputError(
            f"{root / tests} has {some(unknown)}, which {root / 'train'} does not; it has "
            f"{some(classes)}. Name the folders alike."
        )
    return Splits(part("train", classes), part(tests, classes))


def _split(
    root: Path, val_fraction: float | None, part: Callable[[str, list[str]], FolderDataset]
) -> Splits[FolderDataset]:
    """Training images, some of which become test images."""
    within = "train" if class_folders(root / "train") else ""
    if val_fraction is None:
        sorted_ = f"put test images into {root / 'val'}, sorted like those in {root / 'train'}"
        if not within:
            sorted_ = f"sort the class folders into {root / 'train'} and {root / 'val'}"
        below = " below train/" if within else ""
        raise InputError(
            f"{root} has class folders{below}, and no test images below val/ or test/. Set some of "
            f"each class aside with `val_fraction={HELD_OUT}`, or {sorted_}."
        )
    whole = part(within, class_folders(root / within))
    in_test = held_out(whole.labels, val_fraction)
    lacking = set(whole.labels.tolist()) - set(whole.labels[~in_test].tolist())
    if lacking:
        names = [whole.class_names[label] for label in sorted(lacking)]
        raise InputError(
            f"val_fraction={val_fraction:g} leaves no training image of {some(names)} in "
            f"{root / within}. Choose a smaller fraction, or add images."
        )
    count = f"{in_test.sum():,} of {len(whole):,}"
    note = set_aside(whole.name, val_fraction, count)
    parts = [
        replace(
            whole,
            name=f"{root.name}/{name}",
            files=tuple(file for file, one in zip(whole.files, chosen, strict=True) if one),
            labels=whole.labels[chosen],
            notes=(*whole.notes, note) if name == "train" else (),
        )
        for name, chosen in (("train", ~in_test), ("test", in_test))
    ]
    return Splits(*parts)


def _files(folder: Path) -> Iterator[str]:
    """Every file below a folder that is not hidden, in torchvision's order."""
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        yield from (os.path.join(place, name) for name in sorted(names) if not name.startswith("."))


def _part(
    root: Path,
    part: str,
    classes: list[str],
    strict: bool,
    size: int,
    on_progress: Callable[[str], None] | None,
) -> FolderDataset:
    folder, name = root / part, f"{root.name}/{part}".rstrip("/")
    found = [(file, label) for label, name in enumerate(classes) for file in _files(folder / name)]
    images = [(file, label) for file, label in found if file.lower().endswith(SUFFIXES)]
    _refuse_empty(folder, classes, images, f"no image ({', '.join(SUFFIXES)})")
    notes = []
    if others := {file for file, _ in found} - {file for file, _ in images}:
        kinds = sorted({os.path.splitext(file)[1] or "no suffix" for file in others})
        notes.append(
            f"{name}: files left out because they are no JPEG or PNG: {len(others):,} "
            f"({some(kinds)})."
        )
    problems = _damaged([file for file, _ in images], name, on_progress)
    if problems:
        listed = some([f"{os.path.relpath(file, root)} ({why})" for file, why in problems.items()])
        count = f"{len(problems):,} of {len(images):,} images cannot be decoded"
        if strict:
            raise InputError(
                f"{name}: {count}: {listed}. Remove or replace them, or read without strict, "
                f"which leaves them out."
            )
        notes.append(f"{name}: {count} and are left out: {listed}.")
        images = [(file, label) for file, label in images if file not in problems]
        _refuse_empty(folder, classes, images, "no image that can be decoded")
    labels = np.asarray([label for _, label in images], np.int32)
    files, names, notes = tuple(file for file, _ in images), tuple(classes), tuple(notes)
    return FolderDataset(
        name=name, files=files, labels=labels, class_names=names, size=size, notes=notes
    )


def _refuse_empty(
    folder: Path, classes: list[str], images: list[tuple[str, int]], lack: str
) -> None:
    """Raises InputError for an empty class folder; below ``val`` or ``test`` it may be missing."""
    present = {label for _, label in images}
    absent = [name for label, name in enumerate(classes) if label not in present]
    empty = [name for name in absent if (folder / name).is_dir()]
    if empty:
        raise InputError(
            f"{folder} has {lack} for {some(empty)}. Add images, or remove the "
            f"folder{'s' if len(empty) > 1 else ''}."
        )


def _damaged(
    files: list[str], name: str, on_progress: Callable[[str], None] | None
) -> dict[str, str]:
    problems = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), _PIECE):
            piece = files[start : start + _PIECE]
            checked = zip(piece, pool.map(damage, piece), strict=True)
            problems |= {file: problem for file, problem in checked if problem is not None}
            if on_progress is not None:
                on_progress(f"{name}: {start + len(piece):,} of {len(files):,} images checked")
    return problems
