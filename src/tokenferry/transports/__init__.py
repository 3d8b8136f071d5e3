"""Messages between the ranks of a CPU group. Transports move bytes in numbered calls, independently of experts."""
