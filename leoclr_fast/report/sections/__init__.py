"""The sections of a report: one a file, each made of run records and their labels."""
