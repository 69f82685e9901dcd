"""From flags to the training loop. The only package whose functions take the parsed flags (`args`)."""
