"""``flax-resblock demo``."""


def demo() -> int:
    """Placeholder."""
    return 0
