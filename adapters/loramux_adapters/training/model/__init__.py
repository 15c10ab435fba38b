"""The frozen base with LoRA layers: forward, backward, and what is written of it."""
