"""Ports a live PyTorch module: traces it, writes its source, and proves the result."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.errors import InputError, raised, some
from flax_resblock.parity.module_run import global_state_kept, inner, runnable
from flax_resblock.port import axes
from flax_resblock.port.arguments import EmittedClass
from flax_resblock.port.body import Reader
from flax_resblock.port.classes import classes_of
from flax_resblock.port.conditions import Conditions
from flax_resblock.port.examples import SIZES, Size, accepted, runs_on, shapes_of
from flax_resblock.port.inputs import Shapes, grown, is_one_image
from flax_resblock.port.known import known_network
from flax_resblock.port.modes import asking_for_mode, trace_training
from flax_resblock.port.modules import refuse_unready
from flax_resblock.port.network import PortedNetwork
from flax_resblock.port.places import parameters_of, placed_tensors, slots_of, versions_of
from flax_resblock.port.proof import Proof, larger_by, prove
from flax_resblock.port.renaming import old_key, renamed
from flax_resblock.port.source import in_docstring, source_of
from flax_resblock.port.table import Parameter, Table
from flax_resblock.port.tracing import Traced, trace
from flax_resblock.port.unsteady import refuse_unsteady
from flax_resblock.port.weight_norm import without_hooks


def port(
    module: Any,
    *,
    image_size: Size | None = None,
    example_inputs: Any = None,
    exact: bool = False,
    expand: bool = False,
    fold_layout: bool = False,
    origin: str | None = None,
) -> PortedNetwork:
    """A PyTorch module as Flax source, with its weights and the proof that it computes the same.

    The module is traced in evaluation mode, written as Flax NNX classes, and run beside them on
    random images: the output, every layer's activation, in training mode also the running
    statistics and every gradient. It is left as it was.

    Args:
      module: An ``nn.Module`` that maps one batch of images ``(N, C, H, W)``, or the
        ``example_inputs``, to tensors.
      image_size: Height and width to trace it with; None tries 64, 32, 96, 224 and 299.
      example_inputs: What it takes if that is something else than one batch of images: a tensor,
        several, or a mapping from arguments of ``forward`` to tensors, each with the batch first.
        Only the shapes count.
      exact: Train both for five steps as well, and compare weights and statistics to 1e-10.
      fold_layout: Let a linear layer take a flattened map with channels last, with the rows of its
        weight in that order, instead of a transpose in front of it.
      expand: Write out a network that this library has already, which is otherwise one line.
      origin: How the result names the module; None: its class.
    Returns:
      The ported network: ``source``, ``create()`` for the model, ``to_torch(model)`` for the way
      back.
    Raises:
      InputError: The module cannot be traced, has an operator that is not supported, or does not
        compute what was written. The message names the line of your code.
    Example:
      >>> ported = port(torchvision.models.mobilenet_v3_small())
      >>> print(ported.source)
      >>> model = ported.create()
    """
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"port takes an nn.Module, not a {type(module).__name__}.")
    refuse_unready(inner(module))
    with _undisturbed(), global_state_kept(), runnable(inner(module)) as copied:
        state = state_to_numpy(inner(module).state_dict())
        state = {key: value.copy() for key, value in state.items()}  # the module may train on
        if copied is inner(module):
            raise InputError(
                f"{type(module).__name__} cannot be ported: copy.deepcopy raises on it, and both "
                f"are compared on copies. Remove what cannot be copied, such as a lock or an open "
                f"file, from its attributes."
            )
        without_hooks(copied)
        shapes = shapes_of(copied, example_inputs)
        if shapes:
            random = runs_on(copied, shapes)
            channels, *size = next((one for one in shapes if len(one) == 3), (0, 0, 0))
            size, shapes = (size[0], size[1]), () if is_one_image(shapes) else shapes
        else:
            channels, size, random = accepted(copied, [image_size] if image_size else SIZES)
        images = [torch.randn(2, *shape) for shape in shapes or ((channels, *size),)]
        refuse_unsteady(copied, images)
        parameters = parameters_of(copied, images)
        name = origin or type(inner(module)).__name__
        # the library's own networks have neither dropout nor stochastic depth
        known = None if expand or random or shapes else known_network(copied, name)
        if known is None:
            trains = random is not None
            more: dict[str, Any] = {"trains": trains, "inputs": shapes, "fold_layout": fold_layout}
            try:
                return _ported(copied, state, parameters, channels, size, exact, name, **more)
            except InputError:
                raise
            except Exception as error:  # of code that was written wrongly, or of its writer
                raise InputError(
                    f"{name} cannot be ported: the port of it raises ({raised(error)}), which is a "
                    f"fault of this library. Please report it with the module's code; nothing was "
                    f"written."
                ) from error
        table = Table.of(known.tensors, state, parameters, versions_of(copied))
        made = PortedNetwork(
            known.source, known.name, table, table.to_flax(state), {}, name, size, channels,
            known.slots,
        )  # fmt: skip
        proof = prove(copied, made, exact=exact)
        return replace(made, figures=proof.figures, notes=tuple(proof.notes))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within it Python looks for cycles less often, which is a tenth of all work else."""
    thresholds = gc.get_threshold()
    gc.set_threshold(max(thresholds[0], 100_000) if thresholds[0] else 0, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _ported(
    module: torch.nn.Module,
    state: Mapping[str, np.ndarray],
    parameters: Mapping[str, Parameter],
    channels: int,
    size: Size,
    exact: bool,
    origin: str,
    *,
    trains: bool,
    inputs: Shapes,
    fold_layout: bool,
) -> PortedNetwork:
    """Writes the module with the sizes of its trace, and before that, if it has numbers that follow
    from them, as code for images of any size, which is kept if it is right for another size.
    """
    shapes = inputs or ((channels, *size),)
    named, old = renamed(module)

    def read(shapes: Shapes, any_size: bool) -> tuple[Reader, bool]:
        images = [torch.randn(2, *shape) for shape in shapes]
        with asking_for_mode(named) as asking:
            traced = trace(named, images, fold_layout=fold_layout, any_size=any_size)
        training = None
        if trains and asking:
            traced, training = trace_training(traced, images)
        if training is not None:
            traced = replace(traced, folded=traced.folded.joined(training.folded))
        return Reader(traced, training), trains and bool(asking)

    def write(reader: Reader) -> tuple[PortedNetwork, list[EmittedClass]]:
        body = reader.body("", [(shape, axes.channels_last(1 + len(shape))) for shape in shapes])
        rows = [replace(one, key=old_key(one.key, old)) for one in placed_tensors(named, body)]
        table = Table.of(rows, state, parameters, versions_of(module))
        classes = classes_of(reader, body)
        slots = {old_key(name, old): path for name, path in slots_of(reader, body).items()}
        unused = table.unused_of(state)
        made = PortedNetwork(
            source_of(classes, title), classes[-1].name, table, table.to_flax(state), unused,
            origin, size, channels, slots, inputs,
            notes=_notes(parameters, unused),
        )  # fmt: skip
        return made, classes

    reader, in_both_modes = read(shapes, False)
    compared = [grown(shapes, more) for more in larger_by(size)]
    title = f"{in_docstring(origin)} in Flax, with channels last. Written by flax-resblock port."
    parts = [module, *([copy.deepcopy(module).train()] if in_both_modes else [])]
    all_conditions = [Conditions(part, shapes) for part in parts]
    by_batch = [one.refuse_by_batch() for one in all_conditions]
    plain, classes = write(reader)
    plain = replace(plain, notes=(*plain.notes, *sorted({*by_batch} - {""})))
    raises = partial(_raises, cache(plain.create))
    bound, computed, raising = "", "", False
    for conditions in all_conditions:
        bound = bound or conditions.bound_to_size(compared, raises)
        computed, raising = computed or conditions.computed, raising or conditions.raising
    other, following, steady = all_conditions[-1].following(compared)
    options: dict[str, Any] = {"exact": exact, "bound": bound or computed}

    def for_any_size() -> PortedNetwork | None:
        try:
            made, _ = write(read(other, True)[0])
            free = {"exact": exact, "guessed": True}
            proof = _proved(module, made, reader.traced, free)
        except Exception:  # what cannot be written for any size may be right for one
            return None
        made = replace(made, figures=proof.figures, notes=(*plain.notes, *proof.notes))
        return None if proof.fixed_size else made

    seen = bool(computed or following & reader.numbers(steady))
    one_path = not bound and not raising
    made = for_any_size() if seen and one_path else None
    if made is not None:
        return made
    proof = _proved(module, plain, reader.traced, options)
    made = replace(plain, figures=proof.figures, notes=(*plain.notes, *proof.notes))
    if not proof.fixed_size:
        return made
    free = for_any_size() if following and not seen and one_path else None
    if free is not None:
        return free
    sizes = [shape[1:] for shape in shapes]
    source = source_of(classes, title, fixed_sizes=sizes)
    shown = " and ".join("x".join(map(str, one)) for one in sizes if one)
    why = f"{'inputs' if inputs else 'images'} of {shown} only: {proof.fixed_size}"
    return replace(made, source=source, notes=(*made.notes, why))


def _raises(create: Callable[[], nnx.Module], shapes: Shapes) -> bool:
    """Whether the network that is created raises with inputs of these shapes."""
    inputs = [jax.ShapeDtypeStruct((2, *one[1:], one[0]), np.float32) for one in shapes]
    try:
        nnx.eval_shape(lambda model, *images: model(*images), create(), *inputs)
    except Exception:  # of jax: shapes that do not fit
        return True
    return False


def _notes(parameters: Mapping[str, Parameter], unused: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if unused:
        why = "never used in evaluation mode; kept for the way back to PyTorch"
        notes.append(f"{some(list(unused))}: {why}")
    frozen = [name for name, one in parameters.items() if not one.requires_grad]
    if frozen:
        why = (
            "frozen in PyTorch (requires_grad=False); fit and `train` keep them, and keep them "
            "from an optimizer of your own in JAX too"
        )
        notes.append(f"{some(frozen)}: {why}")
    return tuple(notes)


def _proved(
    module: torch.nn.Module,
    made: PortedNetwork,
    traced: Traced,
    options: Mapping[str, Any],
) -> Proof:
    """The proof; a gradient that is written by hand has to be the one of the forward pass."""
    if not traced.custom_gradients:
        return prove(module, made, **options)
    used = (
        f"{some(list(traced.custom_gradients))}, a torch.autograd.Function, has a gradient that is "
        f"written by hand"
    )
    try:
        proof = prove(module, made, **options)
    except InputError as error:
        difference = str(error).partition(" Please")[0]
        raise InputError(
            f"{difference} {used}; write it with PyTorch's own operators, which have the gradient "
            f"that belongs to them."
        ) from error
    if not any("gradients" in name for name in proof.figures):
        raise InputError(
            f"{made.origin} cannot be ported: {used}, and your module does not run in training "
            f"mode, where it would be compared ({some(proof.notes)})."
        )
    note = f"{used}; the port has that of the forward pass, which agrees on the images compared"
    return replace(proof, notes=[*proof.notes, note])
