"""The training demo: a small Mixture-of-Experts model over ranks, and the same in one process."""
