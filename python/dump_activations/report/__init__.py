"""A page that shows a dump: its metadata, boards, activations, attention and the model's moves.

`data` takes figures from the file, `sections` and `charts` turn them into what the templates show,
and `render` writes the page.
"""
