"""The package of buffers in DeepEP 2."""
