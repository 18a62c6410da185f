"""Benchmarks of annnet_kernels: speed and memory (``-m benchmarks``), compiled code (``-m benchmarks.codegen``)."""
