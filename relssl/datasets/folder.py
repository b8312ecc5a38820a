"""The data set of a folder of image files, with or without labels."""

from functools import partial
from pathlib import Path

from relssl.datasets.data import Data
from relssl.datasets.images import Files

# Folders of ImageNet that the clustering literature uses under these names.
CLASSES = {
    "imagenet-10": """
        n02056570 n02085936 n02128757 n02690373 n02692877 n03095699 n04254680 n04285008 n04467665 n07747607
    """,
    "imagenet-dogs": """
        n02085936 n02086646 n02088238 n02091467 n02097130 n02099601 n02101388 n02101556 n02102177 n02105056
        n02105412 n02105855 n02107142 n02110958 n02112137
    """,
}


def class_names(classes: str) -> list[str] | None:
    """Returns the class folders of a name in CLASSES, or of a text file with one per line; None for all."""
    if not classes:
        return None
    if classes in CLASSES:
        return CLASSES[classes].split()
    if not Path(classes).is_file():
        raise FileNotFoundError(
            f"classes must be {', '.join(CLASSES)} or a text file of names; no file {classes}"
        )
    return [line.strip() for line in Path(classes).read_text().splitlines() if line.strip()]


def load_folder(root: Path, size: int, classes: list[str] | None) -> Data:
    """Loads root/train and root/val (or test), which have a folder per class, or images without labels.

    A train folder without class folders has no labels. Without a train folder, all images at any depth of
    root are training images without labels. A val (or test) folder without class folders is ignored.

    Indexing resizes each image, its shorter side to 8/7 of `size`, and cuts it to its central square, so that
    the images of a batch have one shape: `size`, as in ImageNet evaluation, or all of the shorter side in
    `Data.train`. The random crops of `Images.crop` are taken from whole images.
    """
    from relssl.datasets.torchvision_import import torchvision  # noqa: F401  isort: skip
    from torchvision.datasets.folder import (  # The first import makes this possible.
        IMG_EXTENSIONS,
        make_dataset,
    )

    from relssl.datasets.decode import read_crops, read_square

    train = root / "train"
    tests = [root / n for n in ("val", "test") if classes or _class_folders(root / n)]
    test = next((folder for folder in tests if folder.is_dir()), None)
    if not root.is_dir() or ((classes or test) and not train.is_dir()):
        raise FileNotFoundError(f"no folder {train if root.is_dir() else root}")
    labelled = bool(classes or _class_folders(train))
    folders = [folder for folder in (train if labelled else None, test) if folder]
    names = classes or sorted(set().union(*map(_class_folders, folders)))
    for folder in folders:
        missing = [n for n in names if not (folder / n).is_dir()]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise FileNotFoundError(f"no class folder {folder / missing[0]}{more}")

    labels = {name: label for label, name in enumerate(names)}
    side = round(size * 8 / 7)

    def files(folder: Path, labels: dict[str, int], crop: int) -> Files:
        try:
            samples = make_dataset(str(folder), labels, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no images in {root}: {error}") from error
        return Files(samples, partial(read_square, side=side, crop=crop), read_crops)

    test_files = files(test, labels, size) if test else None
    if labelled:
        return Data(files(train, labels, side), files(train, labels, size), test_files, names)
    images = train if train.is_dir() else root
    unlabelled = images.parent, {images.name: -1}
    return Data(files(*unlabelled, side), None, test_files, names, files(*unlabelled, size))


def _class_folders(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir() if f.is_dir()} if folder.is_dir() else set()
