"""Flags of the smallest run that has every part: three steps an epoch on `tiny_data`, each of them logged."""

TINY_FLAGS = (
    "--batch-size=12",
    "--backbone.width-multiplier=0.0625",
    "--method.queue-size=40",
    "--method.projection-dim=8",
    "--method.key-batchnorm-group=4",
    "--views.image-size=16",
    "--monitor.knn-k=3",
    "--monitor.log-every-steps=1",
    "--device=cpu",
)
