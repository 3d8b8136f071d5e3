"""Exchanges as torch users write them without tokenferry, measured in the same run."""
