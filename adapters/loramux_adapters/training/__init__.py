"""QLoRA on the served base: examples in, a PEFT directory with card and scores out. Knows nothing of the server."""
