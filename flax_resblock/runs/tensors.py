"""What knows how to write the tensors of a model, whatever network it is."""

from __future__ import annotations

from typing import Any

from flax import nnx

from flax_resblock.config import Config
from flax_resblock.convert.codecs import AS_IS
from flax_resblock.convert.own import carried
from flax_resblock.convert.state_map import Entry, StateMap, TensorMap
from flax_resblock.nn.blocks import BottleneckBlock, ResidualBlock
from flax_resblock.nn.resnet import ResNet
from flax_resblock.nn.variables import KEPT


def config_of(model: nnx.Module) -> Config | None:
    """The configuration of a network or block of this library; None for any other."""
    known = isinstance(model, ResNet | ResidualBlock | BottleneckBlock)
    return model.config if known else None


def tensors_of(model: nnx.Module) -> TensorMap:
    """The tensors of a model and their names in PyTorch: what a ported network carries; else, for a
    network of this library, its map in torchvision's names; else Flax's own names."""
    own, config = carried(model), config_of(model)
    if own is not None:
        return own
    return flax_tensors(model) if config is None else StateMap(config, "torchvision")


def has_torch_names(model: nnx.Module) -> bool:
    """Whether the tensors of a model have names in PyTorch."""
    return carried(model) is not None or config_of(model) is not None


def flax_tensors(model: nnx.Module) -> TensorMap:
    """Everything that a model keeps, under Flax's names: the attribute paths."""
    entries, parameters = [], []
    flat: Any = nnx.to_flat_state(nnx.state(model, KEPT))
    for path, variable in flat:
        name = str(path[-1])
        role = {"num_batches_tracked": "counter", "var": "variance"}.get(name, "buffer")
        is_parameter = isinstance(variable, nnx.Param)
        role = "weight" if is_parameter else role
        entry = Entry(path, ".".join(map(str, path)), AS_IS, role, tuple(variable.shape))
        entries.append(entry)
        parameters += [entry] if is_parameter else []
    return TensorMap(entries, parameters)
