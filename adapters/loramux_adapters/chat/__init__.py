"""Messages -> tokens, in one way for serving, training and evaluation.

A chat template is untrusted code (`sandbox`); it says for itself which of its text is special (`own_text`), so what
users say never becomes a special token (`special_tokens`). `encoder` puts this together; `tokenizer_files` judges what
an adapter brings along.
"""
