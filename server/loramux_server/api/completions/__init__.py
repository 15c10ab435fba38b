"""A generation request from its body to the last chunk of its reply.

In the order in which a request walks through them: `routes`, `request` (what the body may say), `prepare` (adapters and
tokens), `running` (leases and sequences), `reply` (what is sent). `tokens` shows a prompt's tokens without a reply.
"""
