"""What a converted data set looks like on disk: manifest, sample records, and the two formats of the images."""
