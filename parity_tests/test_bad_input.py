"""Bad input to the library is refused with a message; nothing is written, nothing run."""

import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch

from flax_resblock import (
    CheckpointError,
    InputError,
    ResNetConfig,
    from_torch,
    load,
    load_run,
    save,
    to_torch,
)
from flax_resblock.checkpoint import safetensors_file
from flax_resblock.checkpoint.torch_file import from_numpy, with_tensors
from flax_resblock.cli import run
from flax_resblock.convert.opening import ReadOptions, open_checkpoint
from flax_resblock.parity.live_module import open_module
from parity_tests.support import SMALL, assert_same_bits, flip, healthy, random_bits
from torch_ref import BasicBlock, Block, ResNet


@pytest.fixture
def written(tmp_path):
    """The same network in every format."""
    model = from_torch(healthy())
    for name in ("net.pth", "net.safetensors", "net"):
        save(model, tmp_path / name)
    return tmp_path


NO_CHECKPOINTS = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "directory": (lambda path: path.mkdir(), "is a folder without a checkpoint"),
    "text": (
        lambda path: path.write_text("epoch 3, loss 0.1\n"),
        "neither a PyTorch checkpoint .* begins with b'epoch 3",
    ),
    "absent": (lambda path: None, "does not exist"),
    "other zip": (
        lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
        "damaged or truncated PyTorch zip archive",
    ),
    "a number": (lambda path: torch.save(3, path), "holds a int, not a state dict"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_by_name(case, tmp_path):
    write, message = NO_CHECKPOINTS[case]
    write(tmp_path / "net.pth")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"net\.pth.*{message}"):
        load(tmp_path / "net.pth")
    assert sorted(tmp_path.rglob("*")) == before


def _with(**tensors):
    return lambda state: {
        **state,
        **{key.replace("__", "."): value for key, value in tensors.items()},
    }


VGG = {
    f"features.{i}.{t}": np.random.default_rng(i).random(
        (8, 3, 3, 3) if t == "weight" else (8,), np.float32
    )
    for i in (0, 3)
    for t in ("weight", "bias")
}
MISFITS = {
    "another network": (
        lambda state: VGG,
        r"no residual network in any known naming scheme .*named like features\.0\.weight",
    ),
    "a wrong shape": (
        _with(bn1__bias=np.zeros(5, np.float32)),
        r"\n  wrong shape bn1\.bias \[5\], expected \[4\]\n",
    ),
    "integer weights": (
        _with(fc__weight=np.arange(30).reshape(3, 10)),
        r"\n  wrong dtype fc\.weight int64, expected a floating type\n",
    ),
    "a fractional counter": (
        _with(bn1__num_batches_tracked=np.float32(1.5)),
        r"bn1\.num_batches_tracked float32, expected an integer\n",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named(case):
    change, message = MISFITS[case]
    with pytest.raises(CheckpointError, match=message):
        from_torch(change(healthy()))


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net"])
def test_an_existing_output_is_kept_without_force(name, written):
    other = from_torch({key: value + 1 for key, value in healthy().items()})
    with pytest.raises(InputError, match=f"{name} exists.*force=True"):
        save(other, written / name)
    assert_same_bits(to_torch(load(written / name)), healthy())
    save(other, written / name, force=True)
    assert_same_bits(to_torch(load(written / name)), to_torch(other))
    expected = ["net", "net.pth", "net.pth.sha256.json", "net.safetensors"]
    assert sorted(p.name for p in written.iterdir()) == expected


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(share, written):
    """As test_torch_archive.py shows of PyTorch's files."""
    content = (written / "net.safetensors").read_bytes()
    (written / "net.safetensors").write_bytes(content[: max(1, int(len(content) * share))])
    with pytest.raises(CheckpointError):
        load(written / "net.safetensors")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("wrap", "zipped"),
    [(lambda c: {"state_dict": {"conv1.weight": c}}, True), (lambda c: c, False)],
    ids=["deep in a zip", "bare pickle"],
)
def test_code_in_a_pickle_is_not_run(wrap, zipped, tmp_path):
    torch.save(
        wrap(Canary(tmp_path / "canary")),
        tmp_path / "evil.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match="never executes code"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists(), "the canary itself must be alive"


def test_odd_values_are_carried_bit_for_bit_with_a_warning(tmp_path):
    state = healthy()
    state["layer1.0.conv1.weight"].view(np.uint32)[0, 0, 0, 0] = 0x7FC12345  # a NaN with a payload
    state["bn1.running_var"][1] = -2
    with pytest.warns(
        UserWarning, match=r"layer1.0.conv1.weight \(1 of \d+ values not finite\)|bn1.running_var"
    ):
        model = from_torch(state)
    assert_same_bits(to_torch(model), state)


def test_extra_keys_can_be_ignored_by_name_and_missing_weights_are_never_made_up(tmp_path):
    state = healthy()
    del state["fc.bias"]
    state["ema.decay"] = np.array(0.99, np.float32)
    with pytest.raises(CheckpointError, match=r"missing\s+fc.bias\n\s+unexpected\s+ema.decay"):
        from_torch(state)
    with pytest.raises(CheckpointError, match=r"lacks fc\.bias\. Weights .* are never made up"):
        from_torch(state, ignore=["ema.*"], allow_missing=["fc.*"])
    torch.save(with_tensors(state), tmp_path / "net.pth")
    for call in (load, load_run):
        with pytest.raises(CheckpointError, match=r"lacks fc\.bias"):
            call(tmp_path / "net.pth", ignore=["ema.*"], allow_missing=["fc.*"])
    state["fc.bias"] = healthy()["fc.bias"]
    counters = [key for key in state if "num_batches" in key]
    for key in counters:
        del state[key]
    with pytest.warns(
        UserWarning, match=r"ignored ema\.decay; filled \d+ absent num_batches_tracked"
    ):
        model = from_torch(state, ignore=["ema.*"], allow_missing=["*num_batches_tracked"])
    assert_same_bits(
        {k: v for k, v in to_torch(model).items() if k not in counters},
        {k: v for k, v in state.items() if k != "ema.decay"},
    )


@pytest.mark.parametrize(
    ("prefix", "pattern"),
    [
        *(("", "layer1.0.bn2*"), ("module.", "*.downsample.*"), ("backbone.", "*layer2.*")),
        ("module.", "layer1.0.extra.weight"),
    ],
)
def test_a_tensor_of_a_block_cannot_be_ignored(pattern, prefix, tmp_path):
    state = {f"{prefix}{key}": value for key, value in healthy().items()}
    if "extra" in pattern:
        state[f"{prefix}layer1.0.extra.weight"] = np.ones((6, 6), np.float32)
    with pytest.raises(InputError, match=r"cannot be ignored\. A residual block without"):
        from_torch(state, ignore=[pattern])


def test_a_tensor_of_a_backbone_or_a_bare_block_cannot_be_ignored():
    beside = {f"encoder.{key}": value for key, value in healthy().items() if "fc." not in key}
    beside |= {f"projector.{i}.weight": np.ones((3, 10), np.float32) for i in (0, 2)}
    with pytest.raises(InputError, match=r"encoder\.layer1\.0\.downsample.* cannot be ignored"):
        from_torch(beside, ignore=["*downsample*"])
    block = {key: value.numpy() for key, value in BasicBlock(4, 6, 2).state_dict().items()}
    with pytest.raises(InputError, match=r"downsample.* cannot be ignored"):
        from_torch(block, stride=2, ignore=["*downsample*", "*shortcut*"])


def test_another_network_in_the_file_can_be_ignored():
    two = {f"net.{key}": value for key, value in healthy().items()}
    two |= {f"encoder.{key}": value for key, value in healthy().items()}
    with pytest.warns(UserWarning, match=r"ignored encoder\."):
        model = from_torch(two, ignore=["encoder.*"])
    assert_same_bits(to_torch(model), healthy())


@pytest.mark.parametrize("pattern", ["module.extra.*", "extra.*"])
def test_what_is_ignored_is_named_as_in_the_file_or_as_it_is_shown(pattern):
    state = {f"module.{key}": value for key, value in healthy().items()}
    state["module.extra.weight"] = np.ones(3, np.float32)
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        from_torch(state)
    with pytest.warns(UserWarning, match=r"ignored extra\.weight"):
        model = from_torch(state, ignore=[pattern])
    assert_same_bits(to_torch(model), healthy())


def test_wrappers_inside_names_are_removed():
    wrapper = {"layer1.": "layer1._fsdp_wrapped_module.", "fc.": "_orig_mod.fc."}
    state = healthy()
    for plain, wrapped in wrapper.items():
        state = {key.replace(plain, wrapped, 1): value for key, value in state.items()}
    assert any("_fsdp_wrapped_module" in key for key in state)
    with pytest.warns(UserWarning, match="removed the names of wrappers"):
        model = from_torch(state)
    assert_same_bits(to_torch(model), healthy())


@pytest.mark.parametrize("command", ["predict", "evaluate", "verify", "convert", "export"])
def test_no_command_makes_weights_up(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = {key: from_numpy(value) for key, value in healthy().items() if "running_var" not in key}
    torch.save(state, "net.pth")
    more = {"predict": ["image.png"], "convert": ["out.safetensors"], "export": ["out"]}
    arguments = [command, "net.pth", *more.get(command, [])]
    if command == "evaluate":
        arguments = ["train", "--eval-only", "net.pth"]
    assert run([*arguments, "--allow-missing", "*running_var"]) == 2
    assert "are never made up" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_no_message_advises_to_ignore_tensors_or_to_make_them_up():
    for change in ({"surprise": np.ones(3, np.float32)}, {"bn1.weight": None}):
        state = {key: value for key, value in {**healthy(), **change}.items() if value is not None}
        with pytest.raises(CheckpointError) as caught:
            from_torch(state)
        assert "ignore" not in str(caught.value)
        assert "allow" not in str(caught.value)


def test_what_the_command_line_notes_is_one_warning_of_the_api(tmp_path):
    state = {f"module.{key}": torch.from_numpy(value) for key, value in healthy().items()}
    state = {key: value for key, value in state.items() if "num_batches" not in key}
    state["module.ema.decay"] = torch.tensor(0.99)
    module = ResNet(depths=(1, 1), widths=(6, 10), stem="cifar", stem_width=4, num_classes=3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "net.pth")
    notes = open_checkpoint(tmp_path / "net.pth", ReadOptions(ignore=("ema.*",))).notes
    assert len(notes) >= 4
    for call in (load, load_run, from_torch):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(tmp_path / "net.pth", ignore=("ema.*",))
        ours = [
            w for w in caught if issubclass(w.category, UserWarning) and "ignored" in str(w.message)
        ]
        assert [w.filename for w in ours] == [__file__]
        assert all(note in str(ours[0].message) for note in notes)


def test_a_checkpoint_that_is_read_as_it_stands_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(healthy(), assume="known")


def test_two_readings_that_fit_equally_are_a_tie(monkeypatch):
    from dataclasses import replace

    from flax_resblock.convert import identify, namings
    from flax_resblock.convert.detection.candidates import identify as find
    from flax_resblock.convert.state_map import describe

    mirrored = dict(
        namings.NAMINGS["torchvision"].modules,
        conv1="conv2",
        conv2="conv1",
        norm1="bn2",
        norm2="bn1",
    )
    rival = replace(namings.NAMINGS["torchvision"], name="mirrored", modules=mirrored)
    monkeypatch.setattr(
        "flax_resblock.convert.detection.candidates.NAMINGS", {**namings.NAMINGS, "mirrored": rival}
    )
    square = ResNetConfig(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=3)
    with pytest.raises(
        CheckpointError,
        match=r"several readings equally well: .*'torchvision'; .*'mirrored'. Say which with",
    ):
        find(describe(random_bits(square, np.float32)))
    assert (
        identify(
            describe(random_bits(square, np.float32)), naming="torchvision"
        ).state_map.naming.name
        == "torchvision"
    )


def test_a_module_that_computes_something_else_is_refused():
    """As test_slots.py shows of all numbers of a layer, and test_activation.py of activations."""
    changes = {
        "stride": lambda m: setattr(m.layer1[0].conv2, "stride", (2, 2)),
        "padding_mode": lambda m: setattr(m.conv1, "padding_mode", "reflect"),
        "eps": lambda m: setattr(m.bn1, "eps", 1e-3),
        "momentum": lambda m: setattr(m.layer2[0].bn2, "momentum", None),
        "statistics": lambda m: setattr(m.bn1, "track_running_stats", False),
    }
    settings = {
        "depths": (1, 1),
        "widths": (6, 10),
        "stem": "cifar",
        "stem_width": 4,
        "num_classes": 3,
    }
    assert from_torch(ResNet(**settings)).config == SMALL
    for name, change in changes.items():
        module = ResNet(**settings)
        change(module)
        wrappers = [torch.nn.DataParallel(module)] if name == "stride" else []
        for wrapped in (module, *wrappers):
            with pytest.raises(InputError, match=r"expected|differ in|does not track"):
                open_module(wrapped, ReadOptions())
        assert from_torch(module.state_dict()).config == SMALL, name
    module = ResNet(**settings)
    module.add_module("avgpool", torch.nn.AdaptiveMaxPool2d(1))  # which forward never calls
    assert from_torch(module).config == SMALL


@pytest.mark.parametrize(
    "pool", [torch.nn.MaxPool2d(3, 2), torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True)], ids=str
)
def test_another_pooling_in_an_imagenet_stem_is_refused(pool):
    module = ResNet(depths=(1,), widths=(4,), stem_width=4)
    assert from_torch(module).config.stem == "imagenet"
    module.maxpool = pool
    with pytest.raises(
        InputError, match=r"stem\.pool is .*expected MaxPool2d\(kernel_size=3, stride=2, padding=1"
    ):
        open_module(module, ReadOptions())


def test_a_bare_block_needs_its_stride_unless_it_has_no_projection_or_is_a_module():
    with pytest.raises(CheckpointError, match="cannot be read off the weights"):
        from_torch(BasicBlock(4, 8, 2).state_dict())
    assert from_torch(BasicBlock(4, 8, 2).state_dict(), stride=2).config.stride == 2
    assert from_torch(BasicBlock(4, 8, 2)).config.stride == 2
    assert from_torch(BasicBlock(4, 4).state_dict()).config.stride == 1
    assert from_torch(Block(4, 8)).config.stride == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "not a int"),
        ({}, "holds no state dict"),
        ({"a": 1}, "a: int"),
        ({"conv1.weight": torch.rand(3).to_sparse()}, "sparse"),
    ],
    ids=["number", "empty", "no tensors", "sparse"],
)
def test_what_is_no_state_dict_is_refused(source, message):
    with pytest.raises(InputError, match=message):
        from_torch(source)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/dir.safetensors"])
def test_a_shard_index_cannot_leave_its_folder(name, tmp_path):
    safetensors_file.write_safetensors(tmp_path / "outside.safetensors", healthy(), {})
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv1.weight": name}})
    )
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load(folder)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "absent.safetensors"}}']
)
def test_a_broken_shard_index_is_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(("net.onnx", "names no format"), ("net.safetensor", "names no format")),
        ("nowhere/net.pth", "nowhere does not exist"),
    ],
)
def test_a_place_that_nothing_can_be_written_to_is_named(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save(from_torch(healthy()), tmp_path / name)


def test_what_is_read_back_is_compared(written, monkeypatch):
    original = safetensors_file.write_safetensors

    def corrupting(path, tensors, metadata):
        original(path, tensors, metadata)
        flip(path, -40)

    monkeypatch.setattr(safetensors_file, "write_safetensors", corrupting)
    with pytest.raises(CheckpointError, match=r"is damaged: .* differs? from the SHA-256"):
        save(from_torch(healthy()), written / "new.safetensors")
    assert not (written / "new.safetensors").exists()
