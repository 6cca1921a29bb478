"""Cuts both sides into slots and explains every slot or connection that is wrong by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from flax_resblock.config import Branch
from flax_resblock.errors import InputError, raised
from flax_resblock.parity.causes import NAMES, Cause, Diagnosis, LayerRun, Side, evidence_for
from flax_resblock.parity.causes.blocks import BlockEnd, explain_ending, explain_gradient
from flax_resblock.parity.causes.connections import Connection, explain_connection
from flax_resblock.parity.causes.layers import explain_layer
from flax_resblock.parity.causes.norms import explain_statistics
from flax_resblock.parity.isolation import cotangent_of
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.parity.pair import PRECISIONS, Pair, suspects
from flax_resblock.parity.parts import Devices, Isolated, Tensors, Weights, reference_run
from flax_resblock.parity.taps import Trace


def quantity_of(key: tuple[str, str]) -> str:
    """``"forward"``, ``"connection"``, ``"running statistics"`` or a gradient, whatever the
    mode."""
    return key[0].removeprefix("isolated ").removeprefix("train ")


class Anatomy:
    """A pair taken apart in one mode: what the reference has at every place, and what each side has
    there when it is fed the same."""

    def __init__(self, pair: Pair, images: np.ndarray, train: bool, gradients: bool) -> None:
        self.pair, self.images, self.train = pair, np.asarray(images, np.float64), train
        spec, precision, devices = pair.specification(), PRECISIONS["float64"], Devices()
        self.against = "the specification" if spec is not None else "PyTorch"
        self.reference: Trace = reference_run(spec or pair, images, train=train)
        part = Isolated(train, self.reference, gradients)
        self.truth: Tensors = next(part.run("torch", spec or pair, precision, images, devices))
        self.module = (spec or pair).torch(precision)
        self.places = dict((spec or pair).torch_slots)
        self.raised: list[Diagnosis] = []
        self.sides: dict[Side, Tensors] = {}
        for side in suspects(spec):
            try:
                tensors = next(part.run(side, pair, precision, images, devices))
                if side == "torch" and list(self.places)[-1] not in pair.torch_slots:
                    # what comes out was not cut off from what went in
                    tensors = {key: t for key, t in tensors.items() if key[1] != "output"}
                self.sides[side] = tensors
            except InputError:
                raise
            except Exception as error:  # a layer that cannot take its input
                words = f"{NAMES[side]} raises {raised(error)}"
                evidence = "while it was fed what the reference feeds its layers"
                self.raised.append(Diagnosis("output", "raises", side, words, evidence))
        tensors = next(Weights().run("torch", spec or pair, precision, images, devices))
        self.tensors: dict[str, dict[str, np.ndarray]] = {}
        self.by_name: dict[str, dict[str, np.ndarray]] = {}
        for (_, key), value in tensors.items():
            slot, _, name = key.rpartition("/")
            self.tensors.setdefault(slot, {})[name] = np.asarray(value, np.float64)
            self.by_name.setdefault(name, {})[slot] = np.asarray(value, np.float64)

    def findings(self) -> Iterator[Diagnosis]:
        """Every place that is wrong by itself, in forward order; statistics and gradients last, and
        only where the values are right."""
        yield from self.raised
        order = {name: i for i, name in enumerate(self.reference.activations)}

        def rank(key: tuple[str, str]) -> tuple[int, int, bool]:
            quantity, place = quantity_of(key), key[1].partition("/")[0]
            late = ("gradient" in quantity) * 2 + (quantity == "running statistics")
            return late, order.get(place, len(order)), quantity != "connection"

        for side, tensors in self.sides.items():
            wrong: set[str] = set()
            for key in sorted(self.truth, key=rank):
                truth, value, slot = self.truth[key], tensors.get(key), key[1]
                quantity, place = quantity_of(key), slot.partition("/")[0]
                if value is None or (error := relative_l2(value, truth)) <= FLOAT64_LIMIT:
                    continue
                if not self._is_cut_off(place, tensors):
                    continue
                if quantity in ("forward", "connection"):
                    wrong.add(place)
                elif place in wrong or (wrong and "gradient" in quantity):
                    continue  # follows from it
                cause = self._explain(quantity, slot, side, value, truth)
                where = "in the gradient " if "gradient" in quantity else ""
                if quantity == "connection":
                    where = "before it "
                unknown = f"differs in {quantity}, and no known mistake explains it"
                words = f"{where}{NAMES[side]} {cause.sentence if cause else unknown}"
                name = cause.name if cause else "unknown"
                evidence = evidence_for(cause, error, self.against)
                yield Diagnosis(slot, name, side, words, evidence)

    def _explain(
        self, quantity: str, slot: str, side: Side, value: np.ndarray, truth: np.ndarray
    ) -> Cause | None:
        if quantity == "connection":
            before, outputs = self._before(slot), self.reference.activations
            return explain_connection(Connection(truth, self.images, before, outputs), value)
        if quantity == "running statistics":
            place = slot.partition("/")[0]
            layer = self.layer(place)
            if layer is None:
                return None
            if slot.endswith("num_batches_tracked"):
                return Cause("frozen-counter", f"counts {value} batches instead of {truth}", 0.0)
            keys = [("isolated running statistics", f"{place}/{name}") for name in ("mean", "var")]
            found = [self.sides[side][key] for key in keys if key in self.sides[side]]
            return explain_statistics(layer, *found) if len(found) == 2 else None
        if "gradient" in quantity:
            if quantity != "input gradient":
                return explain_gradient(value, truth)
            output = self.reference.activations.get(slot)
            cotangent = None if output is None else cotangent_of("own", slot, output.shape)
            end = self._block_end(slot) if self._is_block(slot) else None
            return explain_gradient(value, truth, self.layer(slot), cotangent, end)
        if self._is_block(slot):
            end = self._block_end(slot)
            return None if end is None else explain_ending(end, value)
        layer = self.layer(slot)
        return None if layer is None else explain_layer(layer, value)

    def _before(self, slot: str) -> Mapping[str, np.ndarray]:
        """Outputs of the slots that ran before this one. A block runs before its layers do, but is
        complete after them."""
        outputs = self.reference.activations
        if slot not in outputs:
            return outputs
        names = list(outputs)
        end = names.index(slot)
        if self._is_block(slot):
            end = next((i for i, name in enumerate(names) if self._inside(name, slot)), end)
        return {"input": self.images, **{name: outputs[name] for name in names[:end]}}

    def _is_cut_off(self, slot: str, tensors: Tensors) -> bool:
        """Whether what a block gives was computed from what its layers were made to give; not so
        where none of them could be hooked."""
        captured = {key[1] for key in tensors if quantity_of(key) == "forward"}
        inside = [name for name in self.reference.activations if self._inside(name, slot)]
        return not inside or any(name in captured for name in inside)

    def _inside(self, name: str, block: str) -> bool:
        return name != block and (block == "block" or name.startswith(f"{block}."))

    def _is_block(self, slot: str) -> bool:
        return slot in self.reference.activations and any(
            self._inside(name, slot) for name in self.reference.activations
        )

    def layer(self, slot: str) -> LayerRun | None:
        """The layer at a slot as it is meant to be; None where the slot is none."""
        if slot not in self.places or slot not in self.reference.inputs:
            return None
        others = {
            name: {place: t for place, t in by.items() if place != slot}
            for name, by in self.by_name.items()
        }
        module: torch.nn.Module = self.module.get_submodule(self.places[slot])
        x, truth = self.reference.inputs[slot], self.reference.activations[slot]
        return LayerRun(module, self.tensors.get(slot, {}), others, x, truth, self.train)

    def _block_end(self, block: str) -> BlockEnd | None:
        """How the reference ends a residual block; None if its branches could not be captured."""
        outputs = self.reference.activations
        inside = [name for name in outputs if self._inside(name, block)]
        branches = self.pair.branches
        skips = [name for name in inside if branches.get(name) is Branch.SHORTCUT]
        mains = [name for name in inside if name not in skips]
        if not mains or block not in self.reference.inputs:
            return None
        skip = outputs[skips[-1]] if skips else None
        return BlockEnd(outputs[block], outputs[mains[-1]], skip, self.reference.inputs[block])
