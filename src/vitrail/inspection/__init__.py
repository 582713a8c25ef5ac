"""Looking into a trained model: attention, and the report page of a run."""
