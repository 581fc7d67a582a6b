"""How fast nce_ext is, as ratios to what PyTorch users would write otherwise, all measured in one run.

    python -m bench [--quick] [--output FILE.json]

runs everything and ends with a table; ``pytest bench`` runs the same benchmarks under pytest-benchmark's own options.
"""
