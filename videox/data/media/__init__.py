"""Media files: container checks, and decoding of clips and images into uint8 frames."""
