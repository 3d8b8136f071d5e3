"""The training demo: a small Mixture-of-Experts model trained over ranks, and again in one process."""
