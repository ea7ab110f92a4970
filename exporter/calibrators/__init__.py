"""Calibration: eager runs of the model, with torch, from which `exporter/calibration.py`'s numbers come."""
