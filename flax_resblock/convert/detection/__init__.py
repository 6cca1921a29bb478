"""Finds out what a state dict is: its configuration, its naming scheme, and what had to be
assumed.
"""
