"""Draws docs/idea.png: a queue on the circle, two queries, and what the relation loss compares."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

BLUE, ORANGE, GREY = "#1f5fa8", "#d9772b", "#b5b5b5"


def main() -> None:
    torch.manual_seed(4)
    queue = F.normalize(torch.randn(48, 2), dim=1)
    teacher, student = (torch.tensor([a]) for a in (0.9, 1.55))
    k, q = (torch.cat((a.cos(), a.sin())) for a in (teacher, student))
    p_t, p_s = ((queue @ x / tau).softmax(0) for x, tau in ((k, 0.04), (q, 0.1)))

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained", width_ratios=(1, 1.5))
    left.scatter(*queue.T, s=14, color=GREY)
    for p, color, x, name in ((p_t, BLUE, k, "k (teacher)"), (p_s, ORANGE, q, "q (student)")):
        left.scatter(*queue.T, s=900 * p, color=color, alpha=0.35, linewidths=0)
        left.annotate("", x, (0, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
        left.text(*(x * torch.tensor([1.5, 1.2])), name, color=color, ha="center")
        mean = p @ queue
        left.plot(*mean, marker="x", color=color, ms=9, mew=2)
    left.set(
        title="queue rows $m_j$ (dots) and\ntheir two weighted means $\\nabla A$ (crosses)",
        xlim=(-1.4, 1.6),
        ylim=(-1.2, 1.4),
    )
    left.set_aspect("equal")
    left.axis("off")

    order = torch.atan2(queue[:, 1], queue[:, 0]).argsort()
    at = torch.arange(len(queue))
    right.bar(at, p_t[order], color=BLUE, alpha=0.6, label="teacher $p_t$, temperature 0.04")
    right.bar(at, p_s[order], color=ORANGE, alpha=0.6, label="student $p_s$, temperature 0.1")
    right.set(xlabel="queue row, by angle", ylabel="probability")
    right.set_title("loss = KL$(p_t\\,\\|\\,p_s)$\ngradient of q = (orange cross minus blue cross) / 0.1")
    right.legend(frameon=False, loc="upper left")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
