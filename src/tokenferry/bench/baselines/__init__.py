"""What torch users would write without tokenferry, measured in the same run."""
