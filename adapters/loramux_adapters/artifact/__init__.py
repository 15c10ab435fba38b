"""An adapter as strangers send it: a PEFT directory or archive, read strictly, checked, and named by its digest."""
