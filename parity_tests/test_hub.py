"""Weights by name, against a local server that speaks the protocol of Hugging Face's hub. That
server is the only proof: these tests reach no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

import flax_resblock
from flax_resblock import InputError, ResNetConfig, checkpoint
from flax_resblock.cli import run
from flax_resblock.convert.image_facts import carried_images
from flax_resblock.hub import is_name, torchvision
from parity_tests.hub_server import git_sha, serving
from parity_tests.support import REPOSITORY, assert_same_bits, import_torchvision, python

pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")
CONFIG = ResNetConfig(block="bottleneck", depths=(1, 1), widths=(4, 8), stem_width=8, num_classes=3)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, and huggingface_hub imported anew with HF_ENDPOINT set to it."""
    kept = {name: one for name, one in sys.modules.items() if name.startswith("huggingface_hub")}
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv("HF_TOKEN", raising=False)
        for name in kept:
            del sys.modules[name]
        import huggingface_hub.file_download

        patch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
        yield server
        for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
            del sys.modules[name]
        sys.modules.update(kept)


@pytest.fixture(scope="module")
def network():
    model = flax_resblock.ResNet(CONFIG, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture
def files(hub, network, folder, request):
    """The content of a repository of its own, ``user/TEST``, and faults switched off after."""
    flax_resblock.save(network, "made", naming="huggingface")
    name = f"user/{request.node.name[5:40].strip('_').partition('[')[0]}"
    content = {path.name: path.read_bytes() for path in Path("made").iterdir()}
    hub.files[name] = {**content, "modeling.py": b"raise SystemExit('executed')"}
    hub.requests.clear()
    yield name
    hub.status, hub.error_code, hub.pause = None, "", 0.0
    hub.corrupt.clear()
    hub.cut.clear()


def blobs():
    """The files of the cache by their names, which are digests."""
    cache = Path(os.environ["HF_HOME"]) / "hub"
    return {path.name: path.read_bytes() for path in cache.glob("models--*/blobs/*")}


def assert_whole_cache():
    """Every file under a good name is what the name says."""
    for name, data in blobs().items():
        if not name.endswith(".incomplete"):
            assert name in (hashlib.sha256(data).hexdigest(), git_sha(data))


def refused(name):
    with pytest.raises(InputError) as caught:
        checkpoint.read(name)
    text = str(caught.value)
    assert text.startswith(name)
    assert "\n" not in text
    assert_whole_cache()
    return text


def test_names_load_like_files_and_the_revision_is_printed(files, hub, network, capsys):
    commit, name = hub.commit(files), f"hf-hub:{files}"
    hub.files[files]["pytorch_model.bin"] = b"never fetched where safetensors are"
    commit = hub.commit(files)
    assert_same_bits(
        flax_resblock.to_torch(flax_resblock.load(name)), flax_resblock.to_torch(network)
    )
    pinned = f"{name}@{commit}"
    assert f"{name} is at revision {commit}; {pinned} names this one" in capsys.readouterr().err
    asked = "\n".join(hub.requests)
    assert "model.safetensors" in asked
    assert "config.json" in asked
    assert ".bin" not in asked
    assert ".py" not in asked
    hub.requests.clear()
    assert checkpoint.read(Path(pinned)).metadata["hub"] == pinned
    assert "revision" not in capsys.readouterr().err
    assert not [one for one in hub.requests if one.startswith("GET") and "resolve" in one]
    one_file = checkpoint.read(f"{name}/model.safetensors@main")
    assert one_file.metadata["hub"] == f"{name}/model.safetensors@{commit}"
    assert run(["convert", name, "out.safetensors"]) == 0
    (entry,) = json.loads(Path("out.safetensors.parity.json").read_text())["outputs"].values()
    assert entry["source"]["hub"] == pinned
    assert run(["inspect", name]) == 0
    assert_whole_cache()


def test_shards_are_fetched_with_their_index(files, hub, network):
    arrays = flax_resblock.to_torch(network)
    names = list(arrays)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    content = hub.files[files]
    del content["model.safetensors"]
    for file, keys in halves.items():
        content[file] = safetensors.numpy.save({key: arrays[key] for key in keys})
    index = {key: file for file, keys in halves.items() for key in keys}
    content["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
    del content["config.json"]
    found = checkpoint.read(f"hf-hub:{files}").tensors
    assert_same_bits({key: found[key] for key in arrays}, arrays)


FAULTS = {
    "no such repository": (None, "", "hf-hub:user/none", "does not exist on http"),
    "a private one": (401, "RepoNotFound", None, "or is private. Check the name, or log in"),
    "a bad token": (401, "", None, "the token is not valid on http"),
    "a gated one": (403, "GatedRepo", None, "asks for consent"),
    "no such revision": (None, "", "@v9", "has no such revision"),
    "too many requests": (429, "", None, "too many requests (429). Wait some minutes"),
    "a server in trouble": (503, "", None, "answered 503. Try again later"),
    "no such file": (None, "", "/other.pth", "has no file other.pth; it has config.json, model"),
    "no name": (None, "", "hf-hub:user//x", "is no name of a repository"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_hub_refuses_is_one_true_paragraph(fault, files, hub):
    status, code, name, words = FAULTS[fault]
    hub.status, hub.error_code = status, code
    whole = name if name and is_name(name) else f"hf-hub:{files}{name or ''}"
    assert words in refused(whole)
    assert not any(files.replace("/", "--") in str(path) for path in cached_snapshots())


def cached_snapshots():
    return (Path(os.environ["HF_HOME"]) / "hub").glob("models--*/snapshots/*/*")


def test_a_download_goes_on_where_the_connection_broke(files, hub, network, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a broken download
    size = len(hub.files[files]["model.safetensors"])
    small = len(hub.files[files]["config.json"])
    hub.cut[:] = [small, size // 3, size // 4]
    assert_same_bits(
        flax_resblock.to_torch(flax_resblock.load(f"hf-hub:{files}")),
        flax_resblock.to_torch(network),
    )
    starts = [one.split("bytes=")[1] for one in hub.requests if "bytes=" in one]
    first = size // 3 // 1000 * 1000
    assert starts == [f"{first}-", f"{first + size // 4 // 1000 * 1000}-"]


def test_a_connection_that_stays_broken_leaves_no_file_under_a_good_name(files, hub, network):
    digest = hashlib.sha256(hub.files[files]["model.safetensors"]).hexdigest()
    hub.cut[:] = [len(hub.files[files]["config.json"]), 999, *[0] * 20]
    known = digest in blobs()  # of another test, with the same content
    if known:
        for path in (Path(os.environ["HF_HOME"]) / "hub").glob(f"models--*/blobs/{digest}"):
            path.unlink()
    assert "cannot be reached" in refused(f"hf-hub:{files}")
    assert digest not in blobs()
    hub.cut.clear()
    assert flax_resblock.load(f"hf-hub:{files}").config.widths == CONFIG.widths


def test_bytes_that_changed_on_the_way_are_refused_and_removed(files, hub, capsys):
    hub.files[files]["model.safetensors"] += b""
    hub.corrupt.add("model.safetensors")
    assert "is damaged: its digest is" in refused(f"hf-hub:{files}")
    assert not [
        path
        for path in cached_snapshots()
        if path.name == "model.safetensors" and files.replace("/", "--") in str(path)
    ]
    hub.corrupt.clear()
    assert checkpoint.read(f"hf-hub:{files}").tensors
    (blob,) = (Path(os.environ["HF_HOME"]) / "hub").glob(
        f"models--{files.replace('/', '--')}/blobs/{'?' * 64}"
    )
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")  # a disk that fails later
    assert "is damaged" in refused(f"hf-hub:{files}")
    assert checkpoint.read(f"hf-hub:{files}").tensors


def test_without_network_the_cache_is_read_and_said(files, hub, monkeypatch, capsys):
    from huggingface_hub import constants

    name = f"hf-hub:{files}"
    expected = checkpoint.read(name)
    commit = hub.commit(files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_bits(dict(checkpoint.read(name).tensors), dict(expected.tensors))
    assert f"HF_HUB_OFFLINE is set; {name} is read from the cache" in capsys.readouterr().err
    assert checkpoint.read(f"{name}@{commit}").metadata["config.json"]
    text = refused("hf-hub:user/never")
    assert "is not in the cache" in text
    assert "HF_HUB_OFFLINE is set" in text
    monkeypatch.undo()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refused("hf-hub:user/never")
    assert checkpoint.read(name).tensors


@pytest.mark.slow
def test_a_model_is_pushed_with_its_certificate_and_comes_back(files, hub, network, monkeypatch):
    with pytest.raises(InputError, match=r"was refused: the token is not valid|log in"):
        flax_resblock.save(network, "hf-hub:user/pushed")
    assert "user/pushed" not in hub.files
    hub.tokens.add("good")
    monkeypatch.setenv("HF_TOKEN", "good")
    flax_resblock.save(network, "hf-hub:user/pushed")
    pushed = hub.files["user/pushed"]
    assert set(pushed) == {"README.md", "config.json", "model.safetensors", "parity.json"}
    card = pushed["README.md"].decode()
    assert 'flax_resblock.load("hf-hub:user/pushed")' in card
    assert "limit 1e-12" in card
    assert "tensors of" not in card
    (entry,) = json.loads(pushed["parity.json"])["outputs"].values()
    assert entry["verification"]["passed"]
    assert entry["output"]["sha256"]["model.safetensors"] == (
        hashlib.sha256(pushed["model.safetensors"]).hexdigest()
    )
    back = flax_resblock.load("hf-hub:user/pushed")
    assert_same_bits(flax_resblock.to_torch(back), flax_resblock.to_torch(network))
    with pytest.raises(InputError, match="can only be read"):
        flax_resblock.save(network, "torchvision:ResNet50_Weights.IMAGENET1K_V2")
    assert run(["convert", "hf-hub:user/pushed", "hf-hub:user/other"]) == 2
    small = replace(CONFIG, stem="cifar")  # no other package has such a network
    flax_resblock.save(flax_resblock.ResNet(small, rngs=nnx.Rngs(0)), "hf-hub:user/own")
    assert flax_resblock.load("hf-hub:user/own").config == small


@pytest.mark.slow
def test_a_ported_model_is_pushed_with_its_code_and_the_weights_that_it_has_now(
    files, hub, monkeypatch, folder
):
    from parity_tests.newcomers import NET

    hub.tokens.add("good")
    monkeypatch.setenv("HF_TOKEN", "good")
    scope: dict = {}
    exec(NET, scope)
    module = scope["Net"]()
    model = flax_resblock.port(module).create()
    model.head.bias[...] = model.head.bias[...] + 1  # training went on
    flax_resblock.save(model, "hf-hub:user/ported")
    pushed = hub.files["user/ported"]
    written = {"net.py", "weights.safetensors", "port.json", "parity.json"}
    assert set(pushed) == {"README.md", *written}
    entry = json.loads(pushed["parity.json"])["outputs"]["weights.safetensors"]
    digest = hashlib.sha256(pushed["weights.safetensors"]).hexdigest()
    assert digest in json.dumps(entry["output"])
    card = pushed["README.md"].decode()
    assert "agreed when the network was ported, with the weights of that time" in card
    assert "hf download user/ported --local-dir out" in card
    for name, data in pushed.items():  # what the card tells its reader to do
        Path("out").mkdir(exist_ok=True)
        (Path("out") / name).write_bytes(data)
    monkeypatch.syspath_prepend(folder)
    use = card.partition("```python\n")[2].partition("```")[0]
    exec(use, scope)
    assert_same_bits(flax_resblock.to_torch(scope["model"]), flax_resblock.to_torch(model))
    assert not np.array_equal(
        flax_resblock.to_torch(model)["head.bias"], module.head.bias.detach().numpy()
    )
    with pytest.raises(InputError) as caught:  # a card's reader may try it
        flax_resblock.load("hf-hub:user/ported")
    assert str(caught.value).startswith("hf-hub:user/ported")
    with pytest.raises(InputError, match="keep the folder"):
        flax_resblock.save(scope["model"], "hf-hub:user/again")
    assert "user/again" not in hub.files


@pytest.fixture
def weights(hub, monkeypatch, tmp_path):
    """A file of torchvision's kind for one of its names, on the server."""
    module = import_torchvision().models.resnet18(num_classes=7)
    torch.save(module.state_dict(), tmp_path / "net.pth")
    data = (tmp_path / "net.pth").read_bytes()
    file = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    hub.uploads[f"/plain/{file}"] = data
    name = "ResNet18_Weights.IMAGENET1K_V1"
    monkeypatch.setitem(torchvision.WEIGHTS, name, torchvision.WeightsFile(file, 232))
    monkeypatch.setattr(torchvision, "SERVER", f"{hub.url}/plain")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    hub.requests.clear()
    yield f"torchvision:{name}", file, module
    hub.corrupt.clear()
    hub.cut.clear()


def test_torchvisions_weights_are_fetched_whole_or_not_at_all(weights, hub, tmp_path):
    name, file, module = weights
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    hub.cut[:] = [1_000_000]
    assert "arrived in part: 1,000,000 of" in refused(name)
    assert not (cache / file).exists()
    hub.corrupt.add(file)
    assert "is damaged: its SHA-256 begins with" in refused(name)
    assert not (cache / file).exists()
    hub.corrupt.clear()
    model = flax_resblock.load(name, assume="known")
    truth = {key: value.numpy() for key, value in module.state_dict().items()}
    assert_same_bits(flax_resblock.to_torch(model), truth)
    assert carried_images(model).preprocessing.size == (224, 224)
    assert any("bytes=1000000-" in one for one in hub.requests)
    hub.requests.clear()
    checkpoint.read(name)
    assert hub.requests == []  # from torch.hub's cache
    assert "known: ResNeXt101_32X8D_Weights" in refused("torchvision:VGG")


def test_torchvisions_names_and_digests_are_its_own():
    models = import_torchvision().models.resnet
    for name, one in torchvision.WEIGHTS.items():
        kind, _, version = name.partition(".")
        theirs = getattr(models, kind)[version]
        assert theirs.url == f"https://download.pytorch.org/models/{one.file}"
        wanted = theirs.transforms.keywords
        assert (wanted["crop_size"], wanted.get("resize_size", 256)) == (224, one.resize)


def test_create_takes_weights_and_gives_other_classes_a_new_head(weights):
    name, _, module = weights
    model = flax_resblock.create("resnet18", weights=name, num_classes=7)
    truth = {key: value.numpy() for key, value in module.state_dict().items()}
    assert_same_bits(flax_resblock.to_torch(model), truth)
    with pytest.raises(TypeError, match="has 7 classes: create"):
        flax_resblock.create("resnet18", weights=name, num_classes=3)
    tuned = flax_resblock.create("resnet18", weights=name, num_classes=3, rngs=nnx.Rngs(0))
    ours = flax_resblock.to_torch(tuned)
    assert ours["fc.weight"].shape == (3, 512)
    assert all(np.array_equal(ours[key], truth[key]) for key in truth if not key.startswith("fc."))
    with pytest.raises(InputError):
        flax_resblock.create("resnet34", weights=name)
    with pytest.raises(TypeError, match="takes no activation beside weights"):
        flax_resblock.create("resnet18", weights=name, activation="gelu")
    with pytest.raises(TypeError, match="needs rngs"):
        flax_resblock.create("resnet18")


INTERRUPTED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from flax_resblock import checkpoint
from parity_tests.test_hub import assert_whole_cache
import huggingface_hub.file_download
rng, interrupted = random.Random(0), 0
cache = Path(os.environ["HF_HOME"]) / "hub" / ("models--" + sys.argv[1].replace("/", "--"))
while interrupted < 50:
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            checkpoint.read("hf-hub:" + sys.argv[1])
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(rng.random() * 0.6)
    try:
        os.kill(child, rng.choice([signal.SIGKILL, signal.SIGINT]))
    except ProcessLookupError:
        pass
    failed = os.waitpid(child, 0)[1] != 0
    interrupted += failed
    assert_whole_cache()
    if not failed:  # the next one fetches it anew
        shutil.rmtree(cache)
print(interrupted)
"""


@pytest.mark.slow
def test_fifty_interruptions_leave_no_broken_file_under_a_good_name(files, hub):
    hub.chunk, hub.pause = 1 << 12, 0.05  # 30 kB take 0.4 s
    done = python("-c", INTERRUPTED, files, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 50
    assert_whole_cache()
    hub.chunk, hub.pause = 1 << 16, 0.0
    assert checkpoint.read(f"hf-hub:{files}").tensors
    assert_whole_cache()
