"""What an ``nn.Module`` says beyond its state dict: strides, padding, norm constants. Duck-typed;
imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from flax_resblock.checkpoint.unwrap import PREFIXES
from flax_resblock.config import BlockConfig, Config, ResNetConfig, Slot, SlotKind, walk
from flax_resblock.convert.detection.assumptions import TRAITS
from flax_resblock.convert.state_map import StateMap
from flax_resblock.errors import InputError, some

_POOL_FIELDS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_MAX_POOL, _NOTHING = [("MaxPool2d", 3, 2, 1, 1, False)], [("Identity",), ("Sequential",)]
_STEM_POOLS = {
    ("imagenet", "none"): _MAX_POOL,
    ("deep", "none"): _MAX_POOL,
    ("imagenet", "blur"): [("Sequential",)],
    ("deep", "blur"): [("Sequential",)],
}
"""By stem and antialias, what a module named as the stem's pooling may be, with the values of its
fields; in a CIFAR stem it does nothing.
"""
_BLURS = ("Blur", "BlurPool2d")
_AVERAGE_FIELDS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")


def _square(value: Any) -> int | tuple[int, ...] | str:
    """``(2, 2)`` as 2; anything else as it is."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value


def _expected_geometry(state_map: StateMap) -> dict[str, tuple[int, int, int, int]]:
    """Stride, padding, dilation and groups of every convolution, by slot name."""
    config = state_map.config
    geometry = {}
    if isinstance(config, ResNetConfig):
        stride = 1 if config.stem == "cifar" else 2
        geometry |= {
            "stem.conv": (stride, 3 if config.stem == "imagenet" else 1, 1, 1),
            "stem.conv1": (2, 1, 1, 1),
        }
        geometry |= dict.fromkeys(("stem.conv2", "stem.conv3"), (1, 1, 1, 1))
    for stage, index, block in _blocks(config):
        for slot in block.slots(stage, index):
            if slot.kind is SlotKind.CONV:
                geometry[slot.name] = _block_geometry(block, slot)
    return geometry


def _blocks(config: Config) -> list[tuple[str, int | None, BlockConfig]]:
    return list(config.blocks()) if isinstance(config, ResNetConfig) else [("", None, config)]


def _block_geometry(block: BlockConfig, slot: Slot) -> tuple[int, int, int, int]:
    size = slot.shape[0]
    if slot.role.startswith("shortcut"):
        return (block.stride if slot.role == "shortcut.conv" else 1), 0, 1, 1
    dilation = block.dilation if size == 3 else 1
    return (
        block.strides[int(slot.role[-1]) - 1],
        dilation * (size // 2),
        dilation,
        block.groups if size == 3 else 1,
    )


@dataclass(frozen=True)
class ModuleFacts:
    """Attributes of a module tree that decide its function.

    Attributes:
      modules: Submodules by name, wrapper prefixes removed.
      stride: The largest stride of any convolution: that of a bare block.
      norm_options: ``eps`` and ``momentum`` that all norms share.
    """

    modules: dict[str, Any]
    stride: int | None
    norm_options: dict[str, float | None]

    def differences(self, state_map: StateMap) -> list[str]:
        """Every way in which a convolution or norm would compute something else than its Flax twin,
        one sentence each.
        """
        differences = []
        expected = _expected_geometry(state_map)
        for slot in walk(state_map.config):
            module = self.modules.get(state_map.naming.module_name(slot) or "")
            if module is None:
                continue
            if slot.kind is SlotKind.CONV:
                found = tuple(
                    _square(getattr(module, field, None))
                    for field in ("stride", "padding", "dilation", "groups")
                )
                if found != expected[slot.name]:
                    differences.append(
                        f"{slot.name} has (stride, padding, dilation, groups) {found}, "
                        f"expected {expected[slot.name]}"
                    )
                if getattr(module, "padding_mode", "zeros") != "zeros":
                    differences.append(
                        f"{slot.name} pads with {module.padding_mode!r}, expected 'zeros'"
                    )
            elif slot.kind is SlotKind.NORM and not getattr(module, "track_running_stats", True):
                differences.append(f"{slot.name} does not track running statistics")
        return differences + self._other_layers(state_map)

    def _other_layers(self, state_map: StateMap) -> list[str]:
        """Layers without tensors, which no state dict shows: activations other than ReLU, and
        pooling that the Flax twin does not do.
        """
        config, naming = state_map.config, state_map.naming
        differences = []
        known = {}
        if isinstance(config, ResNetConfig) and "stem.pool" in naming.modules:
            known[naming.modules["stem.pool"]] = (
                "stem.pool",
                _POOL_FIELDS,
                _STEM_POOLS.get((config.stem, config.antialias), _NOTHING),
            )
        for stage, index, block in _blocks(config):
            places: dict[str, list[tuple[Any, ...]]] = {
                "blur": [(name,) for name in _BLURS] if block.blurs else [("Identity",)]
            }
            if block.projects and block.shortcut == "pooled":
                places["shortcut.pool"] = [
                    ("AvgPool2d", block.stride, block.stride, 0, True, False)
                ] + [("Identity",)] * (block.stride == 1)
            for place, expected in places.items():
                slot = Slot(stage, index, place, SlotKind.ACTIVATION)
                known[naming.module_name(slot) or ""] = (slot.name, _AVERAGE_FIELDS, expected)
        attention = naming.modules.get("attention")
        for name, module in self.modules.items():
            layer, home = type(module).__name__, type(module).__module__
            if name in known and name:
                place, fields, expected = known[name]
                found = (
                    (layer, *(_square(getattr(module, field, None)) for field in fields))
                    if layer in ("MaxPool2d", "AvgPool2d")
                    else (layer,)
                )
                if found not in expected:
                    differences.append(f"{place} is {found}, expected {expected[0]}")
            elif (
                home == "torch.nn.modules.activation"
                and layer != "ReLU"
                and not (layer == "Sigmoid" and attention in name.split("."))
            ):
                differences.append(f"{name} is {layer}, expected ReLU")
            elif (
                home == "torch.nn.modules.pooling"
                and "Avg" not in layer
                and not any(name.startswith(f"{place}.") for place in known if place)
            ):
                differences.append(f"{name} is {layer}; the Flax network pools by the mean")
        return differences

    def traits(self, state_map: StateMap) -> dict[str, Any]:
        """What the module says of the things that no tensor tells: the values under which it has
        the fewest :meth:`differences`.

        Args:
          state_map: As read off the tensors alone.
        """
        config = state_map.config
        if not isinstance(config, ResNetConfig) or not self.differences(state_map):
            return {}
        last = len(config.depths)
        dilated = [tuple(range(first, last + 1)) for first in range(last + 1, 1, -1)]
        choices = [trait.choices for trait in TRAITS if trait.matters(config)]
        names = [*(trait.field for trait in TRAITS if trait.matters(config)), "dilated_stages"]
        best: tuple[int, dict[str, Any]] | None = None
        for values in product(*choices, dilated):
            traits = dict(zip(names, values, strict=True))
            try:
                number = len(
                    self.differences(StateMap(replace(config, **traits), state_map.naming))
                )
            except ValueError:
                continue  # such a network does not exist
            if best is None or number < best[0]:
                best = number, traits
        return best[1] if best else {}

    def check(self, state_map: StateMap) -> None:
        """Raises InputError where there are :meth:`differences`."""
        differences = self.differences(state_map)
        if differences:
            raise InputError(
                f"the PyTorch module's tensors fit, but it computes something else than its "
                f"Flax twin: {some(differences)}. "
                "Pass architecture=ResNetConfig(...) or BlockConfig(...) that describes it."
            )


def module_facts(module: Any) -> ModuleFacts:
    """Reads the facts off an ``nn.Module``.

    Raises:
      InputError: Norms that differ among themselves in ``eps`` or ``momentum``.
    """
    modules = dict(module.named_modules())
    while True:
        prefix = next(
            (
                p
                for p in PREFIXES
                if p[:-1] in modules and all(n == "" or f"{n}.".startswith(p) for n in modules)
            ),
            None,
        )
        if prefix is None:
            break
        modules = {
            name.removeprefix(prefix) if name != prefix[:-1] else "": value
            for name, value in modules.items()
            if name
        }
    strides = [
        _square(m.stride) for m in modules.values() if hasattr(m, "stride") and hasattr(m, "weight")
    ]
    norms = {name: (m.eps, m.momentum) for name, m in modules.items() if hasattr(m, "running_var")}
    if len(set(norms.values())) > 1:
        shown = [f"{name} {values}" for name, values in norms.items()]
        raise InputError(
            f"the module's norms differ in (eps, momentum): {some(shown)}. A Flax network has "
            f"one pair for all."
        )
    eps, momentum = next(iter(norms.values()), (1e-5, 0.1))
    stride = max((s for s in strides if isinstance(s, int)), default=None)
    return ModuleFacts(modules, stride, {"eps": eps, "momentum": momentum})
