"""The classification head of a network, where its naming scheme does not expect it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from flax_resblock.checkpoint.unwrap import shared_prefixes
from flax_resblock.config import Config, ResNetConfig
from flax_resblock.convert.detection.backbones import Backbone
from flax_resblock.convert.state_map import TensorInfo, matches_any
from flax_resblock.errors import CheckpointError, some


def linears(found: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Number of inputs of every fully connected layer, by module name."""
    return {
        key.removesuffix(".weight"): info.shape[1]
        for key, info in found.items()
        if key.endswith(".weight") and len(info.shape) == 2
    }


@dataclass(frozen=True)
class Head:
    """The classification head of a network, where the naming scheme does not expect it: the name of
    its module, such as ``"classifier"`` beside ``backbone.*``, and the prefix of the other tensors.
    """

    module: str
    prefix: str

    def holds(self, key: str) -> bool:
        """Whether a tensor belongs to the head."""
        return key in (f"{self.module}.weight", f"{self.module}.bias")

    def note(self, name: str) -> str:
        """Which layer is read as the head, and what that assumes."""
        where = f" of the network under '{self.prefix}'" if self.prefix else ""
        return (
            f"{self.module} is read as the classification head{where} and named {name}; assumed, "
            "as the weights do not show it: it takes the mean of the features over all pixels"
        )


def find_head(found: Mapping[str, TensorInfo]) -> Head | None:
    """The head, where exactly one fully connected layer lies beside the rest."""
    modules = list(linears(found))
    if len(modules) != 1:
        return None
    head = Head(modules[0], "")
    rest = [key for key in found if not head.holds(key)]
    return Head(head.module, "".join(shared_prefixes(rest))) if rest else None


def refuse_head_left_out(
    backbone: Backbone, found: Mapping[str, TensorInfo], config: Config, source: str
) -> None:
    """Raises CheckpointError if a classification head is among the tensors beside a network."""
    if not isinstance(config, ResNetConfig):
        return
    features = config.feature_channels
    widths = linears({key: found[key] for key in found if not backbone.holds(key)})
    left = {
        name: width
        for name, width in widths.items()
        if not matches_any(f"{name}.weight", backbone.projections)
    }
    layers = Counter(name.partition(".")[0] for name in left)
    for name, width in left.items():
        if width == features and layers[name.partition(".")[0]] == 1:
            raise CheckpointError(
                f"{source}: {name} takes the {features} features of the network under "
                f"'{backbone.prefix}' as a classification head does, and is no known part of "
                f"{backbone.name}. A head is never left out."
            )


def several_layers(found: Mapping[str, TensorInfo]) -> str:
    """A sentence on a head of several fully connected layers; empty where there is none."""
    names = list(linears(found))
    if len(names) < 2:
        return ""
    return (
        f"It has {len(names)} fully connected layers: {some(names)}. The tensors do not say what "
        "lies between them, or whether they are the network's head; a network that this library "
        "reads has one, the classification head, which is never left out. To convert the features "
        "alone, put torch.nn.Identity() in the place of the others in PyTorch and save the state "
        "dict."
    )
