"""Waits of ranks for one another: counters, timelines, and the verdict of tokenferry diagnose."""
