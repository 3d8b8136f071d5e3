"""Module path of DeepEP 2: `deep_ep.buffers.legacy.Buffer`."""
