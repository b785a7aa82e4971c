"""Pretrained weights: read from runs and files with strict accounting, and written for other libraries."""
