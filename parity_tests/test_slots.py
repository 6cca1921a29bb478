"""The numbers of slots are those of both frameworks' layers; the battery uses every option."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import BlockConfig, ResNetConfig
from flax_resblock import config as configuration
from flax_resblock.config import Branch, Slot, SlotKind, architecture, choices_of, walk
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.convert.modules import module_facts
from flax_resblock.nn.pooling import AveragePool, Blur, MaxPool
from flax_resblock.nn.resnet import build
from flax_resblock.nn.variables import variable_at
from flax_resblock.parity import battery
from flax_resblock.parity.battery import BATTERY
from flax_resblock.parity.reference import torch_reference

GEOMETRY = ("stride", "padding", "dilation", "groups")


def flax_numbers(layer) -> dict[str, object]:
    """What a Flax layer says of itself, in the words of a slot."""
    if isinstance(layer, AveragePool):
        return {"shape": (layer.stride,) * 2, "stride": layer.stride}
    if isinstance(layer, MaxPool):
        names = ("stride", "padding")
        return {"shape": (layer.window,) * 2} | {name: getattr(layer, name) for name in names}
    if isinstance(layer, Blur):
        return {"stride": layer.stride}
    numbers = {name: getattr(layer, name) for name in GEOMETRY if hasattr(layer, name)}
    for name in ("kernel", "scale"):
        if hasattr(layer, name):
            numbers["shape"] = tuple(getattr(layer, name).shape)
    return numbers


def differing_slots(slots: list[Slot], model) -> list[str]:
    """Slots whose numbers are not those of the Flax layer at their place."""
    return [
        slot.name
        for slot in slots
        if slot.kind is not SlotKind.OUTPUT
        for numbers in [flax_numbers(variable_at(model, slot.path))]
        if not numbers or numbers != {name: getattr(slot, name) for name in numbers}
    ]


@pytest.mark.parametrize("name", BATTERY)
def test_slots_have_the_numbers_of_the_layers_on_both_sides(name):
    config = BATTERY[name]
    slots, model = list(walk(config)), build(config, rngs=None)
    assert differing_slots(slots, model) == []
    state_map = StateMap(config, NAMINGS["torchvision"])
    with torch.device("meta"):
        facts = module_facts(torch_reference(config))
    assert facts.differences(state_map) == []
    assert {state_map.naming.module_name(slot) for slot in slots} <= set(facts.modules)
    for slot in slots:  # the negative control: a slot with another number is found on either side
        if slot.convolves:
            for number in GEOMETRY:
                own = getattr(slot, number)
                wrong = replace(slot, **{number: 0 if own == "SAME" else own + 1})
                assert differing_slots([wrong], model) == [slot.name]
            module = facts.modules[state_map.naming.module_name(slot) or ""]
            module.stride = (slot.stride + 1, slot.stride + 1)
            assert slot.name in facts.differences(state_map)[0]
            module.stride = (slot.stride, slot.stride)


@pytest.mark.parametrize("name", BATTERY)
def test_slots_count_the_parameters_of_the_model(name):
    model = build(BATTERY[name], rngs=None)
    values = sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves)
    assert sum(slot.parameters for slot in walk(BATTERY[name])) == values


@pytest.mark.parametrize("name", BATTERY)
def test_every_norm_is_beside_its_convolution(name):
    """It follows the one that it normalises, or precedes the one that takes what it gives."""
    slots = list(walk(BATTERY[name]))
    for before, slot, after in zip([None, *slots], slots, [*slots[1:], None], strict=False):
        if slot.normalises and slot.branch is not Branch.HEAD:
            precedes = BATTERY[name].norm_first and slot.branch is not Branch.STEM
            conv = after if precedes else before
            assert (conv.convolves, conv.branch) == (True, slot.branch)
            axis = 2 if precedes and conv.groups == 1 else 3
            assert conv.shape[axis : axis + 1] == slot.shape


def test_branches_are_the_parts_of_a_network():
    config = architecture("seresnet50t", depths=(1, 1), widths=(8, 8))
    parts = {branch: {s.role for s in walk(config) if s.branch is branch} for branch in Branch}
    assert parts[Branch.HEAD] == {""}
    assert parts[Branch.ATTENTION] == {"attention", "attention.reduce", "attention.expand"}
    assert {role.partition(".")[0] for role in parts[Branch.SHORTCUT]} == {"shortcut"}
    assert {s.stage for s in walk(config) if s.branch is Branch.STEM} == {"stem"}
    assert {"conv1", "conv3", "norm3", ""} <= parts[Branch.MAIN]


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 224), ("resnet50d", 224), ("ecaresnet26t", 224), ("resnet20", 32)],
)
@pytest.mark.slow
def test_the_usual_image_size_follows_from_the_stride_of_the_stem(name, size):
    config = architecture(name)
    assert config.image_size == size
    assert config.stem_reduction == (4 if size == 224 else 1)
    images = np.zeros((1, 64, 64, 3), np.float32)
    stem = build(config, rngs=nnx.Rngs(0)).stem(images, use_running_average=True)
    assert stem.shape[1] == 64 // config.stem_reduction


def missing_values(configs, kind, choices) -> set[tuple[str, str]]:
    """Values of options that no configuration uses so that it makes a difference."""
    values = {(name, value) for name, known in choices.items() for value in known}
    return values - set().union(*map(battery.used, of_kind(configs, kind)))


def of_kind(configs, kind) -> list:
    return [config for config in configs if isinstance(config, kind)]


@pytest.mark.parametrize("kind", [BlockConfig, ResNetConfig])
def test_the_battery_uses_every_value_of_every_option(kind):
    configs, choices = list(BATTERY.values()), choices_of(kind)
    assert missing_values(configs, kind, choices) == set()
    assert len(of_kind(configs, kind)) <= 4 + max(map(len, choices.values()))
    # The negative controls: an option that the battery does not know, and one configuration less.
    fake = {**choices, "attention": (*choices["attention"], "fake")}
    assert missing_values(configs, kind, fake) == {("attention", "fake")}
    for name, value in (("attention", "se"), ("shortcut", "zero_pad"), ("antialias", "blur")):
        fewer = [config for config in configs if getattr(config, name) != value]
        assert (name, value) in missing_values(fewer, kind, choices)


def test_a_new_option_enters_the_battery_by_itself():
    @dataclass(frozen=True, kw_only=True)
    class Extended(BlockConfig):
        colour: Literal["red", "green"] = "red"

        def slots(self, stage="", block=None):
            for slot in super().slots(stage, block):
                yield replace(slot, dilation=slot.dilation + (self.colour == "green"))

    Extended.__annotations__["colour"] = Literal["red", "green"]
    found = battery.covering(Extended, battery._BLOCK)
    assert {config.colour for config in found} == {"red", "green"}
    assert {config.attention for config in found} == set(choices_of(BlockConfig)["attention"])


def test_an_unknown_value_of_an_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"attention 'all' is unknown; choose 'none', 'se' or"):
        BlockConfig(in_channels=4, out_channels=4, attention="all")
    with pytest.raises(ValueError, match=r"stem 'none' is unknown; choose 'imagenet', 'deep' or"):
        ResNetConfig(stem="none")
    assert configuration.from_json(configuration.to_json(ResNetConfig())) == ResNetConfig()
