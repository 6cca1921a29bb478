"""Networks as people write them, against the Flax code that they are ported to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from flax_resblock.errors import InputError
from flax_resblock.nn.variables import flat_arrays
from flax_resblock.parity.module_run import randomise
from flax_resblock.port import axes
from flax_resblock.port.body import Reader
from flax_resblock.port.classes import classes_of
from flax_resblock.port.graphs import leaves
from flax_resblock.port.network import executed, filled
from flax_resblock.port.parts import tensors_of
from flax_resblock.port.source import source_of
from flax_resblock.port.tracing import trace
from flax_resblock.port.values import BATCH
from parity_tests.port_networks import IMAGE, NETWORKS, Dense
from parity_tests.support import fast_only

LIMIT = 1e-12
FLOOR = 1e-2
"""A gradient is compared relative to itself, or to this share of the largest one: that of a bias
in front of a norm is zero but for rounding."""

SLOW = {
    *("resnet9", "wide_resnet", "shake", "loops_over_shapes", "dense", "channel_norms"),
    *("weight_standardised", "blur_pools", "parts_of_backbone", "windows", "transformers"),
}
"""Networks whose operators the others or test_operators.py have too, or which take longest."""


@dataclass
class Ported:
    """A module, the code that it becomes, and the table of its tensors."""

    module: torch.nn.Module
    source: str
    name: str
    tensors: list[Any]

    def flax(self) -> nnx.Module:
        made = getattr(executed(self.source, f"ported_{self.name.lower()}"), self.name)
        state = state_of(self.module)
        return filled(made, {one.path: one.codec.to_flax(state[one.key]) for one in self.tensors})


def ported(build: Any, shapes: Any) -> Ported:
    torch.manual_seed(0)
    module = build().double().eval()
    randomise(module)
    inputs = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    reader = Reader(trace(module, inputs))
    orders = [axes.channels_last(1 + len(shape)) for shape in shapes]
    body = reader.body(
        "", [((BATCH, *shape), one) for shape, one in zip(shapes, orders, strict=True)]
    )
    classes = classes_of(reader, body)
    return Ported(module, source_of(classes, "Ported."), classes[-1].name, tensors_of(body.parts))


def state_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy().copy() for key, value in module.state_dict().items()}


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim > 2 else array


def error(have: Any, want: np.ndarray, floor: float = 0.0) -> float:
    have = np.asarray(have)
    assert have.shape == want.shape
    return float(np.abs(have - want).max() / max(np.abs(want).max(), floor, 1e-300))


@dataclass
class Run:
    """What a network computed in training mode, and in evaluation mode before."""

    evaluated: list[np.ndarray]
    trained: list[np.ndarray]
    statistics: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


def run_torch(case: Ported, inputs: list[torch.Tensor], weights: list[np.ndarray]) -> Run:
    module = case.module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        evaluated = [channels_last(one) for one in leaves(module.eval()(*inputs))]
    with mock.patch.object(F, "dropout", lambda x, *_, **__: x):
        trained = list(leaves(module.train()(*inputs)))
    loss = sum(
        (one * torch.from_numpy(np.moveaxis(w, -1, 1) if w.ndim > 2 else w)).sum()
        for one, w in zip(trained, weights, strict=True)
    )
    assert isinstance(loss, torch.Tensor)
    module.zero_grad()
    loss.backward()
    listed = {one.key for one in case.tensors}
    gradients = {
        key: one.grad.numpy()
        for key, one in module.named_parameters(remove_duplicate=False)
        if one.grad is not None and key in listed
    }
    statistics = {
        key: value.numpy().copy()
        for key, value in module.state_dict().items()
        if key in listed and ("running" in key or "num_batches" in key)
    }
    module.load_state_dict(before)
    return Run(evaluated, [channels_last(one) for one in trained], statistics, gradients)


def run_flax(case: Ported, model: nnx.Module, inputs: Any, weights: Any) -> Run:
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def both(params: Any) -> Any:
        network: Any = nnx.merge(graph, params, rest, copy=True)
        network.eval()
        evaluated = list(leaves(network(*inputs)))
        network.train()
        for _, one in nnx.iter_modules(network):
            if isinstance(one, nnx.Dropout):
                one.rate = 0.0
        trained = list(leaves(network(*inputs)))
        loss = sum(jnp.sum(one * w) for one, w in zip(trained, weights, strict=True))
        return loss, (evaluated, trained, nnx.state(network, nnx.BatchStat))

    gradients, (evaluated, trained, after) = jax.jit(jax.grad(both, has_aux=True))(params)
    gradients = dict(nnx.to_flat_state(gradients))
    after = dict(nnx.to_flat_state(after))
    back = {one.path: one for one in case.tensors if one.path is not None}

    def by_key(found: Mapping[Any, Any]) -> dict[str, np.ndarray]:
        return {
            back[path].key: back[path].codec.to_torch(np.asarray(value[...]))
            for path, value in found.items()
        }

    return Run(evaluated, trained, by_key(after), by_key(gradients))


def compare(case: Ported, model: nnx.Module, shapes: Any) -> dict[str, float]:
    """The largest errors of outputs, running statistics and gradients."""
    rng = np.random.default_rng(1)
    inputs = [torch.from_numpy(rng.standard_normal((3, *shape))) for shape in shapes]
    arrays = [jnp.asarray(channels_last(one)) for one in inputs]
    with torch.no_grad():
        weights = [
            rng.standard_normal(channels_last(one).shape) for one in leaves(case.module(*inputs))
        ]
    torch_run = run_torch(case, inputs, weights)
    flax_run = run_flax(case, model, arrays, weights)
    assert flax_run.gradients.keys() >= torch_run.gradients.keys()
    top = max(float(np.abs(one).max()) for one in torch_run.gradients.values())
    stats = torch_run.statistics
    return {
        "evaluation": max(map(error, flax_run.evaluated, torch_run.evaluated)),
        "training": max(map(error, flax_run.trained, torch_run.trained)),
        "statistics": max(
            (error(flax_run.statistics[key], stats[key]) for key in stats), default=0
        ),
        "gradients": max(
            error(flax_run.gradients[key], one, FLOOR * top)
            for key, one in torch_run.gradients.items()
        ),
    }


def held(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state dict, those that are one tensor among them too."""
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    return {key: tensors[key] for key in module.state_dict()}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", fast_only(NETWORKS.keys() - SLOW, NETWORKS))
def test_a_ported_network_computes_and_learns_the_same(name: str) -> None:
    build, shapes = NETWORKS[name]
    case = ported(build, shapes)
    model = case.flax()
    errors = compare(case, model, shapes)
    assert max(errors.values()) <= LIMIT, errors
    arrays, state = flat_arrays(model), state_of(case.module)
    assert arrays.keys() == {one.path for one in case.tensors}
    for one in case.tensors:
        back = one.codec.to_torch(arrays[one.path])
        assert back.tobytes() == np.ascontiguousarray(state[one.key]).tobytes()
        assert back.shape == state[one.key].shape
    listed = {id(held(case.module)[one.key]) for one in case.tensors}
    assert [key for key, one in held(case.module).items() if id(one) not in listed] == []


def test_a_dense_block_adds_to_one_list() -> None:
    source = ported(Dense, IMAGE).source
    assert "features.append(self.layers[1](features))" in source
    assert "features.append(self.layers[2](features))" in source
    assert source.count("features = [") == 1


@pytest.mark.parametrize(
    ("old", "new", "quantity"),
    [
        ("stride=2", "stride=2, padding_mode='circular'", "evaluation"),
        ("nn.BatchNorm(8", "nn.BatchNorm(8, momentum=0.11", "statistics"),
        ("nn.relu", "nn.silu", "evaluation"),
    ],
)
def test_one_changed_number_is_noticed(old: str, new: str, quantity: str) -> None:
    case = ported(*NETWORKS["flat_sequential"])
    assert old in case.source
    case.source = case.source.replace(old, new, 1)
    assert compare(case, case.flax(), IMAGE)[quantity] > 1e-4


def test_a_gradient_at_ties_is_noticed() -> None:
    case = ported(*NETWORKS["ties"])
    assert "nn.maximum_along(" in case.source
    case.source = case.source.replace("nn.maximum_along(", "nn.amax(")
    errors = compare(case, case.flax(), IMAGE)
    assert errors["evaluation"] <= LIMIT < 1e-4 < errors["gradients"]


class Small(torch.nn.Module):
    """A convolution; subclasses say what comes before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)


class Branching(Small):
    def forward(self, x):
        x = self.conv(x)
        if x.mean() > 0:
            x = x * 2
        return x


class ReadingValues(Small):
    def forward(self, x):
        return self.conv(x) * float(x.max())


class FixedBatch(Small):
    def forward(self, x):
        return self.conv(x).view(2, -1)


class ChangedInput(Small):
    def forward(self, x):
        x -= 0.5
        return self.conv(x)


class ChangedBuffer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        x = self.conv(x)
        self.seen.add_(x.detach().mean((0, 2, 3)))
        return x - self.seen[:, None, None]


class Sorted(Small):
    def forward(self, x):
        return self.conv(x).flatten(2).topk(3, -1)[0]


class Indices(Small):
    def forward(self, x):
        largest, where = self.conv(x).max(1)
        return largest * where


class Noisy(Small):
    def forward(self, x):
        x = self.conv(x)
        return x + torch.randn_like(x)


class AlwaysDropped(Small):
    def forward(self, x):
        return F.dropout(self.conv(x), 0.5)


class Cast(Small):
    def forward(self, x):
        return self.conv(x).float().mean((2, 3))


class Volume(Small):
    def forward(self, x):
        return F.conv3d(self.conv(x)[:, None], self.conv.weight[:, None])


class TiedLayouts(Small):
    def __init__(self) -> None:
        super().__init__()
        self.back = torch.nn.ConvTranspose2d(4, 3, 3)
        self.back.weight = self.conv.weight

    def forward(self, x):
        return self.back(self.conv(x))


class CalledTwoWays(Small):
    def __init__(self) -> None:
        super().__init__()
        self.part = ByShape()

    def forward(self, x):
        return self.part(x).mean((2, 3)) + self.part(x[:, :, ::2]).mean((2, 3))


class ByShape(Small):
    def forward(self, x):
        return self.conv(x) * (2 if x.shape[2] > 8 else 3)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Branching, ["depends on the values", "if x.mean() > 0"]),
        (ReadingValues, ["depends on the values", "float(x.max())"]),
        (FixedBatch, ["fixes the size of the batch"]),
        (ChangedInput, ["changes its input in place (sub_)", "x -= 0.5"]),
        (ChangedBuffer, ["changes a buffer in place (add_)", "self.seen.add_"]),
        (Sorted, ["aten.topk", "topk(3, -1)"]),
        (Indices, ["the indices of the largest", "largest, where"]),
        (Noisy, ["aten.randn_like", "x + torch.randn_like(x)"]),
        (AlwaysDropped, ["dropout is on in evaluation mode", "training=self.training"]),
        (Cast, ["casts to torch.float32", ".float()"]),
        (Volume, ["aten.conv3d", "F.conv3d"]),
        (TiedLayouts, ["back.weight", "conv.weight", "one parameter of two modules"]),
        (CalledTwoWays, ["part is called more than once", "depends on the call"]),
    ],
)
def test_what_cannot_be_ported_is_refused_by_name(build: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ported(build, IMAGE)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
