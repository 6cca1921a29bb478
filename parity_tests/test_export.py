"""Exported networks equal their source, bit for bit, with and without this package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import venv
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_resblock import conv_lowering, create, load, save
from flax_resblock.cli import run
from flax_resblock.config import BlockConfig, ResNetConfig
from flax_resblock.errors import InputError
from flax_resblock.export.exported import MANIFEST, PROGRAM, WEIGHTS, open_exported
from flax_resblock.export.fold import fold_batch_norm, folding_error
from flax_resblock.export.stablehlo import export_model
from flax_resblock.nn.layers import NormLayer
from flax_resblock.nn.norm import BatchNorm
from flax_resblock.nn.resnet import build
from flax_resblock.parity.battery import BATTERY
from parity_tests.support import REPOSITORY, flip

SMALL = ResNetConfig(depths=(1, 1), widths=(8, 16), stem="cifar", stem_width=8, num_classes=10)


def randomised(model, seed=0):
    """The model in evaluation mode, with random statistics, scales and biases."""
    rng = np.random.default_rng(seed)
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, BatchNorm):
            for variable, values in (
                (norm.mean, rng.normal(0, 0.5, norm.num_features)),
                (norm.var, rng.uniform(0.3, 3, norm.num_features)),
                (norm.scale, rng.uniform(-1.5, 1.5, norm.num_features)),
                (norm.bias, rng.normal(0, 0.3, norm.num_features)),
            ):
                variable.set_value(jnp.asarray(values, jnp.float32))
    model.eval()
    return model


def images_for(*shape, seed=1):
    return np.random.default_rng(seed).normal(0.4, 1.3, shape).astype(np.float32)


def outputs_of(model, images):
    """As `predict` computes them."""
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images))


@pytest.fixture(scope="module")
def model():
    return randomised(build(SMALL, rngs=nnx.Rngs(3)))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "small.safetensors"
    save(model, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint):
    out = checkpoint.parent / "exported"
    assert run(["export", str(checkpoint), str(out)]) == 0
    return out


def test_an_exported_network_equals_its_source_bit_for_bit(model, exported):
    """XLA of jax 0.12 compiles a batch of one image differently where the batch is free."""
    for batch in (1, 3):
        images = images_for(batch, 32, 32, 3, seed=batch)
        found, expected = np.asarray(open_exported(exported)(images)), outputs_of(model, images)
        assert np.abs(found - expected).max() <= 2e-7 * np.abs(expected).max()
        if batch > 1 or jax.version.__version_info__ < (0, 12):
            assert found.tobytes() == expected.tobytes()
    assert found.std() > 0.1


OPTION_A = ResNetConfig(
    depths=(1, 1), widths=(8, 16), stem="cifar", stem_width=8, shortcut="zero_pad", num_classes=10
)
NETWORKS = {name: config for name, config in BATTERY.items() if isinstance(config, ResNetConfig)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, config in NETWORKS.items() if config.shortcut == "projection"]
)
def test_every_kind_of_network_survives_with_any_image_size(name, tmp_path):
    """The forms of a CPU are chosen by sizes, so a program for any size has XLA's own.

    With attention, XLA's program for any size differs in the last digits of float32: without it,
    the same network is exact.
    """
    config = NETWORKS[name]
    model = randomised(build(config, rngs=nnx.Rngs(4)))
    export_model(model, tmp_path / "x", image_size=None, platforms=["cpu"])
    exported = open_exported(tmp_path / "x")
    for size in ((40, 33), (37, 64)):
        images = images_for(2, *size, 3)
        with conv_lowering("xla"):
            expected = outputs_of(model, images)
        found = np.asarray(exported(images))
        if config.attention == "none":
            assert found.tobytes() == expected.tobytes()
        else:
            bound = 5e-7 * np.abs(expected).max()
            assert np.abs(found - expected).max() <= bound < np.abs(found[::-1] - expected).max()


@pytest.mark.slow
def test_zero_padded_shortcuts_are_exported_for_one_size(tmp_path):
    model = randomised(build(OPTION_A, rngs=nnx.Rngs(4)))
    with pytest.raises(InputError, match="is exported for one image size"):
        export_model(model, tmp_path / "x", image_size=None)
    export_model(model, tmp_path / "x", image_size=33, platforms=["cpu"])
    images = images_for(2, 33, 33, 3)
    found = np.asarray(open_exported(tmp_path / "x")(images)).tobytes()
    assert found == outputs_of(model, images).tobytes()


@pytest.mark.slow
def test_predict_takes_the_folder(checkpoint, exported, tmp_path, capsys):
    pixels = np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    for source, out in ((checkpoint, "a.npy"), (exported, "b.npy")):
        arguments = f"predict {source} {tmp_path / 'images.npz'} --exact --logits {tmp_path / out}"
        assert run(arguments.split()) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert "normalisation from the export" in capsys.readouterr().out


def test_recorded_constants_are_used(checkpoint, tmp_path):
    constants = "--mean 0.1 0.2 0.3 --std 0.5 0.6 0.7"
    exported, images = tmp_path / "x", tmp_path / "images.npz"
    assert run(f"export {checkpoint} {exported} --platforms cpu {constants}".split()) == 0
    np.savez(
        images, images=np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    )
    line = f"predict {checkpoint} {images} {constants} --exact --logits {tmp_path / 'a.npy'}"
    assert run(line.split()) == 0
    arguments = f"predict {tmp_path / 'x'} {tmp_path / 'images.npz'} --logits {tmp_path / 'b.npy'}"
    assert run(arguments.split()) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_the_manifest_says_what_is_needed(exported):
    manifest = json.loads((exported / MANIFEST).read_text())
    expected = {"shape": ["batch", 32, 32, 3], "dtype": "float32", "layout": "NHWC"}
    assert manifest["input"] == expected
    assert manifest["output"] == {"shape": ["batch", 10], "dtype": "float32"}
    assert manifest["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    assert manifest["versions"]["jax"] == version("jax")
    assert set(manifest["sha256"]) == {PROGRAM, WEIGHTS}
    text = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    assert all(f"`{field}`" in text for field in manifest)


@pytest.mark.parametrize("precision", ["highest", "high", "default"])
def test_the_precision_is_inside_the_program(model, precision, tmp_path):
    export_model(model, tmp_path / "x", image_size=32, precision=precision)
    text = open_exported(tmp_path / "x").program.mlir_module()
    found = re.findall(
        r"precision_config\s*=\s*\[([^\]]*)\]|precision\s*=\s*\[(\w+), (\w+)\]", text
    )
    words = {
        word for groups in found for word in re.findall(r"DEFAULT|HIGHEST|HIGH", " ".join(groups))
    }
    # the default is not spelled out
    assert words == ({precision.upper()} if precision != "default" else set())


def test_baked_weights_are_in_the_program_and_change_last_bits_at_most(model, tmp_path):
    export_model(model, tmp_path / "x", image_size=32, bake_weights=True)
    exported = open_exported(tmp_path / "x")
    assert exported.weights == {}
    images = images_for(3, 32, 32, 3)
    truth = outputs_of(model, images)
    np.testing.assert_allclose(
        np.asarray(exported(images)),
        truth,
        rtol=0,
        atol=16 * np.finfo(np.float32).eps * np.abs(truth).max(),
    )


def _norms(model):
    return {path for path, one in nnx.iter_modules(model) if isinstance(one, NormLayer)}


@pytest.mark.slow
@pytest.mark.parametrize("name", BATTERY)
def test_folding_is_no_worse_than_twice_the_unfolded_error(name):
    config = BATTERY[name]
    model = randomised(build(config, rngs=nnx.Rngs(5)), seed=5)
    before = _norms(model)
    folded = fold_batch_norm(model)
    inside = {path for path in before if path[0] != "stem"}
    follow_an_addition = {path for path in inside if path[-1] in ("norm1", "norm")}
    stay = before if config.norm == "group" else follow_an_addition if config.norm_first else set()
    assert _norms(folded) == stay
    assert _norms(model) == before  # the model itself keeps its norms
    errors = folding_error(model, folded, 33, batch=8)
    assert 0 < errors["folded"] <= 2 * errors["unfolded"]


@pytest.mark.parametrize("mistake", ["eps", "mean"])
def test_a_wrong_fold_is_far_outside(mistake):
    model = randomised(build(SMALL, rngs=nnx.Rngs(5)), seed=5)
    wrong = nnx.merge(*nnx.split(model), copy=True)
    if mistake == "eps":
        wrong.stem.norm.eps = 1e-3
    else:
        wrong.stage1[0].norm2.mean.set_value(jnp.zeros(8))
    errors = folding_error(model, fold_batch_norm(wrong), 33)
    assert errors["folded"] > 100 * errors["unfolded"]


def test_the_command_folds_and_states_the_error(checkpoint, tmp_path, capsys):
    arguments = f"export {checkpoint} {tmp_path / 'x'} --fold-batch-norm --platforms cpu"
    assert run(arguments.split()) == 0
    stated = re.search(r"error against float64 (\S+), unfolded (\S+) ", capsys.readouterr().out)
    assert stated is not None
    recorded = json.loads((tmp_path / "x" / MANIFEST).read_text())["batch_norm_folded"]
    assert float(stated[1]) == pytest.approx(recorded["folded"], rel=0.1)
    assert not [
        name
        for name in open_exported(tmp_path / "x").weights
        if name.endswith((".var", ".mean", ".scale"))
    ]


def test_a_norm_without_its_convolution_is_not_folded(model):
    broken = nnx.merge(*nnx.split(model), copy=True)
    broken.stage1[0].conv1 = broken.stage1[0].norm1
    with pytest.raises(InputError, match=r"the norm at stage1\.0\.norm1 follows no convolution"):
        fold_batch_norm(broken)


def test_float64_weights_are_refused(tmp_path):
    with jax.enable_x64(True):
        wide = build(
            BlockConfig(in_channels=4, out_channels=4), rngs=nnx.Rngs(0), param_dtype=jnp.float64
        )
        with pytest.raises(InputError, match="are float64"):
            export_model(wide, tmp_path / "x", image_size=16)


def damage_manifest(change):
    def damage(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def scramble_program(folder):
    import hashlib

    (folder / PROGRAM).write_bytes(b"no program" * 100)
    damage_manifest(
        lambda manifest: manifest["sha256"].update(
            {PROGRAM: hashlib.sha256(b"no program" * 100).hexdigest()}
        )
    )(folder)


DAMAGES = {
    "a future jax": (
        damage_manifest(
            lambda manifest: manifest.update(
                calling_convention_version=99, versions={"jax": "0.99.0"}
            )
        ),
        r"was written by a newer jax, 0\.99\.0 \(calling convention 99\).* install jax "
        r"0\.99\.0 or newer",
    ),
    "a jax of long ago": (
        damage_manifest(lambda manifest: manifest.update(calling_convention_version=1)),
        r"a much older jax.* export again",
    ),
    "another schema": (
        damage_manifest(lambda manifest: manifest.update(schema=7)),
        "another version of this library",
    ),
    "no manifest of ours": (
        damage_manifest(lambda manifest: manifest.update(format="?")),
        "is no manifest of an exported network",
    ),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
    "a flipped bit": (
        lambda folder: flip(folder / PROGRAM, 4001),
        r"model\.stablehlo is damaged: its SHA-256 differs",
    ),
    "a flipped weight": (
        lambda folder: flip(folder / WEIGHTS, -99),
        r"weights\.safetensors is damaged",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"weights\.safetensors is missing"),
    "a program that jax cannot read": (
        scramble_program,
        r"was written by jax \S+ and jax \S+ cannot read it",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_paragraph(case, exported, tmp_path, capsys):
    damage, words = DAMAGES[case]
    folder = tmp_path / "x"
    shutil.copytree(exported, folder)
    damage(folder)
    np.savez(
        tmp_path / "images.npz",
        images=np.random.default_rng(2).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8),
    )
    assert run(["predict", str(folder), str(tmp_path / "images.npz")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.strip().splitlines()) == 1


def test_bad_requests_are_refused(checkpoint, exported, tmp_path, capsys):
    x, aot = tmp_path / "x", f"aot {exported} --target tpu:v5e:1x1"
    for line, words in (
        (f"export {checkpoint} {exported}", "exists. Choose another name, or pass --force"),
        (
            f"export {checkpoint} {x} --platforms cpu,abacus",
            "platforms abacus: choose from cpu, cuda, rocm, tpu",
        ),
        (f"export {checkpoint} {x} --image-size 32 --any-image-size", "give one of them"),
        (f"export {checkpoint} {x} --image-size 0", "must be positive"),
        (f"export {tmp_path / 'none.pth'} {x}", "does not exist"),
        (f"{aot} --what train-step", "which can only run forward"),
        (f"{aot} --dtype bfloat16", "brings its own dtype and precision"),
    ):
        assert run(line.split()) == 2, line
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(
        InputError, match=r"takes images of shape \(batch, 32, 32, 3\); got \(2, 33, 32, 3\)"
    ):
        open_exported(exported)(images_for(2, 33, 32, 3))


def test_an_exported_folder_is_replaced_by_force_and_a_folder_of_ones_own_is_not(
    checkpoint, exported, tmp_path, capsys
):
    shutil.copytree(exported, tmp_path / "x")
    arguments = ["export", str(checkpoint), str(tmp_path / "x"), "--platforms", "cpu", "--force"]
    assert run(arguments) == 0
    assert open_exported(tmp_path / "x").manifest["platforms"] == ["cpu"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run(["export", str(checkpoint), str(tmp_path / "mine"), "--force"]) == 2
    assert "is not replaced" in capsys.readouterr().err


def test_a_platform_that_was_left_out_is_refused(checkpoint, tmp_path):
    assert run(["export", str(checkpoint), str(tmp_path / "x"), "--platforms", "tpu"]) == 0
    with pytest.raises(InputError, match="was exported for tpu; jax computes on cpu here"):
        open_exported(tmp_path / "x")(images_for(1, 32, 32, 3))


def loader() -> str:
    """The ten lines of the documentation."""
    (code,) = re.findall(
        r"```python\n(.*?)```",
        (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    return code


@pytest.mark.slow
def test_ten_lines_run_a_resnet18_in_a_fresh_environment(tmp_path):
    packages = ["jax", "jaxlib", "numpy", "safetensors", "flatbuffers"]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = [f"{package}=={version(package)}" for package in packages]
    install = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins],
        capture_output=True,
        text=True,
    )
    if install.returncode:
        pytest.skip(
            f"pip cannot install {' '.join(pins)}: {install.stderr.strip().splitlines()[-1]}"
        )
    there = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"^(flax|torch|optax|flax[-_]resblock)==", there, re.MULTILINE)
    save(
        randomised(create("resnet18", rngs=nnx.Rngs(7)), seed=7), tmp_path / "resnet18.safetensors"
    )
    arguments = [
        "export",
        str(tmp_path / "resnet18.safetensors"),
        str(tmp_path / "resnet18_exported"),
    ]
    assert run(arguments) == 0
    source = load(tmp_path / "resnet18.safetensors")
    for batch in (1, 7):
        images = images_for(batch, 224, 224, 3, seed=batch)
        np.save(tmp_path / "images.npy", images)
        code = f"{loader()}\nnp.save('logits.npy', logits)\n"
        environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
        subprocess.run([python, "-I", "-c", code], cwd=tmp_path, check=True, env=environment)
        found = np.load(tmp_path / "logits.npy")
        assert found.shape == (batch, 1000)
        assert found.tobytes() == outputs_of(source, images).tobytes()


@pytest.mark.slow
def test_an_exported_network_compiles_for_a_tpu_with_its_precision(exported, capsys):
    from parity_tests.test_aot import skip_without

    skip_without("tpu")
    assert run(["aot", str(exported), "--target", "tpu:v6e:1x1", "--batch", "7", "--slots"]) == 0
    text = capsys.readouterr().out
    assert "as asked for; no value narrower than float32" in text
    assert "stage2.0.shortcut.conv" in text
