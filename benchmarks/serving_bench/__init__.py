"""The parts of benchmarks/serving.py: who serves, what is asked, how it is timed, and what is written down."""
