"""A generation request from its body to the last chunk of its reply.

In the order in which a request walks through them: `routes`, `schemas` (what the body may say), `prepare` (adapters and
tokens), `generation` (the running sequences), `reply_format` (what is sent).
"""
