"""Formats that other libraries load: one per file, each written, and loaded back by the library it is for."""
