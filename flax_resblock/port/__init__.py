"""PyTorch modules as Flax NNX source code, with their weights and a proof."""
