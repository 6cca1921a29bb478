"""The layers and networks, in public JAX and Flax only."""
