"""Trains on a data set of Hugging Face: pip install datasets, then

    relssl train ressl --data examples/hf_dataset.py:make --image-size 32 --arch conv4 --bn-splits 1

Here it is built from scikit-learn's digits, without a download; load_dataset("cifar10", split=...) has such
columns, too, called img and label.
"""

from functools import partial

import datasets
from PIL import Image
from sklearn.datasets import load_digits

from relssl.datasets import Data, Items


def load() -> datasets.DatasetDict:
    """Builds what load_dataset would return: images and labels, divided into train and test."""
    digits = load_digits()
    images = [Image.fromarray((16 * image).clip(0, 255).astype("uint8")) for image in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    columns = {"image": images, "label": digits.target}
    return datasets.Dataset.from_dict(columns, features=features).train_test_split(0.2, seed=0)


def read(split: datasets.Dataset, index: int) -> Image.Image:
    return split[index]["image"]


def make(size: int) -> Data:
    splits = load()
    train, test = (
        Items(range(len(split)), split["label"], size, partial(read, split))
        for split in (splits["train"], splits["test"])
    )
    return Data(train, train, test, splits["train"].features["label"].names)


if __name__ == "__main__":
    print(f"{len(make(16).train)} training images")
