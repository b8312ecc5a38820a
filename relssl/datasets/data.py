"""`Data`: the sets of images that a data set consists of."""

from dataclasses import dataclass

from relssl.datasets.images import Images


@dataclass
class Data:
    """The images that a method trains on, and the labelled ones that its features are evaluated on.

    Attributes:
        train: all images that are not test images.
        labelled: the labelled ones of them, preprocessed for evaluation; None if there are none.
        test: labelled test images; None if there are none.
        classes: names of the labels; empty if there are no labels.
        unlabelled: the unlabelled images of `train`, preprocessed for evaluation; None if there are none.
    """

    train: Images
    labelled: Images | None
    test: Images | None
    classes: list[str]
    unlabelled: Images | None = None

    @property
    def eval_train(self) -> Images:
        """Training images, preprocessed for evaluation: the labelled ones, or all if there are no labels."""
        images = self.unlabelled if self.labelled is None else self.labelled
        return self.train if images is None else images
