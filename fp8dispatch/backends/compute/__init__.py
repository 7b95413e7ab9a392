"""How the backends compute: the half of each that needs torch, under its backend's name.

A module here holds the methods that its backend in `fp8dispatch.backends` announces with
`computed_in`; their first parameter is the backend. It is imported at the first computation and may
import torch and the library at its top. What a backend declares and refuses does not belong here:
that must be readable where no torch is.
"""
