"""Variables of JAX programs: found wherever they lie in a file, read without running anything,
taken to PyTorch with their padding; and what is refused."""

from __future__ import annotations

import importlib.util
import pickle
import re
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx, serialization
from flax.training import train_state

import flax_resblock
from flax_resblock import InputError, ResNetConfig, from_torch, to_torch
from flax_resblock.checkpoint import read
from flax_resblock.checkpoint.jax_tree import nested
from flax_resblock.cli import run
from flax_resblock.config import architecture, from_json, name_of, to_json
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.convert.hubs import files_of
from flax_resblock.convert.image_facts import ImageFacts
from flax_resblock.errors import CheckpointError
from flax_resblock.nn import linen
from flax_resblock.nn.resnet import build
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair, torch_reference
from flax_resblock.parity.taps import as_tensor
from parity_tests.support import assert_same_bits, fast_only, healthy

SAME = ResNetConfig(
    depths=(1, 2), widths=(4, 8), stem_width=4, num_classes=3, padding="same",
    stem_padding="symmetric",
)  # fmt: skip
EXAMPLE = "flax_imagenet_basic"
TOLD = {"depths": (1, 2), "widths": (8, 16), "stem_width": 8, "num_classes": 3}


def variables(config=SAME, naming=EXAMPLE):
    """Linen's variables of a network of flax's ImageNet example, with statistics."""
    return nested(StateMap(config, naming).written(healthy(config, naming)))


class State(train_state.TrainState):
    batch_stats: dict


def state_of(found):
    step = {"apply_fn": str, "tx": optax.sgd(0.1, momentum=0.9)}
    arrays = jax.tree.map(jnp.asarray, found)
    return State.create(**step, params=arrays["params"], batch_stats=arrays["batch_stats"])


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def test_variables_are_found_wherever_they_lie(tmp_path):
    found = variables()
    truth = StateMap(SAME, EXAMPLE).written(healthy(SAME, EXAMPLE))
    state = state_of(found)
    files = {
        "plain.msgpack": serialization.to_bytes(found),
        "state.msgpack": serialization.to_bytes(state),
        "nested.msgpack": serialization.to_bytes({"model": {"params": found}, "epoch": 3}),
        "runs/checkpoint_9": b"\x81\xa1x\x00",
        "runs/checkpoint_10": serialization.to_bytes(state),
        "pair.pkl": pickle.dumps((found["params"], found["batch_stats"])),
        "jax.pkl": pickle.dumps(jax.tree.map(jnp.asarray, found), protocol=5),
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "plain.npz", **{key.replace(".", "/"): v for key, v in truth.items()})
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        for step in (2, 10):
            kept = state if step == 10 else state.replace(params={"none": jnp.zeros(1)})
            manager.save(step, args=ocp.args.StandardSave(kept))
    with ocp.CheckpointManager(tmp_path / "parts", item_names=("params", "batch_stats")) as manager:
        parts = {name: ocp.args.StandardSave(part) for name, part in found.items()}
        manager.save(1, args=ocp.args.Composite(**parts))
    places = [*(name for name in files if "/" not in name), "runs", "plain.npz", "steps", "parts"]
    for place in (*places, "steps/10/default"):
        tensors = read(tmp_path / place).tensors
        assert tensors.keys() == truth.keys(), place
        assert all(tensors[key].tobytes() == truth[key].tobytes() for key in tensors), place
        assert quietly(flax_resblock.load, tmp_path / place).config == SAME, place
    assert "opt_state" in read(tmp_path / "state.msgpack").extras


def test_the_state_of_an_nnx_network_is_read_without_its_wrappers(tmp_path):
    model = build(replace(SAME, padding="symmetric"), rngs=nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
    again = quietly(flax_resblock.load, tmp_path / "state")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_a_linen_run_of_this_librarys_own_comes_back_into_nnx_and_into_pytorch(tmp_path):
    config = replace(SAME, stem_padding=None)
    model = build(config, rngs=nnx.Rngs(0))
    tree, net, x = linen.variables(model), linen.ResNet(config), jnp.ones((2, 19, 16, 3)) * 0.3
    params, statistics = tree["params"], tree["batch_stats"]
    optimizer = optax.sgd(0.1)
    memory = optimizer.init(params)

    def loss(params):
        held = {"params": params, "batch_stats": statistics}
        logits, updates = net.apply(held, x, train=True, mutable=["batch_stats"])
        return logits.var() - logits[:, 0].mean(), updates

    grads, updates = jax.jit(jax.grad(loss, has_aux=True))(params)
    changes, _ = optimizer.update(grads, memory, params)
    trained = {"params": optax.apply_updates(params, changes), **updates}
    file = tmp_path / "linen.msgpack"
    file.write_bytes(serialization.to_bytes(trained))
    back = quietly(flax_resblock.load, file, assumptions={"padding": "same"})
    assert back.config == config
    jax.tree.map(np.testing.assert_array_equal, linen.variables(back), trained)
    x = np.random.default_rng(0).normal(0.2, 1, (2, 19, 16, 3)).astype(np.float32)
    flax_resblock.save(back, tmp_path / "out.pth")
    module = torch_reference(config)
    module.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    with torch.no_grad():
        output = module.eval()(as_tensor(x, PRECISIONS["float32"])).numpy()
    assert relative_l2(output, np.asarray(jax.jit(net.apply)(trained, x))) < 1e-5
    flax_resblock.save(back, tmp_path / "again.msgpack")
    assert flax_resblock.load(tmp_path / "again.msgpack").config == config  # it says its padding
    empty = jax.tree.map(np.zeros_like, trained)
    again = serialization.from_bytes(empty, (tmp_path / "again.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, again, trained)


SAME_CHANGES = [{}, {"stem_padding": None}, {"stem_pool": "2x2"}]


@pytest.mark.parametrize("change", fast_only(SAME_CHANGES[1:2], SAME_CHANGES))
def test_same_padding_is_that_of_jax_and_not_one_pixel_on_each_side(change):
    config = replace(SAME, **change)
    assert from_json(to_json(config)) == config
    pair = ReferencePair.random(config)
    other = ReferencePair(replace(config, padding="symmetric"), pair.state, pair.norm_options)
    images = np.random.default_rng(2).normal(0.2, 1, (2, 37, 40, 3))
    x = as_tensor(images, PRECISIONS["float64"])
    with torch.no_grad(), jax.enable_x64(True):
        truth = pair.torch(PRECISIONS["float64"]).eval()(x).numpy()
        ours = pair.flax(PRECISIONS["float64"])(images, use_running_average=True)
        wrong = other.torch(PRECISIONS["float64"]).eval()(x).numpy()
    assert relative_l2(np.asarray(ours), truth) <= 1e-12
    assert relative_l2(wrong, truth) > 100 * 1e-12
    module = pair.torch(PRECISIONS["float32"])
    assert from_torch(module).config == config  # a live module says its padding


def test_torch_code_is_the_network_in_plain_pytorch(tmp_path, capsys, monkeypatch):
    (tmp_path / "net.msgpack").write_bytes(serialization.to_bytes(variables()))
    code, out = tmp_path / "same_network.py", tmp_path / "out.pth"
    convert = ["convert", str(tmp_path / "net.msgpack"), str(out), "--no-certificate"]
    assert run(convert) == 0
    assert "PyTorch's own classes load these weights and compute something else" in " ".join(
        capsys.readouterr().out.split()
    )
    more = ["--force", "--torch-code", str(code)]
    wrong_names = ["--to-naming", "huggingface"]
    assert run([*convert, *more, *wrong_names]) == 2
    assert "padding" in capsys.readouterr().err
    assert not code.exists()
    assert run([*convert, *more]) == 0
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location("same_network", code)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "torch_ref" not in code.read_text()
    assert "flax_resblock" not in code.read_text()
    network = module.network()
    network.load_state_dict(torch.load(out, weights_only=True), strict=True)
    x = np.random.default_rng(0).normal(0.2, 1, (2, 33, 36, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = network.eval()(as_tensor(x, PRECISIONS["float32"])).numpy()
    ours = np.asarray(flax_resblock.load(out)(x))  # the file beside it says the padding
    assert relative_l2(ours, theirs) < 1e-5
    assert run(["inspect", str(tmp_path / "net.msgpack")]) == 0
    assert "padding same" in capsys.readouterr().out


def test_a_program_that_would_compute_something_else_is_not_written_for(tmp_path):
    model = build(SAME, rngs=nnx.Rngs(0))
    for naming, words in (
        ("jax_resnet", "padding symmetric"),
        ("huggingface", "padding symmetric"),
        ("flax_imagenet_bottleneck", "block bottleneck"),
    ):
        kind = "safetensors" if naming == "huggingface" else "msgpack"
        with pytest.raises(InputError, match=f"have .*{words}.*would compute something else"):
            flax_resblock.save(model, tmp_path / f"x.{kind}", naming=naming)
    with pytest.raises(InputError, match=r"holds PyTorch names"):
        flax_resblock.save(model, tmp_path / "x.pth", naming=EXAMPLE)
    with pytest.raises(InputError, match=r"'torchvision' is PyTorch's"):
        flax_resblock.save(model, tmp_path / "x.npz", naming="torchvision")
    for hub in ("transformers", "timm"):
        with pytest.raises(InputError, match="padding" if hub == "transformers" else "no name"):
            files_of(hub, architecture("resnet18", padding="same"), {}, ImageFacts())
    assert not list(tmp_path.iterdir())
    assert name_of(architecture("resnet50", padding="same")) == "resnet50, padding same"


class Harm:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_pickle_of_arrays_is_never_run(tmp_path, capsys):
    for content in ({"params": {"a": Harm()}}, Harm()):
        (tmp_path / "net.pkl").write_bytes(pickle.dumps(content, protocol=4))
        with pytest.raises(CheckpointError, match=r"needs builtins\.print to be imported and run"):
            read(tmp_path / "net.pkl")
    assert capsys.readouterr().out == ""
    many = pickle.dumps({"a": [np.zeros(2)] * 3}, protocol=4)
    (tmp_path / "net.pkl").write_bytes(many.replace(b"_reconstruct", b"_reconstruxt"))
    with pytest.raises(CheckpointError, match=r"_reconstruxt\. Loading never executes code"):
        read(tmp_path / "net.pkl")


def test_what_is_no_set_of_variables_is_refused_with_a_reason(tmp_path):
    found = variables()
    two = {"teacher": found, "student": found}
    cases = {
        "several sets of variables: student, teacher": two,
        "two arrays called 'conv_init.kernel'": {
            **found,
            "batch_stats": {"conv_init": {"kernel": np.zeros(1)}},
        },
        "holds no arrays": {"params": {}},
    }
    for words, content in cases.items():
        (tmp_path / "net.msgpack").write_bytes(serialization.msgpack_serialize(content))
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "net.msgpack")
    del found["params"]["conv_init"]["kernel"]
    (tmp_path / "net.msgpack").write_bytes(serialization.msgpack_serialize(found))
    with pytest.raises(CheckpointError, match=r"missing +conv_init\.kernel"):
        flax_resblock.load(tmp_path / "net.msgpack")


def test_every_naming_scheme_of_a_jax_program_reads_what_it_writes():
    for name, naming in NAMINGS.items():
        if not naming.told or name.startswith("resnet9"):  # PyTorch's tutorials of ResNet-9
            continue
        options = {**TOLD, "block": "basic" if "basic" in name or name == "haiku" else "bottleneck"}
        if name.endswith("_d"):
            options |= {"stem": "deep", "stem_hidden": (4, 4), "shortcut": "pooled"}
        if "backbone" in name:
            options["num_classes"] = None
        options |= {key: value for key, value in naming.told.items() if hasattr(SAME, key)}
        if options.get("norm") == "group":
            options |= {"widths": (32, 64), "stem_width": 32}
        config = ResNetConfig(**options)
        state = healthy(config, name)
        model = quietly(from_torch, state)
        assert_same_bits(to_torch(model, name), state)
        gone = next(key for key in list(state)[20:] if "tracked" not in key)
        with pytest.raises(CheckpointError, match=rf"missing +{re.escape(gone)}\n"):
            from_torch({key: value for key, value in state.items() if key != gone})
        assert model.config == config, name
        norm = model.stage1[0].norm1
        assert config.norm == "group" or norm.momentum == naming.told["momentum"]


def test_a_projection_that_changes_nothing_is_no_stride_that_such_a_program_does_not_have():
    """Haiku has projections where asked for; in PyTorch's names this would be a stride of 2."""
    config = ResNetConfig(**TOLD, first_stride=2, padding="same")
    assert quietly(from_torch, healthy(config)).config.first_stride == 2
    with pytest.raises(CheckpointError, match=r"block_group_0\.block_0\.shortcut_conv\.w"):
        from_torch(healthy(config, "haiku"))
