"""The version, where everything below the package root can read it."""

__version__ = "0.2.0"
