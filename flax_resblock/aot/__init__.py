"""What a TPU or CUDA compiler makes of a network, found out on a machine that has neither:
precision, memory, communication.

The compilers run on any CPU. :class:`~flax_resblock.aot.request.Request` says what to compile and
for what; :func:`~flax_resblock.aot.compiler.compile_ahead` compiles it in a child process and
returns :class:`~flax_resblock.aot.outcome.Outcome`, the facts."""
