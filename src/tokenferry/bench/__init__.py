"""Measuring: inputs whose answers are known, clocks, the limit of the same run, and reports."""
