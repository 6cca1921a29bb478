"""What a refusal says: what is seen in the tensors, and which part of them is a network.

No network is read from here, as nothing is left out unless the user asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flax_resblock.config import ResNetConfig
from flax_resblock.convert.detection.backbones import nearly
from flax_resblock.convert.detection.candidates import Match, NoFitError, identify
from flax_resblock.convert.detection.heads import several_layers
from flax_resblock.convert.detection.learning import NotLearned, learn_naming
from flax_resblock.convert.detection.unsupported import unsupported
from flax_resblock.convert.state_map import TensorInfo
from flax_resblock.errors import CheckpointError, some

_MOST_TENSORS, _DEEPEST, _MOST_PLACES, _FEWEST = 20_000, 4, 12, 10
"""Tensors of a file, parts of a prefix and places beyond which nothing is looked for, and tensors
of the smallest network."""


@dataclass(frozen=True)
class CheckpointPart:
    """A part of a checkpoint that is a network: its prefix with the dot, and the other tensors."""

    prefix: str
    match: Match
    beside: tuple[str, ...]

    @property
    def description(self) -> str:
        """What it is, what is beside it, and how to convert it alone."""
        name = self.prefix[:-1]
        plain = all(part.isidentifier() for part in name.split("."))
        module = f"model.{name}" if plain else f"model.get_submodule({name!r})"
        headless = getattr(self.match.state_map.config, "num_classes", None) is None
        gives = "returns pooled features" if headless else "has a head"
        return (
            f"It holds {self.match.title} under '{self.prefix}', which {gives}, and beside it "
            f"{len(self.beside)} other tensors: {some(list(self.beside))}. If that part is what "
            f"you want, pass {module} to from_torch, or save {module}.state_dict() in PyTorch."
        )


def explained(
    error: CheckpointError, found: Mapping[str, TensorInfo], why: str, source: str
) -> CheckpointError:
    """The error of the detection, with what is seen in the tensors. ``why`` is a sentence on the
    names that were not learned; it may be empty."""
    first, *more = str(error).split("\n")
    modules = {key.rpartition(".")[0] for key in found}
    if words := next((words for name, words in _OTHER_PROGRAMS.items() if name in modules), ""):
        return CheckpointError(f"{source} is {words}. It is not converted.")
    known, head = nearly(found), several_layers(found)
    nearest = error.nearest if isinstance(error, NoFitError) else None
    if nearest is not None and _is_network_with_more(nearest):
        lines = [first, *more, head, known]
    elif nearest is None and not known and (parts := _parts_of(found)):
        lines = [f"{source} is no residual network as a whole."]
        lines += [*(part.description for part in parts), head]
        lines.append("Nothing is left out unless you say so: it may be part of what is computed.")
    elif causes := unsupported(found):
        lines = [first, why, *causes, *more, known]
    else:
        lines = [first, why, known, head, *more]
    return CheckpointError("\n".join(filter(None, lines)))


_OTHER_PROGRAMS = {
    "gn_root": "big_vision's ResNet v1 with group norms (it has a gn_root), whose kernels are "
    "divided by their standard deviation plus 1e-5, and no network here computes that"
}
"""What networks of JAX programs are that have no row in the naming schemes, by a module of each."""


def _parts_of(found: Mapping[str, TensorInfo]) -> list[CheckpointPart]:
    """Every part of a checkpoint, with a prefix of its own, that is a whole network."""
    if len(found) > _MOST_TENSORS:
        return []
    parts: list[CheckpointPart] = []
    for prefix in _places(found):
        if any(prefix.startswith(part.prefix) for part in parts):
            continue
        own = {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)}
        match = _network(own)
        if match is not None:
            beside = tuple(key for key in found if not key.startswith(prefix))
            parts.append(CheckpointPart(prefix, match, beside))
    return parts


def _is_network_with_more(match: Match) -> bool:
    """Whether all that does not fit are tensors outside the blocks of a network."""
    beside, naming = match.misfit.unexpected, match.state_map.naming
    return (
        len(beside) == len(match.misfit)
        and isinstance(match.state_map.config, ResNetConfig)
        and not any(naming.is_inside_block(key) for key in beside)
    )


def _places(found: Mapping[str, TensorInfo]) -> list[str]:
    """Prefixes of many tensors, the shortest first."""
    counts: dict[str, int] = {}
    for key in found:
        names = key.split(".")[:-1]
        for depth in range(1, min(len(names), _DEEPEST) + 1):
            prefix = ".".join(names[:depth]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    least = max(_FEWEST, len(found) // 5)
    inner = {(prefix[: prefix.rstrip(".").rfind(".") + 1], n) for prefix, n in counts.items()}
    many = [
        prefix
        for prefix, number in counts.items()
        if least <= number < len(found) and (prefix, number) not in inner
    ]
    return sorted(many, key=lambda one: one.count("."))[:_MOST_PLACES]


def _network(own: Mapping[str, TensorInfo]) -> Match | None:
    learned = learn_naming(own)
    for naming in (None, *(() if isinstance(learned, NotLearned) else (learned,))):
        try:
            match = identify(own, naming=naming)
        except CheckpointError:
            continue
        if isinstance(match.state_map.config, ResNetConfig):
            return match
    return None
