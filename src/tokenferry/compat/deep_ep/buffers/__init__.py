"""The package of buffers in DeepEP 2, for the path `deep_ep.buffers.legacy.Buffer`."""
