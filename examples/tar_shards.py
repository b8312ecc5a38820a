"""Trains on images in tar files of WebDataset's layout, read at random by their offsets.

    python examples/tar_shards.py              # writes shards of scikit-learn's digits to out/shards
    relssl train ressl --data examples/tar_shards.py:make --arch conv4 --bn-splits 1

A shard has KEY.png (or .jpg) and KEY.cls, the label in digits, side by side. The folder, out/shards or what
the environment variable SHARDS names, has train-*.tar and test-*.tar.
"""

import io
import os
import tarfile
from pathlib import Path

from relssl.datasets import Data, Items

FOLDER = Path(os.environ.get("SHARDS", "out/shards"))


def read(source: tuple[str, int, int]) -> bytes:
    path, offset, size = source
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def shards(pattern: str, size: int) -> Items:
    sources: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    for path in sorted(FOLDER.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{path} {folder} {stem}"
                place = (str(path), member.offset_data, member.size)
                if suffix == "cls":
                    labels[key] = int(read(place))
                elif suffix in ("png", "jpg", "jpeg"):
                    sources[key] = place
    return Items(list(sources.values()), [labels[key] for key in sources], size, read)


def make(size: int) -> Data:
    train, test = shards("train-*.tar", size), shards("test-*.tar", size)
    return Data(train, train, test, [str(digit) for digit in range(10)])


def write(folder: Path) -> None:
    """Writes scikit-learn's digits, 500 a shard, of which the last one is for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    for shard, start in enumerate(range(0, 1797, 500)):
        name = f"test-{shard}.tar" if start == 1500 else f"train-{shard}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for i in range(start, min(start + 500, 1797)):
                png = io.BytesIO()
                Image.fromarray((16 * digits.images[i]).clip(0, 255).astype("uint8")).save(png, "png")
                for suffix, content in ("png", png.getvalue()), ("cls", str(digits.target[i]).encode()):
                    member = tarfile.TarInfo(f"{i:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    write(FOLDER)
    print(f"{FOLDER}: {len(shards('train-*.tar', 16))} training images in shards")
