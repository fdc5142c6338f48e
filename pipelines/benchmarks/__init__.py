"""Benchmarks: what is claimed of this software's speed, measured against something else in the same run."""
