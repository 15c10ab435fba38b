"""The API as it describes itself: OpenAPI, pages to read, the version."""
