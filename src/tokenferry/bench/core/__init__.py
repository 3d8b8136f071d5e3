"""The base of every measurement: devices, sessions, clocks, inputs and checks."""
