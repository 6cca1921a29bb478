"""Folders of torch.distributed.checkpoint are read as PyTorch reads them, and run nothing."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from flax_resblock import CheckpointError, Limits, checkpoint
from parity_tests.support import python

pytestmark = pytest.mark.filterwarnings("ignore")


class Harm:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.makedirs, (str(self.path), 0o777, True))


def saved(folder, **more):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    net(torch.randn(2, 1, 5, 6)).square().sum().backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), **more}
    from torch.distributed import checkpoint as distributed  # slow to import

    distributed.save(state, checkpoint_id=folder)
    return folder


def as_file(folder, path):
    """What PyTorch makes of a folder."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, path)


def plan_of(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def rewritten(folder, change):
    plan = plan_of(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(change(plan) or plan))


def in_parts(folder):
    """Stores the convolution's kernel as two parts."""
    from torch.distributed.checkpoint import metadata

    plan = plan_of(folder)
    name, (_, place) = (
        "model.0.weight",
        next((k, v) for k, v in plan.storage_data.items() if k.fqn == "model.0.weight"),
    )
    shard = (folder / place.relative_path).read_bytes()
    kernel = torch.load(io.BytesIO(shard[place.offset : place.offset + place.length]))
    del plan.storage_data[metadata.MetadataIndex(name, torch.Size([0, 0, 0, 0]))]
    parts, chunks = ((0, kernel[:1]), (1, kernel[1:])), plan.state_dict_metadata[name].chunks
    chunks[:] = [metadata.ChunkStorageMetadata(torch.Size([n, 0, 0, 0]), p.shape) for n, p in parts]
    for start, part in parts:
        file = folder / f"__{start + 1}_0.distcp"
        torch.save(part.clone(), file)
        index = metadata.MetadataIndex(name, (start, 0, 0, 0))
        plan.storage_data[index] = type(place)(file.name, 0, file.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(plan))


def test_a_folder_is_what_torch_makes_of_it(tmp_path):
    more = {"lists": [1, {"a": torch.ones(3), "b": (2, torch.arange(4).bfloat16())}], "epoch": 4}
    folder = saved(tmp_path / "folder", **more)
    in_parts(folder)
    as_file(folder, tmp_path / "file.pth")
    expected = checkpoint.read(tmp_path / "file.pth", run=True)
    for path in (folder, folder / ".metadata", next(folder.glob("*.distcp"))):
        found = checkpoint.read(path, run=True)
        assert checkpoint.digests(found.tensors) == checkpoint.digests(expected.tensors)
        assert repr(found.extras) == repr(expected.extras)
    code = f"import sys; from flax_resblock import checkpoint; checkpoint.read({str(folder)!r}); "
    assert python("-c", f"{code}print('torch' in sys.modules)").stdout.strip() == "False"


def test_a_hostile_plan_is_refused_before_anything_runs(tmp_path):
    folder, mark = saved(tmp_path / "folder"), tmp_path / "mark"
    rewritten(folder, lambda plan: plan.planner_data.update(x=Harm(mark)))
    with pytest.raises(CheckpointError, match=r"needs os\.makedirs to be imported"):
        checkpoint.read(folder)
    assert not mark.exists()
    plan_of(folder)
    assert mark.exists()


def test_a_hostile_value_in_a_shard_is_refused_where_torch_runs_it(tmp_path):
    mark = tmp_path / "mark"
    folder = saved(tmp_path / "folder", args=Harm(mark))
    if mark.exists():  # torch deals with its own copy
        mark.rmdir()
    with pytest.raises(CheckpointError, match=r"at its entry args, needs os\.makedirs to be"):
        checkpoint.read(folder)
    assert not mark.exists()
    as_file(folder, tmp_path / "file.pth")
    assert mark.exists()


def _moved(plan, **changes):
    for place in plan.storage_data.values():
        vars(place).update(changes)


def _twice(plan):
    places = {index.fqn: (index, place) for index, place in plan.storage_data.items()}
    plan.storage_data[places["model.0.weight"][0]] = places["model.0.bias"][1]


def _longer(plan):
    plan.state_dict_metadata["model.0.weight"].size = torch.Size([1 << 40, 1, 3, 3])


def _list(plan):
    name = "optimizer.param_groups.0.lr"
    plan.planner_data[name] = ("optimizer", "param_groups", 1 << 40, "lr")


BAD = {
    "a shard elsewhere": (lambda p: _moved(p, relative_path="../x.distcp"), "no plain name"),
    "a shard that is gone": (lambda p: _moved(p, relative_path="__9.distcp"), "is not there. Copy"),
    "an extension": (lambda p: _moved(p, transform_descriptors=["zstd"]), "by an extension"),
    "behind the end": (lambda p: _moved(p, offset=1 << 50), "damaged"),
    "negative": (lambda p: _moved(p, offset=-4), "a place in it is no number"),
    "endless": (lambda p: _moved(p, length=1 << 50), "bytes of tensors and values; the limit"),
    "another's bytes": (_twice, r"parts of model\.0\.weight are not those of one tensor"),
    "a huge tensor": (_longer, r"parts of model\.0\.weight are not those of one tensor"),
    "a huge list": (_list, "a place in a list is no number"),
    "a list": (lambda _: [1, 2], "is no plan of torch.distributed.checkpoint"),
}


def test_damage_is_refused_by_name(tmp_path):
    good = saved(tmp_path / "good")
    for number, (change, words) in enumerate(BAD.values()):
        folder = shutil.copytree(good, tmp_path / f"{number}")
        rewritten(folder, change)
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read(folder)
    with pytest.raises(CheckpointError, match="bytes of pickle; the limit"):
        checkpoint.read(good, limits=Limits(max_header_bytes=100))
    shard = next(good.glob("*.distcp"))
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    content[: len(content) // 2] ^= 1
    shard.write_bytes(content.tobytes())
    with pytest.raises(CheckpointError, match="Copy"):
        checkpoint.read(good)
