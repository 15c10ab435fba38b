"""One server put together, started and stopped."""
