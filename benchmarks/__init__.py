"""Measurements. Their results stand in `benchmarks/results/`, with the machine, the command and the date."""
