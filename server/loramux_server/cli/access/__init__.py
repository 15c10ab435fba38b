"""`loramux keys`, `tenants` and `audit`: who may call, what they may take, and what they changed."""
