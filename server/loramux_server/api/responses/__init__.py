"""POST /v1/responses: a translation onto the chat request and its generation; the client holds the conversation.

In the order in which a request walks through them: `routes`, `request` (what the body may say), `translate` (into a
chat request), `reply` (items, whole or as they grow), `events` (a stream of them).
"""
