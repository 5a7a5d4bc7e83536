"""The page of `specedit app`: drop a picture, paint what may change, say what to change.

`server.serving` starts it. Below it, `desk.Desk` is one person's work and knows nothing of the page, and
`models.Models` holds the pipelines, which run one edit at a time.
"""
