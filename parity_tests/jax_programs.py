"""Programs that train residual networks in JAX, as their users have them: each builds a small
network with random statistics in float64, saves it by its own means, and runs it.

It reads what to do from its standard input, a list in JSON on each line, and answers each with a
line. ``[PROGRAM, "save", FOLDER]`` writes the checkpoint into FOLDER, and images and outputs to
FOLDER/truth.npz; ``[PROGRAM, "run", FOLDER, FILE]`` loads FILE by the program's own means and
writes FOLDER/again.npz. It is a process of its own, as it takes packages from a folder that this
library's own environment does not have."""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx, serialization, traverse_util

IMAGES = np.random.default_rng(1).normal(0.2, 1, (2, 45, 38, 3)).astype(np.float32)
"""Odd and even, not square; the rows and columns of the later maps are odd and even too."""


def randomised(tree, seed=0):
    """The same tree in float64 with random values, positive where a norm needs it."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        if any(name in ("scale", "var") or name.endswith("var_ema") for name in names):
            return rng.uniform(0.5, 1.5, like.shape)
        if "counter" in names:
            return np.full(like.shape, 7, np.int32)
        fan = max(1, like.size // like.shape[-1]) if len(like.shape) > 1 else 10
        return rng.normal(0, fan**-0.5, like.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


class ExampleBlock(linen.Module):
    """A block of flax's ImageNet example, by its conventions: what is not named is numbered."""

    filters: int
    strides: tuple[int, int] = (1, 1)
    sizes: tuple[int, ...] = (3, 3)

    @linen.compact
    def __call__(self, x):
        conv = partial(linen.Conv, use_bias=False)
        norm = partial(linen.BatchNorm, use_running_average=True, momentum=0.9, epsilon=1e-5)
        out = self.filters * (4 if len(self.sizes) == 3 else 1)
        y = x
        for i, size in enumerate(self.sizes):
            last = i == len(self.sizes) - 1
            strides = self.strides if i == len(self.sizes) - 2 else (1, 1)
            y = conv(out if last else self.filters, (size, size), strides)(y)
            y = norm()(y)
            y = y if last else linen.relu(y)
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(out, (1, 1), self.strides, name="conv_proj")(x))
        return linen.relu(x + y)


class ResNetBlock(ExampleBlock):
    """Two 3x3 convolutions."""


class BottleneckResNetBlock(ExampleBlock):
    """1x1, 3x3 and 1x1."""

    sizes: tuple[int, ...] = (1, 3, 1)


class Example(linen.Module):
    """flax's ImageNet example: the first convolution pads (3, 3), everything else ``'SAME'``."""

    block: type
    depths: tuple[int, ...] = (1, 2, 1)

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (7, 7), (2, 2), [(3, 3), (3, 3)], use_bias=False, name="conv_init")(x)
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn_init")(x)
        x = linen.max_pool(linen.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = self.block(8 * 2**stage, (2, 2) if stage and not i else (1, 1))(x)
        return linen.Dense(5)(x.mean((1, 2)))


class Linen:
    """A Linen network that is saved with ``flax.serialization``."""

    def __init__(self, model):
        self.model = model
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(IMAGES, jnp.float64))
        self.variables = randomised(shapes)

    def save(self, folder):
        (folder / "net.msgpack").write_bytes(serialization.to_bytes(self.variables))

    def load(self, file):
        self.variables = serialization.from_bytes(self.variables, file.read_bytes())

    def output(self, images):
        return self.model.apply(self.variables, jnp.asarray(images, jnp.float64))


def jax_resnet(name):
    import jax_resnet as package

    return Linen(getattr(package, name)(stage_sizes=[1, 2], hidden_sizes=(8, 16), n_classes=5))


class HuggingFace:
    """FlaxResNet of transformers 4."""

    def __init__(self, kind):
        from transformers import FlaxResNetForImageClassification, ResNetConfig

        sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "num_labels": 5}
        config = ResNetConfig(**sizes, layer_type=kind, downsample_in_first_stage=kind == "basic")
        self.model = FlaxResNetForImageClassification(config, (1, 32, 32, 3), dtype=jnp.float64)
        self.model.params = randomised(jax.tree_util.tree_map(jnp.asarray, self.model.params))

    def save(self, folder):
        self.model.save_pretrained(folder / "net")

    def load(self, file):
        self.model.params = serialization.from_bytes(self.model.params, file.read_bytes())

    def output(self, images):
        return self.model(np.moveaxis(images, -1, 1)).logits


class FlaxModels:
    """A network of flaxmodels; its published weights are HDF5, what it trains is Linen's."""

    def __init__(self, kind):
        from flaxmodels.resnet import resnet

        jnp.float32 = jnp.float64  # its norms compute in float32 whatever the dtype
        resnet.LAYERS = {"resnet18": [1, 2, 1, 1], "resnet50": [1, 1, 1, 1]}
        self.package, self.name = resnet, {"basic": "resnet18", "bottleneck": "resnet50"}[kind]
        self.kind, self.options = kind, {"output": "logits", "normalize": False}
        self.model = getattr(resnet, f"ResNet{self.name[6:]}")
        self.trained = self._build()
        self.variables = randomised(
            jax.eval_shape(partial(self.trained.init, train=False), jax.random.key(0), IMAGES)
        )

    def _build(self, **options):
        options = {"pretrained": None, **self.options, **options}
        return self.model(**options, dtype="float64")

    def save(self, folder):
        (folder / "net.msgpack").write_bytes(serialization.to_bytes(self.variables))

    def load(self, file):
        if file.suffix == ".h5":
            self.package.utils.download = lambda *_: str(file)
            self.trained = self._build(pretrained="imagenet")
            self.variables = self.trained.init(jax.random.key(0), IMAGES, train=False)
        else:
            self.variables = serialization.from_bytes(self.variables, file.read_bytes())

    def output(self, images):
        return self.trained.apply(self.variables, jnp.asarray(images, jnp.float64), train=False)


class Haiku:
    """haiku.nets.ResNet, pickled or as an archive of numpy."""

    def __init__(self, bottleneck, v2=False):
        import haiku as hk

        def forward(images, train=False):
            net = hk.nets.ResNet(
                (1, 2, 1, 1),
                5,
                bottleneck=bottleneck,
                resnet_v2=v2,
                channels_per_group=(16, 32, 32, 64),
                use_projection=(bottleneck, True, True, True),
                initial_conv_config={"output_channels": 8 if bottleneck else 16},
            )
            return net(images, is_training=train)

        self.net = hk.transform_with_state(forward)
        init = partial(self.net.init, train=True)
        shapes = jax.eval_shape(init, jax.random.key(0), jnp.asarray(IMAGES, jnp.float64))
        self.params, self.state = randomised(shapes)

    def save(self, folder):
        with (folder / "net.pkl").open("wb") as handle:
            pickle.dump(jax.tree_util.tree_map(jnp.asarray, (self.params, self.state)), handle)
        flat = {
            f"{collection}/{module}/{name}": value
            for collection, tree in (("params", self.params), ("state", self.state))
            for module, own in tree.items()
            for name, value in own.items()
        }
        np.savez(folder / "net.npz", **flat)

    def load(self, file):
        """Fills every parameter and every average from names without ``~`` and the root."""
        found = dict(np.load(file))

        def value(collection, path, name, like):
            parts = [part for part in path.split("/") if part != "~"][1:]
            return found["/".join((collection, *parts, name))].reshape(like.shape)

        for path, own in self.params.items():
            self.params[path] = {n: value("params", path, n, like) for n, like in own.items()}
        for path, own in self.state.items():
            norm, _, ema = path.rpartition("/~/")
            average = value("batch_stats", norm, ema.removesuffix("_ema"), own["average"])
            self.state[path] = {**own, "average": average}

    def output(self, images):
        return self.net.apply(self.params, self.state, None, jnp.asarray(images, jnp.float64))[0]


class BigVisionConv(linen.Module):
    """A convolution without bias whose kernel is standardised."""

    filters: int
    size: int
    stride: int = 1

    @linen.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.filters)
        kernel = self.param("kernel", linen.initializers.lecun_normal(), shape)
        mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        kernel, sides = (kernel - mean) / jnp.sqrt(var + 1e-10), [(self.size // 2,) * 2] * 2
        layouts, strides = ("NHWC", "HWIO", "NHWC"), (self.stride, self.stride)
        return jax.lax.conv_general_dilated(x, kernel, strides, sides, dimension_numbers=layouts)


class BigVisionNorm(linen.Module):
    """A group norm of 32 groups whose parameters have the axes of an image."""

    @linen.compact
    def __call__(self, x):
        shape = (1, 1, 1, x.shape[-1])
        scale = self.param("scale", linen.initializers.ones, shape)
        bias = self.param("bias", linen.initializers.zeros, shape)
        groups = x.reshape(*x.shape[:-1], 32, -1)
        mean = groups.mean((1, 2, 4), keepdims=True)
        var = groups.var((1, 2, 4), keepdims=True)
        return ((groups - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias


class BigVisionUnit(linen.Module):
    """A bottleneck in pre-activation order."""

    planes: int
    stride: int

    @linen.compact
    def __call__(self, x):
        y = linen.relu(BigVisionNorm(name="gn1")(x))
        if self.stride > 1 or x.shape[-1] != 4 * self.planes:
            x = BigVisionConv(4 * self.planes, 1, self.stride, name="conv_proj")(y)
        y = BigVisionConv(self.planes, 1, name="conv1")(y)
        y = linen.relu(BigVisionNorm(name="gn2")(y))
        y = BigVisionConv(self.planes, 3, self.stride, name="conv2")(y)
        y = linen.relu(BigVisionNorm(name="gn3")(y))
        return x + BigVisionConv(4 * self.planes, 1, name="conv3")(y)


class BigVisionRoot(linen.Module):
    """The stem: a bare convolution, and pooling that sees no border."""

    @linen.compact
    def __call__(self, x):
        x = BigVisionConv(32, 7, 2, name="conv_root")(x)
        return linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class BigVisionStage(linen.Module):
    """Units that are numbered from 1, in two digits."""

    planes: int
    depth: int
    stride: int

    @linen.compact
    def __call__(self, x):
        for i in range(1, self.depth + 1):
            x = BigVisionUnit(self.planes, self.stride if i == 1 else 1, name=f"unit{i:02}")(x)
        return x


class BigVisionNet(linen.Module):
    """big_vision's BiT by the names of its parts; it is in no registry."""

    @linen.compact
    def __call__(self, x):
        x = BigVisionRoot(name="root_block")(x)
        x = BigVisionStage(32, 2, 1, name="block1")(x)
        x = BigVisionStage(64, 1, 2, name="block2")(x)
        x = linen.relu(BigVisionNorm(name="norm-pre-head")(x)).mean((1, 2))
        return linen.Dense(5, name="head")(x)


class BigVision(Linen):
    """Its parameters are an archive of numpy, by their paths."""

    def save(self, folder):
        flat = traverse_util.flatten_dict(self.variables["params"], sep="/")
        np.savez(folder / "net.npz", **flat)

    def load(self, file):
        like = traverse_util.flatten_dict(self.variables["params"], sep="/")
        found = dict(np.load(file))
        assert found.keys() - like.keys() == {"flax_resblock"}
        assert all(found[name].shape == value.shape for name, value in like.items())
        tree = {name: found[name] for name in like}
        self.variables = {"params": traverse_util.unflatten_dict(tree, sep="/")}


class BonsaiBlock(nnx.Module):
    """A bottleneck by the names that bonsai gives its parts."""

    def __init__(self, inputs, planes, stride, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.conv0, self.bn0 = conv(inputs, planes, (1, 1), padding=0), norm(planes)
        self.conv1 = conv(planes, planes, (3, 3), strides=stride, padding=1)
        self.bn1 = norm(planes)
        self.conv2, self.bn2 = conv(planes, 4 * planes, (1, 1), padding=0), norm(4 * planes)
        skip = {"conv": conv(inputs, 4 * planes, (1, 1), strides=stride, padding=0)}
        projects = stride > 1 or inputs != 4 * planes
        self.downsample = nnx.Dict(**skip, bn=norm(4 * planes)) if projects else None

    def __call__(self, x):
        y = nnx.relu(self.bn0(self.conv0(x)))
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(y)))))
        x = x if self.downsample is None else self.downsample["bn"](self.downsample["conv"](x))
        return nnx.relu(x + y)


class Bonsai(nnx.Module):
    """bonsai's ResNet by the names of its parts; its package in the registry is empty."""

    def __init__(self, rngs):
        conv = nnx.Conv(3, 8, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.stem = nnx.Dict(conv=conv, bn=nnx.BatchNorm(8, use_running_average=True, rngs=rngs))
        channels = 8
        for stage, (planes, depth) in enumerate(((8, 2), (16, 1))):
            blocks = []
            for i in range(depth):
                blocks.append(BonsaiBlock(channels, planes, 2 if stage and not i else 1, rngs))
                channels = 4 * planes
            setattr(self, f"layer{stage}", nnx.Dict(blocks=nnx.List(blocks)))
        self.fc = nnx.Linear(channels, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem["bn"](self.stem["conv"](x)))
        x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for layer in (self.layer0, self.layer1):
            for block in layer["blocks"]:
                x = block(x)
        return self.fc(x.mean((1, 2)))


class Nnx:
    """An NNX network whose state is saved with Orbax, in a folder of steps."""

    def __init__(self):
        self.model = Bonsai(nnx.Rngs(0))
        nnx.update(self.model, randomised(nnx.state(self.model)))

    def save(self, folder):
        import orbax.checkpoint as ocp

        with ocp.CheckpointManager((folder / "net").resolve()) as manager:
            for step in (2, 10):
                manager.save(step, args=ocp.args.StandardSave(nnx.state(self.model)))

    def load(self, file):
        state = nnx.to_pure_dict(nnx.state(self.model))
        found = serialization.msgpack_restore(file.read_bytes())

        def merged(like, *trees):
            if not isinstance(like, dict):
                return next(tree for tree in trees if tree is not None)
            return {
                key: merged(value, *(tree and tree.get(str(key)) for tree in trees))
                for key, value in like.items()
            }

        state = merged(state, found["params"], found["batch_stats"])
        nnx.update(self.model, state)

    def output(self, images):
        return self.model(jnp.asarray(images, jnp.float64))


PROGRAMS = {
    "flax example": lambda: Linen(Example(ResNetBlock)),
    "flax example, bottleneck": lambda: Linen(Example(BottleneckResNetBlock)),
    "jax-resnet": lambda: jax_resnet("ResNet18"),
    "jax-resnet, D": lambda: jax_resnet("ResNetD50"),
    "transformers": lambda: HuggingFace("basic"),
    "transformers, bottleneck": lambda: HuggingFace("bottleneck"),
    "flaxmodels": lambda: FlaxModels("basic"),
    "flaxmodels, bottleneck": lambda: FlaxModels("bottleneck"),
    "haiku": lambda: Haiku(False),
    "haiku, bottleneck": lambda: Haiku(True),
    "haiku v2": lambda: Haiku(False, v2=True),
    "haiku v2, bottleneck": lambda: Haiku(True, v2=True),
    "big_vision": lambda: BigVision(BigVisionNet()),
    "bonsai": Nnx,
}


def main():
    jax.config.update("jax_enable_x64", True)
    made = {}
    for line in sys.stdin:
        name, what, folder, *file = json.loads(line)
        try:
            program = made.setdefault(name, None) or PROGRAMS[name]()
            made[name] = program
            if what == "save":
                program.save(Path(folder))
            else:
                program.load(Path(*file))
            output = {"images": IMAGES, "output": np.asarray(program.output(IMAGES))}
            np.savez(Path(folder) / ("truth.npz" if what == "save" else "again.npz"), **output)
            print("done", flush=True)
        except Exception:
            print(json.dumps(traceback.format_exc()), flush=True)


if __name__ == "__main__":
    main()
