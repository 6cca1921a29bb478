"""A damaged file is refused with one message or gives the bits that were written."""

import re
import subprocess
import sys

import numpy as np
import pytest

from flax_resblock import InputError, ResNetConfig, checkpoint, from_torch, load, save, to_torch
from flax_resblock.checkpoint.safetensors_file import write_safetensors
from parity_tests.support import random_bits

SMALL = ResNetConfig(depths=(1, 1), widths=(6, 10), stem="cifar", stem_width=4, num_classes=3)


def healthy():
    rng = np.random.default_rng(0)
    return {
        key: value if value.dtype == np.int64 else rng.random(value.shape, np.float32)
        for key, value in random_bits(SMALL, np.float32).items()
    }


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One bit flipped, eight bytes replaced or the end cut off; half of the time in the headers."""
    position = int(rng.integers(min(len(content), 3000 if rng.random() < 0.5 else len(content))))
    changed = bytearray(content)
    how = rng.integers(3)
    if how == 0:
        changed[position] ^= 1 << int(rng.integers(8))
    elif how == 1:
        changed[position : position + 8] = rng.bytes(8)[: len(content) - position]
    else:
        del changed[position:]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:.*carried as they are")
@pytest.mark.parametrize(
    ("name", "times", "has_digests"),
    [("net.safetensors", 150, True), ("net", 40, True), ("net.pth", 150, False)],
)
def test_damage_is_refused_or_harmless(name, times, has_digests, tmp_path):
    state = healthy()
    save(from_torch(state), tmp_path / name)
    files = sorted(
        p
        for p in [tmp_path / name, *(tmp_path / name).rglob("*")]
        if p.is_file() and p.stat().st_size
    )
    rng = np.random.default_rng(len(name))
    refused = 0
    for _ in range(times):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        file.write_bytes(damaged(content, rng))
        try:
            back = to_torch(load(tmp_path / name))
            assert not has_digests or all(
                back[key].tobytes() == value.tobytes() for key, value in state.items()
            )
        except InputError:
            refused += 1
        file.write_bytes(content)
    assert refused > times // 5
    assert all(
        to_torch(load(tmp_path / name))[key].tobytes() == value.tobytes()
        for key, value in state.items()
    )


def test_a_damaged_orbax_folder_gives_one_line_and_no_traceback(tmp_path):
    """Orbax reads all tensors at once; others must not fill the terminal when one fails."""
    save(from_torch(healthy()), tmp_path / "net")
    index = max((tmp_path / "net" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    code = "import sys; from flax_resblock.cli import run; sys.exit(run(['inspect', sys.argv[1]]))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"flax-resblock: .*net is not an Orbax checkpoint, or a damaged one \(.*\)\. Copy it "
        r"again\. Of its tensors, .* cannot be read\.\n",
        result.stderr,
    )


def test_other_reports_still_arrive():
    code = """
from flax_resblock.checkpoint import orbax_folder
orbax_folder._orbax()
class Fails:
    def __del__(self):
        raise RuntimeError("in a destructor")
Fails()
"""
    assert (
        "RuntimeError: in a destructor"
        in subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stderr
    )


def test_without_digests_a_flipped_bit_would_pass(tmp_path):
    """The negative control: it is the SHA-256 that notices."""
    state = healthy()
    write_safetensors(tmp_path / "net.safetensors", state, {})
    content = bytearray((tmp_path / "net.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "net.safetensors").write_bytes(content)
    back = checkpoint.read(tmp_path / "net.safetensors").tensors
    assert any(back[key].tobytes() != value.tobytes() for key, value in state.items())
