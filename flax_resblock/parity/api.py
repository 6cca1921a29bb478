"""``flax_resblock.parity.compare``: any PyTorch module against any nnx module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from flax_resblock.convert import StateMap
from flax_resblock.convert.own import PORTED_FROM
from flax_resblock.cpu.switch import Lowering
from flax_resblock.errors import InputError, raised
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.devices import strict
from flax_resblock.parity.diagnose import Diagnosis, diagnose
from flax_resblock.parity.oracle import Comparison, Tolerance
from flax_resblock.parity.pair import PRECISIONS, ModulePair, Pair, dotted
from flax_resblock.parity.parts import Devices
from flax_resblock.parity.precision import measure_precision, require
from flax_resblock.parity.report import verdict_lines
from flax_resblock.parity.taps import as_array, as_tensor
from flax_resblock.parity.trajectory import Trajectory, own_spread


@dataclass(frozen=True)
class Verification:
    """The result of comparing two modules.

    Attributes:
      comparison: The verdict on every tensor.
      diagnosis: The mistakes that were found, most telling first; empty when nothing differs.
      title: What was compared.
      notes: Further remarks, such as that a training run is chaotic.
    """

    comparison: Comparison
    diagnosis: Sequence[Diagnosis] = ()
    title: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether every tensor is within the criterion."""
        return self.comparison.passed

    def __str__(self) -> str:
        """The outcome in words: diagnosis first, then where it shows."""
        lines = [self.title] if self.title else []
        lines += [*verdict_lines(self.comparison), *(f"  {found}" for found in self.diagnosis)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def compare(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    inputs: Any = None,
    *,
    state_map: StateMap | Mapping[str, Any] | None = None,
    slots: Mapping[str, tuple[str, str]] | None = None,
    copy_weights: bool = False,
    train: bool = True,
    gradients: bool = True,
    isolated: bool = False,
    steps: int = 0,
    precisions: Sequence[str] = ("float64", "float32"),
    rtol: float | None = None,
    atol: float | None = None,
    conv_lowering: Lowering = "xla",
    seed: int = 0,
    devices: Devices | None = None,
) -> Verification:
    """Compares a PyTorch module with an nnx module: every layer's output, running statistics, every
    gradient, and on request whole training steps.

    You only say which of their tensors correspond; a ported model knows that itself. Each module is
    called with one array and returns one. A layer that holds a tensor of the table is compared by
    itself; name other layers to compare in ``slots``.

    Args:
      torch_module: Takes ``inputs``; images as ``(N, C, H, W)``.
      flax_module: Takes ``inputs`` as they are; images as ``(N, H, W, C)``. Neither module is
        modified.
      inputs: Array in Flax's memory layout, finite. With four axes it is an image batch and is
        handed to PyTorch as NCHW. None is enough for a ported model: random inputs of the shapes
        that it was traced with. Several are one array, see :mod:`flax_resblock.port.inputs`.
      state_map: PyTorch key to Flax path, ``{"fc.weight": "head.kernel"}``, with a codec where the
        memory layout is not the usual one, ``("head.kernel", "linear")``; see
        :func:`flax_resblock.parity.pair.entries_of`. Or a :class:`flax_resblock.convert.StateMap`.
        None for a ported model, whose slots then have the names of the PyTorch modules.
      slots: Further layers to compare: name to ``(torch module name, Flax path)``.
      copy_weights: Copy PyTorch's tensors to the Flax side first. Otherwise the two modules are
        compared as they are, tensors included.
      train: Also training mode and running statistics.
      gradients: Also gradients of every parameter, activation and the input.
      isolated: Also compare every layer by itself, fed PyTorch's own input.
      steps: Also compare this many training steps with SGD and with AdamW.
      precisions: Among ``"float64"``, ``"float32"``, ``"tf32"`` and ``"bfloat16"``.
      rtol, atol: Replace the project's criterion by that of ``numpy.allclose``. If only one is
        given, the other is 0.
      conv_lowering: How Flax computes the convolutions of this package; see
        :class:`flax_resblock.parity.comparison.Plan`.
      seed: Seed of cotangents, targets and further batches.
      devices: The devices to compute on; by default jax's default device and the CPU.
    Returns:
      The :class:`Verification`; ``print`` it. If something differs, it names the layer and, if the
      mistake is a known one, the mistake.
    Raises:
      InputError: The table does not pair the two; an input that is not finite or that a module
        refuses; a module that returns no tensor, or another result when it is run twice.
    Example:
      >>> table = {"0.weight": "layers.0.kernel", "0.bias": "layers.0.bias"}
      >>> print(compare(torch_mlp, flax_mlp, x, state_map=table))
    """
    pair: Pair
    ported = getattr(flax_module, PORTED_FROM, None)
    if state_map is not None:
        if isinstance(state_map, StateMap):
            state_map = {e.torch_key: (dotted(e.flax_path), e.codec) for e in state_map.entries}
        options: dict[str, Any] = {"slots": slots, "copy_weights": copy_weights}
        pair = ModulePair(torch_module, flax_module, state_map, **options)
    elif ported is not None and slots is None:
        pair = ported.pair_with(torch_module, flax_module, copy_weights=copy_weights)
        inputs = ported.images() if inputs is None else inputs
    else:
        raise InputError(
            "compare needs a state_map, which says which tensors of the two modules correspond. "
            "Only a ported model has one of its own, and slots as well."
        )
    if inputs is None:
        raise InputError("compare needs inputs, an array in Flax's memory layout.")
    plan = Plan(train, gradients, precisions, isolated, steps, conv_lowering=conv_lowering)
    if rtol is not None or atol is not None:
        plan = replace(plan, tolerance=Tolerance(rtol or 0.0, atol or 0.0))
    return verify_pair(pair, np.asarray(inputs, np.float64), plan, seed=seed, devices=devices)


def verify_pair(
    pair: Pair,
    images: np.ndarray,
    plan: Plan,
    *,
    seed: int = 0,
    devices: Devices | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Checks that a pair can be compared, compares it in strict precision, and diagnoses any
    difference.

    Args:
      pair, images, plan, seed, devices, progress: As for
        :func:`flax_resblock.parity.comparison.compare_pair`.
    Raises:
      InputError: See :func:`compare`.
    """
    unknown = [name for name in plan.precisions if name not in PRECISIONS]
    if unknown or not plan.precisions:
        raise InputError(
            f"precisions={list(plan.precisions)}: choose among {', '.join(PRECISIONS)}."
        )
    places = devices or Devices()
    with strict(plan.conv_lowering):
        measured = []  # on other devices than the CPU, which may silently compute in less
        for name in plan.precisions:
            if places.jax is not None and places.jax.platform != "cpu":
                measured += measure_precision("flax", places.jax, name)
            if places.torch.type != "cpu":
                measured += measure_precision("torch", places.torch, name)
        require(measured)
        refuse_unfit(pair, images, train=plan.train)
        comparison = compare_pair(pair, images, plan, progress=progress, seed=seed, devices=devices)
        if comparison.passed:
            return Verification(comparison, title=pair.title)
        progress("looking for the cause")
        narrow = [name for name in plan.precisions if name not in ("float64", "tf32")]
        gradients = plan.gradients or plan.steps > 0
        found = diagnose(
            pair, images, train=plan.train, gradients=gradients, precisions=narrow, devices=devices
        )
        notes = _chaos(pair, images, plan, comparison, seed)
        return Verification(comparison, tuple(found), pair.title, tuple(notes))


def refuse_unfit(pair: Pair, images: np.ndarray, *, train: bool) -> None:
    """Raises InputError if the two cannot be compared at all; see :func:`compare`."""
    if not np.isfinite(images).all():
        bad = np.argwhere(~np.isfinite(images))
        raise InputError(
            f"the input holds {len(bad)} values that are not finite, first at index "
            f"{bad[0].tolist()}; no comparison is possible with them. Remove them."
        )
    precision = PRECISIONS["float32"]
    for mode in (False, True) if train else (False,):
        name = "training" if mode else "evaluation"
        first, second = (_torch_output(pair, images, mode) for _ in range(2))
        if not np.array_equal(first, second, equal_nan=True):
            advice = (
                "dropout or stochastic depth? Compare in evaluation mode only "
                "(`train=False`), or switch it off"
                if mode
                else "remove what is random"
            )
            raise InputError(
                f"the PyTorch module gives another result when it is run twice on the same "
                f"input in {name} mode: it is not deterministic ({advice})."
            )
    try:
        model = pair.flax(precision)
        model.eval()
        shape = jax.eval_shape(model, jax.ShapeDtypeStruct(images.shape, precision.storage))  # pyright: ignore[reportArgumentType]
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the Flax module refuses an input of shape {list(images.shape)}: "
            f"{raised(error)}. Its images are (N, H, W, C)."
        ) from error
    if not hasattr(shape, "shape"):
        raise InputError(
            f"the Flax module returns a {type(shape).__name__}, not an array; only modules "
            f"that map one array to one array can be compared."
        )


def _torch_output(pair: Pair, images: np.ndarray, train: bool) -> np.ndarray:
    precision = PRECISIONS["float32"]
    module = pair.torch(precision).train(train)
    x = as_tensor(images, precision)
    try:
        with torch.no_grad():
            output = module(x)
    except Exception as error:
        raise InputError(
            f"the PyTorch module refuses an input of shape {list(x.shape)}: "
            f"{raised(error)}. Its images are (N, C, H, W)."
        ) from error
    if not isinstance(output, torch.Tensor):
        raise InputError(
            f"the PyTorch module returns a {type(output).__name__}, not a tensor; only modules "
            f"that map one tensor to one tensor can be compared. "
            "Wrap it in a module that returns the tensor to compare."
        )
    return as_array(output)


def _chaos(
    pair: Pair, images: np.ndarray, plan: Plan, comparison: Comparison, seed: int
) -> list[str]:
    """Notes on training runs that differ because training at this rate amplifies every rounding."""
    rows = [m for m in comparison.measurements if m.precision == "float64"]
    failed = [m for m in rows if not m.verdict.passed]
    if not failed or any(m.step is None for m in failed):
        return []
    notes = []
    for name in dict.fromkeys(m.quantity.partition(":")[0] for m in failed):
        alone = replace(plan, train=False, gradients=False, isolated=False, optimizers=(name,))
        runs = [part for part in alone.parts(pair, images, seed) if isinstance(part, Trajectory)]
        spread = max(own_spread(run, pair, images) for run in runs)
        worst = max(m.verdict.error for m in failed if m.quantity.startswith(f"{name}:"))
        if spread > min(worst, 1.0) / 100:  # beyond 1 it has run off anywhere
            notes.append(
                f"{name}: PyTorch's own float64 run, its input moved by one unit in the last "
                f"place, ends {spread:.1e} away from itself; Flax ends {worst:.1e} "
                "away. At this learning rate training is chaotic, so the comparison "
                "proves nothing. Use a smaller rate, more images or fewer steps."
            )
    return notes
