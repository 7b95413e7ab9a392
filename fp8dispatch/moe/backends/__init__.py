"""Ways to compute an expert matmul, one file each, behind `contract`; `registry` knows them."""
