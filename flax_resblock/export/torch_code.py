"""A network as a file of plain PyTorch, for those who have its weights and not this library.

The code is that of ``torch_ref``, read as text; neither torch nor ``torch_ref`` is imported."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from flax_resblock._version import __version__
from flax_resblock.config import Config, ResNetConfig, name_of
from flax_resblock.errors import InputError

_MODULES = ("layers", "blocks", "resnet")


def torch_code(config: Config, norm_options: Mapping[str, float | None]) -> str:
    """Source text of a module whose ``network()`` builds the network in PyTorch, with torchvision's
    attribute names.

    Args:
      norm_options: ``eps`` and ``momentum`` of every norm.
    Raises:
      InputError: A bare block.
    """
    if not isinstance(config, ResNetConfig):
        raise InputError("`torch_code=...` writes whole networks, and this is a bare block.")
    imports: dict[str, None] = {}
    bodies = []
    for module in _MODULES:
        text = _source(module)
        heads = [node for node in ast.parse(text).body if isinstance(node, _IMPORTS)]
        lines = [ast.unparse(node) for node in heads if not _inside(node)]
        imports |= dict.fromkeys(lines)
        bodies.append("\n".join(text.splitlines()[heads[-1].end_lineno :]).strip())
    plain = sorted(imports, key=lambda line: (line.split()[1].startswith("torch"), line))
    arguments = "".join(
        f"        {one.name}={getattr(config, one.name)!r},\n"
        for one in fields(ResNetConfig)
        if getattr(config, one.name) != one.default
    )
    norms = {"eps": 1e-5, "momentum": 0.1, **norm_options}
    return (
        f'"""{name_of(config)}, in PyTorch.\n\n'
        f"    state = torch.load(FILE, weights_only=True)\n"
        f"    network().load_state_dict(state, strict=True)\n\n"
        f'Written by flax-resblock {__version__}."""\n\n'
        f"from __future__ import annotations\n\n"
        + "\n".join(plain)
        + "\n\n\n"
        + "\n\n\n".join(bodies)
        + f'\n\n\ndef network() -> ResNet:\n    """{name_of(config)}, with fresh weights."""\n'
        f"    net = ResNet(\n{arguments}    )\n"
        f"    for module in net.modules():\n"
        f"        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | FrozenBatchNorm2d):\n"
        f"            module.eps = {norms['eps']!r}\n"
        f"        if isinstance(module, nn.BatchNorm2d):\n"
        f"            module.momentum = {norms['momentum']!r}\n"
        f"    return net\n"
    )


_IMPORTS = (ast.Import, ast.ImportFrom)


def _inside(node: ast.stmt) -> bool:
    """Whether an import is of the file itself, or of the future."""
    module = getattr(node, "module", None) or ""
    return module.startswith(("torch_ref", "__future__"))


def _source(module: str) -> str:
    found = find_spec("torch_ref")
    folder = Path(next(iter(found.submodule_search_locations or ()))) if found else Path()
    return (folder / f"{module}.py").read_text(encoding="utf-8")
