"""Opens data of any kind, by name or by the content of a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_resblock.errors import InputError, reason
from flax_resblock.training.data.cifar import EDITIONS, cifar_folder
from flax_resblock.training.data.dataset import Dataset, DataSource, Splits, has_own_tests
from flax_resblock.training.data.digits import digits
from flax_resblock.training.data.folder import holds_classes, image_folder
from flax_resblock.training.data.idx import find_idx, idx_folder
from flax_resblock.training.data.npz import npz_archive

_KNOWN = (
    "'digits'; an IDX folder (train-images-idx3-ubyte and its three companions, also .gz); a "
    f"CIFAR-10 or CIFAR-100 folder ({', '.join(edition.folder for edition in EDITIONS)}); an .npz "
    "archive; an image folder (train/CLASS/*.jpg or *.png, and val/ or test/ beside train/; or "
    "CLASS/*.jpg or *.png, with `val_fraction=...`)"
)


def open_data(
    spec: str | Path,
    *,
    strict: bool = False,
    image_size: int | None = None,
    val_fraction: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Splits[DataSource]:
    """Opens training and test images of any kind, recognised by their content.

    Args:
      spec: ``"digits"``, or a path: an IDX folder, a CIFAR folder or its parent, an ``.npz``
        archive, an image folder.
      strict: Refuse an image folder with damaged images instead of leaving them out. Damaged files
        of other kinds are always refused.
      image_size: Side in pixels to which the images of a folder are resized, 224 by default. Other
        data keep their size.
      val_fraction: Part of the images of each class that become test images, where the data have
        none of their own. The choice depends on the images alone.
      on_progress: Called with a line of text while an image folder is checked.
    Raises:
      InputError: Nothing readable; the message says what was looked for.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size={image_size} must be a positive number of pixels.")
    try:
        splits = digits() if spec == "digits" else _with_tests(Path(spec))
        if splits is None:
            how = {"strict": strict, "size": image_size or 224, "on_progress": on_progress}
            splits = _at(Path(spec), val_fraction, how)
        elif val_fraction is not None:
            raise has_own_tests(spec, val_fraction)
    except OSError as error:
        raise InputError(f"{spec} cannot be read ({reason(error)}).") from error
    train, test = splits
    if train.shape != test.shape:
        raise InputError(
            f"{train.name} has images of {_size(train)} and {test.name} of {_size(test)}; they "
            f"must be alike. They belong to different data."
        )
    if image_size is not None and train.shape[:2] != (image_size, image_size):
        raise InputError(
            f"image_size={image_size} is for image folders; {train.name} has images of "
            f"{_size(train)}, which are taken as they are. Leave it out."
        )
    return splits


def _size(source: DataSource) -> str:
    height, width, channels = source.shape
    return f"{height}x{width} pixels in {channels} channel{'s' if channels > 1 else ''}"


def _with_tests(path: Path) -> Splits[Dataset] | None:
    """Data of a kind that always has test images of its own; None for any other path."""
    if any(find_idx(path, stem, dimensions) for stem in ("train", "t10k") for dimensions in (3, 1)):
        return idx_folder(path)
    places = [
        (place, one) for one in EDITIONS for place in (path, path / one.folder) if one.within(place)
    ]
    if len(places) > 1:
        raise InputError(
            f"{path} holds {', '.join(place.name for place, _ in places)}. Say which: "
            f"{places[0][0]}, for example."
        )
    return cifar_folder(*places[0]) if places else None


def _at(path: Path, val_fraction: float | None, how: dict[str, Any]) -> Splits[DataSource]:
    """Data of the other kinds; ``how`` an image folder is read."""
    if not path.exists():
        raise InputError(f"{path} does not exist. Data are {_KNOWN}.")
    if path.is_file():
        if path.suffix == ".npz":
            return npz_archive(path, val_fraction)
        packed = path.name.endswith((".tar.gz", ".tgz", ".tar"))
        unpack = f" Unpack it first: tar xf {path.name}." if packed else ""
        raise InputError(f"{path} is a file of no known kind.{unpack} Data are {_KNOWN}.")
    if holds_classes(path):
        return image_folder(path, val_fraction=val_fraction, **how)
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    shown = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "")
    raise InputError(
        f"{path} holds no data of a known kind; it has {shown or 'nothing'}. Looked for {_KNOWN}."
    )
