"""Outputs are held against their certificate; a bad certificate is refused and kept."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from flax_resblock import checkpoint
from flax_resblock.cli import run
from flax_resblock.errors import InputError
from flax_resblock.parity.certificate import certificate_of, read_certificate, recheck
from parity_tests.support import flip, python
from parity_tests.test_certificate import PATH, convert, sha, write_network
from torch_ref import BasicBlock


@pytest.fixture(autouse=True)
def _a_network_is_there(folder):
    write_network()


def checked(out):
    """What is found of an output."""
    (check,) = recheck(certificate_of(Path(out)))
    return check


def test_one_flipped_bit_is_found_and_the_tensor_named(folder):
    convert("a.safetensors")
    content = Path("a.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:header_end])
    flip("a.safetensors", 8 * (header_end + header["layer2.0.conv2.weight"]["data_offsets"][0]))
    changed = checked("a.safetensors")
    assert (changed.output, changed.status) == ("a.safetensors", "changed")
    assert changed.details == (
        "file a.safetensors has another SHA-256",
        "tensor layer2.0.conv2.weight has changed",
    )


def test_one_flipped_bit_in_a_pth_is_found_and_the_tensor_named(folder):
    convert("a.pth", source="net.pth")
    needle = torch.load("a.pth", weights_only=True)["fc.weight"].numpy().tobytes()
    flip("a.pth", 8 * Path("a.pth").read_bytes().index(needle) + 17)
    check = checked("a.pth")
    assert check.status == "changed"
    assert check.details == ("file a.pth has another SHA-256", "tensor fc.weight has changed")


def test_a_change_in_an_orbax_folder_names_the_file(folder):
    convert("net_flax")
    largest = max(
        (p for p in Path("net_flax/").rglob("*") if p.is_file() and p.name != "parity.json"),
        key=lambda p: p.stat().st_size,
    )
    flip(largest, 4 * largest.stat().st_size)
    Path("net_flax/note.txt").write_text("mine")
    Path("net_flax/flax_resblock.json").unlink()
    check = checked("net_flax")
    assert check.status == "changed"
    assert check.details[:3] == tuple(
        sorted(
            [
                f"file {largest.relative_to('net_flax')} has another SHA-256",
                "file flax_resblock.json is gone",
                "file note.txt is new",
            ],
            key=lambda d: d.split()[1],
        )
    )
    assert all("tensor" in detail for detail in check.details[3:])
    assert len(check.details) > 3


def test_a_changed_tensor_in_a_rewritten_orbax_folder_is_named(folder):
    convert("net_flax")
    record = checkpoint.read("net_flax")
    tensors = {name: np.array(value) for name, value in record.tensors.items()}
    tensors["stage1.0.conv1.kernel"][1, 2, 3, 4] += 1e-3
    certificate = Path("net_flax/parity.json").read_text()
    checkpoint.write("net_flax", tensors, force=True)
    assert not Path("net_flax/parity.json").exists()  # a stale one does not stay
    Path("net_flax/parity.json").write_text(certificate)
    assert "tensor stage1.0.conv1.kernel has changed" in checked("net_flax").details
    assert not any("tensor stage2" in detail for detail in checked("net_flax").details)


def test_a_file_whose_tensors_are_as_they_were_is_told_from_one_with_others(folder):
    convert("a.safetensors")
    record = checkpoint.read("a.safetensors")
    safetensors.numpy.save_file(
        {key: np.array(value, order="C") for key, value in record.tensors.items()},
        "new.safetensors",
    )
    Path("new.safetensors").replace("a.safetensors")
    check = checked("a.safetensors")
    assert check.status == "changed"
    assert check.details[-1] == "every tensor is as it was; only the bytes around them differ"
    tensors = safetensors.numpy.load_file("a.safetensors")
    del tensors["fc.bias"]
    safetensors.numpy.save_file({**tensors, "more": np.ones(2)}, "a.safetensors")
    assert checked("a.safetensors").details[1:] == ("tensor fc.bias is gone", "tensor more is new")
    Path("a.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:50])
    assert "can no longer be read" in checked("a.safetensors").details[-1]


def test_a_bare_block_in_a_pth_is_certified_though_the_file_does_not_tell_its_stride(folder):
    torch.save(BasicBlock(4, 6, 2).state_dict(), "block.pth")
    assert run(["convert", "block.pth", "again.pth", "--stride", "2"]) == 0
    entry = read_certificate(certificate_of(Path("again.pth")))["again.pth"]
    assert entry["verification"]["passed"] is True
    assert checked("again.pth").status == "unchanged"


def test_a_renamed_output_is_missing(folder):
    out = "net.safetensors"
    convert(out)
    Path(out).rename("elsewhere")
    check = checked(out)
    assert (check.output, check.status) == (out, "missing")
    Path(out).mkdir()  # another thing under its name
    assert checked(out).status == "missing"
    Path(out).rmdir()
    Path("elsewhere").rename(out)
    assert checked(out).status == "unchanged"


def test_checking_needs_neither_framework(folder):
    convert("net.safetensors")
    convert("net_flax")
    flip("net.safetensors", -24)
    code = (
        "import sys; from pathlib import Path; from flax_resblock.parity.certificate import "
        "read_certificate, recheck\n"
        "found = recheck(Path('net.safetensors.parity.json')) + "
        "recheck(Path('net_flax/parity.json'))\n"
        "print([c.status for c in found], {'jax', 'torch', 'flax'} & set(sys.modules))"
    )
    result = python("-c", code, check=True)
    assert result.stdout.strip() == "['changed', 'unchanged'] set()"


def _entry(**changes):
    return {"output": {"sha256": "0" * 64}, "tensors": {}} | changes


def _certificate(outputs, **changes):
    return json.dumps(
        {"schema": 1, "kind": "flax-resblock certificate", "outputs": outputs} | changes
    )


BAD = {
    "no JSON": ("hello", "it is no JSON"),
    "not UTF-8": (b"\xff\xfe{}", "it is no JSON"),
    "nested too deeply": ("[" * 200_000, "it is no JSON"),
    "a list": ("[1, 2]", "its 'kind' is 'None'"),
    "another kind": (_certificate({}, kind="thesis"), "its 'kind' is 'thesis'"),
    "another schema": (
        _certificate({}, schema=2),
        "has schema '2'; this version of flax-resblock reads 1",
    ),
    "a schema that only equals 1": (_certificate({}, schema=True), "has schema 'True'"),
    "outputs missing": (_certificate(None), "'outputs' is no object"),
    "an absolute name": (
        _certificate({"/etc/passwd": _entry()}),
        "'/etc/passwd' is not the plain name",
    ),
    "a name above": (_certificate({"..": _entry()}), "'..' is not the plain name"),
    "a name below": (_certificate({"sub/x.pth": _entry()}), "is not the plain name"),
    "a name with a null": (_certificate({"a\0b": _entry()}), "is not the plain name"),
    "an absolute file": (
        _certificate({"x": _entry(output={"sha256": {"/etc/passwd": "0" * 64}})}),
        "'/etc/passwd' in the entry of 'x' leads out",
    ),
    "a file above": (
        _certificate({"x": _entry(output={"sha256": {"d/../../y": "0" * 64}})}),
        "leads out of its folder",
    ),
    "an entry that is no object": (_certificate({"x.pth": 7}), "lacks 'output' or 'tensors'"),
    "no digest": (_certificate({"x.pth": _entry(output={})}), "the SHA-256 of 'x.pth'"),
    "a digest that is none": (
        _certificate({"x.pth": _entry(tensors={"fc.bias": "0" * 63 + "g"})}),
        "the SHA-256 of 'fc.bias'",
    ),
}


def test_a_bad_certificate_gives_one_paragraph(folder):
    for content, message in BAD.values():
        PATH.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError) as error:
            recheck(PATH)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["no JSON", "a name above"])
def test_a_bad_certificate_is_never_replaced(case, folder, capsys):
    content, message = BAD[case]
    PATH.write_text(content)
    before = sorted(folder.iterdir())
    for flags in ([], ["--force"]):
        assert run(["convert", "net.pth", "out.safetensors", *flags]) == 2
        text = capsys.readouterr().err
        assert message in " ".join(text.split())
        assert "--no-certificate" in text
        assert sorted(folder.iterdir()) == before
    assert run(["convert", "net.pth", "out.safetensors", "--no-certificate"]) == 0
    assert PATH.read_text() == content


def test_an_absent_certificate_gives_one_paragraph(folder):
    with pytest.raises(InputError, match=r"does not exist\. A certificate is called OUTPUT\.par"):
        recheck(PATH)


def test_an_index_in_a_forged_certificate_leads_nowhere(folder):
    """An output is hashed as the certificate's kind, a file; what it names is not opened."""
    Path("secret").write_text("x")
    Path("deep").mkdir()
    Path("deep/a.index.json").write_text(json.dumps({"weight_map": {"t": "../secret"}}))
    Path("deep/parity.json").write_text(
        _certificate({"a.index.json": _entry(output={"sha256": sha("deep/a.index.json")})})
    )
    assert [check.status for check in recheck(Path("deep/parity.json"))] == ["unchanged"]
    Path("deep/a.index.json").write_text(json.dumps({"weight_map": {"t": "../../secret"}}))
    (check,) = recheck(Path("deep/parity.json"))
    assert check.status == "changed"
    assert "secret" not in "".join(check.details) or "not a plain file name" in "".join(
        check.details
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_certificate_that_cannot_be_read_is_left_alone(folder, capsys):
    convert("out.safetensors")
    PATH.chmod(0)
    assert run(["convert", "net.pth", "out.safetensors", "--force"]) == 2
    assert "cannot be read: Permission denied" in capsys.readouterr().err
