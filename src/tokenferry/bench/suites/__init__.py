"""Measurements, one file for each family of calls."""
