"""Online data layer: a data set on disk -> views on the device. One decode, one set of boxes, one augmentation."""
