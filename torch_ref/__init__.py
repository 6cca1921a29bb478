"""The PyTorch side: plain reference modules that the Flax modules are held against. Imports torch
and nothing else.
"""

from torch_ref.block import Block
from torch_ref.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["BasicBlock", "Block", "Bottleneck", "ResNet"]
