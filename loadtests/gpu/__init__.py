"""What a machine with a GPU is asked in one go: `make gpu`, or `python -m loadtests gpu`."""
