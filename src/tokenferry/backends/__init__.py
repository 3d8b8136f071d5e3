"""The backends: one package for each, behind the protocol in `base`."""
