"""Offline: any image source → random access to encoded images, and a verified data set on disk.

Needs the standard library, msgspec, numpy and pillow, and rich and tyro for its command line: a conversion machine has
no torch.
"""
