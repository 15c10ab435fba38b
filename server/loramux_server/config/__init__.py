"""What can be set: flags, environment variables and files, one frozen model for each command."""
