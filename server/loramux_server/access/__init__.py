"""Who may call: keys with their scopes, and the tenants that they belong to. Knows nothing of HTTP."""
