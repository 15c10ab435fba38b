"""Two checkouts of this project side by side: do they answer with the same bits, as fast, and start as soon."""
