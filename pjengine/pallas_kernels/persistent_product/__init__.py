"""A product of many tokens whose tiles are two blocks of 128 columns: what kernels with their own epilogues share."""
