"""A generation request from its body to the last chunk of its reply.

In the order in which a request walks through them: `routes`, `schemas` (what the body may say; `options` has what it
may not, `problems` tells what is wrong), `prepare` (adapters and tokens), `generation` (the running sequences),
`reply_format` (what is sent). `tokens` shows a prompt's tokens without a reply.
"""
