"""Momentum contrast: encoders, queue, moving average, key order, and the methods LeOCLR and MoCo-v2."""
