"""What a pretrained backbone is worth: one evaluator per file."""
