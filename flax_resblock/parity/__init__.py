"""Cross-framework verification: the same network in PyTorch and in Flax, slot by slot, judged by the float64 truth. Imports torch."""
