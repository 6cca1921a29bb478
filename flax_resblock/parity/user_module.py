"""A person's own PyTorch module, held against the specification: its Flax twin, its declared shapes and strides, and the known ways to get a block wrong."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flax_resblock.architecture import BlockConfig
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.convert import LAYOUTS, StateMap, describe, identify
from flax_resblock.convert.modules import module_facts
from flax_resblock.errors import CheckpointError, InputError
from flax_resblock.parity.compare import Comparison, Plan, compare_twins
from flax_resblock.parity.diagnose import explain_block
from flax_resblock.parity.inputs import adversarial_images, randomised_norm_state
from flax_resblock.parity.twins import Twins

BLOCK_CASES = ({"in_channels": 8, "out_channels": 8}, {"in_channels": 4, "out_channels": 8}, {"in_channels": 8, "out_channels": 8, "stride": 2})
"""Arguments for a block whose constructor asks for channels: the identity skip, new channels, a stride. Together they tell the known faults apart."""


@dataclass(frozen=True)
class Case:
    """One module that a factory made.

    Attributes:
      title: The call, ``Block(in_channels=8, out_channels=8)``.
      findings: What is wrong, one sentence each; empty when nothing is.
      comparison: Against the Flax twin; None where the module does not run or fits no network.
    """

    title: str
    findings: list[str] = field(default_factory=list)
    comparison: Comparison | None = None


def load_factory(spec: str) -> Callable[..., Any]:
    """What ``FILE.py:NAME`` or ``package.module:NAME`` names. Imports it, which runs its code.

    Raises:
      InputError: No such file, module or name, or code that raises.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise InputError(f"--torch {spec!r} must be FILE.py:NAME or package.module:NAME, such as model.py:Block.")
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise InputError(f"--torch {spec}: the file {where} does not exist.")
            found = importlib.util.spec_from_file_location(path.stem, path)
            if found is None or found.loader is None:
                raise InputError(f"--torch {spec}: {where} cannot be imported.")
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(path.stem, module)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--torch {spec}: importing it raised {type(error).__name__}: {error}.") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise InputError(f"--torch {spec}: {where} has no class or function {name!r}.")
    return factory


def cases_of(factory: Callable[..., Any], kwargs: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The arguments to try: those given; else none; else, for a block that asks for channels, :data:`BLOCK_CASES`.

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
        raise InputError(f"{getattr(factory, '__name__', factory)} needs {', '.join(required)}; say them with --kwargs, such as --kwargs '{{\"width\": 64}}'.")
    full = [{"stride": 1, **case} if "stride" in required else dict(case) for case in BLOCK_CASES]
    return [case for case in full if set(case) <= set(parameters)]


def examine(factory: Callable[..., Any], arguments: Mapping[str, Any], plan: Plan, *, batch: int = 3, seed: int = 0) -> Case:
    """Builds one module and finds out whether it is what its arguments and names say.

    Args:
      factory: Makes the module.
      arguments: Keyword arguments; ``in_channels``, ``out_channels`` and ``stride`` also say what a block is meant to be.
      plan, batch, seed: Of the comparison.
    Raises:
      InputError: The factory raises, makes no module, or a module whose results change from run to run.
    """
    torch.manual_seed(seed)
    title = f"{getattr(factory, '__name__', 'factory')}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        module = factory(**arguments)
    except Exception as error:
        raise InputError(f"{title} raised {type(error).__name__}: {error}. Say its arguments with --kwargs.") from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{title} made a {type(module).__name__}, not an nn.Module.")
    state = randomised_norm_state(state_to_numpy(module.state_dict()), seed)
    state_map, findings = _specification(state, arguments, title)
    if state_map is None:
        return Case(title, findings)
    facts = module_facts(module)
    findings += [f"{difference}{_stride_remark(difference)}" for difference in facts.differences(state_map)]
    config = state_map.config
    twins = Twins(config, state, facts.norm_options, layout=state_map.layout.name, module=module)
    images = adversarial_images(config, batch=batch, seed=seed)
    if any(value.shape != entry.torch_shape for entry in state_map.entries if (value := state.get(entry.torch_key)) is not None):
        findings += _raises(module, images)
        return Case(title, findings)
    raised = _raises(twins.torch(np.float64), images.astype(np.float64))
    if raised:
        return Case(title, findings + raised)
    comparison = compare_twins(twins, images, plan)
    if not comparison.passed:
        findings += list(explain_block(twins, images)) or ["its output differs from the specification's; the table shows where it begins"]
    return Case(title, findings, comparison)


def _specification(state: Mapping[str, np.ndarray], arguments: Mapping[str, Any], title: str) -> tuple[StateMap | None, list[str]]:
    """The map of what the module is meant to be, and how its tensors differ from that."""
    found = describe(state)
    if not {"in_channels", "out_channels"} <= set(arguments):
        try:
            return identify(found, source=title, stride=arguments.get("stride")).state_map, []
        except CheckpointError as error:
            raise InputError(str(error)) from error
    kind = "bottleneck" if any(f"{name}.weight" in found for name in ("conv3", "block.6")) else "basic"
    meant = BlockConfig(**{name: arguments[name] for name in ("in_channels", "out_channels", "stride") if name in arguments}, kind=kind)
    maps = [StateMap(meant, LAYOUTS[name]) for name in ("torchvision", "sequential", "kuangliu")]
    state_map = min(maps, key=lambda m: len(m.check(found)))
    misfit = state_map.check(found)
    if len(misfit.missing) > len(state_map.entries) // 2:
        raise InputError(f"{title} is no residual block in a known naming scheme; its tensors are named like {', '.join(list(found)[:3])}.")
    findings = []
    for entry in state_map.entries:
        info = found.get(entry.torch_key)
        if info is not None and info.shape != entry.torch_shape:
            findings.append(f"{entry.torch_key} has shape {list(info.shape)}, expected {list(entry.torch_shape)}{_channel_remark(entry, info.shape, meant)}")
    findings += [f"{key} is missing" for key in misfit.missing] + [f"{key} has no place in the specification" for key in misfit.unexpected]
    return state_map, findings


def _channel_remark(entry: Any, shape: tuple[int, ...], meant: BlockConfig) -> str:
    if entry.flax_path[0] == "conv2" and len(shape) == 4 and shape[1] == meant.in_channels != meant.out_channels:
        return ": the second convolution takes in_channels, but it receives the first one's out_channels"
    return ""


def _stride_remark(difference: str) -> str:
    return ": the first convolution ignores stride, so the two paths end at different resolutions" if difference.startswith("conv1 has") else ""


def _raises(module: torch.nn.Module, images: np.ndarray) -> list[str]:
    """What forward says, if it raises; also refuses modules that cannot be compared."""
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).to(next(module.parameters()).dtype)
    module = module.eval()
    with torch.no_grad():
        try:
            first, second = module(x.clone()), module(x.clone())
        except Exception as error:
            return [f"forward raises {type(error).__name__}: {str(error).splitlines()[0]}"]
    if not isinstance(first, torch.Tensor):
        raise InputError(f"the module returns a {type(first).__name__}, not a tensor; only modules that map one tensor to one tensor can be compared.")
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise InputError("the module gives another result when it is run twice on the same input in evaluation mode; remove what is random in its forward.")
    return []
