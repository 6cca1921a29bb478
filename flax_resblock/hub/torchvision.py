"""torchvision's weights, by the names of its enumerations: the files that torch.hub fetches."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from flax_resblock.errors import InputError, reason, some, visible
from flax_resblock.hub.names import HUB, TORCHVISION_PREFIX, Fetched

SERVER = "https://download.pytorch.org/models"
_CHUNK = 1 << 20
_TIMEOUT = 30
"""Seconds without a byte."""
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


class WeightsFile(NamedTuple):
    """A file, whose name ends with the beginning of its SHA-256, and how it was evaluated.

    Attributes:
      resize: Pixels of the shorter side, of which the central 224 are taken.
    """

    file: str
    resize: int


WEIGHTS = {
    "ResNet18_Weights.IMAGENET1K_V1": WeightsFile("resnet18-f37072fd.pth", 256),
    "ResNet34_Weights.IMAGENET1K_V1": WeightsFile("resnet34-b627a593.pth", 256),
    "ResNet50_Weights.IMAGENET1K_V1": WeightsFile("resnet50-0676ba61.pth", 256),
    "ResNet50_Weights.IMAGENET1K_V2": WeightsFile("resnet50-11ad3fa6.pth", 232),
    "ResNet101_Weights.IMAGENET1K_V1": WeightsFile("resnet101-63fe2227.pth", 256),
    "ResNet101_Weights.IMAGENET1K_V2": WeightsFile("resnet101-cd907fc2.pth", 232),
    "ResNet152_Weights.IMAGENET1K_V1": WeightsFile("resnet152-394f9c45.pth", 256),
    "ResNet152_Weights.IMAGENET1K_V2": WeightsFile("resnet152-f82ba261.pth", 232),
    "ResNeXt50_32X4D_Weights.IMAGENET1K_V1": WeightsFile("resnext50_32x4d-7cdf4587.pth", 256),
    "ResNeXt50_32X4D_Weights.IMAGENET1K_V2": WeightsFile("resnext50_32x4d-1a0047aa.pth", 232),
    "ResNeXt101_32X8D_Weights.IMAGENET1K_V1": WeightsFile("resnext101_32x8d-8ba56ff5.pth", 256),
    "ResNeXt101_32X8D_Weights.IMAGENET1K_V2": WeightsFile("resnext101_32x8d-110c445d.pth", 232),
    "ResNeXt101_64X4D_Weights.IMAGENET1K_V1": WeightsFile("resnext101_64x4d-173b62eb.pth", 232),
    "Wide_ResNet50_2_Weights.IMAGENET1K_V1": WeightsFile("wide_resnet50_2-95faca4d.pth", 256),
    "Wide_ResNet50_2_Weights.IMAGENET1K_V2": WeightsFile("wide_resnet50_2-9ba9bcbe.pth", 232),
    "Wide_ResNet101_2_Weights.IMAGENET1K_V1": WeightsFile("wide_resnet101_2-32ee1156.pth", 256),
    "Wide_ResNet101_2_Weights.IMAGENET1K_V2": WeightsFile("wide_resnet101_2-d733dc28.pth", 232),
}


def fetch_from_torchvision(name: str) -> Fetched:
    """See :func:`flax_resblock.hub.fetch`. The cache is torch.hub's, so that both share it."""
    found = WEIGHTS.get(name.removeprefix(TORCHVISION_PREFIX))
    if found is None:
        raise InputError(
            f"{visible(name)} is no weights of torchvision that are known here; known: "
            f"{some(sorted(WEIGHTS), len(WEIGHTS))}."
        )
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or str(Path(home) / "torch")
    folder = Path(home).expanduser() / "hub" / "checkpoints"
    path = folder / found.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                _download(name, f"{SERVER}/{found.file}", path)
            _check(name, path, path)
    except OSError as error:
        raise InputError(
            f"{name} could not be fetched to {path}: {reason(error)}. Run this again; it goes on "
            f"where it stopped."
        ) from error
    return Fetched(path, {HUB: f"{name} ({found.file})", "images": _images(found)})


def _download(name: str, url: str, path: Path) -> None:
    """Fetches a file under another name, from where an earlier call stopped, and renames it once
    its digest is right.
    """
    if any(os.environ.get(one, "").upper() in ("1", "ON", "YES", "TRUE") for one in _OFFLINE):
        raise InputError(
            f"{name} is not in the cache ({path.parent}), and HF_HUB_OFFLINE is set. Fetch it "
            f"where there is a network, or give the path of a file."
        )
    part = path.with_name(f"{path.name}.partial")
    there = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            there = there if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
            size = int(answer.headers.get("Content-Length") or 0)
            columns = TextColumn(path.name), BarColumn(), DownloadColumn(), TransferSpeedColumn()
            progress = Progress(*columns, console=Console(stderr=True), transient=True)
            with part.open("ab" if there else "wb") as handle, progress:
                task = progress.add_task(path.name, total=there + size or None, completed=there)
                while chunk := answer.read(_CHUNK):
                    handle.write(chunk)
                    progress.advance(task, len(chunk))
                handle.flush()
                os.fsync(handle.fileno())
        if size and part.stat().st_size != there + size:
            raise InputError(
                f"{name} arrived in part: {part.stat().st_size:,} of {there + size:,} bytes. Run "
                f"this again; it goes on where it stopped."
            )
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # nothing is left to fetch
            raise InputError(
                f"{name} could not be served: {url} answered {error.code} {error.reason}. Try "
                f"again later."
            ) from error
    except urllib.error.URLError as error:
        raise InputError(
            f"{name} could not be fetched: {url} cannot be reached ({visible(str(error.reason))}). "
            f"Check the network and run this again, or give the path of a file."
        ) from error
    _check(name, part, path)
    os.replace(part, path)


def _check(name: str, file: Path, path: Path) -> None:
    """Raises InputError for a file that is not as the digest in its name says, and removes it."""
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    prefix = path.stem.rpartition("-")[2]
    if not digest.startswith(prefix):
        file.unlink()
        raise InputError(
            f"{name}: {path.name} is damaged: its SHA-256 begins with {digest[: len(prefix)]}, not "
            f"with {prefix}. It was removed from the cache. Run this again; if the digest differs "
            f"again, a proxy changes the file."
        )


def _images(weights: WeightsFile) -> str:
    """How torchvision evaluates them, as this library stores it in its checkpoints."""
    preprocessing = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "size": [224, 224],
        "crop_pct": 224 / weights.resize,
        "interpolation": "bilinear",
        "keep_ratio": True,
        "origin": "as torchvision evaluates these weights",
        "white": 255.0,
    }
    return json.dumps({"preprocessing": preprocessing, "labels": []})
