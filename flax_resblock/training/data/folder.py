"""Image folders: one folder per class below ``train`` and ``val`` or ``test``, decoded when they
are needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_resblock.errors import InputError, some
from flax_resblock.training.data.dataset import Splits, check_range, normalise
from flax_resblock.training.data.images import damage, decode, fit

IMAGENET_MEAN, IMAGENET_STD = (
    (0.485 * 255, 0.456 * 255, 0.406 * 255),
    (0.229 * 255, 0.224 * 255, 0.225 * 255),
)
SUFFIXES = (".jpg", ".jpeg", ".png")
_PIECE = 1000
"""Files that are checked between two reports of progress."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderDataset:
    """Labelled image files; every access decodes again.

    Attributes:
      name: What it is, for messages.
      files: Paths, one per image.
      labels: ``(N,)``, int32.
      class_names: One per class; a label is a place in it.
      size: Side in pixels of the square that evaluation takes,
        :func:`flax_resblock.training.data.images.fit`.
      mean, std: Per channel, for pixels from 0 to 255; ImageNet's.
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
        if (
            not self.files
            or labels.shape != (len(self.files),)
            or not np.issubdtype(labels.dtype, np.integer)
        ):
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

    def raw(self, index: int) -> np.ndarray:
        """One image as decoded, ``(h, w, 3)`` uint8."""
        return decode(self.files[index])

    def fitted(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` resized and cropped for evaluation, ``(n, size, size, 3)``
        uint8.
        """
        chosen = np.arange(len(self))[indices]
        images = np.empty((len(chosen), *self.shape), np.uint8)
        for image, index in zip(images, chosen, strict=True):
            image[:] = fit(self.raw(index), self.size)
        return images

    def normalised(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` as the network sees them in evaluation, ``(n, size, size, 3)``
        float32.
        """
        return normalise(self.fitted(indices), self.mean, self.std)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, hidden ones excepted, in order; empty where there is no
    such folder.
    """
    return (
        sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if folder.is_dir()
        else []
    )


def image_folder(
    root: Path, *, strict: bool, size: int, on_progress: Callable[[str], None] | None = None
) -> Splits[FolderDataset]:
    """``root/train/CLASS/...`` and ``root/val/CLASS/...``, or ``test`` where there is no ``val``;
    JPEG and PNG, in the order of torchvision's ``ImageFolder``.

    Every file is decoded once to find damaged ones, which are left out and counted in ``notes``.

    Args:
      root: The folder.
      strict: Refuse damaged images instead.
      size: See :class:`FolderDataset`.
      on_progress: Called now and then with a line that says how far the check is.
    Raises:
      InputError: A missing folder, an empty class, a class that training does not know; damaged
        images where ``strict``.
    """
    held_out = next((name for name in ("val", "test") if class_folders(root / name)), None)
    if held_out is None:
        raise InputError(
            f"{root} has class folders below train/, but none below val/ or test/. Put images "
            f"to judge by there, sorted like those in train/."
        )
    classes = class_folders(root / "train")
    unknown = [name for name in class_folders(root / held_out) if name not in classes]
    if unknown:
        raise InputError(
            f"{root / held_out} has {some(unknown)}, which {root / 'train'} does not; it has "
            f"{some(classes)}. Name the folders alike."
        )
    parts = [_part(root, name, classes, strict, size, on_progress) for name in ("train", held_out)]
    return Splits(*parts)


def _files(folder: Path) -> Iterator[str]:
    """Every file below a folder, hidden ones excepted, in torchvision's order."""
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
    folder, name = root / part, f"{root.name}/{part}"
    found = [
        (file, label)
        for label, class_name in enumerate(classes)
        for file in _files(folder / class_name)
    ]
    images = [(file, label) for file, label in found if file.lower().endswith(SUFFIXES)]
    others = sorted(
        {
            os.path.splitext(file)[1] or "no suffix"
            for file, _ in found
            if not file.lower().endswith(SUFFIXES)
        }
    )
    _refuse_empty(
        folder, classes, {label for _, label in images}, f"no image ({', '.join(SUFFIXES)})"
    )
    notes = (
        [
            f"{name}: files left out because they are no JPEG or PNG: "
            f"{len(found) - len(images):,} ({some(others)})."
        ]
        if others
        else []
    )
    problems = _damaged([file for file, _ in images], name, on_progress)
    if problems:
        listed = some(
            [f"{os.path.relpath(file, root)} ({problem})" for file, problem in problems.items()]
        )
        count = f"{len(problems):,} of {len(images):,} images cannot be decoded"
        if strict:
            raise InputError(
                f"{name}: {count}: {listed}. Remove or replace them, or read without strict, "
                f"which leaves them out."
            )
        notes.append(f"{name}: {count} and are left out: {listed}.")
        images = [(file, label) for file, label in images if file not in problems]
        _refuse_empty(
            folder, classes, {label for _, label in images}, "no image that can be decoded"
        )
    labels = np.asarray([label for _, label in images], np.int32)
    return FolderDataset(
        name=name,
        files=tuple(file for file, _ in images),
        labels=labels,
        class_names=tuple(classes),
        size=size,
        notes=tuple(notes),
    )


def _refuse_empty(folder: Path, classes: list[str], present: set[int], lack: str) -> None:
    """A class folder that exists must hold something; below ``val`` or ``test`` a class may have
    none.
    """
    empty = [
        name
        for label, name in enumerate(classes)
        if label not in present and (folder / name).is_dir()
    ]
    if empty:
        raise InputError(
            f"{folder} has {lack} for {some(empty)}. Add images, or remove the "
            f"folder{'s' if len(empty) > 1 else ''}."
        )


def _damaged(
    files: list[str], name: str, on_progress: Callable[[str], None] | None
) -> dict[str, str]:
    """Files that cannot be decoded, and why."""
    problems = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), _PIECE):
            piece = files[start : start + _PIECE]
            problems.update(
                {
                    file: problem
                    for file, problem in zip(piece, pool.map(damage, piece), strict=True)
                    if problem is not None
                }
            )
            if on_progress is not None:
                on_progress(f"{name}: {start + len(piece):,} of {len(files):,} images checked")
    return problems
