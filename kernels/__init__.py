"""GPU kernels written in Triton (installed as relssl.kernels).

    forward.py     similarities, softmax and mean of a block of rows against a split of the queue
    specialised.py the same with specialised warps, a candidate for Hopper and later
    combine.py     splits merged, and the losses as epilogues of that
    backward.py    backward through lse and mean
    enqueue.py     a batch written into a queue, in one launch
    batch_norm.py  BatchNorm in parts of the batch
    common.py      what these share
    tiles.py       tiles: one table for each chip
    heuristics.py  the choice of tiles, and the splits of the queue

relssl/backends/triton.py launches them, relssl/enqueuing.py enqueue.py's, and
relssl/methods/batch_norm.py batch_norm.py's.
"""
