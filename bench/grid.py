"""The sizes: those that run by default, on two cores in minutes, and those that --full and a GPU add."""

from itertools import product

from machine import DEVICE
from peers import PEERS
from work import Case

SWEEP = (16_384, 65_536, 262_144)  # K, for the plots of time and memory

# The first is the one of reports and plots; then a large one; small batches, where a queue matters most; and
# one that needs no work.
SMALL = [
    Case("relation", 256, 65_536, 128),
    Case("relation", 256, 65_536, 128, grad=False),
    Case("relation", 1024, 65_536, 256),
    *(Case("relation", 64, size, 128) for size in SWEEP),
    Case("relation", 256, 4_096, 128),
    Case("relation", 8, 64, 32),
    Case("relation_ids", 64, 16_384, 128),
    Case("info_nce", 256, 65_536, 128),
    Case("in_queue", 256, 65_536, 128),
    Case("multi_crop", 64, 16_384, 128, views=5),  # ReSSL's five crops
    Case("nt_xent", 64, 0, 128),
    Case("nt_xent", 200, 0, 128),  # SACC's batch
    Case("nt_xent", 1024, 0, 128),
    Case("nt_xent_queue", 200, 65_536, 128),
    Case("sacc", 200, 0, 128, views=3),
]
# ReSSL's own on ImageNet, per GPU; few rows; 16 bits; a million rows.
LARGE = [
    Case("relation", 32, 131_072, 512),
    Case("relation", 4, 65_536, 128),
    Case("relation", 256, 65_536, 128, "bfloat16"),
    *(Case("relation", 64, size, 128) for size in (4_096, 1_048_576)),
    Case("relation", 256, 262_144, 128),
    Case("relation_ids", 256, 65_536, 128),
    Case("info_nce", 256, 262_144, 128),
    Case("multi_crop", 32, 131_072, 512, views=5),
    Case("nt_xent_queue", 200, 16_384, 128),
    *(Case("nt_xent_queue", 1024, size, 128) for size in (16_384, 65_536)),
]
# First the two of the plots, complete; then as many as the time allows.
GPU = [
    *(Case("relation", 256, size, 128, "bfloat16") for size in (65_536, 4_096, 16_384, 262_144, 1_048_576)),
    *(Case("relation", 1024, size, 128, "bfloat16") for size in (262_144, 65_536, 1_048_576)),
    Case("relation", 256, 65_536, 128, "bfloat16", grad=False),
    Case("relation", 256, 65_536, 128),
    Case("relation", 8, 64, 32, "bfloat16"),
    *(Case(work, 256, 65_536, 128, "bfloat16") for work in ("relation_ids", "info_nce", "in_queue")),
    Case("multi_crop", 256, 65_536, 128, "bfloat16", views=5),
    Case("nt_xent", 64, 0, 128, "bfloat16"),
    Case("nt_xent", 4096, 0, 128, "bfloat16"),
    Case("nt_xent_queue", 200, 65_536, 128, "bfloat16"),
    Case("sacc", 200, 0, 128, "bfloat16", views=3),
]
GPU += [
    case
    for rows, size, dim in product((256, 1024, 4096, 32), (65_536, 262_144, 1_048_576), (128, 256, 512))
    if (case := Case("relation", rows, size, dim, "bfloat16")) not in GPU
]
DEFAULT, MORE = (SMALL, LARGE) if DEVICE == "cpu" else (GPU, [])
# Peers that run only with --full: at the large size all but one, elsewhere those with eager code's work, and
# those that compile for long to little effect. relssl is timed with every peer.
ALIKE = {"relssl reference", "solo-learn"}
SLOW = {
    Case("relation", 256, 65_536, 128): {"relssl reference"},
    Case("relation", 256, 65_536, 128, grad=False): ALIKE | {"liger-kernel"},
    Case("relation", 1024, 65_536, 256): {*PEERS["relation"]} - {"eager"},
    **{Case("relation", 64, size, 128): ALIKE for size in SWEEP},
    Case("relation", 8, 64, 32): {"torch.compile", "liger-kernel"},
    Case("info_nce", 256, 65_536, 128): {"relssl reference"},
    Case("in_queue", 256, 65_536, 128): {"relssl reference"},
    Case("multi_crop", 64, 16_384, 128, views=5): {"relssl reference"},
    Case("nt_xent", 64, 0, 128): {"torch.compile"},
    # In the large grid they never run, nor in bfloat16 those that take 20 seconds a call, as eager code does
    # where the CPU lacks its instructions.
    **{case: ALIKE for case in LARGE},
    Case("relation", 256, 65_536, 128, "bfloat16"): ALIKE | {"torch.compile", "liger-kernel"},
}
