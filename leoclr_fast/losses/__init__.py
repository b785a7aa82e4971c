"""Contrastive losses: one door, several implementations."""
