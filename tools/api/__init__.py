"""SparseOcc in a program: ``SparseOccPredictor`` takes images and calibration and gives an ``Occupancy``."""

from .cameras import Frame
from .occupancy import Occupancy
from .predictor import SparseOccPredictor
from .stream import OccupancyStream

__all__ = ['Frame', 'Occupancy', 'OccupancyStream', 'SparseOccPredictor']
