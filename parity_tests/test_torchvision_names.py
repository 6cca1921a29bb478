"""Names, shapes and numbers are those of the real torchvision."""

from dataclasses import asdict

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import architectures, create, from_torch, to_torch
from flax_resblock.config import architecture
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from parity_tests.support import fast_only, import_torchvision, output, with_trained_norms
from torch_ref import ResNet

TORCHVISION = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
]
TORCHVISION += ["wide_resnet50_2", "wide_resnet101_2"]


def shapes(state):
    return [
        (key, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in state.items()
    ]


def test_all_ten_architectures_of_torchvision_are_there():
    theirs = {
        name
        for name in import_torchvision().models.list_models(import_torchvision().models)
        if "resne" in name or "resnext" in name
    }
    assert set(TORCHVISION) == theirs
    assert theirs <= set(architectures())


FEW = ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"]


@pytest.mark.parametrize("name", fast_only(FEW, TORCHVISION))
def test_keys_shapes_and_dtypes_are_torchvisions(name):
    with torch.device("meta"):
        theirs = shapes(getattr(import_torchvision().models, name)().state_dict())
        assert shapes(ResNet(**asdict(architecture(name))).state_dict()) == theirs
    ours = StateMap(architecture(name), NAMINGS["torchvision"])
    assert [(entry.torch_key, entry.torch_shape) for entry in ours.entries] == [
        (key, shape) for key, shape, _ in theirs
    ]
    model = create(name, rngs=None)
    flat = {
        tuple(path): variable.get_raw_value()
        for path, variable in dict(nnx.to_flat_state(nnx.state(model))).items()
    }
    assert {path: value.shape for path, value in flat.items()} == {
        entry.flax_path: entry.flax_shape for entry in ours.entries
    }


@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("wide_resnet50_2", marks=pytest.mark.slow)]
)
def test_a_fresh_network_leaves_under_torchvisions_names(name):
    with torch.device("meta"):
        theirs = getattr(import_torchvision().models, name)(num_classes=7)
    ours = to_torch(create(name, num_classes=7, rngs=nnx.Rngs(0)))
    assert shapes(ours) == shapes(theirs.state_dict())
    theirs.load_state_dict(
        {key: torch.from_numpy(value) for key, value in ours.items()}, strict=True, assign=True
    )
    last = list(ours)[-1]
    del ours[last]
    with pytest.raises(RuntimeError, match=f"Missing key.*{last}"):
        theirs.load_state_dict(
            {key: torch.from_numpy(value) for key, value in ours.items()}, strict=True, assign=True
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train"),
    [("resnet18", True), ("resnext50_32x4d", False), ("wide_resnet50_2", True)],
)
def test_logits_equal_torchvisions_in_float64(name, train):
    torch.manual_seed(3)
    module = getattr(import_torchvision().models, name)(num_classes=17).double()
    generator = np.random.default_rng(4)
    with_trained_norms(module)
    images = generator.standard_normal((4, 67, 80, 3)) * 1.5 + 0.3
    with jax.enable_x64(True):
        model = from_torch(module)
        assert model.config == architecture(name, num_classes=17)
        model.train() if train else model.eval()
        ours = output(model, images)
    theirs = (
        module.train(train)(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).detach().numpy()
    )
    assert relative_l2(ours, theirs) <= FLOAT64_LIMIT
    module.load_state_dict(
        {key: torch.from_numpy(value) for key, value in to_torch(model).items()}, strict=True
    )


@pytest.mark.slow
def test_dilation_is_torchvisions_replace_stride_with_dilation():
    torch.manual_seed(5)
    module = (
        import_torchvision()
        .models.resnet50(num_classes=5, replace_stride_with_dilation=[False, True, True])
        .double()
        .eval()
    )
    images = np.random.default_rng(6).standard_normal((1, 65, 64, 3))
    theirs = module(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).detach().numpy()
    with jax.enable_x64(True):
        model = from_torch(
            module, architecture=architecture("resnet50", num_classes=5, dilated_stages=(3, 4))
        )
        assert relative_l2(output(model, images), theirs) <= FLOAT64_LIMIT
        plain = from_torch(module.state_dict())
        assert relative_l2(output(plain, images), theirs) > 1e-3
