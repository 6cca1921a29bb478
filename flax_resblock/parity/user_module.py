"""Compares a user's own PyTorch module with the specification: the reference model in Flax, the
shapes and strides that the module declares, and known mistakes in a block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import BlockConfig, Config, ResNetConfig
from flax_resblock.convert import StateMap, describe, identify
from flax_resblock.convert.detection.learning import NotLearned, learn_naming
from flax_resblock.convert.detection.refusal import explained
from flax_resblock.convert.modules import module_facts
from flax_resblock.errors import CheckpointError, InputError, without_gpu
from flax_resblock.errors import raised as of_error
from flax_resblock.parity.api import Verification, verify_pair
from flax_resblock.parity.comparison import Plan
from flax_resblock.parity.diagnose import Diagnosis
from flax_resblock.parity.inputs import adversarial_images, randomised_norm_state
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.parts import Devices
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.parity.taps import as_tensor

BLOCK_CASES = (
    {"in_channels": 8, "out_channels": 8},
    {"in_channels": 4, "out_channels": 8},
    {"in_channels": 8, "out_channels": 8, "stride": 2},
)
"""Arguments for a block whose constructor asks for channels: the identity skip, new channels, a
stride. Together they tell the known faults apart."""


@dataclass(frozen=True)
class ExaminedModule:
    """One module made by the user's factory, and what is wrong with it.

    Attributes:
      title: The call, ``Block(in_channels=8, out_channels=8)``.
      config: The network or block that the module should be.
      stated: Mistakes that its attributes and shapes show, one sentence each.
      verification: The comparison with the Flax reference model; None if the module does not run.
      images: What it was run on, ``(N, H, W, C)``.
    """

    title: str
    config: Config
    naming: str
    state: Mapping[str, np.ndarray]
    stated: tuple[str, ...] = ()
    raised: str = ""
    verification: Verification | None = None
    images: np.ndarray | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.stated and self.verification is not None and self.verification.passed

    @property
    def diagnosis(self) -> list[Diagnosis]:
        """Every mistake, once: a slot that ``stated`` already names is not repeated."""
        known = " ".join(self.stated)
        why = "read off the module"
        found = [Diagnosis("module", "specification", "torch", one, why) for one in self.stated]
        if self.raised:
            why = "seen when it was run"
            found.append(Diagnosis("module", "raises", "torch", self.raised, why))
        computed = self.verification.diagnosis if self.verification else ()
        return found + [d for d in computed if d.slot.partition("/")[0] not in known]

    @property
    def findings(self) -> list[str]:
        """The same in words; empty when nothing is wrong."""
        found = [d.sentence if d.slot == "module" else str(d) for d in self.diagnosis]
        unknown = "its output differs from the specification's; the table shows where it begins"
        return found or ([] if self.passed else [unknown])


class NoSpecificationError(CheckpointError):
    """A module is neither a residual network nor a block, so that there is no specification to
    compare it with."""


def cases_of(factory: Callable[..., Any], kwargs: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The arguments to try: those given; else none; else, for a block that asks for channels,
    :data:`BLOCK_CASES`.

    Raises:
      InputError: The factory needs arguments that cannot be guessed.
    """
    if kwargs is not None:
        return [dict(kwargs)]
    parameters = inspect.signature(factory).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind in kinds]
    if not required:
        return [{}]
    if not set(required) <= {"in_channels", "out_channels", "stride"}:
        raise InputError(
            f"{getattr(factory, '__name__', factory)} needs {', '.join(required)}; pass them "
            f"with `kwargs=...`, such as `kwargs={{'width': 64}}`."
        )
    full = [{"stride": 1, **case} if "stride" in required else dict(case) for case in BLOCK_CASES]
    return [case for case in full if set(case) <= set(parameters)]


def made_by(
    factory: Callable[..., Any], arguments: Mapping[str, Any], title: str
) -> torch.nn.Module:
    """The module that the user's factory makes; ``title`` is what messages call it.

    Raises:
      InputError: It raises, or makes no module.
    """
    try:
        module = factory(**arguments)
    except Exception as error:
        raise InputError(
            f"{title} raised {type(error).__name__}: {error}. "
            f"{without_gpu(error, 'Pass its arguments with `kwargs=...`.')}"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{title} made a {type(module).__name__}, not an nn.Module.")
    return module


def examine(
    factory: Callable[..., Any],
    arguments: Mapping[str, Any],
    plan: Plan,
    *,
    images: Callable[[Config], np.ndarray] | None = None,
    any_size: bool = False,
    seed: int = 0,
    devices: Devices | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ExaminedModule:
    """Builds one module and checks that it is the block or network its arguments and names
    describe.

    Args:
      arguments: Keyword arguments; ``in_channels``, ``out_channels`` and ``stride`` also say what a
        block is meant to be.
      plan, seed, devices, progress: Of the comparison.
      images: Makes the input for what the module is meant to be; by default three random images.
      any_size: Try images of 32x32 too where a network fails on these, as one with a pool of fixed
        size does on an odd number of pixels. A bare block has no such pool.
    Raises:
      NoSpecificationError: The module is no residual network or block.
      InputError: The factory raises, makes no module, or a module that cannot be compared: see
        :func:`flax_resblock.parity.compare`.
    """
    torch.manual_seed(seed)
    listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    title = f"{getattr(factory, '__name__', 'factory')}({listed})"
    module = made_by(factory, arguments, title)
    state = randomised_norm_state(state_to_numpy(module.state_dict()), seed)
    try:
        state_map, findings = _specification(state, arguments, title)
    except InputError as error:
        raise NoSpecificationError(str(error)) from error
    facts = module_facts(module)
    findings += [
        f"{difference}{_stride_remark(difference)}" for difference in facts.differences(state_map)
    ]
    config = state_map.config
    case = ExaminedModule(title, config, state_map.naming.name, state, tuple(findings))
    pair = ReferencePair(config, state, facts.norm_options, state_map.naming, module)
    batch = images(config) if images is not None else adversarial_images(config, batch=3, seed=seed)
    shapes_fit = all(
        value.shape == entry.torch_shape
        for entry in state_map.entries
        if (value := state.get(entry.torch_key)) is not None
    )
    ran = pair.torch(PRECISIONS["float64"]) if shapes_fit else module
    raised = _raises(ran, batch)
    options: dict[str, Any] = {"seed": seed, "devices": devices, "progress": progress}
    found = None
    if not raised and shapes_fit:
        found = verify_pair(pair, batch, plan, **options)
    is_network = isinstance(config, ResNetConfig)
    if any_size and is_network and shapes_fit and (found is None or not found.passed):
        square = adversarial_images(config, batch=len(batch), height=_SIDE, width=_SIDE, seed=seed)
        again = None if _raises(ran, square) else verify_pair(pair, square, plan, **options)
        if again is not None and again.passed:
            height, width = batch.shape[1:3]
            what = f"raises {raised}" if raised else "computes something else"
            note = (
                f"made for images of {_SIDE}x{_SIDE}: it equals the Flax network there, and on "
                f"{height}x{width} it {what}, as a network with a pool of fixed size does"
            )
            again = replace(again, notes=(*again.notes, note))
            return replace(case, verification=again, images=square)
    return replace(case, raised=raised, verification=found, images=batch)


_SIDE = 32
"""Pixels of the images that suit most networks with a pool of fixed size."""


def _specification(
    state: Mapping[str, np.ndarray], arguments: Mapping[str, Any], title: str
) -> tuple[StateMap, list[str]]:
    """The state map of the specification, and how the module's tensors differ from it."""
    found = describe(state)
    if not {"in_channels", "out_channels"} <= set(arguments):
        stride = arguments.get("stride")
        try:
            return identify(found, source=title, stride=stride).state_map, []
        except CheckpointError as error:
            learned = learn_naming(found)
            if isinstance(learned, NotLearned):
                raise explained(error, found, learned.why, title) from error
            return identify(found, naming=learned, source=title, stride=stride).state_map, []
    three = any(f"{name}.weight" in found for name in ("conv3", "block.6"))
    kind = "bottleneck" if three else "basic"
    names = ("in_channels", "out_channels", "stride")
    sizes = {name: arguments[name] for name in names if name in arguments}
    meant = BlockConfig(**sizes, kind=kind)
    maps = [StateMap(meant, name) for name in ("torchvision", "sequential", "kuangliu")]
    state_map = min(maps, key=lambda m: len(m.check(found)))
    misfit = state_map.check(found)
    if len(misfit.missing) > len(state_map.entries) // 2:
        raise InputError(
            f"{title} is no residual block in a known naming scheme; its tensors are named "
            f"like {', '.join(list(found)[:3])}."
        )
    findings = []
    for entry in state_map.entries:
        info = found.get(entry.torch_key)
        if info is not None and info.shape != entry.torch_shape:
            findings.append(
                f"{entry.torch_key} has shape {list(info.shape)}, expected "
                f"{list(entry.torch_shape)}{_channel_remark(entry, info.shape, meant)}"
            )
    findings += [f"{key} is missing" for key in misfit.missing] + [
        f"{key} has no place in the specification" for key in misfit.unexpected
    ]
    return state_map, findings


def _channel_remark(entry: Any, shape: tuple[int, ...], meant: BlockConfig) -> str:
    second = entry.flax_path[0] == "conv2" and len(shape) == 4
    known = second and shape[1] == meant.in_channels != meant.out_channels
    words = ": the second convolution takes in_channels, but it receives the first one's"
    return f"{words} out_channels" if known else ""


def _stride_remark(difference: str) -> str:
    words = ": the first convolution ignores stride, so the two paths end at different resolutions"
    return words if difference.startswith("conv1 has") else ""


def _raises(module: torch.nn.Module, images: np.ndarray) -> str:
    """The error that ``forward`` raises; empty if it runs."""
    dtype = next(module.parameters()).dtype
    x = as_tensor(images, PRECISIONS["float64"]).to(dtype)
    try:
        with torch.no_grad():
            module.eval()(x)
    except Exception as error:
        return f"forward raises {of_error(error)}"
    return ""
