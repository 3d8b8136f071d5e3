"""The command line, `tokenferry`: one module for each command."""
