"""Experts of a mixture-of-experts layer: many FP8 weights, and tokens that each go to one of them.

`matmul` holds the two calls. In both a weight is [E, N, K] and every row of the activations is
multiplied with the weight of one expert: `fp8_experts_batched` is told the expert of each row
(decode: few rows, any order), `fp8_experts_grouped` takes rows sorted by expert and where each
expert's rows end (prefill).
"""
