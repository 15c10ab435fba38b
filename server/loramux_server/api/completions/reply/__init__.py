"""A generation's pieces -> the bytes of its reply, in OpenAI's JSON: one object, or a stream of events."""
