"""Many pictures: rows are checked, edited one by one by a worker, and recorded so that a run can be resumed.

`specedit batch` and `specedit.integrations.ray` run these rows, in process or through Ray Data.
"""
