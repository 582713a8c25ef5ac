"""How good a model is."""

from vitrail.evaluation.classify import evaluate, predict_dataset
from vitrail.evaluation.metrics import CalibrationBin, Outputs, Report, classification_report
from vitrail.evaluation.probing import probe

__all__ = ["CalibrationBin", "Outputs", "Report", "classification_report", "evaluate", "predict_dataset", "probe"]
