"""Measurements that the documentation quotes. Run one by `python -m benchmarks.<name>`."""
