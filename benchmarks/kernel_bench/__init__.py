"""The parts of benchmarks/kernels.py: what is multiplied, by whom, how it is timed, and what is written down."""
