"""What the body of a generation request may say: strict, bounded, and every refusal names its parameter."""
