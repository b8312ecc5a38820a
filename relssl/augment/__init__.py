"""Random augmentations of batches of images, on their device, with parameters of its own for each image.

draw.py          random numbers in one draw
resample.py      weighted sums of rows
crop.py          random resized crops with flips
colour.py        colour jitter and grey
blur.py          Gaussian blur
randaugment.py   RandAugment
normalize.py     normalisation by channel
view.py          `View`, which composes them
"""

from relssl.augment.normalize import Normalize
from relssl.augment.randaugment import RandAugment
from relssl.augment.view import View, ViewParameters

__all__ = ["Normalize", "RandAugment", "View", "ViewParameters"]
