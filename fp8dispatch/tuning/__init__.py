"""Orders of backends measured on the user's own GPU: `fp8dispatch tune` and `fp8dispatch.tune`.

`shapes` reads what to measure, `timing` times and ranks, `measure` checks and times one size on the
tensors of `operands`, `store` keeps the results, `orders` looks them up for the router, `run` and
`command` are the face.
"""
