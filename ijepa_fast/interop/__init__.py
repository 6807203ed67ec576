"""Other trainers and model libraries: the official code, timm, Hugging Face transformers, Lightning.

Each module is imported by whoever wants it; none is loaded by the rest of the package.
"""
