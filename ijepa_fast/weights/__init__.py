"""Weights in files: of runs, of encoders, and in the forms of the official code, timm and Hugging Face."""
