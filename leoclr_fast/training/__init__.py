"""Pretraining: the loop and its step."""
