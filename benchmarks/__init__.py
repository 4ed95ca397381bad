"""Benchmarks: `python -m benchmarks`. Everything comes from a seed; nothing is downloaded."""
