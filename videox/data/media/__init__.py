"""Media files: checks of containers, and decoding of clips and images into uint8 frames."""
