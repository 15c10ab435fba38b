"""LoRA adapters as artifact, as memory and as maths. Knows nothing of HTTP or of sequences."""
