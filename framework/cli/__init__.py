"""The commands; only here are lines printed and exit codes chosen."""
