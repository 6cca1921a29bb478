"""Finds out what a state dict is: its configuration, its naming scheme, what is assumed."""
