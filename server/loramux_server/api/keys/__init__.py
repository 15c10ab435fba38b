"""/v1/keys: who may call, managed by those who may say so."""
