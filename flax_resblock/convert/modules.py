"""What an ``nn.Module`` says beyond its state dict. Duck-typed; imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from flax_resblock.checkpoint.unwrap import PREFIXES, without_wrappers
from flax_resblock.config import Activation, Branch, ResNetConfig, Slot, SlotKind, choices_of, walk
from flax_resblock.convert.detection.assumption_rules import ASSUMPTION_RULES
from flax_resblock.convert.naming import TORCH_ACTIVATIONS
from flax_resblock.convert.state_map import StateMap
from flax_resblock.errors import InputError, some

_CONVOLUTIONS = (SlotKind.CONV, SlotKind.BIASED_CONV, SlotKind.CHANNEL_CONV)
_POOLS = {
    SlotKind.MAX_POOL: (("MaxPool2d", "SameMaxPool2d"), {"dilation": 1, "ceil_mode": False}),
    SlotKind.AVERAGE_POOL: (("AvgPool2d",), {"ceil_mode": True, "count_include_pad": False}),
    SlotKind.BLUR: (("Blur", "BlurPool2d"), {}),
}
"""Classes of the layers without tensors, and their fields that no slot has."""
_IN_TRAINING = ("not track running statistics", "normalises each image on its own in training")
"""Differences of norms that no evaluation shows."""
_STANDARDISES = "StdConv"
"""In the name of every convolution that standardises its kernel before it uses it."""
_FROZEN = "FrozenBatchNorm2d"
_POOLING = {name for classes, _ in _POOLS.values() for name in classes}


def _square(value: Any) -> int | tuple[int, ...] | str:
    """``(2, 2)`` as 2; anything else as it is."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value


def _numbers(module: Any, *names: str) -> tuple[Any, ...]:
    return tuple(_square(getattr(module, name, None)) for name in names)


def _call(options: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{name}={value}' for name, value in options.items())})"


def _is_activation(module: Any, layer: str, fields: Mapping[str, Any]) -> bool:
    return type(module).__name__ == layer and all(
        getattr(module, name, None) == value for name, value in fields.items()
    )


def _difference(slot: Slot, module: Any) -> str | None:
    """How a module computes something else than its slot says; None where it does not."""
    if slot.kind in _CONVOLUTIONS and type(module).__name__ != "Linear":  # one pixel, as a matrix
        names = ("stride", "padding", "dilation", "groups")
        found, expected = _numbers(module, *names), tuple(getattr(slot, name) for name in names)
        if found != expected:
            return f"{slot.name} has ({', '.join(names)}) {found}, expected {expected}"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"{slot.name} pads with {module.padding_mode!r}, expected 'zeros'"
        eps = module.eps if _STANDARDISES in type(module).__name__ else None
        if eps != slot.standardized:
            how = "as it is" if slot.standardized is None else f"with eps {slot.standardized}"
            return f"{slot.name} is {type(module).__name__} (eps {eps}), expected a kernel {how}"
    elif slot.kind is SlotKind.GROUP_NORM:
        found, expected = getattr(module, "num_groups", None), slot.groups
        if found != expected:
            return f"{slot.name} is {type(module).__name__} of {found} groups, expected {expected}"
    elif slot.kind is SlotKind.NORM:
        if not getattr(module, "track_running_stats", True):
            return f"{slot.name} does {_IN_TRAINING[0]}"
        if type(module).__name__.startswith("InstanceNorm"):
            return f"{slot.name} is {type(module).__name__}, which {_IN_TRAINING[1]}"
    elif slot.kind in _POOLS:
        classes, fixed = _POOLS[slot.kind]
        layer = type(module).__name__
        geometry = {"kernel_size": slot.shape[0], "stride": slot.stride, "padding": slot.padding}
        expected = {} if slot.kind is SlotKind.BLUR else geometry | fixed
        found = dict(zip(expected, _numbers(module, *expected), strict=True))
        if layer not in classes or found != expected:
            return f"{slot.name} is {layer}{_call(found)}, expected {classes[0]}{_call(expected)}"
    return None


@dataclass(frozen=True)
class ModuleFacts:
    """Attributes of a module tree that decide its function: submodules by name, without wrappers;
    the largest stride of any convolution, which is that of a bare block; and ``eps`` and
    ``momentum`` that all norms share.
    """

    modules: dict[str, Any]
    stride: int | None
    norm_options: dict[str, float | None]

    def differences(self, state_map: StateMap) -> list[str]:
        """Every way in which a layer differs from its Flax counterpart, one sentence each."""
        places = {state_map.naming.module_name(slot): slot for slot in walk(state_map.config)}
        here = [(slot, self.modules.get(name)) for name, slot in places.items() if name is not None]
        found = (_difference(slot, module) for slot, module in here if module is not None)
        blurs = [slot for slot in walk(state_map.config) if slot.kind is SlotKind.BLUR]
        blurred = {slot.name for slot, module in here if module is not None}
        absent = [f"{slot.name} is absent" for slot in blurs if slot.name not in blurred]
        pools = [slot for slot in walk(state_map.config) if slot.name == "stem.pool"]
        placed = {state_map.naming.module_name(slot) in self.modules for slot in pools}
        home = state_map.naming.modules.get("stem.pool")
        config = state_map.config
        over = "Max" if isinstance(config, ResNetConfig) and config.head_pool == "max" else "Avg"
        pools, blocks = [] if True in placed else pools, state_map.naming.inside_blocks(config)
        others = self._other_layers(places, blocks, pools, home, over)
        return [words for words in found if words] + absent + list(others)

    def trains_otherwise(self, state_map: StateMap) -> bool:
        """Whether a norm trains otherwise than a batch norm, which no evaluation shows."""
        return any(words.endswith(_IN_TRAINING) for words in self.differences(state_map))

    def _other_layers(
        self,
        places: Mapping[str | None, Slot],
        blocks: tuple[str, ...],
        unplaced: Sequence[Slot],
        home: str | None,
        over: str,
    ) -> Iterator[str]:
        """Activations other than the network's, and pooling that it does not do.

        One pool outside the blocks may be the stem's, if that is unplaced: if the naming scheme has
        no ``home`` for it or the module nothing there. ``over`` is in the name of the head's.
        """
        activations: set[Activation | None] = {slot.activation for slot in places.values()}
        expected = [TORCH_ACTIVATIONS[one] for one in activations if one is not None]
        attention = tuple(f"{name}." for name, s in places.items() if s.branch is Branch.ATTENTION)
        for name, module in self.modules.items():
            layer, package = type(module).__name__, type(module).__module__
            if name in places:
                continue
            if package == "torch.nn.modules.activation":
                if name.startswith(attention):
                    known = layer in ("ReLU", "Sigmoid")
                else:
                    known = any(_is_activation(module, *meant) for meant in expected)
                if not known:
                    words = " or ".join(f"{name}{_call(fields)}" for name, fields in expected)
                    yield f"{name} is {module}, expected {words}"
            elif package == "torch.nn.modules.pooling" or layer in _POOLING:
                inside = name.startswith(blocks) and not name.startswith(attention)
                if not inside and any(_difference(pool, module) is None for pool in unplaced):
                    unplaced = []
                    continue
                heads = over in layer and not inside and name != home
                window = _numbers(module, "kernel_size", "stride", "padding")
                if window != (1, 1, 0) and not heads:  # it looks at more than a pixel
                    what = "maximum" if over == "Max" else "mean"
                    place = "no pooling" if inside else f"the {what} over the image"
                    yield f"{name} is {layer}, expected {place}"

    def told(self, state_map: StateMap) -> dict[str, Any]:
        """Values of the options that cannot be inferred from the weights: those under which the
        module has the fewest :meth:`differences`. ``state_map`` is read off the tensors alone."""
        config, told = state_map.config, self._read_off(state_map)
        if told:
            state_map = StateMap(replace(config, **told), state_map.naming)
        if not self.differences(state_map):
            return told
        config, told = state_map.config, {**told, **self._activation}
        if not isinstance(config, ResNetConfig):
            return told
        last = len(config.depths)
        choices: dict[str, Iterable[Any]] = {
            rule.field: rule.choices for rule in ASSUMPTION_RULES if rule.matters(config)
        }
        if not any("Pad2d" in type(one).__name__ for one in self.modules.values()):
            pools = choices.get("stem_pool", ())
            choices["stem_pool"] = [one for one in pools if one != "3x3_zeros"]
        options = choices_of(ResNetConfig)
        choices |= {name: options[name] for name in ("padding", "stem_padding")}
        choices["dilated_stages"] = [tuple(range(n, last + 1)) for n in range(last + 1, 1, -1)]

        def number(told: Mapping[str, Any]) -> float:
            try:
                return len(self.differences(StateMap(replace(config, **told), state_map.naming)))
            except ValueError:
                return inf  # such a network does not exist

        best = number(told)
        for name, values in choices.items():
            told = {name: getattr(config, name), **told}
            for value in values if name != "activation" else ():
                if (differing := number(told | {name: value})) < best:
                    best, told = differing, told | {name: value}
        return told

    def _read_off(self, state_map: StateMap) -> dict[str, Any]:
        """Options that single layers say: groups, standardised kernels, frozen norms, dropout."""
        names = [state_map.naming.module_name(slot) for slot in walk(state_map.config)]
        layers = [self.modules[name] for name in names if name in self.modules]
        blocks = state_map.naming.inside_blocks(state_map.config)
        rates = {
            float(module.p)
            for name, module in self.modules.items()
            if type(module).__name__ == "Dropout" and name.startswith(blocks)
        }
        groups = {one.num_groups for one in layers if hasattr(one, "num_groups")}
        eps = {one.eps for one in layers if _STANDARDISES in type(one).__name__}
        told: dict[str, Any] = {}
        if len(groups) == 1:
            told |= {"norm_groups": groups.pop(), "standardized": bool(eps)}
        if len(eps) == 1:
            told |= {"standardized": True, "standardized_eps": eps.pop()}
        if any(type(one).__name__ == _FROZEN for one in layers):
            told["norm"] = "frozen"
        if len(rates) == 1 and 0 < (rate := rates.pop()) < 1:
            told["dropout"] = rate
        return {k: v for k, v in told.items() if v != getattr(state_map.config, k)}

    @property
    def _activation(self) -> dict[str, Any]:
        """The activation that most layers of the module are; relu where it has none as layers."""
        found = Counter(
            name
            for module in self.modules.values()
            for name, meant in TORCH_ACTIVATIONS.items()
            if _is_activation(module, *meant)
        )
        return {"activation": found.most_common(1)[0][0] if found else "relu"}

    def check(self, state_map: StateMap) -> None:
        """Raises InputError where there are :meth:`differences`."""
        differences = self.differences(state_map)
        if differences:
            raise InputError(
                f"the PyTorch module's tensors fit, but it computes something else than its "
                f"Flax counterpart: {some(differences)}. Where a ResNetConfig or BlockConfig "
                "describes these layers, pass it as architecture=; otherwise this library has no "
                "such network."
            )


def module_facts(module: Any) -> ModuleFacts:
    """Reads facts off an ``nn.Module``; raises InputError where norms differ in eps or momentum."""
    # the module inside a wrapper comes after it, and takes its place
    modules = {without_wrappers(name): one for name, one in module.named_modules()}

    def is_around(prefix: str) -> bool:
        inside = all(name == "" or f"{name}.".startswith(prefix) for name in modules)
        return inside and prefix[:-1] in modules

    while (prefix := next(filter(is_around, PREFIXES), None)) is not None:
        modules = {
            name.removeprefix(prefix) if name != prefix[:-1] else "": value
            for name, value in modules.items()
            if name
        }
    strides = [
        _square(m.stride) for m in modules.values() if hasattr(m, "stride") and hasattr(m, "weight")
    ]
    # frozen norms have no momentum
    norms = {
        name: (getattr(m, "eps", 1e-5), getattr(m, "momentum", 0.1))
        for name, m in modules.items()
        if hasattr(m, "running_var") or hasattr(m, "num_groups")
    }
    if len(set(norms.values())) > 1:
        shown = [f"{name} {values}" for name, values in norms.items()]
        raise InputError(
            f"the module's norms differ in (eps, momentum): {some(shown)}. A Flax network has "
            f"one pair for all."
        )
    eps, momentum = next(iter(norms.values()), (1e-5, 0.1))
    stride = max((s for s in strides if isinstance(s, int)), default=None)
    return ModuleFacts(modules, stride, {"eps": eps, "momentum": momentum})
