"""Benchmarks of annnet_kernels: speed and memory (``python -m benchmarks``)."""
