"""What can be set: flags, environment variables and files, as frozen dataclasses."""
