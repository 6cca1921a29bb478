"""How a CPU computes convolutions, norms and max pooling: the same sums as XLA's own operations, as
matrix products and slices that XLA's CPU backend is fast at.

Only :mod:`flax_resblock.cpu.switch` may be imported at any time. All other modules need parts of
JAX that are not public; ``switch.forms`` imports them when a CPU first needs them, tries them, and
does without where this JAX lacks them.
"""
