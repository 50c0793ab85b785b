"""Single-device compute: each op with a naive reference beside it. Knows no process group."""
