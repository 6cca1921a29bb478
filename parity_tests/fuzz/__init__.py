"""Mutated checkpoints and data sets, by the ten thousand: every one must load exactly or be refused
with one clear error.

    python -m parity_tests.fuzz [SECONDS] [--engine structured|atheris] [--category NAME] [--seed N]

``samples`` makes valid files, ``mutations`` changes them with knowledge of their formats,
``targets`` opens them and judges what comes out, ``guard`` notices code that runs, files outside
the output folder and memory beyond the limit, ``worker`` does all that in a process of its own, and
``__main__`` watches the workers, restarts what hangs or crashes, keeps its input, and counts."""
