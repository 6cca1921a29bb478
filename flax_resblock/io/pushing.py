"""Models to a repository of Hugging Face's hub: weights, certificate and a model card."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from flax import nnx

from flax_resblock._version import __version__
from flax_resblock.config import Config, ResNetConfig, name_of
from flax_resblock.convert import Naming, naming_of
from flax_resblock.convert.hubs import files_of
from flax_resblock.convert.image_facts import carried_images
from flax_resblock.convert.opening import ReadOptions
from flax_resblock.errors import InputError
from flax_resblock.hub import HUB_PREFIX, push_folder
from flax_resblock.io.writing import model_config, save
from flax_resblock.parity.certificate import certificate_of, read_certificate
from flax_resblock.parity.certify import certify

_WEIGHTS = "model.safetensors"
_LOADERS = {
    "huggingface": 'transformers.AutoModelForImageClassification.from_pretrained("{name}")',
    "timm": 'timm.create_model("hf-hub:{name}", pretrained=True)',
}


def push(model: nnx.Module, name: str, naming: str | Naming | None = None) -> str:
    """Writes a model into a folder, certifies it, and pushes it as one commit to
    ``hf-hub:USER/NAME``, or ``@BRANCH`` of it. Without ``naming`` the names are transformers' if it
    can build the network, else timm's, else torchvision's, or those of the module that a ported
    network came from.

    Returns:
      The name with the revision of the commit, by which :func:`flax_resblock.load` reads it.
    Raises:
      InputError: The frameworks differ on what was written, no access, or no network. Nothing was
        changed on the hub then.
    """
    if not name.startswith(HUB_PREFIX):
        raise InputError(f"{name} can only be read. Push a model to {HUB_PREFIX}USER/NAME.")
    repository = name.removeprefix(HUB_PREFIX).partition("@")[0]
    config = model_config(model, naming)
    with tempfile.TemporaryDirectory(prefix="flax_resblock.") as scratch:
        folder = Path(scratch) / "model"
        scheme = None if config is None else _written(model, config, folder, naming)
        if config is None:
            save(model, folder)
        entry = _entry(folder, config, scheme)
        card = _card(repository, model, config, scheme, entry)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return push_folder(folder, name, f"Weights written by flax-resblock {__version__}")


def _written(
    model: nnx.Module, config: Config, folder: Path, naming: str | Naming | None
) -> Naming:
    """Writes the weights of a network of this library; returns their naming scheme."""
    candidates = ["huggingface", "timm", "torchvision"] if naming is None else [naming]
    schemes = [naming_of(one) for one in candidates]
    scheme = next(one for one in schemes if one is schemes[-1] or _fits(model, config, one))
    if scheme.hub:
        save(model, folder, naming=scheme)
    else:
        folder.mkdir()
        save(model, folder / _WEIGHTS, naming=scheme)
    return scheme


def _fits(model: nnx.Module, config: Config, scheme: Naming) -> bool:
    try:
        files_of(scheme.hub, config, {}, carried_images(model))
        return True
    except InputError:
        return False


def _entry(folder: Path, config: Config | None, scheme: Naming | None) -> dict[str, Any]:
    """The certificate's entry; raises InputError if the frameworks differ."""
    if config is None or scheme is None:  # the folder of a port has its certificate already
        return read_certificate(folder / "parity.json")["weights.safetensors"]
    out = folder if scheme.hub else folder / _WEIGHTS
    verification = certify(out, ReadOptions(config, scheme), {"path": "a Flax model in memory"})
    if verification.get("passed") is False:
        raise InputError(
            f"PyTorch and Flax do not compute the same with what was written ("
            f"{verification['worst']}). It was not pushed."
        )
    return next(iter(read_certificate(certificate_of(out)).values()))


def _card(
    repository: str,
    model: nnx.Module,
    config: Config | None,
    scheme: Naming | None,
    entry: dict[str, Any],
) -> str:
    """The model card, with the certificate in words."""
    head = {"library_name": "flax-resblock", "tags": ["flax", "jax", "resnet", "flax-resblock"]}
    if isinstance(config, ResNetConfig) and config.num_classes is not None:
        head["pipeline_tag"] = "image-classification"
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    kind = type(model).__name__ if config is None else name_of(config)
    use = f'import flax_resblock\n\nmodel = flax_resblock.load("hf-hub:{repository}")'
    if config is None:
        use = (
            f"# hf download {repository} --local-dir out; read its code before you import it\n"
            f"import flax_resblock\nfrom out.{kind.lower()} import {kind}\n\n"
            f"model = flax_resblock.load_ported('out', {kind})"
        )
    loader = _LOADERS.get("" if scheme is None else scheme.name, "").format(name=repository)
    also = f"\nIn PyTorch: `{loader}`\n" if loader else ""
    return f"""---
{front}
---

# {repository.rpartition("/")[2]}

{kind}, written by flax-resblock {__version__}.

```python
{use}
```
{also}{_images(model)}
## Parity certificate

{_certificate(entry)}

The whole certificate, with the SHA-256 of every file and tensor, is in this repository
(`parity.json`, or `{_WEIGHTS}.parity.json`); `flax-resblock verify --certificate` checks it again.
"""


def _images(model: nnx.Module) -> str:
    facts = carried_images(model)
    wanted = facts.preprocessing
    if wanted is None:
        return ""
    height, width = wanted.size
    return (
        f"\n## Images\n\n{height}x{width} pixels, {wanted.interpolation}, crop "
        f"{wanted.crop_pct:.4g}; mean {list(wanted.mean)}, std {list(wanted.std)} for pixels from "
        f"0 to 1 ({wanted.origin}). `flax_resblock.preprocess(images, model)` makes them.\n"
    )


def _certificate(entry: dict[str, Any]) -> str:
    found = entry["verification"]
    if "skipped" in found:
        return f"The frameworks were not compared: {found['skipped']}."
    rows = {"compared with": found["compared_with"]}
    if "worst" in found:
        worst = found["worst"]
        error = f"{float(worst['error']):.1e} at {worst['slot']}, limit {worst['limit']:g}"
        rows |= {
            "criterion": found["criterion"],
            "tensors": found["tensors"],
            "largest error": error,
        }
    rows |= {"versions": ", ".join(f"{k} {v}" for k, v in entry["versions"].items())}
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    words = "PyTorch and Flax agree on these weights."
    if "figures" in found:
        words = (
            "PyTorch and Flax agreed when the network was ported, with the weights of that time. "
            "The SHA-256 are those of the weights here."
        )
    return f"{words}\n\n| | |\n|---|---|\n{lines}"
