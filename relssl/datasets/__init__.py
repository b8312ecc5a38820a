"""Data sets by name, as uint8 images [N, 3, H, W] that are indexed a batch at a time.

The methods augment the images, on the device of a batch; only the random crops of images that are read from
files are taken by the worker processes that read them.

    images.py    sets of images
    data.py      `Data`, the sets that a data set consists of
    sources.py   `load`: data sets by name
    arrays.py    the data set of an .npz file
    folder.py    the data set of a folder of image files
    items.py     images that a function opens one by one
    python.py    data sets from Python
    crops.py     the random crop of a view
    decode.py    one image file, or random crops of it
    loading.py   batches, read by worker processes
    on_device.py images in memory that lie on the training device
"""

from relssl.datasets.crops import Crop
from relssl.datasets.data import Data
from relssl.datasets.images import Arrays, ConcatImages, Images, IndexedSubset, Subset, evenly_spaced
from relssl.datasets.items import Items
from relssl.datasets.sources import load

__all__ = [
    "Arrays",
    "ConcatImages",
    "Crop",
    "Data",
    "Images",
    "IndexedSubset",
    "Items",
    "Subset",
    "evenly_spaced",
    "load",
]
