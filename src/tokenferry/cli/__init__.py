"""The command line, `tokenferry`: one small module a command."""
