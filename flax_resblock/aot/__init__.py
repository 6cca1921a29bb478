"""Compiles networks for TPUs and GPUs that are not present, and reports precision, memory and
communication of the compiled program.

The compilers run on any CPU. A :class:`~flax_resblock.aot.request.Request` says what to compile for
which chips; :func:`~flax_resblock.aot.compiler.compile_ahead` compiles it in a child process and
returns an :class:`~flax_resblock.aot.outcome.Outcome`."""
