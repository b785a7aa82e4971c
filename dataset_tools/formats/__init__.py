"""What a converted data set looks like on disk: manifest, sample records, and the formats of the images."""
