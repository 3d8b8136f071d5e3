"""Messages between the ranks of a CPU group. Transports move bytes in numbered calls and do not depend on experts."""
