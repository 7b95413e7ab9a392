"""How the backends of expert matmuls compute: the half of each that needs torch, under its name.

As in `fp8dispatch.backends.compute`: a module holds the method that its backend announces with
`computed_in`, whose first parameter is the backend.
"""
