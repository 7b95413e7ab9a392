"""Programmatic dependent launch: a kernel that starts while the one in front of it still runs.

The kernel in front says `launch_dependents`. Once every program of it has said so or ended, the
next kernel of the stream may start, if it was launched with that attribute. It calls
`wait_for_prerequisites`, which returns when the kernel in front has ended and all that it wrote can
be seen. Without the attribute a launch is ordinary and both calls do nothing.

What the next kernel does before it waits must rest on nothing that may still be written. Here that
is one thing: the decode kernel copies the weight. Safe, because

* the kernel in front is our quantiser, and the quantiser is launched without the attribute: it
  starts when everything before it in the stream has ended and can be seen, a write to the weight
  among it. When it says `launch_dependents`, it has started;
* nothing stands between the two launches;
* the decode kernel never says `launch_dependents`: whatever follows it, however launched, starts
  after its end.

Everything else, the scales of the weight included, is read after the wait, and nothing is written
before it: the call before may still use the workspace or the output.

Sources: the PTX ISA on ``griddepcontrol``; the CUDA programming guide on programmatic dependent
launch. Below capability 9.0 there is none.
"""

from __future__ import annotations

try:
    from triton.language.extra.cuda import gdc_launch_dependents as launch_dependents
    from triton.language.extra.cuda import gdc_wait as wait_for_prerequisites
except ImportError:  # a Triton that knows neither; no kernel asks for them there
    launch_dependents = wait_for_prerequisites = None

__all__ = ["launch_dependents", "wait_for_prerequisites"]
