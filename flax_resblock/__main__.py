"""``python -m flax_resblock``."""

from flax_resblock.cli import main

if __name__ == "__main__":
    main()
