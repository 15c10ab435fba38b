"""What `make gpu` measures in a process of its own each: `python -m loadtests gpu` starts these programs."""
