"""DeepEP 2's folder of buffers."""
