"""Times both frameworks with the same weights, batches and number of threads. Each runs in a
process of its own, and the processes take turns."""
