"""Using a trained model."""

from vitrail.inference.output import write_predictions
from vitrail.inference.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "write_predictions"]
