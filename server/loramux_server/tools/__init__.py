"""Tools in a conversation: how a base's chat template has calls written, and calls read from a reply bit by bit."""
