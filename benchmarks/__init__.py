"""Benchmarks: `python -m benchmarks.<name> --help`; committed figures are in `results/`."""
