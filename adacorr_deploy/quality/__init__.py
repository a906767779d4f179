"""Measuring: calibration, validation against PyTorch, image metrics, benches. Beside exporters, torch's only place."""
