"""Object detection: Faster R-CNN R50-C4 fine-tuned from a pretrained backbone, as MoCo's detection protocol."""
