"""Public benchmarks and result files."""
