"""Data sets and what brings them to the net. To add one: a file here, an import below, an overlay in configs/data."""

from segmentation.data.base import Sample, SegmentationData
from segmentation.data.datamodule import SegmentationDataModule
from segmentation.data.folder import FolderData
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.data.statistics import SplitStatistics
from segmentation.data.synthetic import ShapesData
from segmentation.data.torchvision_sets import TorchvisionData
