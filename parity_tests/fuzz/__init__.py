"""Mutated checkpoints and data sets: each must load exactly or be refused with one clear error.

    python -m parity_tests.fuzz [SECONDS] [--files N] [--category NAME] [--canary NAME]

``samples`` makes valid files. ``mutations`` changes them with knowledge of their formats, by
choices that hypothesis draws. ``targets`` opens them and compares what comes out. ``guard`` notices
code that runs, files outside the output folder, and memory beyond the limit. ``check`` combines
them into one hypothesis property. ``__main__`` lets atheris choose hypothesis's choices, guided by
coverage of this library's parsers, in processes that it starts again when a file crashes them."""
