"""Names and conventions of other projects, mapped onto `fp8_linear` and nothing else.

Code written for those projects runs here unchanged where their results were right; where they
were wrong (a dropped bias, a guessed block size, NaN from a block of zeros) these are right.
"""
