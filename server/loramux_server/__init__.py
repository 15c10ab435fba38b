"""loramux: many LoRA adapters served over one resident NF4 base model."""
