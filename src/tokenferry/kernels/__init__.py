"""The kernels: one folder each, both halves side by side: spec.py (host) and kernel.cuh (device)."""
