"""Hugging Face models and data, local training and evaluation; knows nothing of Flower."""
