"""Load tests that speak to the server over HTTP only and import nothing of ours: `python -m loadtests --help`."""
