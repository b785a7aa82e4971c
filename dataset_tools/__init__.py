"""Offline: any image source → random access to encoded images, and later a verified data set on disk.

Needs the standard library, numpy and pillow only: a conversion machine has no torch.
"""
