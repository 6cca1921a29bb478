"""What the benchmark times, and the contestants that it compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Workload = Literal["train-step", "forward", "inference", "conversion"]
Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class BenchCase:
    """One computation to time.

    Attributes:
      what: ``"train-step"``: loss, gradients, SGD with momentum; ``"forward"``: evaluation mode,
        every layer as it is; ``"inference"``: each side's own preparation for inference, before the
        clock starts; ``"conversion"``: from a file to arrays on the device.
      architecture: A name of :func:`flax_resblock.architectures`, or ``"block"``: one residual
        block of 64 channels.
      image_size: Side of the square images (of the block: activations), in pixels; up to 64 the
        network has the stem for small images.
      precision: ``"float32"``: exact; ``"tf32"``: both sides may multiply in TF32; ``"bfloat16"``:
        weights in float32 and computation in bfloat16, as under PyTorch's autocast, in inference
        weights in bfloat16 too.
    """

    what: Workload
    architecture: str
    image_size: int
    batch: int
    classes: int = 10
    precision: Precision = "float32"

    @property
    def title(self) -> str:
        """``"train-step resnet18 32x32 batch 32"``."""
        title = f"{self.what} {self.architecture}"
        if self.what == "conversion":
            return title
        precision = "" if self.precision == "float32" else f" {self.precision}"
        return f"{title} {self.image_size}x{self.image_size} batch {self.batch}{precision}"


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
      how: The variant, as its worker understands it.
      flags: Of XLA.
      late: Whether it compiles when the others are ready, because it keeps the device busy.
    """

    name: str
    side: Literal["torch", "jax"]
    how: str
    flags: str = ""
    late: bool = False


EAGER = Contestant("PyTorch eager", "torch", "eager")
COMPILED = Contestant("torch.compile", "torch", "compile")
OURS = Contestant("flax-resblock", "jax", "auto")
PLAIN = Contestant("plain XLA", "jax", "xla")

CONTESTANTS: dict[Workload, tuple[Contestant, ...]] = {
    "train-step": (EAGER, COMPILED, OURS, PLAIN),
    "forward": (EAGER, COMPILED, OURS, PLAIN),
    "inference": (
        replace(EAGER, name="PyTorch eager, fused"),
        replace(COMPILED, name="torch.compile, frozen"),
        OURS,
        PLAIN,
    ),
    "conversion": (
        replace(EAGER, name="torch.load, load_state_dict"),
        OURS,
        Contestant("copy of the bytes", "jax", "copy"),
    ),
}
"""The others are compared with the first."""

QUICK = (BenchCase("train-step", "resnet18", 32, 32), BenchCase("inference", "resnet18", 32, 8))

FULL = (
    BenchCase("train-step", "resnet18", 32, 32),
    BenchCase("train-step", "resnet18", 32, 128),
    BenchCase("train-step", "resnet50", 224, 8),
    BenchCase("train-step", "block", 32, 32),
    BenchCase("forward", "resnet18", 32, 32),
    BenchCase("forward", "resnet50", 224, 8),
    BenchCase("forward", "block", 32, 32),
    *(
        BenchCase("inference", name, size, batch)
        for name, size in (("resnet18", 32), ("resnet50", 224))
        for batch in (1, 8, 32)
    ),
    BenchCase("conversion", "resnet50", 224, 1),
)
