"""Measuring: inputs whose results are known, clocks, the limit of the same run, and reports."""
