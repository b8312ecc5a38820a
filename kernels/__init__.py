"""GPU kernels written in Triton (installed as relssl.kernels).

    lookup.py      forward: similarities, softmax and mean of a block of rows against a split of the queue
    specialised.py the same with specialised warps, a candidate for Hopper and later
    combine.py     splits merged, and the losses as epilogues of that
    vjp.py         backward through lse and mean
    pieces.py      what these share
    heuristics.py  tiles and splits: one table for each chip

relssl/backends/triton.py launches them.
"""
