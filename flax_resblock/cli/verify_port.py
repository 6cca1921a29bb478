"""``flax-resblock verify --torch`` for networks that were ported, or are for this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_resblock import checkpoint
from flax_resblock.cli.common import ReadingFlags, arguments_of, print_notes, print_title, status
from flax_resblock.config import BlockConfig
from flax_resblock.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from flax_resblock.cli.verify_flags import InputFlags
    from flax_resblock.cli.verify_run import Verifier
    from flax_resblock.port.network import PortedNetwork


def verify_port(
    verifier: Verifier,
    spec: str,
    kwargs: str | None,
    *,
    weights: Path | None = None,
    flax: str | None = None,
    reading: ReadingFlags | None = None,
    refusal: InputError | None = None,
) -> int:
    """Verifies a PyTorch module, by the class or function ``spec`` with JSON ``kwargs``, against a
    port of it; returns the exit status.

    Args:
      weights: Checkpoint for both, read as ``reading`` says; None: those of the folder of ``flax``,
        or random ones.
      flax: ``FILE.py:NAME`` in the folder of a port, whose code may have been edited; None: the
        module is ported now.
      refusal: Why the module is no network of this library, for the message that it cannot be
        ported either.
    """
    import torch

    from flax_resblock.parity.live_module import load_into
    from flax_resblock.parity.user_code import load_factory
    from flax_resblock.parity.user_module import made_by
    from flax_resblock.port.folder import read_ported
    from flax_resblock.port.instead import ported_instead
    from flax_resblock.port.network import described, filled
    from flax_resblock.port.porting import port

    torch.manual_seed(verifier.input.seed)
    module = made_by(load_factory(spec), arguments_of(kwargs) or {}, f"`torch={spec}`: calling it")
    reading = reading or ReadingFlags()
    folder = None if flax is None else Path(flax.rpartition(":")[0]).parent
    read = None if folder is None else read_ported(folder, reading.limits)
    if weights is not None:
        found = checkpoint.read(weights, entry=reading.entry, limits=reading.limits)
        load_into(module, found.tensors, found.source)
    elif read is not None:
        load_into(module, read.state_dict(), str(folder))
    else:
        _as_trained(module, verifier.input.seed)
    if read is not None and flax is not None:
        port_of = described(read.table)
        state = {key: value.detach().numpy() for key, value in module.state_dict().items()}
        network = load_factory(flax, "flax")
        model = filled(network, port_of.table.to_flax(state))
    else:
        with status.status(f"porting {spec}"):
            ported = port(module) if refusal is None else ported_instead(module, refusal, ())[0]
        model, port_of = ported.create(), ported
        print_notes(ported.notes)
    pair = port_of.pair_with(module, model)
    images = _images(verifier.input, port_of)
    against = flax or "its port"
    print_title(port_of.name, f"{spec} and {against}, input {list(images.shape)}")
    facts: Mapping[str, Any] = {
        "subject": f"{spec} and {against}",
        "compared_with": f"{spec}, your own module",
        "architecture": port_of.name,
    }
    verification, report = verifier.pair(pair, images, facts)
    verifier.print(verification, compared_with=facts["compared_with"])
    verifier.write(report)
    return 0 if verification.passed else 1


def _images(flags: InputFlags, described: PortedNetwork) -> np.ndarray:
    """The inputs of a network as the flags say, by default of the size that it was ported with."""
    from flax_resblock.port.inputs import random_inputs

    if described.inputs and not flags.is_default:
        raise InputError(
            f"--height, --width and --input are for images; {described.name} takes inputs of the "
            f"shapes {' and '.join(str([*shape]) for shape in described.inputs)}."
        )
    if described.inputs:
        return random_inputs(described.inputs, batch=flags.batch, seed=flags.seed)
    height, width = described.image_size
    flags = replace(flags, height=flags.height or height, width=flags.width or width)
    channels = described.channels
    return flags.images(BlockConfig(in_channels=channels, out_channels=channels))


def _as_trained(module: Any, seed: int) -> None:
    """Gives the norms of a module statistics that look trained."""
    from flax_resblock.checkpoint.torch_file import state_to_numpy, with_tensors
    from flax_resblock.parity.inputs import randomised_norm_state

    own = state_to_numpy(module.state_dict())
    state = randomised_norm_state(own, seed)
    module.load_state_dict(with_tensors({key: state[key] for key in own}), strict=True)
