"""GPU kernels written in Triton (installed as relssl.kernels).

    lookup.py      forward: similarities, softmax and mean of a block of rows against a split of the queue
    combine.py     splits merged, and the losses as epilogues of that
    vjp.py         backward through lse and mean
    pieces.py      what these share
    heuristics.py  tiles and splits: one table for each chip
    autotune.py    tiles by measurement, on request
    resources.py   what the compiler makes of it all, without a GPU

relssl/backends/triton.py launches them.
"""
