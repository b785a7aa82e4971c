"""The method, its training, its evaluation and its command line."""
