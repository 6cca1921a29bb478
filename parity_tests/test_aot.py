"""The precision certificate and the sharding proof, by the compilers of TPUs and GPUs that are not
there; and the command ``aot``.

Needs the compilers: ``make compilers``. Each target compiles everything in one child process, once.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from flax_resblock.aot import hlo
from flax_resblock.aot.compiler import compile_ahead, require_compiler
from flax_resblock.aot.memory import largest_batch, suggestions
from flax_resblock.aot.outcome import Outcome, findings
from flax_resblock.aot.program import lower
from flax_resblock.aot.request import Request, request_for
from flax_resblock.aot.sharding import differences, expected
from flax_resblock.aot.targets import TPUS
from flax_resblock.cli import run
from flax_resblock.config import BlockConfig, ResNetConfig, SlotKind, architecture, walk
from flax_resblock.errors import InputError, MissingDependencyError
from flax_resblock.parity.battery import BATTERY
from parity_tests.support import fast_only

TARGETS = ("tpu:v5e", "cuda:a100")
BLOCKS = {name: config for name, config in BATTERY.items() if isinstance(config, BlockConfig)}
PROJECTION = BlockConfig(in_channels=8, out_channels=16, stride=2)
NETWORK = ResNetConfig(depths=(1, 1), widths=(8, 16), stem="cifar", stem_width=8, num_classes=10)
SMALL = {"batch": 8, "height": 8, "width": 8}


@functools.cache
def missing(platform: str) -> str:
    """Why a platform's compiler cannot be used; empty where it can."""
    try:
        require_compiler(platform)
    except MissingDependencyError as error:
        return str(error)
    return ""


def skip_without(target: str) -> None:
    reason = missing(target.split(":")[0])
    if reason:
        pytest.skip(f"make compilers: {reason}")


def certified(target: str) -> dict[str, Request]:
    """Everything that is compiled for the certificate of a target."""
    strict = {
        f"{name}, {what}": request_for(config, target, what=what, **SMALL)
        for name, config in BLOCKS.items()
        for what in ("forward", "train-step")[name != "basic block" :]
    }
    return {
        **strict,
        "fast blur": request_for(
            replace(PROJECTION, antialias="blur"),
            target,
            what="train-step",
            precision="default",
            **SMALL,
        ),
        "fast": request_for(PROJECTION, target, what="train-step", precision="default", **SMALL),
        "between": request_for(PROJECTION, target, what="train-step", precision="high", **SMALL),
        "one lowered": request_for(
            PROJECTION, target, what="train-step", slot_precision=(("conv2", "default"),), **SMALL
        ),
        "network": request_for(NETWORK, target, slot_precision=(("head", "default"),), **SMALL),
        "bfloat16": request_for(PROJECTION, target, dtype="bfloat16", **SMALL),
    }


@functools.cache
def compiled(target: str) -> dict[str, tuple[Request, Outcome]]:
    requests = certified(target)
    outcomes = compile_ahead(list(requests.values()))
    return {
        name: (request, outcome)
        for (name, request), outcome in zip(requests.items(), outcomes, strict=True)
    }


def program_of(outcome: Outcome):
    assert outcome.program is not None
    return outcome.program


def sentences(request: Request, outcome: Outcome) -> list[str]:
    return [finding.sentence for finding in findings(request, program_of(outcome))]


def on_each_target(test):
    """Runs a slow test once per target; their compilations are shared."""
    return pytest.mark.slow(pytest.mark.parametrize("target", TARGETS)(test))


@on_each_target
def test_strict_mode_is_float32_everywhere(target):
    skip_without(target)
    for name, (request, outcome) in compiled(target).items():
        if name.rpartition(", ")[0] not in BLOCKS:
            continue
        assert sentences(request, outcome) == [], name
        products = program_of(outcome).products
        slots = [slot for slot in walk(request.config) if slot.shape]
        needed = {slot.name for slot in slots if slot.kind is SlotKind.CONV}
        directions = ("forward", "backward")[: 1 + (request.what == "train-step")]
        for direction in directions:
            found = {product.slot for product in products if product.direction == direction}
            # Attention and blurs are so small that a compiler may multiply and sum instead.
            assert needed <= found <= {slot.name for slot in slots}, name
        assert program_of(outcome).narrow == ()


@on_each_target
def test_one_lowered_convolution_breaks_the_certificate(target):
    skip_without(target)
    request, outcome = compiled(target)["one lowered"]
    assert sentences(request, outcome) == []  # it is what was asked for
    wrong = findings(request.but(slot_precision=()), program_of(outcome))
    lowered = {
        finding.sentence
        for finding in wrong
        if "has precision {default,default}, asked for was highest" in finding.sentence
    }
    assert {finding.slot for finding in wrong if finding.sentence in lowered} == {"conv2"}
    assert {sentence.split()[2] for sentence in lowered} == {"forward", "backward"}


@on_each_target
def test_fast_mode_is_exactly_what_was_asked_for(target):
    skip_without(target)
    for name in ("fast", "fast blur", "between", "network"):
        request, outcome = compiled(target)[name]
        assert sentences(request, outcome) == [], name
    request, outcome = compiled(target)["fast"]
    assert {product.precision for product in program_of(outcome).products} == {
        ("default", "default")
    }
    lowered = [
        finding
        for finding in findings(request.but(precision="highest"), program_of(outcome))
        if "asked for was highest" in finding.sentence
    ]
    assert {finding.slot for finding in lowered} == {"conv1", "conv2", "shortcut.conv"}
    real = "bfloat16" if target.startswith("tpu") else "TF32"
    assert all(finding.sentence.endswith(f"it runs in {real}") for finding in lowered)
    request, outcome = compiled(target)["network"]
    products = program_of(outcome).products
    fast = {product.slot for product in products if product.precision == ("default", "default")}
    assert fast == {"head"}
    request, outcome = compiled(target)["bfloat16"]
    assert {one.dtype for one in program_of(outcome).narrow} == {"bf16"}


TOPOLOGIES = {"one slice": ("tpu:v5e:2x2", 1), "two slices": ("tpu:v5e:2x2", 2)}


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_training_step_has_exactly_the_expected_all_reduces(topology):
    target, slices = TOPOLOGIES[topology]
    skip_without(target)
    networks = {
        "network": NETWORK,
        "pooled network": replace(NETWORK, shortcut="pooled", attention="se"),
        "attention": replace(PROJECTION, shortcut="zero_pad", attention="eca"),
        "bottleneck": replace(PROJECTION, kind="bottleneck", shortcut="pooled"),
    }
    options = {**SMALL, "batch": 16, "slices": slices, "what": "train-step"}
    if slices > 1:
        networks = {"pooled network": networks["pooled network"]}
    requests = {
        (name, mode): request_for(config, target, batch_norm=mode, **options)
        for name, config in networks.items()
        for mode in ("global", "replica")
    }
    outcomes = dict(zip(requests, compile_ahead(list(requests.values())), strict=True))
    for key, request in requests.items():
        assert outcomes[key].devices == 4 * slices
        assert differences(request, program_of(outcomes[key]), outcomes[key].devices) == [], key
    # Norms in a row: the stem's, two in each block. Each costs three all-reduces; the gradients
    # one.
    should = expected(NETWORK, "global")
    assert should.fewest == should.most == 5 * 3 + 1
    pooled = expected(networks["pooled network"], "global")
    assert (pooled.fewest, pooled.most) == (5 * 3 + 1, 6 * 3 + 1)
    assert expected(NETWORK, "replica").most == 1
    for name in networks:  # the negative control: the one is not the other
        assert (
            differences(requests[name, "replica"], program_of(outcomes[name, "global"]), 4 * slices)
            != []
        )
        assert (
            differences(requests[name, "global"], program_of(outcomes[name, "replica"]), 4 * slices)
            != []
        )


ATTENTIONS = ["none-branch", "se-branch", "eca-branch", "eca-sum"]


@pytest.mark.parametrize("option", fast_only(ATTENTIONS[1::2], ATTENTIONS))
def test_the_gradients_of_every_option_are_summed_once_over_the_devices(option):
    attention, place = option.split("-")
    """Compiled for four CPUs, with statistics of each device: exactly the expected values."""
    import jax

    told = {"attention": attention, "attention_place": place}
    config = replace(PROJECTION, shortcut="pooled", **told)
    options = {**SMALL, "what": "train-step", "batch_norm": "replica"}
    request = request_for(config, "tpu:v5e:2x2", **options)
    devices = jax.devices()[:4]
    program = hlo.read_hlo(lower(request, devices).compile().as_text())
    assert differences(request, program, len(devices)) == []
    other = replace(config, attention="none" if attention != "none" else "se")
    other = replace(other if place == "branch" else config, attention_place="branch")
    wrong = differences(request_for(other, "tpu:v5e:2x2", **options), program, len(devices))
    assert "values are summed over the devices" in wrong[0]


@pytest.mark.parametrize(
    ("config", "size"),
    [(architecture("resnet50d"), 224), (architecture("resnet20"), 32), (PROJECTION, 16)],
    ids=["deep stem", "CIFAR stem", "block"],
)
def test_images_have_the_usual_size_of_the_network(config, size):
    request = request_for(config, "tpu:v5e")
    assert (request.height, request.width) == (size, size)


@pytest.mark.slow
def test_inference_on_several_devices_communicates_nothing():
    skip_without("tpu:v5e")
    request, outcome = compiled("tpu:v5e")["basic block, forward"]
    assert outcome.devices == 4
    assert differences(request, program_of(outcome), 4) == []


@pytest.mark.slow
def test_slow_arithmetic_costs_cycles():
    skip_without("tpu:v5e")
    fast, between, strict = (
        program_of(compiled("tpu:v5e")[name][1]).cycles
        for name in ("fast", "between", "basic block, stride 2, train-step")
    )
    assert 0 < fast < between < strict


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_what_does_not_fit_is_refused_with_the_memory_that_there_is(chip):
    skip_without("tpu")
    request = request_for(architecture("resnet18"), f"tpu:{chip}", batch=2**19, precision="default")
    (outcome,) = compile_ahead([request])
    assert outcome.program is None
    assert not outcome.fits
    assert abs(outcome.capacity - TPUS[chip].memory) < 2**20
    assert outcome.needed > outcome.capacity


@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_does_not():
    skip_without("cuda")
    request = request_for(
        BLOCKS["basic block"], "cuda:a100", what="train-step", batch=8, height=512, width=512
    )
    found = largest_batch(request, lambda one: compile_ahead([one])[0])
    assert found.outcome is not None
    assert found.outcome.fits
    assert 0 < found.too_large - found.batch <= max(1, found.batch // 32)
    (larger,) = compile_ahead([request.but(batch=found.too_large)])
    assert not larger.fits
    # what is suggested where it does not fit does fit
    for suggestion in suggestions(request.but(batch=found.too_large), larger):
        (outcome,) = compile_ahead([request.but(batch=suggestion.batch, target=suggestion.target)])
        assert outcome.fits, suggestion


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu:v6e:1x1", "cuda:h100"])
def test_a_whole_network_is_float32_everywhere(target):
    """With the stem and the head of ImageNet's networks, and both kinds of shortcut."""
    skip_without(target)
    config = ResNetConfig(depths=(1, 2), widths=(8, 16), stem_width=8, num_classes=10)
    options = {"batch": 2, "height": 32, "width": 32, "what": "train-step"}
    request = request_for(config, target, **options)
    (outcome,) = compile_ahead([request])
    assert sentences(request, outcome) == []
    products = program_of(outcome).products
    slots = {
        slot.name for slot in walk(request.config) if slot.kind in (SlotKind.CONV, SlotKind.LINEAR)
    }
    for direction in ("forward", "backward"):
        assert {product.slot for product in products if product.direction == direction} == slots


@pytest.mark.slow
def test_the_command_reports_and_writes_json(tmp_path, capsys):
    skip_without("cuda")
    out = tmp_path / "aot.json"
    arguments = (
        "aot resnet20 --target cuda:a100 --batch 2 --compare precision=default "
        f"--json {out} --hlo {tmp_path / 'x.hlo'}"
    ).split()
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert "fits" in text
    assert "as asked for; no value narrower than float32" in text
    assert "TF32" in text
    first, second = json.loads(out.read_text())["programs"]
    assert first["problems"] == second["problems"] == []
    assert {tuple(product["precision"]) for product in first["program"]["products"]} == {
        ("highest", "highest")
    }
    assert {tuple(product["precision"]) for product in second["program"]["products"]} == {
        ("default", "default")
    }
    assert (tmp_path / "x.hlo").read_text().startswith("HloModule")


V5E = "resnet18 --target tpu:v5e"
BAD = {
    "unknown chip": ("resnet18 --target tpu:v9", "target 'tpu:v9' is unknown. Known: tpu:v4"),
    "wrong topology": (
        f"{V5E}:2x2x1",
        "'2x2x1' is no topology of a TPU v5e, which has 2 dimensions",
    ),
    "no number": ("resnet18 --target cuda:h100:many", "is no number of GPUs"),
    "slices of a GPU": ("resnet18 --target cuda:h100 --slices 2", "slices are TPU slices"),
    "no batch": (f"{V5E} --batch 0", "must be positive"),
    "no slot": (
        f"{V5E} --slot-precision stage9.conv=high",
        "there is no convolution or product at 'stage9.conv'",
    ),
    "no precision": (f"{V5E} --slot-precision head=low", "precision 'low' of head is unknown"),
    "no pair": (f"{V5E} --slot-precision head", "must be NAME=VALUE"),
    "nothing to compare": (f"{V5E} --compare colour=red", "'colour' cannot be changed"),
    "no choice": (f"{V5E} --compare precision=low", "choose from default, high, highest"),
    "no checkpoint": ("nothing.pth --target tpu:v5e", "nothing.pth does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_anything_is_compiled(case, capsys):
    line, words = BAD[case]
    assert run(["aot", *line.split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tpu:v5e:2x2 --batch 6", "a batch of 6 cannot be shared equally by the 4 devices"),
        ("tpu:v5e:3x5 --batch 15", "the compiler for tpu does not know tpu:v5e:3x5"),
    ],
)
@pytest.mark.slow
def test_what_only_the_compiler_knows_is_one_paragraph_too(line, words, capsys):
    skip_without("tpu")
    assert run(["aot", "resnet20", "--target", *line.split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("flax_resblock.aot.compiler._installed", lambda package: None)
    assert run(["aot", "resnet18", "--target", "tpu:v5e"]) == 2
    assert (
        "compiling for tpu needs libtpu, which is not installed: pip install --no-deps --target"
        in capsys.readouterr().err
    )
    assert run(["aot", "resnet18", "--target", "cuda:a100"]) == 2
    assert "jax-cuda12-plugin and jax-cuda12-pjrt" in capsys.readouterr().err


def test_a_compiler_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("flax_resblock.aot.compiler._installed", lambda package: "0.0.1")
    with pytest.raises(
        InputError, match=r"libtpu 0\.0\.1 does not belong to jax .*, which needs 0\.0\.\d+"
    ):
        require_compiler("tpu")
    with pytest.raises(InputError, match=r"jax-cuda12-plugin 0\.0\.1 does not belong to jax"):
        require_compiler("cuda")


@pytest.mark.slow
def test_a_request_is_compiled_once():
    skip_without("cuda")
    request = request_for(PROJECTION, "cuda:a100", **SMALL)
    (outcome,) = compile_ahead([request])
    assert compile_ahead([request])[0] is outcome


@pytest.mark.slow
def test_an_interrupt_ends_the_compilation_and_its_process(tmp_path):
    skip_without("tpu")
    flags = "--target tpu:v5e:1x1 --what train-step --batch 8"
    command = [sys.executable, "-m", "flax_resblock", "aot", "resnet50", *flags.split()]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    child = None
    deadline = time.monotonic() + 60
    while child is None and time.monotonic() < deadline:
        time.sleep(0.2)
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        child = int(found[0]) if found else None
    assert child is not None
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
