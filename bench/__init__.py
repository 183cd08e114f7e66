"""Benchmarks: fitune beside other stacks, each measurement in a process of its own. See bench/README.md."""
