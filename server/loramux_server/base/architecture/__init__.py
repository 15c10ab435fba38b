"""What a checkpoint's config asks for, as a model that is served: which part of it, and what its weights are called."""
