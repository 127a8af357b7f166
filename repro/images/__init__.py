"""Image data sets: the settings that name one, its images by number, and loaders of them."""
