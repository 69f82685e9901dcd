"""From a model folder to loaded components; knows no model family by its class."""
