"""Plain reference modules that the Flax modules are held against. Imports torch alone."""

from torch_ref.block import Block
from torch_ref.blocks import BasicBlock, Bottleneck
from torch_ref.resnet import ResNet

__all__ = ["BasicBlock", "Block", "Bottleneck", "ResNet"]
