"""What a GPU can do at most: the limits that the benchmarks on CUDA are stated against."""
