"""Ports the convolutional networks of torchvision and timm, and writes what was measured.

    python -m parity_tests.zoo torchvision              # all convolutional classifiers
    python -m parity_tests.zoo all --jobs 8 --write

prints one line for each network: lines of source, layers, the largest errors, or why it is refused.
``--write`` brings its row of docs/ported/zoo.md up to date, and passes over what this code has
proved already. Exit status 1 if one is refused."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import flax_resblock
from flax_resblock import InputError
from flax_resblock.port.source import formatted
from parity_tests.families import import_timm
from parity_tests.support import REPOSITORY, import_torchvision

PAGE = REPOSITORY / "docs" / "ported" / "zoo.md"
FACTS = PAGE.with_suffix(".json")

PACKAGES = ("torchvision", "timm")
ATTENTION = ("vit", "swin", "maxvit")
"""Classifiers of torchvision that begin so are not convolutional."""

FAMILIES = """
    resnet10t resnet26d resnetaa50d resnetblur50 resnetrs50 seresnet33ts ecaresnet26t
    gcresnet33ts resnetv2_18 resnetv2_50x1_bit res2net50_48w_2s resnest14d selecsls42 dla34
    hrnet_w18_small nfnet_l0 nf_resnet26 dm_nfnet_f0 rexnet_100 repvgg_a0 mobileone_s0
    cspresnet50 cspdarknet53 darknet53 ese_vovnet19b_slim_dw vovnet39a ghostnet_050
    ghostnetv2_100 tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s
    tf_mobilenetv3_small_minimal_100 efficientnet_lite0 mobilenetv1_100 mobilenetv2_035
    mobilenetv4_conv_small_035 mobilenet_edgetpu_100 mnasnet_small semnasnet_075 spnasnet_100
    fbnetc_100 lcnet_035 lcnetv2_small tinynet_e hardcorenas_a regnetx_002 regnety_002
    regnetz_b16 convnext_atto convnextv2_atto legacy_senet154 legacy_seresnet18 skresnet18
    gernet_s legacy_xception xception41 inception_v3 inception_v4 inception_resnet_v2 dpn48b
    densenet121 vgg11_bn tresnet_m nasnetalarge pnasnet5large hgnet_tiny hgnetv2_b0
    fasternet_t0 repghostnet_050 repvit_m0_9 inception_next_atto starnet_s050 starnet_s1
    rdnet_tiny mambaout_femto poolformerv2_s12 fastvit_t8 convmixer_768_32 focalnet_tiny_srf
    cspnext_tiny edgenext_xx_small efficientvit_b0 mobilevit_xxs lambda_resnet26t
    visformer_tiny
"""
"""A small network of each family of timm that convolves, and some that mix it with attention."""

TITLE = """# Networks of torchvision and timm that port

Each number is the largest relative error of any tensor in float64, against the package's own
module on the same images: the output and every layer's output in evaluation mode and in training
mode (with auxiliary heads), the running statistics after a batch, every gradient with that of the
images, and weights and statistics after five steps of SGD with momentum. The limit is 1e-12, or
four times as much as PyTorch's own rounding moves a tensor if that is more; of the five steps it is
1e-10. The state dict returns bit for bit, and `load_state_dict(strict=True)` takes it. A dash: the
network has no such tensor, the steps were not run, or its lines were not formatted.

    python -m parity_tests.zoo torchvision mnasnet0_5            # prints the row
    python -m parity_tests.zoo all --jobs 8 --write              # brings this page up to date
"""
HEAD = ("network", "lines", "layers", "evaluation", "training", "statistics", "gradients", "steps",
        "with")  # fmt: skip
QUANTITIES = {
    "evaluation": ("evaluation output", "evaluation activations"),
    "training": ("training output", "training activations"),
    "statistics": ("training running statistics",),
    "gradients": ("training gradients", "training gradient of the input"),
    "steps": ("weights after 5 steps of SGD",),
}


def networks(package: str) -> list[str]:
    """The names of all convolutional classifiers of torchvision, small ones first, or of one of
    each family of timm."""
    if package == "timm":
        return FAMILIES.split()
    models = import_torchvision().models
    names = [one for one in models.list_models(module=models) if not one.startswith(ATTENTION)]
    return sorted(names, key=lambda one: models.get_model_weights(one).DEFAULT.meta["num_params"])


def built(package: str, name: str) -> torch.nn.Module:
    """A network with the weights that it starts with."""
    if package == "timm":
        return import_timm().create_model(name)
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(import_torchvision().models, name)(weights=None, **slow)


def row_of(package: str, name: str) -> list[str]:
    """Ports a network and returns what was measured, in the order of :data:`HEAD`.

    Raises:
      InputError: It is refused.
    """
    module = built(package, name)
    ported = flax_resblock.port(module, exact=True, origin=name)
    back = ported.to_torch(ported.create())
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in back.items()}
    state = module.state_dict()
    marked = OrderedDict(tensors)
    marked._metadata = state._metadata  # torch.save keeps it, and MNASNet asks for it
    module.load_state_dict(marked, strict=True)
    assert all(torch.equal(tensors[key], value) for key, value in state.items())
    figures: dict[str, Any] = {
        name.removeprefix("float64 "): figure for name, figure in ported.figures.items()
    }
    layers = figures.get("evaluation activations", {}).get("tensors", 0)
    lines = "-" if formatted("a=1") == "a=1" else len(ported.source.splitlines())  # no ruff
    row = [str(lines), str(layers)]
    for names in QUANTITIES.values():
        errors = [figures[one]["error"] for one in names if one in figures]
        row.append(f"{max(errors):.0e}" if errors else "-")
    assert "-" not in (row[2:4] + row[5:]), f"not all of {name} was compared: {ported.notes}"
    return row


def digest() -> str:
    """Of the code that a row is measured with."""
    library = REPOSITORY / "flax_resblock"
    files = [file for part in ("port", "nn", "parity") for file in (library / part).rglob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def versions(package: str) -> str:
    """Of the packages that a row is measured with."""
    module = import_torchvision() if package == "torchvision" else import_timm()
    found = {"jax": jax.__version__, "torch": torch.__version__, package: module.__version__}
    return ", ".join(f"{one} {number.partition('+')[0]}" for one, number in found.items())


def work(package: str, name: str, core: int | None, memory: int, results: Connection) -> None:
    """Sends the row of a network, or why there is none.

    Args:
      core: To compute on; None: on all. Threads of one process wait for each other where other
        processes keep the cores busy.
      memory: Bytes that it may fill. One that needs more ends without a row, and nothing else on
        the machine does.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.set_num_threads(1)
    if core is not None:
        os.sched_setaffinity(0, {core})
    about = {"code": digest(), "with": versions(package)}
    try:
        results.send({**about, "ported": " ".join(row_of(package, name))})
    except InputError as error:
        if " alloc" in str(error):  # memory ran out, which says nothing about the network
            raise
        why = str(error).partition("cannot be ported: ")[2] or str(error)
        results.send({**about, "refused": re.sub(r"/\S*/site-packages/", "", why)})


def measured(
    tasks: Sequence[tuple[str, str]], jobs: int, limit: float, within: float
) -> Iterator[tuple[str, str, float, dict[str, str]]]:
    """Ports networks in processes of their own.

    Args:
      tasks: Package and name of each.
      jobs: How many at once; each of several has a core of its own.
      limit: Seconds for each.
      within: Seconds for all; then those that still run are ended.
    Yields:
      Package, name, seconds and facts, in the order in which they end. The facts are empty of a
      network that takes longer than the limit or fills more than its share of the memory that is
      free, or whose process ends with an error of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parity_tests.families", "flax_resblock.port.porting"])
    cores = sorted(os.sched_getaffinity(0))
    free = int(re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[0])
    waiting, running = list(reversed(tasks)), dict[int, Any]()
    memory = free * 1024 // jobs
    end = time.monotonic() + within
    while (waiting or running) and time.monotonic() < end:
        for place in range(jobs):
            if waiting and place not in running:
                task = waiting.pop()
                results, sender = context.Pipe(duplex=False)
                core = cores[place % len(cores)] if jobs > 1 else None
                process = context.Process(
                    target=work, args=(*task, core, memory, sender), daemon=True
                )
                process.start()
                sender.close()
                running[place] = task, process, results, time.monotonic()
        wait([one[2] for one in running.values()], timeout=1)
        for place, (task, process, results, began) in list(running.items()):
            seconds = time.monotonic() - began
            if results.poll() or not process.is_alive() or seconds > limit:
                try:
                    facts = results.recv() if results.poll() else {}
                except EOFError:
                    facts = {}
                process.kill()
                process.join()
                del running[place]
                yield *task, seconds, facts
    for _, process, *_ in running.values():
        process.kill()


def main() -> int:
    """Ports the networks that were named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", choices=[*PACKAGES, "all", "merge"])
    parser.add_argument("names", nargs="*", help="of networks; of files to merge")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each network")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument("--again", action="store_true", help="also what this code has proved")
    parser.add_argument("--write", nargs="?", const=FACTS, type=Path, metavar="FILE",
                        help="write the results to FILE and the page beside it")  # fmt: skip
    options = parser.parse_args()
    facts = read(options.write or FACTS)
    if options.package == "merge":
        for file in options.names:
            for package, rows in read(Path(file)).items():
                facts.setdefault(package, {}).update(rows)
        write(facts, FACTS)
        return 0
    tasks, failed = [], False
    for package in PACKAGES if options.package == "all" else [options.package]:
        now = {"code": digest(), "with": versions(package)}
        for name in options.names or networks(package):
            row = facts.get(package, {}).get(name, {})
            if options.again or "ported" not in row or {**row, **now} != row:
                tasks.append((package, name))
    shown = read(FACTS)
    tasks.sort(key=lambda task: "ported" in shown.get(task[0], {}).get(task[1], {}))
    for package, name, seconds, row in measured(tasks, options.jobs, options.limit, options.within):
        told = row.get("ported") or f"refused: {row.get('refused', 'no result')}"
        print(f"{name:33}{seconds:5.0f} s  {told}", flush=True)
        failed |= "ported" not in row
        if options.write and row:
            facts.setdefault(package, {})[name] = row
            write(facts, options.write)
    return int(failed)


def read(file: Path) -> dict[str, Any]:
    """The facts in a file: by package and network, ``ported`` (its row) or ``refused`` (why),
    ``code`` and ``with``."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(facts: dict[str, Any], file: Path) -> None:
    """Brings a file of facts and the page beside it up to date."""
    file.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(page(facts), encoding="utf-8")


def page(facts: dict[str, Any]) -> str:
    """The page that shows the facts."""
    parts = [TITLE]
    for package, of in sorted(facts.items()):
        used = sorted({row["with"] for row in of.values()})
        told = "; ".join(f"{chr(97 + place)}: {one}" for place, one in enumerate(used))
        ported = [
            [name, *row["ported"].split(), chr(97 + used.index(row["with"]))]
            for name, row in sorted(of.items())
            if "ported" in row
        ]
        parts.append(f"## {package}: {len(ported)} ported\n\nWith {told}.\n")
        parts.append(table(HEAD, ported))
        refused = [
            [name, row["refused"].replace("|", "/")]
            for name, row in sorted(of.items())
            if "refused" in row
        ]
        if refused:
            parts += ["Refused, with what the command says:\n", table(("network", "why"), refused)]
    return "\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
