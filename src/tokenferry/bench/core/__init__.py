"""What every measurement stands on: devices, sessions, clocks, inputs and their checks."""
