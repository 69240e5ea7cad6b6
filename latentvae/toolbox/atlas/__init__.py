"""Features of images, groups and maps of them."""
