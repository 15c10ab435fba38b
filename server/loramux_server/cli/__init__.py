"""The commands: they parse, call, print, and turn errors into one line and an exit code."""
