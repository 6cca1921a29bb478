"""Both frameworks side by side: the same weights, the same batches, equal threads, turn by turn,
each in a process of its own.
"""
