"""How a CPU computes convolutions: the same sums as ``lax.conv_general_dilated``, as matrix
products that XLA's CPU backend is fast at.
"""
