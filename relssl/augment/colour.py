"""Colour jitter as torchvision's ColorJitter computes it, in an order of its own for each image, and grey.

Images are float32 [B, W, 3, H] in levels, see `relssl.augment.resample`.
"""

import torch
from torch import Tensor

from relssl.augment.draw import floats

# Brightness, contrast and saturation change x to (1 + d) x + d (g grey + m mean grey), with a (1, g, m) each.
BLENDS = (1.0, 0.0, 0.0), (1.0, 0.0, -1.0), (1.0, -1.0, 0.0)
HUE = 3


def to_grey(images: Tensor, dim: int = 2) -> Tensor:
    """Computes the luma of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, along the channels' dimension."""
    red, green, blue = images.unbind(dim)
    return blue.lerp(red, 0.299 / 0.413).lerp(green, 0.587).unsqueeze(dim)


def jitter(images: Tensor, changes: Tensor, order: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue, and cuts off levels below 0 and above 255 each time.

    The hue is changed once, between three blends before it and three after it: a blend on the other side, or
    of an image that has none there, changes nothing.

    Args:
        changes: what is added to the factors of brightness, contrast and saturation, which are 1, and to the
            hue, in turns; [B, 4].
        order: when each of the four is applied, from 0 to 3, int64 [B, 4].
    """
    device = images.device
    # Eight places: 0 to 2 are before the hue, 5 to 7 after it.
    places = order[:, :HUE].add(order[:, :HUE] > order[:, HUE:], alpha=4)
    blends = changes[:, :HUE, None] * floats(BLENDS, device)
    places = places.unsqueeze(2).expand_as(blends)
    blends = floats(((1.0, 0.0, 0.0),) * 8, device).repeat(len(images), 1, 1).scatter_add_(1, places, blends)
    blends = blends.view(len(images), 8, 3, 1, 1, 1)
    for place in 0, 1, 2:
        images = _blend(images, blends[:, place])
    images = turn_hue(images, changes[:, HUE])
    for place in 5, 6, 7:
        images = _blend(images, blends[:, place])
    return images


def _blend(images: Tensor, coefficients: Tensor) -> Tensor:
    """coefficients: of the image, its grey and the mean of its grey, [B, 3, 1, 1, 1]."""
    own, grey_share, mean_share = coefficients.unbind(1)
    grey = to_grey(images)
    base = torch.addcmul(grey.mean((1, 2, 3), keepdim=True) * mean_share, grey, grey_share)
    return torch.addcmul(base, images, own).clamp_(0, 255)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of HSV, which is what rotates the colour circle.

    In sixths of a turn from red, a channel at angle a has the value v - c clamp(min(k, 4 - k), 0, 1) for
    k = (a + 6 hue) mod 6, where v is the largest channel, and c its distance to the smallest.
    """
    value, largest = images.max(2, keepdim=True)
    chroma = value - images.amin(2, keepdim=True)
    cycle = torch.cat((images, images[:, :, :2]), 2)
    hue = (cycle[:, :, 1:4] - cycle[:, :, 2:]).gather(2, largest)
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(largest, alpha=2)
    corners = floats(((5.0,), (3.0,), (1.0,)), images.device)
    k = (hue + torch.add(corners, turns.view(-1, 1, 1, 1), alpha=6)).remainder_(6)
    darker = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value, chroma, darker, value=-1)
