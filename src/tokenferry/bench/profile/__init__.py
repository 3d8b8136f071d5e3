"""Who waits for whom: counters, timelines, and the verdict of tokenferry diagnose."""
